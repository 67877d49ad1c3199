"""Tells Ray when the cloud takes this machine back: nothing in Ray does.

    python -m orchestration.clusters.spot aws     # or gcp; beside `ray start` on every worker

It asks the machine's metadata service, and drains the node at a notice: ranks save and leave before the machine goes.
AWS gives two minutes, GCP half a minute. On Kubernetes `ray start` itself drains at the SIGTERM that a pod gets.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import urllib3

logger = logging.getLogger("spot")

POLL_SECONDS = 2.0
GCP_SECONDS = 30.0
"""From GCP's notice to the end of the machine."""
TOKEN_SECONDS = 21_600
"""That a token of AWS's metadata service is good for."""

AWS_ENDPOINT = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
GCP_HOST = ("GCE_METADATA_HOST", "metadata.google.internal")
"""Variables that the clouds' own libraries take the service's place from, and where it is."""


class MetadataError(Exception):
    """The metadata service does not answer as it should."""


@dataclass(frozen=True)
class Raylet:
    """Ray's process on this machine: its node, and the address of the cluster."""

    node_id: str
    gcs_address: str


class AwsNotices:
    """By IMDSv2 (docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html)."""

    def __init__(self) -> None:
        variable, usual = AWS_ENDPOINT
        self._service = os.environ.get(variable, usual).rstrip("/")
        self._token = ""

    def seconds_left(self) -> float | None:
        """Until the machine goes; None: there is no notice.

        Raises:
            MetadataError: the service does not answer, or not with a notice.
        """
        status, body = self._notice()
        if status == 401:  # the token is too old, or there is none yet
            self._token = self._new_token()
            status, body = self._notice()
        if status == 404:
            return None
        try:
            when = datetime.fromisoformat(json.loads(body)["time"])
            return (when - datetime.now(UTC)).total_seconds()
        except (KeyError, TypeError, ValueError) as error:
            raise MetadataError(f"{self._service}: {status} {body[:80]!r} is no notice") from error

    def _notice(self) -> tuple[int, str]:
        token = {"X-aws-ec2-metadata-token": self._token}
        return _answer("GET", f"{self._service}/latest/meta-data/spot/instance-action", token)

    def _new_token(self) -> str:
        lasting = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        status, body = _answer("PUT", f"{self._service}/latest/api/token", lasting)
        if status != 200:
            raise MetadataError(f"{self._service}: {status}, no token; allow IMDSv2 with a hop limit of 2")
        return body


class GcpNotices:
    """By the metadata server (cloud.google.com/compute/docs/instances/create-use-spot, "Handle preemption")."""

    def __init__(self) -> None:
        variable, usual = GCP_HOST
        self._service = f"http://{os.environ.get(variable, usual)}"

    def seconds_left(self) -> float | None:
        """As of `AwsNotices`."""
        url = f"{self._service}/computeMetadata/v1/instance/preempted"
        status, body = _answer("GET", url, {"Metadata-Flavor": "Google"})
        if status != 200 or body.strip() not in ("TRUE", "FALSE"):
            raise MetadataError(f"{self._service}: {status} {body[:80]!r} is neither TRUE nor FALSE")
        return GCP_SECONDS if body.strip() == "TRUE" else None


CLOUDS: dict[str, type[AwsNotices] | type[GcpNotices]] = {"aws": AwsNotices, "gcp": GcpNotices}


def watch(
    notices: AwsNotices | GcpNotices,
    drain: Callable[[float], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Waits for a notice, and drains; returns when Ray has heard of it, or the machine's time is over.

    Args:
        notices: of a cloud.
        drain: tells Ray how many seconds are left; raises RuntimeError where it cannot.
        sleep, now: a clock.
    """
    silent, end = False, None
    while True:
        try:
            left = notices.seconds_left() if end is None else end - now()
            silent = False
            if left is not None:
                end = now() + left
                if left <= 0:
                    return
                logger.warning("this machine is taken back in %.0f s; draining its node", left)
                drain(left)
                return
        except MetadataError as error:
            if not silent:
                logger.warning("no word from the metadata service, trying on: %s", error)
            silent = True
        except RuntimeError as error:
            logger.warning("Ray cannot be told, trying on: %s", error)
        sleep(POLL_SECONDS)


def drain_here(seconds: float) -> None:
    """Has Ray take this machine's node out of use until then.

    Raises:
        RuntimeError: no Ray runs here, or it does not accept.
    """
    raylet = find_raylet(list(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    if raylet is None:
        raise RuntimeError("no raylet runs on this machine")
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    command += ["--address", raylet.gcs_address, "--node-id", raylet.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes the machine back"]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 our own command
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip()[-500:])


def find_raylet(commands: Iterable[Sequence[str]]) -> Raylet | None:
    """The first raylet among processes, by their command lines."""
    for words in commands:
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        if words and words[0].endswith("/raylet") and {"--node_id", "--gcs-address"} <= options.keys():
            return Raylet(options["--node_id"], options["--gcs-address"])
    return None


def _answer(method: str, url: str, headers: dict[str, str]) -> tuple[int, str]:
    """(status, body) of a question to the machine's own service: no proxy is asked, nothing is redirected."""
    try:
        answer = urllib3.request(method, url, headers=headers, timeout=2.0, retries=False, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        raise MetadataError(f"{url}: {error}") from error
    return answer.status, answer.data.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m orchestration.clusters.spot", description=__doc__)
    parser.add_argument("cloud", choices=CLOUDS)
    cloud = parser.parse_args().cloud
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logger.info("watching for notices of %s", cloud)
    watch(CLOUDS[cloud](), drain_here)


if __name__ == "__main__":
    main()
