"""DeepSpeed's stages against a plain torch loop, at several world sizes, in real process groups over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestration.engine import DeepSpeedEngine, Engine, PlainEngine, Precision, emulation
from pipelines import micro_batches
from slot_models import SlotAutoencoder, Stage, build_autoencoder

BATCH = 13  # a prime: slices are uneven and micro batches are padded
SLOTS, DIM, SIZE = 4, 16, 12
BREAK, END = 4, 7
# At first the gate has no gradient: ZeRO-3 would repeat a stale one.
STAGES: tuple[Stage, ...] = ("open", "random", "deciding")
LEARNING_RATE = 1e-2


Curve = list[tuple[float, float, float]]
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"attention": {"kind": "slots", "hidden_dim": 16}, "gate": {}},
    "demo": {
        "attention": {"kind": "slots", "hidden_dim": 16, "initial": "per_slot", "gradient": "bilevel"},
        "gate": {"gradient": "difference", "exploration": 0.05},
    },
    "codebook": {
        "attention": {"kind": "heads", "heads": 2, "dim_head": 8, "hidden_dim": 16, "gradient": "bilevel"},
        "codebook": {"size": 8, "commitment": 0.1},
    },
}
# A run for each (stage, variant): all variants meet a stage that shards nothing but gradients and one that shards all.
RUNS = [(0, "published"), (1, "demo"), (2, "published"), (3, "demo"), (1, "codebook"), (3, "codebook")]
each_run = pytest.mark.parametrize("number", range(len(RUNS)), ids=[f"{stage}-{variant}" for stage, variant in RUNS])
FIXED = ("encoder.position.weight", "encoder.position.bias")
CODES = ("slot_attention.codebook.codes", "slot_attention.codebook.counts")


def build(variant: str) -> SlotAutoencoder:
    torch.manual_seed(0)
    model = build_autoencoder(
        image_size=SIZE,
        num_slots=SLOTS,
        slot_dim=DIM,
        encoder={"kind": "conv", "channels": 8, "strides": (2, 1), "padding": "centred"},
        decoder={"kind": "broadcast", "channels": 8, "layers": 2, "kernel": 3},
        **VARIANTS[variant],
    )
    if variant == "codebook":  # and a part that is not trained, as a frozen backbone is
        model.encoder.position.requires_grad_(False)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator) * 2 - 1
    slots = torch.randn(BATCH, SLOTS, DIM, generator=generator)
    gate = -torch.rand(BATCH, SLOTS, 2, generator=generator).log().neg().log()
    return images, slots, gate


def run(engine: Engine, first: int, last: int, largest: int = 3) -> Curve:
    """Loss and gradient norm of steps, each rank on its slice in padded micro batches, and an evaluation after each."""
    accumulation, size = micro_batches(BATCH, engine.world, largest)
    low, high = engine.rank * BATCH // engine.world, (engine.rank + 1) * BATCH // engine.world
    places = list(range(low, high))
    weights = [1.0] * len(places)
    places += [low] * (accumulation * size - len(places))
    weights += [0.0] * (len(places) - len(weights))
    curve = []
    for step in range(first, last):
        images, slots, gate = batch(step)
        total, tally = torch.zeros(1), None
        for start in range(0, len(places), size):
            chosen = torch.tensor(places[start : start + size])
            real = torch.tensor(weights[start : start + size])
            share = real / BATCH
            output = engine(images[chosen], slots[chosen], gate[chosen], weight=real, stage=STAGES[min(step, 2)])
            loss = (output.reconstruction - images[chosen]).square().mean((1, 2, 3)) + 0.05 * output.keep.mean(1)
            loss = loss + output.auxiliary
            if output.code_tally is not None:
                tally = output.code_tally if tally is None else tally + output.code_tally
            total += (loss * share).sum().detach()
            engine.backward(loss, share)
        engine.step(LEARNING_RATE)
        if tally is not None:
            engine.module.move_codes(engine.sum(tally))
        error = (engine.evaluate(images).reconstruction - images).square().mean()
        curve.append((float(engine.sum(total)), engine.gradient_norm(), float(error)))
    return curve


def plain(variant: str, largest: int) -> tuple[Curve, dict[str, dict[str, Tensor]]]:
    engine = PlainEngine(build(variant), clip_norm=0.5)
    return run(engine, 0, END, largest), dict(engine.named_state(owned=False))


def deepspeed(world: int, stage: int, module: SlotAutoencoder, precision: Precision = "fp32") -> DeepSpeedEngine:
    accumulation = micro_batches(BATCH, world, 3)[0]
    return DeepSpeedEngine(module, micro_batches=accumulation, zero_stage=stage, clip_norm=0.5, precision=precision)


def resumed(world: int, stage: int, variant: str, state: dict[str, dict[str, Tensor]]) -> DeepSpeedEngine:
    module = build(variant)
    module.load_state_dict({name: tensors["weight"] for name, tensors in state.items()})
    engine = deepspeed(world, stage, module)
    engine.load_moments(state, BREAK)
    return engine


def train_all(rank: int, world: int, folder: Path) -> None:
    for number, (stage, variant) in enumerate(RUNS):
        engine = deepspeed(world, stage, build(variant))
        before = run(engine, 0, BREAK)
        state = dict(engine.named_state(owned=False))
        owned = [name for name, _ in engine.named_state(owned=True)]
        after = run(engine, BREAK, END)
        final = dict(engine.named_state(owned=False))
        again = run(resumed(world, stage, variant, state), BREAK, END)
        elsewhere = run(resumed(world, (stage + 1) % 4, variant, state), BREAK, END)
        facts = {"curve": before + after, "again": again, "elsewhere": elsewhere, "state": state, "final": final}
        torch.save({**facts, "owned": owned}, folder / f"run-{number}-rank-{rank}.pt")
    torch.save(run(deepspeed(world, 2, build("published"), "bf16"), 0, 5), folder / f"bf16-rank-{rank}.pt")


def resume_all(rank: int, world: int, folder: Path) -> None:
    for number, (stage, variant) in enumerate(RUNS):
        state = torch.load(folder / f"run-{number}-rank-0.pt")["state"]
        curve = run(resumed(world, stage, variant, state), BREAK, END)
        torch.save(curve, folder / f"resumed-{world}-{number}-rank-{rank}.pt")


def spawn(body: Callable[[int, int, Path], None], world: int, folder: Path) -> None:
    rendezvous = folder / f"rendezvous-{body.__name__}-{world}"
    torch.multiprocessing.spawn(_enter, args=(world, folder, rendezvous, body), nprocs=world)


def _enter(rank: int, world: int, folder: Path, rendezvous: Path, body: Callable[[int, int, Path], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    body(rank, world, folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers did in every stage, and how one and three went on from it."""
    folder = tmp_path_factory.mktemp("engines")
    spawn(train_all, 2, folder)
    for world in (1, 3):
        spawn(resume_all, world, folder)
    return folder


