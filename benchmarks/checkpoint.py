"""What saving costs training: python -m benchmarks.checkpoint [--device cuda] [--write]

The training loop on synthetic batches, one rank, plain engine; after every few steps a checkpoint, in turns:

    copies          a copy of each tensor, as a snapshot without memory of its own would take; nothing is written
    disk            orchestration's saver, to a temporary folder (--folder: to another)
    s3              the same, to an S3 server (moto) in a process of its own on this machine

The stall is what `save` takes from the training thread, with its CPU time, which tells more on a busy machine; the
first one, which also makes the snapshot's memory, stands apart. A step is told undisturbed and beside a write: the
writer needs a core of its own to leave it alone. Uploads measure moto, not S3; what counts there is the stall.
"""

import argparse
import contextlib
import itertools
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import torch
from torch import Tensor, nn

from benchmarks.page import machine, versions, write
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe, load_recipe
from orchestration.runs.checkpoints import committed, discard
from orchestration.runs.saver import Saver, new_token
from orchestration.runs.storage import Storage, storage_at
from orchestration.schedule import Schedule
from orchestration.worker import StepReport, train
from pipelines.stream import MicroBatch
from slot_models import build_autoencoder

RECIPES = ("tetrominoes", "multi-dsprites")
LARGE = "100 million parameters, no training beside it"
BETWEEN = 4  # steps from one save to the next: the first beside the write, the last undisturbed


class Synthetic:
    """One micro batch, again and again."""

    waited = 0.0

    def __init__(self, recipe: Recipe, shapes: dict[str, tuple[int, ...]], images: int) -> None:
        size = recipe.model.image_size
        noise = {name: torch.randn(images, *shape) for name, shape in shapes.items()}
        self._micro = MicroBatch(
            images=torch.rand(images, 3, size, size) * 2 - 1,
            weight=torch.ones(images),
            slot_noise=noise.get("slots"),
            gate_noise=noise.get("gate"),
            input_noise=noise.get("inputs"),
            num_objects=torch.full((images,), -1),
            masks=None,
            ids=torch.arange(images),
            places=torch.arange(images),
        )

    def batch_size(self, step: int) -> int:
        return len(self._micro.images)

    def step(self, step: int) -> list[MicroBatch]:
        return [self._micro]


@dataclass
class Turns:
    """Seconds, of one kind of save.

    Fields:
        stalls: of the training thread; the first makes the snapshot's memory.
        busy: CPU time of that thread in them.
        whole: saves with nothing beside them, to their commit.
        beside: steps that began with a save under way.
    """

    stalls: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)


