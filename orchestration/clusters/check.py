"""Whether a cluster file does what it should, before a machine is rented: Ray's own checks, and what Ray does not see.

Ray validates the fields that it reads and passes the rest on: a wrong key in node_config fails in the cloud, a wrong
image when the nodes start, an open port never. Nothing here needs a network or an account.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestration.clusters.kuberay import kuberay_facts, kuberay_problems
from orchestration.clusters.launcher import launcher_facts, launcher_problems
from orchestration.clusters.rules import Config, placeholders


class ClusterFileError(Exception):
    """The file cannot be read as a cluster."""


@dataclass(frozen=True)
class Verdict:
    """What was found in a cluster file.

    Fields:
        problems: a sentence for each, with its place in the file, the value and the cure.
        right: what holds; empty unless there is no problem.
        open: what is left for the user to fill in.
    """

    problems: tuple[str, ...]
    right: tuple[str, ...]
    open: tuple[str, ...]


def check_cluster(path: Path) -> Verdict:
    """Checks a cluster file: of Ray's cluster launcher (AWS, GCP), or a manifest for KubeRay.

    Raises:
        ClusterFileError: there is no such file, or it is not YAML.
    """
    config = _read(path)
    of_kuberay = str(config.get("apiVersion", "")).startswith("ray.io/")
    problems = kuberay_problems(config) if of_kuberay else launcher_problems(config)
    found = tuple(dict.fromkeys(problems))  # one mistake may be met twice
    facts = kuberay_facts(config) if of_kuberay else launcher_facts(config)
    return Verdict(found, () if found else tuple(facts), tuple(placeholders(config)))


def _read(path: Path) -> Config:
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ClusterFileError(f"{path}: it cannot be read ({error.strerror}); name a file that is there") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ClusterFileError(f"{path}: this is not one YAML document ({said}); correct the file") from error
    if not isinstance(config, dict):
        raise ClusterFileError(
            f"{path}: the file is a {type(config).__name__}; write fields such as 'provider:' at top"
        )
    return config
