"""How fast samples come, side by side on the same shards: python benchmarks/data.py --format jpg --processes 2

    read            the shards' bytes through the page cache, one process
    decode          samples held in memory, decoded by each process on its own: the ceiling
    stream          pipelines.stream: plan, windows, decode workers, micro batches in order
    webdataset      a DataLoader over webdataset with a shuffle buffer of as many samples as the stream's windows hold
    mosaic          a DataLoader over MosaicML Streaming, where it is installed; its own format, written first
    litdata         LitData's loader, where it is installed; its own format, written first

Every rate is images a second over the same number of images after a warm-up, the best of `--repeats` turns. The readers
take turns, so that what else the machine does hits all alike; it needs as many idle cores as processes, and one more.
"""

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines import Plan, read_index, write_index, write_shard
from pipelines.samples import decode
from pipelines.stream import Stream
from pipelines.transforms import to_model

SHARDS, PER_SHARD, BATCH, LANES, WINDOW = 16, 250, 64, 8, 2


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


# --- one turn each: how many images, in how many seconds -----------------------------------------------------------


def read(folder: Path) -> tuple[int, float]:
    start = time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        path.read_bytes()
    return SHARDS * PER_SHARD, time.perf_counter() - start


def _decode(images: list[bytes], format: str, barrier: Any, results: Any) -> None:
    decode({f"image.{format}": images[0]}, with_masks=False)
    barrier.wait()
    start = time.perf_counter()
    for image in images:
        decode({f"image.{format}": image}, with_masks=False)
    results.put(time.perf_counter() - start)


def decode_only(images: list[bytes], format: str, processes: int) -> tuple[int, float]:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    each = len(images) // processes
    workers = [
        context.Process(target=_decode, args=(images[i * each : (i + 1) * each], format, barrier, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    seconds = max(results.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return each * processes, seconds


def timed(batches: Iterator[int], warm: int = 8) -> tuple[int, float]:
    """Images and seconds after the first batches, which start processes and fill queues."""
    for _ in range(warm):
        next(batches)
    start, images = time.perf_counter(), 0
    for count in batches:
        images += count
    return images, time.perf_counter() - start


def stream(folder: Path, processes: int) -> tuple[int, float]:
    plan = Plan(read_index(folder), batch_size=BATCH, seed=1, lanes=LANES, window=WINDOW)
    with Stream(plan, folder, rank=0, world=1, micro_batch=BATCH, seed=1, noise={}, decode_workers=processes) as reader:
        return timed(len(reader.step(step)[0].ids) for step in range(plan.steps_per_epoch))


def webdataset(folder: Path, processes: int) -> tuple[int, float]:
    import webdataset as wds

    def ready(sample: dict[str, Any]) -> np.ndarray:
        return np.asarray(next(value for name, value in sample.items() if name.startswith("image.")))

    room = LANES * WINDOW * PER_SHARD // processes
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = wds.WebDataset(urls, shardshuffle=SHARDS, empty_check=False, seed=1).shuffle(room, initial=room)
    samples = samples.decode("rgb8").map(ready).batched(BATCH, collation_fn=lambda images: to_model(np.stack(images)))
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=processes, prefetch_factor=4)
    return timed(len(batch) for batch in loader)


def mosaic(folder: Path, images: list[bytes], format: str, processes: int) -> tuple[int, float]:
    from streaming import MDSWriter, StreamingDataset

    place = folder / "mosaic"
    if not place.is_dir():
        with MDSWriter(out=str(place), columns={"image": "bytes"}, size_limit=2**23) as writer:
            for image in images:
                writer.write({"image": image})

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> torch.Tensor:
            return to_model(
                decode({f"image.{format}": super().__getitem__(at)["image"]}, with_masks=False).image[None]
            )[0]

    data = Decoded(local=str(place), shuffle=True, batch_size=BATCH)
    return timed(
        len(batch) for batch in torch.utils.data.DataLoader(data, BATCH, num_workers=processes, prefetch_factor=4)
    )


def litdata(folder: Path, images: list[bytes], format: str, processes: int) -> tuple[int, float]:
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
            return to_model(
                decode({f"image.{format}": super().__getitem__(at)["image"]}, with_masks=False).image[None]
            )[0]

    data = Decoded(str(place), shuffle=True)
    return timed(len(batch) for batch in StreamingDataLoader(data, BATCH, num_workers=processes, prefetch_factor=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), options.processes
        images = written(folder, options.format, options.side)
        readers: dict[str, Callable[[], tuple[int, float]]] = {
            "read": lambda: read(folder),
            "decode": lambda: decode_only(images, options.format, n),
            "stream": lambda: stream(folder, n),
            "webdataset": lambda: webdataset(folder, n),
        }
        for reader, package in ((mosaic, "streaming"), (litdata, "litdata")):
            if importlib.util.find_spec(package):
                readers[reader.__name__] = lambda reader=reader: reader(folder, images, options.format, n)
        rates: dict[str, list[float]] = {reader: [] for reader in readers}
        for _ in range(options.repeats):
            for reader, turn in readers.items():
                count, seconds = turn()
                rates[reader].append(count / seconds)
    best = {reader: round(max(turns)) for reader, turns in rates.items()}
    facts = {"format": options.format, "side": options.side, "processes": n, "cores": os.cpu_count()}
    facts |= {"machine": platform.machine(), "bytes_per_image": sum(map(len, images)) // len(images)}
    shares = {reader: round(rate / best["decode"], 3) for reader, rate in best.items() if reader != "read"}
    print(json.dumps(facts | {"images_per_second": best, "of_the_ceiling": shares, "turns": rates}))


if __name__ == "__main__":
    main()