def close(ours: Curve, theirs: Curve, loss: float, norm: float) -> None:
    for (loss_a, norm_a, error_a), (loss_b, norm_b, error_b) in zip(ours, theirs, strict=True):
        assert loss_a == pytest.approx(loss_b, rel=loss)
        assert norm_a == pytest.approx(norm_b, rel=norm)
        assert error_a == pytest.approx(error_b, rel=10 * loss)  # after an update


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_and_padding_do_not_change_the_plain_loop(variant: str) -> None:
    close(plain(variant, BATCH)[0], plain(variant, 3)[0], loss=1e-6, norm=1e-5)


@each_run
def test_a_stage_on_two_workers_trains_as_one_plain_process_does(folder: Path, number: int) -> None:
    variant = RUNS[number][1]
    curve, everything = plain(variant, BATCH)
    start = build(variant).state_dict()
    weights = {name: state for name, state in everything.items() if "exp_avg_sq" in state}
    others = everything.keys() - weights.keys()
    assert others == (set() if variant != "codebook" else set(FIXED) | set(CODES))
    for rank in range(2):
        facts = torch.load(folder / f"run-{number}-rank-{rank}.pt")
        close(facts["curve"], curve, loss=1e-5, norm=1e-4)
        final = facts["final"]
        assert final.keys() == everything.keys()
        for name in others:
            assert final[name].keys() == {"weight"}
            moved = name in CODES
            assert torch.equal(final[name]["weight"], start[name]) == (not moved)
            assert torch.allclose(final[name]["weight"], everything[name]["weight"], rtol=1e-4, atol=1e-5)
        facts["final"] = {name: final[name] for name in weights}
        squares = torch.cat([state["exp_avg_sq"].flatten() for state in weights.values()])
        seen = squares > 1e-9 * squares.max()
        # The rest is what the softmax over slots cannot see: a gradient of rounding, which Adam divides by itself.
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            ours, theirs = (
                torch.cat([s[kind].flatten() for s in state.values()]) for state in (facts["final"], weights)
            )
            moved = theirs - torch.cat([start[name].flatten() for name in weights]) if kind == "weight" else theirs
            assert (ours - theirs)[seen].norm() < 1e-3 * moved[seen].norm(), kind


