"""How fast samples come, side by side on the same shards: python -m benchmarks.data [--write]

    read            the shards' bytes through the page cache, one process
    decode          images held in memory, decoded by each process on its own, by the stream's codecs, into the rows
                    of a batch: the ceiling, whose pixels stay uint8 and where they are
    decode beside   the same while this process converts batches without a pause: what cores of this machine take from
                    each other, where they share caches or are threads of one
    convert         one loop that decodes a batch like that and turns it into float32, as a model on a CPU takes it
    stream          pipelines.stream: plan, windows, decode workers, micro batches in order
    webdataset      a DataLoader over webdataset with a shuffle buffer of as many samples as the stream's windows hold
    mosaic          a DataLoader over MosaicML Streaming, where it is installed; its own format, written first
    litdata         LitData's loader, where it is installed; its own format, written first

The others decode as they do by themselves or as their documentation shows, with Pillow, and hand out the same float32
batches. Rates are images a second after a warm-up, the median of `--repeats` turns with their spread. CPU time, of this
process and of the processes that it starts, tells more than rates where the machine has other work or few cores. The
readers take turns, so that what else the machine does hits all alike, each in a fresh process, so that none pays for
what another one has imported; rates need as many idle cores as processes, and one more.

The last two pin other versions of what slotforge uses: put them into a folder of their own with

    pip install --no-deps --target OTHERS mosaicml-streaming litdata lightning-utilities obstore tifffile brotli zstd \\
        python-snappy cramjam xxhash catalogue "transformers<5" "huggingface_hub<1" tokenizers==0.22.2
    PYTHONPATH=OTHERS OMP_NUM_THREADS=1 python -m benchmarks.data --processes 1 --repeats 5 --write

Beside a CPU build of torch the torchvision on PyPI does not load, and mosaic only takes names from it: put a folder
before OTHERS with torchvision/datasets.py (`class VisionDataset: pass`) and torchvision/transforms/functional.py
(`to_tensor = None`).
"""

import argparse
import importlib
import io
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.page import machine, versions, write
from pipelines import Plan, codecs, read_index, write_index, write_shard
from pipelines.decoding.memory import Layout
from pipelines.stream import Stream
from pipelines.transforms import to_model

SHARDS, PER_SHARD, BATCH, LANES, WINDOW, WARM = 24, 250, 64, 8, 2, 8
COMPARED = ("torch", "numpy", "pillow", "simplejpeg", "imagecodecs", "webdataset", "mosaicml-streaming", "litdata")
PACKAGES = {"mosaic": "streaming", "litdata": "litdata"}

NOTES = """\
`decode` is the ceiling: what as many processes decode that do nothing else on an idle machine. `decode beside` is the
same while one more core is as busy as the stream's own process is: what a core gives less when its neighbours work.
The last column tells what an image costs on all cores together, to be held against `convert`, the least that a model
on a CPU pays. To a GPU the stream sends uint8 and converts there. `decode`, `convert` and `stream` decode with
simplejpeg and imagecodecs, the others with Pillow, which is what they come with: part of the lead is the codec."""


@dataclass(frozen=True)
class Turn:
    """What a reader took: seconds of wall time, of this process's CPUs and of its workers', for so many images."""

    images: int
    wall: float
    ours: float
    workers: float


def picture(number: int, side: int) -> np.ndarray:
    """Smooth colours with some noise: neither flat nor incompressible. uint8 [side, side, 3]."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse, np.int16) + random.integers(-6, 7, (side, side, 3)), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format={"jpg": "JPEG", "png": "PNG"}[format], quality=90)
    return buffer.getvalue()


def written(folder: Path, format: str, side: int) -> list[bytes]:
    """Writes the shards; the images' bytes in order."""
    images = [encoded(picture(number, side), format) for number in range(SHARDS * PER_SHARD)]
    shards = [
        write_shard(
            folder,
            f"{shard:03d}.tar",
            [
                {"__key__": f"{number:06d}", f"image.{format}": images[number]}
                for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
            ],
        )
        for shard in range(SHARDS)
    ]
    write_index(folder, shards, {"made": "for a benchmark"})
    return images


