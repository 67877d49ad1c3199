"""What more workers would do: bytes against those that real process groups send, coefficients against made-up ones."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.engine import DeepSpeedEngine
from orchestration.planning.cost import ModelSize
from orchestration.planning.scaling import PERSISTENT, Network, Observation, ScalingModel, fitted, scales, wire
from orchestration.profiling.collectives import sent_by_ring, watched
from orchestration.profiling.profile import Traffic
from slot_models import SlotAutoencoder, build_autoencoder

STAGES = (0, 1, 2, 3)
WIDTHS = (16, 192)  # with 192 the GRU's weights are large ones
SIZE = ModelSize(300_000, 300_000, 0, tensors=40)
NETWORK = Network(1e9, 1e-5)


def build(width: int) -> SlotAutoencoder:
    return build_autoencoder(
        image_size=8,
        num_slots=3,
        slot_dim=width,
        encoder={"kind": "conv", "channels": 4, "strides": (2, 2)},
        decoder={"kind": "broadcast", "channels": 4, "layers": 1, "kernel": 3},
    )


def size_of(model: SlotAutoencoder) -> ModelSize:
    values = [parameter.numel() for parameter in model.parameters()]
    large = sum(value for value in values if value >= PERSISTENT)
    return ModelSize(sum(values), sum(values), 0, tensors=len(values), large=large)


def send(rank: int, world: int, folder: Path) -> None:
    """A step's collectives of each stage, width and number of micro batches; the second step, when all is set up."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    counted, seen = {}, []
    with watched(seen.append):
        for stage in STAGES:
            for width, micro_batches in ((16, 1), (16, 2), (192, 2)):
                engine = DeepSpeedEngine(build(width), micro_batches=micro_batches, zero_stage=stage, clip_norm=1.0)
                for _ in range(2):
                    seen.clear()
                    for _ in range(micro_batches):
                        images = torch.zeros(1, 3, 8, 8)
                        output = engine(images)
                        engine.backward(output.reconstruction.square().mean((1, 2, 3)), torch.ones(1))
                    engine.step(1e-3)
                counted[stage, width, micro_batches] = sum(seen, Traffic()).sent
    torch.save(counted, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # without Python's own end, in which a thread of gloo's that still holds an object aborts (seen once)


def test_the_bytes_of_every_stage_are_those_that_are_sent(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(send, args=(2, tmp_path), nprocs=2)
    for rank in range(2):
        counted = torch.load(tmp_path / f"{rank}.pt")
        assert len(counted) == 3 * len(STAGES)
        for (stage, width, micro_batches), sent in counted.items():
            size = size_of(build(width))
            expected = wire(size, stage, 2, micro_batches).sent
            more = 64 + 32 * size.tensors * (stage == 3)  # norms, and tensors that are padded to equal parts
            assert expected <= sent <= expected + more, (stage, width, micro_batches)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_ring_sends_what_the_formula_says(world: int) -> None:
    """By passing chunks round, as Patarasuk & Yuan (2009) do; every rank ends with the sum."""
    values = np.random.default_rng(0).normal(size=(world, world, 5))  # [rank, chunk, values of a chunk]
    whole, sent = values.sum(axis=0), np.zeros(world)
    held = values.copy()
    for turn in range(world - 1):
        for rank, chunk in [(rank, (rank - turn) % world) for rank in range(world)]:
            passed = held[rank, chunk].copy()
            held[(rank + 1) % world, chunk] += passed
            sent[rank] += passed.nbytes
    scattered = sent.copy()
    for turn in range(world - 1):
        for rank, chunk in [(rank, (rank + 1 - turn) % world) for rank in range(world)]:
            held[(rank + 1) % world, chunk] = held[rank, chunk]
            sent[rank] += held[rank, chunk].nbytes
    assert np.allclose(held, whole)
    assert sent.tolist() == [sent_by_ring("all_reduce", values[0].nbytes, world)] * world
    assert scattered.tolist() == [sent_by_ring("reduce_scatter_tensor", values[0].nbytes, world)] * world


@settings(deadline=None, max_examples=30)
@given(
    fixed=st.floats(1e-4, 1e-1),
    sample=st.floats(1e-4, 1e-1),
    byte=st.floats(1e-10, 1e-7),
    hop=st.floats(1e-6, 1e-3),
    stage=st.sampled_from(STAGES),
)
def test_small_runs_of_a_known_law_predict_large_ones(
    fixed: float, sample: float, byte: float, hop: float, stage: int
) -> None:
    law = ScalingModel(fixed, sample, byte, hop)
    shapes = [(1, 16), (1, 64), (2, 64), (3, 96), (4, 64), (8, 64)]
    runs = [Observation(w, b, law.step_seconds(SIZE, stage, w, b, 64), stage, 64) for w, b in shapes]
    model = fitted(SIZE, runs, NETWORK)
    for workers, batch in ((8, 512), (64, 64), (512, 32768)):
        expected = law.step_seconds(SIZE, stage, workers, batch, 64)
        assert model.step_seconds(SIZE, stage, workers, batch, 64) == pytest.approx(expected, rel=1e-2)


def test_what_no_run_has_shown_is_taken_of_the_network() -> None:
    model = fitted(SIZE, [Observation(1, 64, 0.64, 2, 64)], NETWORK)
    assert (model.fixed, model.sample) == pytest.approx((0, 0.01))
    assert (model.byte, model.hop) == (1e-9, 1e-5)
    step = model.step_seconds(SIZE, 2, 8, 512, 64)
    sends = wire(SIZE, 2, 8, 1)
    assert step == pytest.approx(0.64 + 1e-9 * sends.sent + 1e-5 * sends.hops)
    assert sends.sent == pytest.approx(3 * 4 * 300_000 * 7 / 8)


def test_scales_are_honest_about_small_batches_and_lost_time() -> None:
    model = ScalingModel(0.0, 0.001, 1e-9, 1e-4)
    found = scales(model, SIZE, 0, (1, 64, 512), batch_size=64, largest=64)
    assert [scale.fixed_batch is None for scale in found] == [False, False, True]
    assert found[0].efficiency == 1.0
    assert found[0].sent == 0
    assert found[0].grown_batch == pytest.approx(1000)
    assert 1 > found[1].efficiency > found[2].efficiency > 0
    assert found[1].fixed_batch < 64 * 1000  # a single sample each, and all the messages


@pytest.mark.parametrize("seconds", [[], [0.0]])
def test_a_fit_wants_times(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="seconds a step"):
        fitted(SIZE, [Observation(1, 64, value, 2, 64) for value in seconds], NETWORK)
