"""A training step of the published autoencoders, beside the same ones put together from a package and torch's layers.

    OMP_NUM_THREADS=2 python -m benchmarks.autoencoder [--write]

    assembled       what a user writes: SlotAttention of the PyPI package slot-attention, torch's convolutions, linear
                    layers and softmax, mean squared error, torch.optim.Adam
    memory kept     the same, in a process that keeps what it frees (orchestration/kept_memory.py), as a training rank
                    does
    slotforge       build_autoencoder and PlainEngine, the training loop's, in such a process; the assembled model's
                    weights are copied

All take a whole step (noise, forward, backward, Adam) on the same images with the same noise, each in a process of its
own and in turns, so that what else the machine does hits all alike. Their losses stay within 1e-5 of each other, or the
benchmark fails. CPU time tells more than wall time where the machine has other work; the least of the repeats is the
least disturbed. What the backward pass holds is what autograd saved, each tensor once; the peak is of the process.
"""

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import slot_attention
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.page import machine, versions, write
from orchestration.engine import PlainEngine
from orchestration.kept_memory import keep_memory
from slot_models import SlotAutoencoder, build_autoencoder
from slot_models.interop import from_package

LEARNING_RATE, LEAST_AGREEMENT = 4e-4, 1e-5
MODELS = {"Tetrominoes": (35, 4), "Multi-dSprites": (64, 6)}
"""Pixels a side and slots (Locatello et al. 2020); 32 channels, slots of 64, three iterations."""
KINDS = ("assembled", "memory kept", "slotforge")


class Position(nn.Module):
    """Adds a linear code of the four distances to the borders. [B, C, H, W]"""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        ramp = torch.linspace(0, 1, size)
        y, x = torch.meshgrid(ramp, ramp, indexing="ij")
        self.register_buffer("grid", torch.stack([y, x, 1 - y, 1 - x], dim=-1))
        self.dense = nn.Linear(4, channels)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.dense(self.grid).permute(2, 0, 1)


class Narrow(nn.LayerNorm):
    """Of the first channels: the package wants inputs as wide as its slots, so they are padded, and cut here."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs[..., : self.normalized_shape[0]])


class Assembled(nn.Module):
    """The published autoencoder as a user of the package writes it."""

    def __init__(self, size: int, num_slots: int, channels: int = 32, dim: int = 64) -> None:
        super().__init__()
        self.size, self.num_slots, self.dim = size, num_slots, dim
        widths = [3, channels, channels, channels, channels]
        convolutions: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            convolutions += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU()]
        self.encoder = nn.Sequential(*convolutions, Position(channels, size))
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.slots = slot_attention.SlotAttention(num_slots, dim, iters=3, hidden_dim=128)
        self.slots.norm_input = Narrow(channels)
        self.slots.to_k, self.slots.to_v = nn.Linear(channels, dim), nn.Linear(channels, dim)
        self.decoder = nn.Sequential(
            Position(dim, size),
            nn.Conv2d(dim, channels, 5, padding=2), nn.ReLU(),
            nn.Conv2d(channels, channels, 5, padding=2), nn.ReLU(),
            nn.Conv2d(channels, channels, 5, padding=2), nn.ReLU(),
            nn.Conv2d(channels, 4, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        features = self.mlp(self.encoder(images).flatten(2).transpose(1, 2))  # [B, N, C]
        slots = self.slots(functional.pad(features, (0, self.dim - features.shape[-1])))  # [B, K, D]
        grid = slots.flatten(0, 1)[:, :, None, None].repeat(1, 1, self.size, self.size)  # [BK, D, H, W]
        drawn = self.decoder(grid).unflatten(0, (len(images), self.num_slots))  # [B, K, 4, H, W]
        return (drawn[:, :, :3] * drawn[:, :, 3:].softmax(dim=1)).sum(dim=1)


def converted(assembled: Assembled) -> SlotAutoencoder:
    """The same model of slot_models, with the same weights."""
    model = build_autoencoder(image_size=assembled.size, num_slots=assembled.num_slots)
    attention = from_package(assembled.slots)
    attention.checks_values = False  # as in every autoencoder
    model.slot_attention = attention
    renamed = {
        **{f"encoder.{layer}": f"encoder.convolutions.{layer}" for layer in (0, 2, 4, 6)},
        "encoder.8.dense": "encoder.position",
        "mlp.0": "encoder.norm",
        "mlp.1": "encoder.mlp.0",
        "mlp.3": "encoder.mlp.2",
        "decoder.0.dense": "decoder.position",
        "decoder.3": "decoder.hidden.0",
        "decoder.5": "decoder.hidden.2",
        "decoder.7": "decoder.output",
    }
    weights = {f"slot_attention.{name}": weight for name, weight in attention.state_dict().items()}
    for name, weight in assembled.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in renamed:
            weights[f"{renamed[owner]}.{leaf}"] = weight
        elif owner == "decoder.1":
            weights[f"decoder.first_{leaf}"] = weight
    model.load_state_dict(weights)
    return model


def scenes(batch: int, size: int) -> Tensor:
    """Three squares of one colour each on black, in [-1, 1]. float32 [batch, 3, size, size]"""
    random = torch.Generator().manual_seed(1)
    images = torch.full((batch, 3, size, size), -1.0)
    for image in images:
        for _ in range(3):
            top, left = torch.randint(0, size - size // 4, (2,), generator=random).tolist()
            colour = 2.0 * torch.randint(0, 2, (3, 1, 1), generator=random) - 1
            image[:, top : top + size // 4, left : left + size // 4] = colour
    return images


Step = Callable[[], Tensor]


def assembled_step(model: Assembled, images: Tensor) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(images), images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def our_step(model: SlotAutoencoder, images: Tensor) -> Step:
    engine, batch = PlainEngine(model), len(images)
    share = torch.full((batch,), 1 / batch)
    shape = model.noise_shapes()["slots"]

    def step() -> Tensor:
        output = engine(images, torch.randn(batch, *shape))
        loss = (output.reconstruction - output.target).square().mean(dim=(1, 2, 3))  # [B]
        engine.backward(loss, share)
        engine.step(LEARNING_RATE)
        return loss.detach().mean()

    return step


def held_for_backward(step: Step) -> float:
    """Takes a step; MB of different memory that autograd saved in it."""
    storages: dict[int, int] = {}

    def saved(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        step()
    return sum(storages.values()) / 1e6


@dataclass(frozen=True)
class Turn:
    """A step: its loss, seconds on the clock and of the process on all cores, and the process's peak until then, MB."""

    loss: float
    wall: float
    cpu: float
    peak: float