# --- one turn each -------------------------------------------------------------------------------------------------


def read(folder: Path) -> Turn:
    start, busy = time.perf_counter(), time.process_time()
    for path in sorted(folder.glob("*.tar")):
        path.read_bytes()
    return Turn(SHARDS * PER_SHARD, time.perf_counter() - start, time.process_time() - busy, 0.0)


def batches_in_memory(images: list[bytes]) -> Iterator[np.ndarray]:
    """Batches decoded by the stream's codecs into memory as the stream has it, uint8 [G, H, W, 3]."""
    height, width, _ = codecs.rgb(images[0]).shape
    layout = Layout(BATCH, (height, width), with_masks=False)
    rows, _ = layout.views(mmap.mmap(-1, layout.bytes))
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        for image, row in zip(batch, rows, strict=False):
            codecs.rgb(image, row)
        yield rows[: len(batch)]


def _decode(images: list[bytes], barrier: Any, results: Any) -> None:
    barrier.wait()
    start, busy = time.perf_counter(), time.process_time()
    for _ in batches_in_memory(images):
        pass
    results.put((time.perf_counter() - start, time.process_time() - busy))


def convert(images: list[bytes]) -> Turn:
    memory = to_model(np.zeros_like(next(batches_in_memory(images)))).numpy()
    start, busy = time.perf_counter(), time.process_time()
    for batch in batches_in_memory(images):
        to_model(batch, memory[: len(batch)])
    return Turn(len(images), time.perf_counter() - start, time.process_time() - busy, 0.0)


