"""Slot attention's forward and backward pass on a CPU, beside what a user would take instead.

    python -m benchmarks.attention [--write]

    slotforge                 slot_models.SlotAttention
    slot-attention            the PyPI package's SlotAttention
    slot-attention-pytorch    the PyPI package's SlotAttentionModule
    einsums                   the usual order: keys and values of all inputs (benchmarks/usual_attention.py)

All have the same sizes, in float32 with a gradient of the inputs, and take turns, so that what else the machine does
hits all alike; in all orders, so that none always finds the caches as the same other one leaves them. Speeds are
against the fastest other one in each shape, by the least time of each (the least disturbed) and by the medians. Memory
is the most that torch holds during a step above what it held before, which is the inputs and the weights.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import slot_attention
import torch
from slot_attention_pytorch.slot_attention_module import SlotAttentionModule
from torch import Tensor, nn

from benchmarks.page import machine, versions, write
from benchmarks.usual_attention import UsualSlotAttention
from slot_models import SlotAttention

OURS = "slotforge"
PACKAGES = ("torch", "slot-attention", "slot-attention-pytorch")
SHAPES = [(4, 16384, 64, 7), (4, 1225, 64, 4), (4, 1024, 512, 5), (4, 196, 256, 24)]
"""Images, inputs, width, slots: CLEVR's, Tetrominoes', and those of features of two kinds of ViT."""


def modules(dim: int, num_slots: int) -> dict[str, nn.Module]:
    """All of the same sizes: the packages take an MLP as wide as the slots, or 128."""
    hidden = max(dim, 128)
    return {
        OURS: SlotAttention(num_slots, dim, hidden_dim=hidden),
        "slot-attention": slot_attention.SlotAttention(num_slots, dim, hidden_dim=hidden),
        "slot-attention-pytorch": SlotAttentionModule(num_slots, dim, dim, 3, mlp_size=hidden),
        "einsums": UsualSlotAttention(num_slots, dim, hidden_dim=hidden),
    }


def steps(batch: int, count: int, dim: int, num_slots: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    inputs = torch.randn(batch, count, dim, requires_grad=True)

    def step_of(module: nn.Module) -> Callable[[], None]:
        def step() -> None:
            result: Tensor = module(inputs)
            result.square().sum().backward()
            inputs.grad = None
            module.zero_grad()

        return step

    return {name: step_of(module) for name, module in modules(dim, num_slots).items()}


def seconds(taking: dict[str, Callable[[], None]], budget: float) -> dict[str, list[float]]:
    """Of each step, in turns until the budget of seconds is spent, but five turns at least; one is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in taking}
    orders = itertools.cycle(itertools.permutations(taking.items()))
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[OURS]) < 6:
        for name, step in next(orders):
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in taken.items()}


def most_held(step: Callable[[], None]) -> int:
    """Bytes that torch held at most during a step, above what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]) for event in events if event["name"] == "[memory]")
    held, most = 0, 0
    for _, change in changes:
        held += change["Bytes"]
        most = max(most, held)
    return most


def fastest(taken: dict[str, list[float]], of: Callable[[list[float]], float]) -> tuple[str, float]:
    """The fastest but ours, and how much faster ours is."""
    others = {name: of(times) for name, times in taken.items() if name != OURS}
    best = min(others, key=lambda name: others[name])
    return best, others[best] / of(taken[OURS])


def table(threads: int, budget: float) -> list[str]:
    """Of one number of threads, in Markdown."""
    torch.set_num_threads(threads)
    names = list(modules(16, 2))
    lines = [
        f"| {threads} thread{'s' * (threads > 1)}: images, inputs, width, slots | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | times as fast, by least and median | memory, MB | of the fastest other's |",
        "|---" * (len(names) + 4) + "|",
    ]
    by_least, by_median = [], []
    for shape in SHAPES:
        taking = steps(*shape)
        taken = seconds(taking, budget)
        best, least = fastest(taken, min)
        _, median = fastest(taken, statistics.median)
        ours, theirs = most_held(taking[OURS]), most_held(taking[best])
        by_least.append(least)
        by_median.append(median)
        times = " | ".join(f"{1e3 * min(t):.1f} ({1e3 * statistics.median(t):.1f})" for t in taken.values())
        lines.append(
            f"| {', '.join(map(str, shape))} | {times} | {least:.2f}, {median:.2f} | {ours / 1e6:.1f} | "
            f"{ours / theirs:.2f} |"
        )
        print(lines[-1], flush=True)
    means = (math.exp(statistics.fmean(map(math.log, ratios))) for ratios in (by_least, by_median))
    lines.append(f"| geometric mean |{' |' * len(names)} {', '.join(f'{mean:.2f}' for mean in means)} | | |")
    print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape and number of threads")
    parser.add_argument("--threads", type=int, action="append", help="1 and 2 if not given")
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    around = machine()
    tables = [table(threads, options.seconds) for threads in options.threads or (1, 2)]
    text = "\n".join(
        [
            "## Slot attention on a CPU",
            "",
            f"    python -m benchmarks.attention --seconds {options.seconds:g}",
            "",
            f"Forward and backward, float32, three iterations: the least time of turns in {options.seconds:g} seconds "
            f"(and the median). {around}; {versions(*PACKAGES)}.",
            *(line for lines in tables for line in ("", *lines)),
        ]
    )
    if options.write:
        write("attention", text)


if __name__ == "__main__":
    main()
