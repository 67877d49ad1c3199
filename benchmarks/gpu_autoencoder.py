"""CLEVR's training step on a GPU, beside what its layers take on their own and the rate of matmuls.

    python -m benchmarks.gpu_autoencoder [--small]      # torch, einops and numpy are enough

    step        forward, backward and fused Adam of the published model (recipes/clevr6.yaml): 128 x 128 pixels, 64
                images, 7 slots, bfloat16 autocast; eager, compiled, and compiled with CUDA graphs
    layers      each layer's forward and backward on tensors of its own, in every form at hand: both memory layouts,
                compiled or not, transposed convolutions as such, or as convolutions to sub-pixels (stride 2) or plain
                ones (stride 1). The sum of the fastest forms is what the step could take
    matmul      a bfloat16 matmul of 8192 x 8192 x 8192: what the GPU can do at all

Times are medians. ``--small`` takes a tiny model on the CPU, to see that everything runs.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clevr_layers import CLEVR, SMALL, Form, Layer, Setting, clevr, draw, error, layers
from benchmarks.timing import milliseconds
from slot_models import SlotAutoencoder

STEPS = 500_000
"""Of the published training."""

Run = Callable[[], object]


def gigaflops(run: Run) -> float:
    """Of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def training_step(model: SlotAutoencoder, setting: Setting, forward: Callable[..., Any]) -> Run:
    """A step of the model, whose forward pass may be a compiled one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4, fused=True)
    images = draw(setting, setting.batch, 3, setting.image_size, setting.image_size).float().tanh()
    noise = torch.randn(setting.batch, *model.noise_shapes()["slots"], device=setting.device)

    def step() -> None:
        with torch.autocast(setting.device, torch.bfloat16):
            output = forward(images, noise)
        error(output.reconstruction, output.target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def layer_step(layer: Layer, form: Form) -> Run:
    """A forward and a backward pass of a layer, in a form of it."""
    inputs = layer.inputs()

    def step() -> None:
        result = form(*inputs, *layer.weights)
        result.backward(torch.ones_like(result))
        for tensor in (*inputs, *layer.weights, *layer.own):
            tensor.grad = None

    return step


def fastest(layer: Layer, setting: Setting) -> tuple[float, str]:
    """Milliseconds, and the form that takes them."""
    forms = dict(layer.forms)
    if setting.on_gpu:  # the other layout is not worth a compiler's time
        forms |= {
            f"{name}, compiled": torch.compile(form, fullgraph=True)
            for name, form in layer.forms.items()
            if not name.endswith("contiguous")
        }
    found = []
    for name, form in forms.items():
        found.append((milliseconds(layer_step(layer, form), setting.repeats), name))
        torch.compiler.reset()
    return min(found)


def layer_table(setting: Setting) -> tuple[list[str], float]:
    """Rows of the table in Markdown, and milliseconds of all layers and the optimizer."""
    model, rows, total = clevr(setting), [], 0.0
    for layer in layers(model, setting):
        work = gigaflops(layer_step(layer, next(iter(layer.forms.values()))))
        taken, form = fastest(layer, setting)
        rows.append(f"| {layer.name} | {form} | {taken:.3f} | {work / taken:.0f} |")
        total += taken
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    taken = milliseconds(optimizer.step, setting.repeats)
    return [*rows, f"| Adam | fused | {taken:.3f} | |", f"| all | | {total + taken:.2f} | |"], total + taken


def step_table(setting: Setting, matmul: float, allowed: float) -> list[str]:
    """Rows of the table in Markdown; ``matmul`` in TFLOP/s, ``allowed`` the layers' milliseconds."""
    forwards: dict[str, Callable[[SlotAutoencoder], Callable[..., Any]]] = {"eager": lambda model: model}
    if setting.on_gpu:
        forwards["compiled"] = lambda model: torch.compile(model, fullgraph=True)
        forwards["compiled, CUDA graphs"] = lambda model: torch.compile(model, fullgraph=True, mode="reduce-overhead")
    rows = []
    for name, forward in forwards.items():
        torch.compiler.reset()
        model = clevr(setting)
        work = gigaflops(training_step(model, setting, model))
        step = training_step(model, setting, forward(model))
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(step, setting.repeats)
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if setting.on_gpu else ""
        rate, speed = 1e3 * setting.batch / taken, work / taken  # images/s, TFLOP/s
        rows.append(
            f"| {name} | {taken:.2f} | {rate:.0f} | {STEPS * setting.batch / rate / 3600:.1f} | "
            f"{speed:.0f}, {speed / matmul:.0%} | {allowed / taken:.0%} | {memory} |"
        )
    return rows


def report(setting: Setting) -> str:
    """Both tables in Markdown."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    side = setting.matmul
    left, right = draw(setting, side, side), draw(setting, side, side)
    matmul = 2 * side**3 / milliseconds(lambda: left @ right, setting.repeats) / 1e9  # TFLOP/s
    layer_rows, allowed = layer_table(setting)
    step_rows = step_table(setting, matmul, allowed)
    machine = torch.cuda.get_device_name() if setting.on_gpu else "CPU"
    return "\n".join(
        [
            f"{setting.image_size} x {setting.image_size}, {setting.batch} images, {setting.num_slots} slots, bf16. "
            f"{machine}, torch {torch.__version__}; a matmul of {side} x {side} x {side}: {matmul:.0f} TFLOP/s.",
            "",
            f"| step | ms | images/s | hours for {STEPS} steps | TFLOP/s, of the matmul's | of what the layers allow | "
            "GiB |",
            "|---|---|---|---|---|---|---|",
            *step_rows,
            "",
            "| layer, forward and backward | fastest form | ms | TFLOP/s |",
            "|---|---|---|---|",
            *layer_rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    print(report(SMALL if parser.parse_args().small else CLEVR))


if __name__ == "__main__":
    main()