def decode_only(images: list[bytes], processes: int, beside: bool = False) -> Turn:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    each = len(images) // processes
    workers = [
        context.Process(target=_decode, args=(images[i * each : (i + 1) * each], barrier, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    if beside:
        pixels = next(batches_in_memory(images[:BATCH]))
        memory = to_model(pixels).numpy()
        while any(worker.is_alive() for worker in workers):
            to_model(pixels, memory)
    taken = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return Turn(each * processes, max(wall for wall, _ in taken), 0.0, sum(busy for _, busy in taken))


def timed(batches: Iterator[int]) -> Turn:
    """From the batches after the first ones, which start processes and fill queues, to one before the last."""
    for _ in range(WARM):
        next(batches)
    images, start, ours, workers = 0, time.perf_counter(), time.process_time(), children()
    for _ in range(SHARDS * PER_SHARD // BATCH - 2 * WARM):
        images += next(batches)
    return Turn(images, time.perf_counter() - start, time.process_time() - ours, children() - workers)


def children() -> float:
    """CPU seconds of the processes that this one has started and that still live."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def stream(folder: Path, processes: int) -> Turn:
    plan = Plan(read_index(folder), batch_size=BATCH, seed=1, lanes=LANES, window=WINDOW)
    with Stream(plan, folder, rank=0, world=1, micro_batch=BATCH, seed=1, noise={}, decode_workers=processes) as reader:
        return timed(len(reader.step(step)[0].ids) for step in range(plan.steps_per_epoch))


def webdataset(folder: Path, processes: int) -> Turn:
    import webdataset as wds

    def ready(sample: dict[str, Any]) -> np.ndarray:
        return np.asarray(next(value for name, value in sample.items() if name.startswith("image.")))

    room = LANES * WINDOW * PER_SHARD // processes
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = wds.WebDataset(urls, shardshuffle=SHARDS, empty_check=False, seed=1).shuffle(room, initial=room)
    samples = samples.decode("rgb8").map(ready).batched(BATCH, collation_fn=lambda images: to_model(np.stack(images)))
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=processes, prefetch_factor=4)
    return timed(len(batch) for batch in loader)


def by_pillow(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return to_model(np.asarray(image.convert("RGB"))[None])[0]


def mosaic(folder: Path, images: list[bytes], processes: int) -> Turn:
    from streaming import MDSWriter, StreamingDataset

    place = folder / "mosaic"
    if not place.is_dir():
        with MDSWriter(out=str(place), columns={"image": "bytes"}, size_limit=2**23) as writer:
            for image in images:
                writer.write({"image": image})

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> torch.Tensor:
            return by_pillow(super().__getitem__(at)["image"])

    data = Decoded(local=str(place), shuffle=True, batch_size=BATCH)
    return timed(
        len(batch) for batch in torch.utils.data.DataLoader(data, BATCH, num_workers=processes, prefetch_factor=4)
    )


def litdata(folder: Path, images: list[bytes], processes: int) -> Turn:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    place = folder / "litdata"
    if not place.is_dir():
        writer = BinaryWriter(str(place), chunk_bytes=2**23)
        for number, image in enumerate(images):
            writer[number] = {"image": image}
        writer.done()
        writer.merge()

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> torch.Tensor:
            return by_pillow(super().__getitem__(at)["image"])

    data = Decoded(str(place), shuffle=True)
    return timed(
        len(batch) for batch in StreamingDataLoader(data, batch_size=BATCH, num_workers=processes, prefetch_factor=4)
    )


# --- all of them -------------------------------------------------------------------------------------------------


def measured(format: str, side: int, processes: int, repeats: int) -> tuple[dict[str, list[Turn]], int]:
    """Every reader's turns, and the bytes of an image."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = written(folder, format, side)
        readers: dict[str, Callable[[], Turn]] = {
            "read": partial(read, folder),
            "decode": partial(decode_only, images, processes),
            "decode beside": partial(decode_only, images, processes, beside=True),
            "convert": partial(convert, images),
            "stream": partial(stream, folder, processes),
            "webdataset": partial(webdataset, folder, processes),
        }
        for reader in (mosaic, litdata):
            try:
                importlib.import_module(PACKAGES[reader.__name__])
            except (ImportError, RuntimeError) as error:  # torchvision raises the latter
                print(f"{reader.__name__} is left out: {error}", flush=True)
            else:
                readers[reader.__name__] = partial(reader, folder, images, processes)
        turns: dict[str, list[Turn]] = {reader: [] for reader in readers}
        for _ in range(repeats):
            for reader, turn in readers.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin) as fresh:
                    turns[reader].append(fresh.submit(turn).result())
    return turns, sum(map(len, images)) // len(images)


def _begin() -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the readers' own workers, as without a spawned process


def table(turns: dict[str, list[Turn]], title: str) -> str:
    """A table of one format in Markdown."""
    ceiling = statistics.median(turn.images / turn.wall for turn in turns["decode"])
    lines = [
        title,
        "",
        "| reader | images/s (spread) | of the ceiling | CPU us an image: processes | this process | in all |",
        "|---|---|---|---|---|---|",
    ]
    for reader, taken in turns.items():
        rates = sorted(turn.images / turn.wall for turn in taken)
        ours, workers = (
            statistics.median(getattr(turn, name) / turn.images for turn in taken) for name in ("ours", "workers")
        )
        of_ceiling = "" if reader in ("read", "convert") else f"{statistics.median(rates) / ceiling:.0%}"
        lines.append(
            f"| {reader} | {statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f}) | {of_ceiling} | "
            f"{1e6 * workers:.0f} | {1e6 * ours:.0f} | {1e6 * (ours + workers):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("jpg", "png"), action="append", help="both if not given")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    parts = [
        "## Samples a second",
        f"    OMP_NUM_THREADS=1 python -m benchmarks.data --processes {options.processes} --repeats {options.repeats}",
        f"{options.side}x{options.side}, {options.processes} decoding process(es), {SHARDS * PER_SHARD} images, "
        f"batches of {BATCH}, the median of {options.repeats}. {machine()}; {versions(*COMPARED)}.",
    ]
    for format in options.format or ("jpg", "png"):
        turns, size = measured(format, options.side, options.processes, options.repeats)
        parts.append(table(turns, f"{format.upper()}, {size} bytes an image:"))
        print(parts[-1], flush=True)
    parts.append(NOTES)
    if options.write:
        write("data", "\n\n".join(parts))


if __name__ == "__main__":
    main()