class Subject:
    """A model in training, and the kinds of saves that it goes through."""

    def __init__(self, model: nn.Module, places: dict[str, Storage | None], device: str) -> None:
        self.engine = PlainEngine(model, device=device)
        self.turns = {name: Turns() for name in places}
        self.undisturbed: list[float] = []
        self._places, self._done = places, 0
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._savers = {
            name: place and Saver(place, new_token(), 0, 1, allowed=lambda: None) for name, place in places.items()
        }

    @property
    def size(self) -> int:
        """Bytes of a checkpoint's tensors."""
        state = self.engine.named_state(owned=True, live=True)
        return sum(value.nbytes for _, kinds in state for value in kinds.values())

    def save(self, kind: str) -> None:
        self.settle()
        began, busy = time.perf_counter(), time.thread_time()
        if (saver := self._savers[kind]) is None:
            self._copies = dict(self.engine.named_state(owned=True))
        else:
            self._done += 1
            saver.save(self._done, self.engine, [], {})
        self.turns[kind].stalls.append(time.perf_counter() - began)
        self.turns[kind].busy.append(time.thread_time() - busy)
        self._copies = {}

    def wait(self, kind: str) -> None:
        saver, place = self._savers[kind], self._places[kind]
        if saver is None or place is None:
            return
        saver.wait(must=True)
        for old in committed(place)[:-1]:
            discard(place, old.name)

    def settle(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self, recipe: Recipe, images: int, repeats: int) -> None:
        """Every few steps a save, of each kind in turn; stalls, and steps with and without a save beside them."""
        kinds, current, began = itertools.cycle(self.turns), "", 0.0

        def hook(report: StepReport) -> None:
            nonlocal current, began
            self.settle()
            seconds, place = time.perf_counter() - began, report.done % BETWEEN
            if place == 1 and current:
                self.turns[current].beside.append(seconds)
                self.wait(current)
            elif place == BETWEEN - 1:
                self.undisturbed.append(seconds)
            elif place == 0:
                current = next(kinds)
                self.save(current)
            began = time.perf_counter()

        steps = BETWEEN * len(self.turns) * repeats + 1
        schedule = Schedule(recipe.train.model_copy(update={"steps": steps}))
        train(self.engine, Synthetic(recipe, self.engine.module.noise_shapes(), images), schedule, hooks=[hook])

    def save_alone(self, repeats: int, stalls: bool) -> None:
        """Whole saves with nothing beside them; their stalls count where there is no training to stall."""
        for _ in range(repeats):
            for kind, turns in self.turns.items():
                began = time.perf_counter()
                self.save(kind)
                self.wait(kind)
                turns.whole.append(time.perf_counter() - began)
                if not stalls:
                    turns.stalls.pop()
                    turns.busy.pop()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A bucket on a server in another process; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 our own
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="runs")
        yield f"s3://runs/{secrets.token_hex(4)}"
    finally:
        server.terminate()
        server.wait()


def milliseconds(values: list[float]) -> str:
    if not values:
        return ""
    return f"{1e3 * statistics.median(values):.1f} ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})"


def table(title: str, subject: Subject) -> str:
    step = f"; an undisturbed step {milliseconds(subject.undisturbed)}" if subject.undisturbed else ""
    lines = [
        f"{title}: {subject.size / 1e6:.1f} MB{step}",
        "",
        "| save | stall | its CPU time | first stall | whole save | step beside it |",
        "|---|---|---|---|---|---|",
    ]
    for name, turn in subject.turns.items():
        first, later = turn.stalls[:1], turn.stalls[1:]
        whole = "" if name == "copies" else milliseconds(turn.whole)
        stall = f"{milliseconds(later)} | {milliseconds(turn.busy[1:])} | {milliseconds(first)}"
        lines.append(f"| {name} | {stall} | {whole} | {milliseconds(turn.beside)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="of a step; the published batch is 64")
    parser.add_argument("--repeats", type=int, default=8, help="pairs of saves of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the writer needs a core beside them")
    parser.add_argument("--folder", type=Path, help="where the disk's checkpoints go")
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = [
        "## What a checkpoint costs",
        f"    python -m benchmarks.checkpoint --images {options.images} --repeats {options.repeats} "
        f"--device {options.device} --threads {options.threads}",
        f"Steps of {options.images} images; milliseconds: medians (least to most). `copies`: of each tensor, "
        f"nothing is written. {machine(options.device)}; {versions('torch', 'safetensors')}.",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, s3_server() as bucket:
        for title in (*RECIPES, LARGE):
            places: dict[str, Storage | None] = {"copies": None, "disk": storage_at(Path(folder) / str(len(parts)))}
            if title != LARGE:  # moto holds everything in memory, several times
                places["s3"] = storage_at(f"{bucket}/{title}")
            torch.manual_seed(0)
            if title == LARGE:
                subject = Subject(nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24))), places, options.device)
                subject.save_alone(max(2, options.repeats // 2), stalls=True)
            else:
                recipe = load_recipe(title)
                subject = Subject(build_autoencoder(**recipe.model.model_dump()), places, options.device)
                subject.train(recipe, options.images, options.repeats)
                subject.save_alone(options.repeats, stalls=False)
            parts.append(table(title, subject))
            print(parts[-1], flush=True)
    if options.write:
        write("checkpoint", "\n\n".join(parts))


if __name__ == "__main__":
    main()
