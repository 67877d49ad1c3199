"""The Ray that a run uses: the cluster it was submitted to, or one started here for as long as it lasts."""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from orchestration.recipe import state_home

SYSTEM = {"task_events_report_interval_ms": 0, "enable_metrics_collection": False, "event_stats": False}
"""Of a Ray that is started here, for one run: nobody is there who could ask for these."""


class NoRayError(Exception):
    """Ray does not start here, or does not answer there; the message says which, why, and what may help."""


@contextmanager
def ray_cluster(workers: int) -> Iterator[None]:
    """Connects to the cluster of $RAY_ADDRESS (set in every submitted job), or starts Ray on this machine, with room
    for so many workers.

    A Ray that is started here listens on loopback alone, and demands a token, kept in a file that only its owner can
    read.

    Raises:
        NoRayError: it does not start, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
    address = os.environ.get("RAY_ADDRESS")
    if address:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # tries to reach a head, of 40 seconds; Ray's are 20
    else:
        ours = os.environ.get("RAY_AUTH_MODE") == "token"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(state_home() / "ray-token"))
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "3600000")  # its agent's, of what nobody reads here
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's words for: no server on any other interface
        if "ray" in sys.modules and not ours:
            raise RuntimeError("ray was imported before slotforge could give it a token; import it afterwards")
    import ray
    from ray._private.utils import get_num_cpus  # knows containers' quotas, not taskset

    end = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            with _lean():
                ray.init(
                    address="local",
                    _node_ip_address="127.0.0.1",
                    num_cpus=max(min(int(get_num_cpus()), len(os.sched_getaffinity(0))), workers),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    object_store_memory=256 * 2**20,  # shards are read from files; Ray carries next to nothing
                    _system_config=SYSTEM,
                )
    except Exception as error:  # what Ray raises has no type of its own
        if address:
            raise NoRayError(f"RAY_ADDRESS: no Ray answers at {address} ({error}); start it, or unset it") from error
        raise NoRayError(f"Ray did not start ({error}); try again when the machine has less to do") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # Ray's own exits at once: a job that is stopped would save nothing
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _lean() -> Iterator[None]:
    """Ray without what one run on one machine has no use for: each of its processes takes its part of a core for good,
    and of the start. No server of telemetry (Ray starts one without a dashboard too), no follower of log files, no
    autoscaler, no metrics of Ray's own."""
    import ray._private.parameter
    import ray._private.services

    internal: Any = ray._private
    kept = internal.services.start_api_server, internal.parameter.RayParams
    internal.services.start_api_server = lambda *arguments, **options: (None, None)
    internal.parameter.RayParams = partial(kept[1], include_log_monitor=False, no_monitor=True)
    try:
        yield
    finally:
        internal.services.start_api_server, internal.parameter.RayParams = kept


def token_file(path: Path) -> Path:
    """The file of a Ray token, made if it is not there, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path