@each_run
def test_an_unchanged_world_goes_on_bit_for_bit(folder: Path, number: int) -> None:
    facts = torch.load(folder / f"run-{number}-rank-0.pt")
    assert facts["again"] == facts["curve"][BREAK:]


@each_run
@pytest.mark.parametrize("world", [1, 3])
def test_any_other_world_goes_on(folder: Path, number: int, world: int) -> None:
    unbroken = torch.load(folder / f"run-{number}-rank-0.pt")["curve"][BREAK:]
    curve = torch.load(folder / f"resumed-{world}-{number}-rank-0.pt")
    close(curve[:1], unbroken[:1], loss=1e-6, norm=1e-5)
    close(curve, unbroken, loss=1e-5, norm=1e-4)


@each_run
def test_any_other_stage_goes_on(folder: Path, number: int) -> None:
    facts = torch.load(folder / f"run-{number}-rank-0.pt")
    close(facts["elsewhere"], facts["curve"][BREAK:], loss=1e-5, norm=1e-4)


@each_run
def test_names_are_dealt_out_to_the_ranks_without_gap_or_repetition(folder: Path, number: int) -> None:
    owned = [torch.load(folder / f"run-{number}-rank-{rank}.pt")["owned"] for rank in range(2)]
    assert sorted(owned[0] + owned[1]) == sorted(build(RUNS[number][1]).state_dict())
    assert abs(len(owned[0]) - len(owned[1])) <= 1


def test_bf16_follows_fp32(folder: Path) -> None:
    bf16 = torch.load(folder / "bf16-rank-0.pt")
    fp32 = torch.load(folder / "run-2-rank-0.pt")["curve"][:5]
    assert [loss for loss, *_ in bf16] == pytest.approx([loss for loss, *_ in fp32], rel=1e-2)
    assert bf16 != fp32


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what the processor can do")
def test_bf16_on_a_processor_without_it_is_told() -> None:
    flags = {flag for line in Path("/proc/cpuinfo").read_text().splitlines() for flag in line.split()}
    told = emulation("bf16", torch.device("cpu"))
    assert (told is None) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_fp32_is_recommended_where_bf16_is_emulated(instructions: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "bf16": False, instructions: True})
    assert emulation("fp32", torch.device("cpu")) is None
    told = emulation("bf16", torch.device("cpu"))
    assert (told is None) == (instructions is not None)
    assert told is None or "parallel.precision" in told


def test_an_engine_steps_without_torchs_compiler_and_mlflow() -> None:
    """Each is seconds of a rank's start, and DeepSpeed imports both if it is let."""
    code = """
import sys, torch
from orchestration.engine import DeepSpeedEngine
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
engine = DeepSpeedEngine(torch.nn.Linear(3, 1), micro_batches=1, zero_stage=2)
engine.backward(engine(torch.ones(1, 3)).sum(dim=1), torch.ones(1))
engine.step(1e-3)
imported = {"torch._inductor.compile_fx", "mlflow"} & set(sys.modules)
assert not imported, imported
torch.compile(torch.nn.Linear(3, 1))
assert "torch._inductor.compile_fx" in sys.modules, "it is switched off for DeepSpeed alone"
"""
    environment = {**os.environ, "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
