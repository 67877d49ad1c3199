"""What happens to batches on their way to a GPU, with a GPU that is this machine's memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batches import MicroBatch, ToDevice
from pipelines.index import Index
from pipelines.plan import Plan
from pipelines.stream import Stream

MakeSet = Callable[..., Index]


class Driver:
    """Stands for CUDA: notes what is asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.inside = False
        self.current = SimpleNamespace(wait_event=lambda event: self.calls.append(("wait", event)))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(record_event=self._event))
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(Tensor, "pin_memory", self._pinned)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.calls.append(("used", stream)))

    def _event(self) -> object:
        self.calls.append(("event", self.inside))
        return len(self.calls)

    @contextlib.contextmanager
    def _entered(self, stream: object) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def _pinned(self, tensor: Tensor) -> Tensor:
        self.calls.append(("pin", tensor.dtype, self.inside))
        return tensor.clone()  # page-locked memory is always a copy


def read(stream: Stream, steps: int) -> list[MicroBatch]:
    with stream:
        return [micro for step in range(steps) for micro in stream.step(step)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_gpu_gets_the_same_batches_on_a_stream_of_its_own(
    tmp_path: Path, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    plan = Plan(make_set(tmp_path, [9, 7, 8]), batch_size=6, seed=3, lanes=2)
    streams = [
        Stream(
            plan,
            tmp_path,
            rank=0,
            world=1,
            micro_batch=4,
            seed=1,
            noise={"slots": (3, 2)},
            with_masks=True,
            decode_workers=workers,
        )
        for _ in range(2)
    ]
    steps = 3 * plan.steps_per_epoch  # memory is used again many times
    expected = read(streams[0], steps)
    driver = Driver(monkeypatch)
    streams[1]._to_device = ToDevice(torch.device("cpu"))
    found = read(streams[1], steps)
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.images.dtype == torch.float32 and torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.weight, theirs.weight)
        assert ours.masks is not None and theirs.masks is not None and torch.equal(ours.masks, theirs.masks)
        assert ours.slot_noise is not None and theirs.slot_noise is not None
        assert torch.equal(ours.slot_noise, theirs.slot_noise)
    fields = 7  # tensors of a micro batch: without noise of gate and inputs
    pins = [call for call in driver.calls if call[0] == "pin"]
    assert all(inside for *_, inside in pins)  # on the stream that copies
    assert sum(dtype == torch.uint8 for _, dtype, _ in pins) * fields == len(pins)  # pixels travel as bytes
    events = [call for call in driver.calls if call[0] == "event"]
    assert len(events) >= steps and all(inside for _, inside in events)
    # Whoever takes a step makes its own stream wait for the copies, and keeps every tensor for as long as it is used.
    waits = [call for call in driver.calls if call[0] == "wait"]
    used = [stream for kind, *rest in driver.calls if kind == "used" for stream in rest]
    assert len(waits) == steps and len({event for _, event in waits}) == steps
    assert used == [driver.current] * (fields * len(found))