@dataclass
class Turns:
    """The steps of a kind, and MB held for the backward pass."""

    held: float
    steps: list[Turn] = field(default_factory=list)


def work(kind: str, name: str, batch: int, threads: int, connection: Connection) -> None:
    """A process of a kind: sends what is held for the backward pass, then a Turn for each seed that it is sent."""
    torch.set_num_threads(threads)
    if kind != "assembled":
        keep_memory()
    torch.manual_seed(0)
    size, num_slots = MODELS[name]
    assembled, images = Assembled(size, num_slots), scenes(batch, size)
    step = our_step(converted(assembled), images) if kind == "slotforge" else assembled_step(assembled, images)
    torch.manual_seed(0)  # all draw the same noise from a seed
    connection.send(held_for_backward(step))
    while (seed := connection.recv()) is not None:
        torch.manual_seed(seed)
        start, busy = time.perf_counter(), time.process_time()
        loss = float(step())
        wall, cpu = time.perf_counter() - start, time.process_time() - busy
        connection.send(Turn(loss, wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6))


@contextmanager
def process(kind: str, name: str, batch: int, threads: int) -> Iterator[Connection]:
    spawning = multiprocessing.get_context("spawn")
    connection, other = spawning.Pipe()
    child = spawning.Process(target=work, args=(kind, name, batch, threads, other), daemon=True)
    child.start()
    other.close()  # so that its end is heard of here
    try:
        yield connection
        connection.send(None)
    finally:
        connection.close()
        child.join()


def measured(name: str, batch: int, repeats: int, threads: int) -> tuple[dict[str, Turns], float]:
    """Turns of each kind, and how far apart their losses were at most."""
    with ExitStack() as stack:
        workers, turns = {}, {}
        for kind in KINDS:
            workers[kind] = stack.enter_context(process(kind, name, batch, threads))
            turns[kind] = Turns(workers[kind].recv())  # before the next one starts
        for seed in range(1 + repeats):
            for kind, worker in workers.items():
                worker.send(seed)
                turn = worker.recv()
                if seed:  # the first ones find their memory
                    turns[kind].steps.append(turn)
    losses = torch.tensor([[turn.loss for turn in taken.steps] for taken in turns.values()])  # [kinds, repeats]
    apart = float((losses.amax(dim=0) - losses.amin(dim=0)).max())
    if apart > LEAST_AGREEMENT:
        raise SystemExit(f"the losses are {apart:.1e} apart: these are not the same models")
    return turns, apart


def rows(name: str, batch: int, turns: dict[str, Turns]) -> list[str]:
    """Of the table in Markdown."""
    theirs, found = turns["assembled"].steps, []
    for kind, taken in turns.items():
        rates = sorted(batch / turn.wall for turn in taken.steps)
        paired = statistics.median(a.wall / b.wall for a, b in zip(theirs, taken.steps, strict=True))
        least, less = (min(turn.cpu for turn in steps) for steps in (taken.steps, theirs))
        found.append(
            f"| {name} | {kind} | {statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f}) | {paired:.2f} | "
            f"{1e3 * least / batch:.1f} | {less / least:.2f} | {taken.held / batch:.1f} | {taken.steps[-1].peak:.0f} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", choices=MODELS, action="append", help="both if not given")
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    around, table, apart = machine(), [], 0.0
    for name in options.model or MODELS:
        turns, difference = measured(name, options.batch, options.repeats, options.threads)
        table += rows(name, options.batch, turns)
        apart = max(apart, difference)
        print("\n".join(table[-len(KINDS) :]), flush=True)
    text = "\n".join(
        [
            "## A training step of the autoencoder",
            "",
            f"    python -m benchmarks.autoencoder --batch {options.batch} --repeats {options.repeats} "
            f"--threads {options.threads}",
            "",
            f"Batches of {options.batch}, {options.repeats} steps of each in turns, {options.threads} threads. "
            f"Losses at most {apart:.0e} apart. {around}; {versions('torch', 'slot-attention')}.",
            "",
            "| model | | images/s: median (spread) | times as fast | least CPU ms an image | times less | "
            "MB an image held for backward | MB the process held at most |",
            "|---|---|---|---|---|---|---|---|",
            *table,
        ]
    )
    if options.write:
        write("autoencoder", text)


if __name__ == "__main__":
    main()
