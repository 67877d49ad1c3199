"""Slot attention's forward and backward pass on a GPU, beside the usual order and the rate of a copy.

    python -m benchmarks.gpu_attention [--small] [--sweep]      # torch, einops, numpy, triton are enough

    step        forward and backward in bfloat16 autocast, the inputs in bfloat16, with a gradient of the inputs: the
                usual order (benchmarks/usual_attention.py) and slot_models.SlotAttention, each eager, compiled, and
                compiled with CUDA graphs; ours also as CUDA graphs alone
    passes      the Triton kernels on their own, with the bytes that they have to move against those of a copy
    error       of slots and of the inputs' gradient in bfloat16, against float64 on the same inputs

Times are medians. ``--small`` takes tiny shapes on the CPU, the kernels in Triton's interpreter, to see that everything
runs; ``--sweep`` tries other tiles for the kernels.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import milliseconds
from benchmarks.usual_attention import UsualSlotAttention
from slot_models import SlotAttention

SHAPES = [(64, 16384, 64, 7), (64, 1225, 64, 4), (64, 1024, 512, 5), (64, 196, 256, 24)]
SMALL = [(2, 40, 16, 3)]
"""Images, inputs, width, slots."""

Run = Callable[[], object]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of a copy of so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device()).random_()
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), 20) * 1e3


def step_of(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], inputs: Tensor) -> Run:
    def step() -> None:
        with torch.autocast(device(), torch.bfloat16):
            slots = module(inputs)
        slots.float().square().mean().backward()
        for tensor in (inputs, *parameters):
            tensor.grad = None

    return step


def step_row(shape: tuple[int, int, int, int], repeats: int) -> str:
    """Milliseconds of every way, and what ours gains, as a row in Markdown."""
    batch, count, width, slots = shape
    inputs = torch.randn(batch, count, width, device=device(), dtype=torch.bfloat16, requires_grad=True)
    hidden = max(width, 128)
    taken: dict[tuple[str, str], float] = {}
    for name in ("usual", "ours"):
        torch.manual_seed(0)
        module: Any = (
            UsualSlotAttention(slots, width, hidden_dim=hidden)
            if name == "usual"
            else SlotAttention(slots, width, hidden_dim=hidden)
        ).to(device())
        ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {"eager": lambda module=module: module}
        if torch.cuda.is_available():
            ways["compiled"] = lambda module=module: torch.compile(module, fullgraph=True)
            ways["compiled, graphs"] = lambda module=module: torch.compile(module, mode="reduce-overhead")
            if name == "ours":
                ways["graphs"] = lambda module=module: torch.cuda.make_graphed_callables(module, (inputs,))
        for way, made in ways.items():
            torch.compiler.reset()
            parameters = list(module.parameters())
            if way == "graphs":  # under the autocast that it will be run under
                with torch.autocast(device(), torch.bfloat16, cache_enabled=False):
                    run = step_of(made(), parameters, inputs)
            else:
                run = step_of(made(), parameters, inputs)
            taken[name, way] = milliseconds(run, repeats)
    ways = ("eager", "compiled", "compiled, graphs", "graphs")
    cells = [f"{taken[name, way]:.3f}" if (name, way) in taken else "" for name in ("usual", "ours") for way in ways]
    ours = min(value for (name, _), value in taken.items() if name == "ours")
    against = [taken.get(("usual", way)) for way in ("eager", "compiled")]
    gains = ", ".join("" if value is None else f"{value / ours:.2f}" for value in against)
    gains += f"; eager {taken['usual', 'eager'] / taken['ours', 'eager']:.2f}"
    return f"| {', '.join(map(str, shape))} | {' | '.join(cells[:3] + cells[4:])} | {gains} |"


def passes(shape: tuple[int, int, int, int]) -> dict[str, tuple[Run, int]]:
    """Each kernel on bfloat16 inputs, and the bytes that it has to move."""
    from slot_models.iterations import kernels

    batch, count, width, slots = shape
    inputs = torch.randn(batch, count, width, device=device(), dtype=torch.bfloat16)
    rows, d_sums = torch.randn(2, batch, 3, slots, width + 1, device=device()) / width**0.5
    first, d_first = rows[:, 0].contiguous(), d_sums[:, 0].contiguous()
    normed = kernels.statistics(inputs, 1e-5, None)
    read, known, small = inputs.nbytes, 2 * normed[0].nbytes, first.nbytes
    return {
        "statistics": (lambda: kernels.statistics(inputs, 1e-5, None), read + known),
        "pool": (lambda: kernels.pool(inputs, *normed, first, 1, 1e-8, True), read + known + 2 * small),
        "pool, backward": (
            lambda: kernels.pool_backward(inputs, *normed, first, d_first, 1, True),
            read + known + 3 * small,
        ),
        "inputs, backward": (
            lambda: kernels.inputs_backward(inputs, *normed, rows, d_sums, 1, 1e-8, True),
            2 * read + known + 6 * small,
        ),
    }


def pass_row(shape: tuple[int, int, int, int], bandwidth: float, repeats: int) -> str:
    """Microseconds and the part of the copy's bandwidth of each kernel, and of a step's passes together."""
    cells, total, moved = [], 0.0, 0
    for name, (run, size) in passes(shape).items():
        taken = milliseconds(run, repeats)
        times = 3 if name.startswith("pool") else 1  # in a step of three iterations
        total, moved = total + times * taken, moved + times * size
        cells.append(f"{1e3 * taken:.0f}, {size / taken * 1e3 / bandwidth:.0%}")
    cells.append(f"{1e3 * total:.0f}, {moved / total * 1e3 / bandwidth:.0%}")
    return f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |"


def error_row(shape: tuple[int, int, int, int]) -> str:
    """Of ours and of the usual order in bfloat16, against ours in float64, in parts of the largest entry."""
    _, count, width, slots = shape
    torch.manual_seed(0)
    inputs = torch.randn(2, count, width, device=device()).bfloat16()
    cells = []
    for module in (SlotAttention(slots, width).to(device()), UsualSlotAttention(slots, width).to(device())):
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            module = module.to(torch.float32 if dtype == torch.bfloat16 else dtype)
            x = inputs.to(dtype).requires_grad_()
            torch.manual_seed(0)
            with torch.autocast(device(), torch.bfloat16, enabled=dtype == torch.bfloat16):
                result = module(x)
            (gradient,) = torch.autograd.grad(result.square().sum(), x)
            found.append((result.double(), gradient.double()))
        for half, exact in zip(*found, strict=True):
            cells.append(f"{((half - exact).abs().max() / exact.abs().max()).item():.1e}")
    return f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |"


def sweep(shape: tuple[int, int, int, int], repeats: int) -> list[str]:
    """Rows of microseconds of each kernel by inputs a tile and warps a program."""
    from slot_models.iterations import kernels

    usual, found = kernels._tile, []
    for block in (16, 32, 64, 128, 256):
        for warps in (2, 4, 8):
            kernels._tile = lambda *sizes, b=block, w=warps, **more: (
                usual(*sizes, **more) | {"BLOCK": b, "num_warps": w}
            )
            cells = []
            for run, _ in passes(shape).values():
                try:
                    cells.append(f"{1e3 * milliseconds(run, repeats):.0f}")
                except Exception as error:  # too large for the processor's memory
                    cells.append(type(error).__name__)
            found.append(f"| {', '.join(map(str, shape))} | {block}, {warps} | {' | '.join(cells)} |")
    kernels._tile = usual
    return found


def report(small: bool = False, with_sweep: bool = False) -> str:
    """The tables in Markdown."""
    shapes, repeats = (SMALL, 1) if small else (SHAPES, 30)
    bandwidth = copy_bandwidth(2**20 if small else 2**30)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = ["statistics", "pool", "pool, backward", "inputs, backward"]
    lines = [
        f"bfloat16, three iterations. {machine}, torch {torch.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s.",
        "",
        "| images, inputs, width, slots | usual, eager: ms | compiled | compiled, graphs | ours, eager | compiled "
        "| compiled, graphs | graphs | ours at best against usual eager, compiled; both eager |",
        "|---|---|---|---|---|---|---|---|---|",
        *(step_row(shape, repeats) for shape in shapes),
        "",
        f"| passes: us, of the copy's bandwidth | {' | '.join(names)} | all of a step |",
        "|---|---|---|---|---|---|",
        *(pass_row(shape, bandwidth, repeats) for shape in shapes),
        "",
        "| error | ours: slots | inputs' gradient | usual: slots | inputs' gradient |",
        "|---|---|---|---|---|",
        *(error_row(shape) for shape in shapes),
    ]
    if with_sweep:
        lines += ["", f"| | inputs a tile, warps | {' | '.join(f'{name}, us' for name in names)} |", "|---" * 6 + "|"]
        lines += [row for shape in shapes for row in sweep(shape, repeats)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--sweep", action="store_true", help="also other tiles for the kernels")
    options = parser.parse_args()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"
    print(report(options.small, options.sweep))


if __name__ == "__main__":
    main()
