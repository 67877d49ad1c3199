"""What a cluster can hold is counted also while it is scaled to zero."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestration.clusters import capacity as capacities
from orchestration.clusters.capacity import Capacity, autoscaler_config, capacity, cpus_per_worker, use_gpu
from orchestration.clusters.local import autoscaler_config as local_config
from orchestration.recipe import Recipe, RecipeError, parse_recipe

ROOT = Path(__file__).parents[3]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


HEAD: dict[str, float] = {"node:__internal_head__": 1.0}


@pytest.mark.parametrize("name", ["cluster.yaml", "clusters/gcp.yaml"])
def test_a_cluster_scaled_to_zero_counts_what_it_can_become(name: str) -> None:
    """Eight machines of 8 CPUs and a GPU, spot or on demand, though both types allow eight."""
    assert capacity([HEAD], load(name)) == Capacity(cpus=64, gpus=8, largest=8)


def test_a_local_cluster_gives_each_rank_a_cpu() -> None:
    assert capacity([HEAD], local_config(3, 1, 1)) == Capacity(cpus=3, gpus=0, largest=1)


def test_a_cluster_that_does_not_scale_is_what_it_is() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}, HEAD]
    assert capacity(nodes, None) == Capacity(cpus=20, gpus=1, largest=16)
    assert capacity(nodes, local_config(3, 1, 1)) == Capacity(cpus=20, gpus=1, largest=16)


@given(
    most=st.integers(1, 5),
    kinds=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=3),
)
def test_the_count_is_that_of_the_best_choice_of_machines(most: int, kinds: list[tuple[int, int, int]]) -> None:
    config = {
        "max_workers": most,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 9, "GPU": 9}, "max_workers": 0},
            **{
                f"kind{i}": {"resources": {"CPU": cpus, "GPU": gpus}, "max_workers": count}
                for i, (count, cpus, gpus) in enumerate(kinds)
            },
        },
    }
    machines = [(cpus, gpus) for count, cpus, gpus in kinds for _ in range(count)]
    choices = [choice for size in range(min(most, len(machines)) + 1) for choice in combinations(machines, size)]
    found = capacity([], config)
    assert found.cpus == max(sum(cpus for cpus, _ in choice) for choice in choices)
    assert found.gpus == max(sum(gpus for _, gpus in choice) for choice in choices)


def with_workers(recipe: Recipe, most: int, device: str = "auto") -> Recipe:
    fields = recipe.model_dump(mode="json")
    fields["parallel"] |= {"workers": {"min": 1, "max": most}, "device": device}
    return parse_recipe(fields)


@pytest.mark.parametrize(
    ("has", "workers", "threads"),
    [
        (Capacity(64, 8, 8), 4, 8),  # a node each, not two
        (Capacity(64, 8, 8), 8, 8),
        (Capacity(64, 8, 8), 16, 4),
        (Capacity(3, 0, 1), 2, 1),
        (Capacity(0, 0, 0), 2, 1),  # nothing is known: one CPU fits everywhere
    ],
)
def test_ranks_share_the_cores_that_there_will_be(
    recipe: Recipe, has: Capacity, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacities, "cluster_capacity", lambda: has)
    assert cpus_per_worker(with_workers(recipe, workers)) == threads


def test_auto_is_a_gpu_where_there_will_be_one(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, gpu in ((Capacity(64, 8, 8), True), (Capacity(3, 0, 1), False)):
        monkeypatch.setattr(capacities, "cluster_capacity", lambda has=has: has)
        assert use_gpu(with_workers(recipe, 2)) is gpu
        assert use_gpu(with_workers(recipe, 2, "gpu")) and not use_gpu(with_workers(recipe, 2, "cpu"))
    monkeypatch.setattr(capacities, "cluster_capacity", lambda: Capacity(0, 0, 0))
    with pytest.raises(RecipeError, match=r"parallel\.device: auto"):
        use_gpu(with_workers(recipe, 2))


def test_the_autoscaler_beside_a_driver_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text("max_workers: 3")
    monitor = ["python", "-u", "/ray/autoscaler/v2/monitor.py", "--gcs-address=10.0.0.1:6379"]
    others = [["python", "train.py", f"--autoscaling-config={path}"], [], [*monitor[:3], "--gcs-address=10.0.0.2:6379"]]
    assert autoscaler_config("10.0.0.1:6379", [*others, [*monitor, f"--autoscaling-config={path}"]]) == {
        "max_workers": 3
    }
    assert autoscaler_config("10.0.0.1:6379", [*others, monitor]) is None  # a head that scales nothing
    assert autoscaler_config("10.0.0.3:6379", [[*monitor, f"--autoscaling-config={path}"]]) is None
