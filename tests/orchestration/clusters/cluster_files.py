"""The project's cluster files, and mistakes to make in them."""

import re
from pathlib import Path
from typing import Any

import yaml

from orchestration.clusters.check import check_cluster

ROOT = Path(__file__).parents[3]
FILES = {"aws": ROOT / "cluster.yaml", "gcp": ROOT / "clusters/gcp.yaml", "k8s": ROOT / "clusters/kuberay-rayjob.yaml"}
NOTHING = object()  # the field is taken away


def load(name: str) -> Any:
    return yaml.safe_load(FILES[name].read_text())


def change(config: Any, place: str, value: Any) -> None:
    """Sets, or takes away, what stands at a place such as a.b[0].c; a value may be a function of the old one."""
    *way, last = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[|\]\.?", place) if part]
    for part in way:
        config = config[part]
    if value is NOTHING:
        del config[last]
    else:
        config[last] = value(config[last]) if callable(value) else value


def problems_of(config: Any, tmp_path: Path) -> list[str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return list(check_cluster(path).problems)


GPU, HEAD = "available_node_types.gpu-spot", "available_node_types.head"
