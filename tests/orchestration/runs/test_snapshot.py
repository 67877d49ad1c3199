"""A snapshot is the file that safetensors would write."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from orchestration.runs.snapshot import DTYPES, Snapshot

SHAPES = st.lists(st.integers(0, 5), max_size=3)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


def tensor(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return torch.from_numpy(np.asarray(random.integers(0, 2, shape))).to(dtype)


@settings(deadline=None)
@given(
    kinds=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(DTYPES, key=str))), max_size=6),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_it_reads_back_as_what_was_taken_last(
    kinds: dict[str, tuple[list[int], torch.dtype]], seeds: list[int]
) -> None:
    snapshot = Snapshot()
    for seed in seeds:
        state = {name: tensor(shape, dtype, seed) for name, (shape, dtype) in kinds.items()}
        snapshot.take(state.items())
        snapshot.settle()
        found = load(bytes(snapshot.content))
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            assert torch.equal(found[name], value)


def test_it_is_byte_for_byte_the_librarys_file() -> None:
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3), "c": torch.tensor([True]), "d": torch.tensor(7)}
    snapshot = Snapshot()
    snapshot.take(state.items())
    assert bytes(snapshot.content) == save(state)


def test_what_is_taken_does_not_change_with_the_model() -> None:
    weight = torch.zeros(3)
    snapshot = Snapshot()
    snapshot.take([("weight", weight)])
    weight += 1
    assert torch.equal(load(bytes(snapshot.content))["weight"], torch.zeros(3))
    memory = snapshot.content
    snapshot.take([("weight", weight)])
    assert torch.equal(load(bytes(memory))["weight"], torch.ones(3))  # the same memory, filled again


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    state = {"empty": torch.zeros(0), "count": torch.tensor(2**62), "good": torch.full((4,), 3e38), "x": torch.zeros(9)}
    snapshot = Snapshot()
    snapshot.take(state.items())
    assert snapshot.not_finite() is None
    state["x"][5] = bad
    snapshot.take(state.items())
    assert snapshot.not_finite() == "x"
