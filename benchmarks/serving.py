"""How fast `slotforge serve` answers, beside the forward pass alone: python -m benchmarks.serving [--write]

A registered model with the weights of a start (they cost what trained ones cost), served by one replica with as many
threads as there are cores. Clients in this process ask one after the other over kept connections (a closed loop): one
PNG a request, or 16 in one. Before each turn the model's own forward is timed in this process, on arrays, with
the replica's batch, threads and memory: the ceiling, which leaves nothing for HTTP, PNG, Ray and the clients. CPU
time, of the command and of its replica, tells more than rates where clients and service share few cores.

Exits with 1 if any request failed.
"""

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import torch

from benchmarks.data import encoded, picture
from benchmarks.page import machine, versions, write
from orchestration.kept_memory import keep_memory
from orchestration.recipe import load_recipe
from orchestration.registry.package import package
from orchestration.registry.trained import Trained
from orchestration.runs.folder import RunFolder
from orchestration.serving.finder import Finder, ModelName
from orchestration.tracking import Tracker
from slot_models import build_autoencoder

BATCH, SEVERAL, IMAGES = 16, 16, 64
PATIENCE = 300


@dataclass
class Turn:
    """What clients saw in some seconds, and what it took."""

    clients: int
    several: bool
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failed: int = 0
    cpu: tuple[float, float] = (0.0, 0.0)  # seconds of the command, of the replica
    memory: tuple[float, float] = (0.0, 0.0)  # MiB of both, at the end
    ceiling: float = 0.0  # images a second of the forward alone

    @property
    def images(self) -> int:
        return len(self.latencies) * (SEVERAL if self.several else 1)


