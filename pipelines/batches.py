"""What a step is made of: micro batches, on the CPU or on their way to a GPU."""

import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.transforms import on_device


@dataclass(frozen=True)
class MicroBatch:
    """m samples of a step. Where a slice does not fill its micro batches, a sample is repeated with weight 0.

    Fields:
        images: float32 [m, 3, H, W] in [-1, 1].
        weight: float32 [m], 1 for a sample of the batch, 0 for padding.
        slot_noise: float32 [m, ...] standard normal, or None.
        gate_noise: float32 [m, ...] standard Gumbel, or None.
        input_noise: float32 [m, ...] standard normal, for what the slots look at, or None.
        num_objects: int64 [m], -1 where unknown.
        masks: int64 [m, H, W], 0 is background, or None.
        ids: int64 [m], number of the sample in the set.
        places: int64 [m], place in the step's batch.
    """

    images: Tensor
    weight: Tensor
    slot_noise: Tensor | None
    gate_noise: Tensor | None
    input_noise: Tensor | None
    num_objects: Tensor
    masks: Tensor | None
    ids: Tensor
    places: Tensor

    def pin_memory(self) -> Self:
        """The same micro batch in page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Its memory is not used again before what `stream` does now has ended."""
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                value.record_stream(stream)

    def to(self, device: torch.device | str) -> Self:
        """The same micro batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changed)


class Recycled:
    """Arrays whose memory is used again once nothing refers to them: fresh pages cost as much as filling them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: deque[NDArray[np.float32]] = deque()

    def array(self) -> NDArray[np.float32]:
        """float32 of the shape, with anything in it. A tensor that is made of it holds it for as long as it lives."""
        memory = self._free.pop() if self._free else np.empty(self._shape, dtype=np.float32)
        array = memory.view()
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class ToDevice:
    """Copies steps to a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], "torch.cuda.Event"]:
        """In the thread that reads ahead: start the copies. What they end with is for `arrive`."""
        with torch.cuda.stream(self._stream):
            moved = [micro.pin_memory().to(self._device) for micro in micro_batches]
            moved = [dataclasses.replace(micro, images=on_device(micro.images)) for micro in moved]
            return moved, self._stream.record_event()

    def arrive(self, micro_batches: Sequence[MicroBatch], copied: "torch.cuda.Event") -> None:
        """In the caller: what it computes from now on waits for the copies, and keeps them from being overwritten."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for micro in micro_batches:
            micro.record_stream(current)