class Service:
    """A served recipe, until `stop`."""

    def __init__(self, home: Path, model: ModelName) -> None:
        command = [str(Path(sys.executable).with_name("slotforge")), "serve", "--model", model.uri, "--port", "0"]
        self._process = subprocess.Popen(  # noqa: S603 this very project
            [*command, "--tracking-uri", model.tracking, "--batch", str(BATCH), "--waiting", "128"],
            env={**os.environ, "SLOTFORGE_HOME": str(home)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        lines = iter(self._process.stdout)
        address = next((found[1] for line in lines if (found := re.search(r"answers at (\S+)/predict", line))), None)
        if address is None:
            sys.exit("the service did not start")
        self.address = address
        self.command = psutil.Process(self._process.pid)
        (self.replica,) = (
            child for child in self.command.children(recursive=True) if "ServeReplica" in " ".join(child.cmdline())
        )

    def cpu(self) -> tuple[float, float]:
        command, replica = (process.cpu_times() for process in (self.command, self.replica))
        return command.user + command.system, replica.user + replica.system

    def memory(self) -> tuple[float, float]:
        command, replica = (process.memory_info().rss / 2**20 for process in (self.command, self.replica))
        return command, replica

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(PATIENCE) != 0:
            sys.exit("the service did not stop as it should")


@contextmanager
def registered(name: str) -> Iterator[tuple[Path, ModelName]]:
    """A recipe's model in a registry of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SLOTFORGE_HOME"] = folder
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow leaves that of the recipe before there
        recipe = load_recipe(name).without_weights()
        run = RunFolder.of(recipe)
        run.claim(recipe)
        tracker = Tracker(recipe, run)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = build_autoencoder(**recipe.model.model_dump()).state_dict()
        side = recipe.model.image_size
        version = package(recipe, Trained.of(recipe, weights), tracker, np.zeros((1, side, side, 3), dtype=np.uint8))
        yield Path(folder), ModelName(f"models:/{recipe.registered_model}/{version}", tracker.uri)


def forward(finder: Finder, images: np.ndarray, seconds: float) -> float:
    """Images a second of the model alone, in batches of so many."""
    finder.find(images)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        finder.find(images)
        done += len(images)
    return done / (time.perf_counter() - start)


async def load(service: Service, turn: Turn, bodies: list[bytes], seconds: float) -> None:
    """Clients that ask, and ask again once they are answered."""
    media = "application/json" if turn.several else "image/png"
    connector = aiohttp.TCPConnector(limit=turn.clients)
    async with aiohttp.ClientSession(service.address, connector=connector, headers={"Content-Type": media}) as session:

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                asked = time.perf_counter()
                number += 1
                try:
                    async with session.post("/predict", data=bodies[number % len(bodies)]) as answer:
                        await answer.read()
                        good = answer.status == 200
                except aiohttp.ClientError:
                    good = False
                if good:
                    turn.latencies.append(time.perf_counter() - asked)
                else:
                    turn.failed += 1

        for warm in (True, False):
            turn.latencies.clear()
            before, start = service.cpu(), time.perf_counter()
            end = start + (min(2.0, seconds / 4) if warm else seconds)
            await asyncio.gather(*(client(number) for number in range(turn.clients)))
            turn.seconds = time.perf_counter() - start
        after = service.cpu()
        turn.cpu = (after[0] - before[0], after[1] - before[1])
        turn.memory = service.memory()


def measured(name: str, clients: list[int], seconds: float) -> tuple[list[Turn], int, tuple[float, float]]:
    """Turns of a recipe's model, its side, and MiB of command and replica before the first."""
    with registered(name) as (home, model):
        finder = Finder.of(model, BATCH)
        images = [picture(number, finder.side) for number in range(IMAGES)]
        single = [encoded(image, "png") for image in images]
        texts = [base64.b64encode(data).decode() for data in single]
        several = [json.dumps({"images": texts[at : at + SEVERAL]}).encode() for at in range(0, IMAGES, SEVERAL)]
        service = Service(home, model)
        try:
            at_first, turns = service.memory(), []
            for turn in [*(Turn(count, False) for count in clients), Turn(4, True)]:
                together = BATCH if turn.several else min(turn.clients, BATCH)
                turn.ceiling = forward(finder, np.stack(images[:together]), seconds / 4)
                asyncio.run(load(service, turn, several if turn.several else single, seconds))
                print(row(turn), flush=True)
                turns.append(turn)
        finally:
            service.stop()
        return turns, finder.side, at_first


def row(turn: Turn) -> str:
    rate, images = turn.images / turn.seconds, max(1, turn.images)
    p50, p99 = np.percentile(turn.latencies, [50, 99]) * 1e3 if turn.latencies else (np.nan, np.nan)
    each = SEVERAL if turn.several else 1
    return (
        f"| {turn.clients} | {each} | {rate / each:.0f} | {p50:.0f} | {p99:.0f} | {turn.failed} | {rate:.0f} | "
        f"{turn.ceiling:.0f} | {rate / turn.ceiling:.0%} | {1e3 * turn.cpu[0] / images:.2f} | "
        f"{1e3 * turn.cpu[1] / images:.2f} | {turn.memory[0]:.0f} + {turn.memory[1]:.0f} |"
    )


def table(name: str, turns: list[Turn], side: int, at_first: tuple[float, float]) -> str:
    head = (
        "| clients | images a request | requests/s | p50 ms | p99 ms | failed | images/s | forward alone | share | "
        "command's CPU ms an image | replica's | MiB |"
    )
    title = f"`{name}`, {side}x{side}; {at_first[0]:.0f} + {at_first[1]:.0f} MiB before the first request:"
    return "\n".join([title, "", head, "|" + "---|" * 12, *map(row, turns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="demo and clevr6 if none is given")
    parser.add_argument("--clients", type=int, action="append", help="1, 4, 16 and 64 if none is given")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    recipes, clients = options.recipe or ["demo", "clevr6"], options.clients or [1, 4, 16, 64]
    torch.set_num_threads(os.cpu_count() or 1)  # the replica's, and its memory
    keep_memory()
    parts = [
        "## Serving",
        f"    python -m benchmarks.serving --seconds {options.seconds:g}",
        f"One replica, batches of {BATCH} at most; PNG in, JSON with run lengths out; clients, command and replica "
        f"share the cores. {machine()}; {versions('torch', 'ray', 'mlflow', 'uvicorn', 'starlette', 'aiohttp')}.",
    ]
    failed = 0
    for name in recipes:
        turns, side, at_first = measured(name, clients, options.seconds)
        failed += sum(turn.failed for turn in turns)
        parts.append(table(name, turns, side, at_first))
        print(parts[-1], flush=True)
    if options.write:
        write("serving", "\n\n".join(parts))
    if failed:
        sys.exit(f"{failed} requests failed")


if __name__ == "__main__":
    main()
