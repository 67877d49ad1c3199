"""A rank's state in this machine's memory, laid out as the file that it becomes."""

import json
from collections.abc import Iterable
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

# https://github.com/huggingface/safetensors#format: 8 bytes with the header's length, a JSON header, the tensors
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


class Snapshot:
    """A safetensors file in memory that is made once and filled at each save: no allocation, no serialising.

    On a GPU the memory is pinned and the copies are queued behind the step's kernels, so that taking a snapshot waits
    for nothing; `settle` does, in the thread that writes.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._tensors: dict[str, Tensor] = {}
        self._weights = torch.empty(0)  # all that is float32, in one piece
        self._taken: torch.cuda.Event | None = None

    def take(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Copies tensors by name; the same names, shapes and dtypes each time."""
        if not self._tensors:
            known, on_gpu = {}, False
            for name, value in state:  # gathered one by one: a GPU need not have room for all of them
                known[name] = value.detach().cpu()
                on_gpu = on_gpu or value.is_cuda
            self._allocate(known, pinned=on_gpu)
            state = known.items()
        taken = 0
        for name, value in state:
            self._tensors[name].copy_(value.detach(), non_blocking=True)
            taken += 1
        assert taken == len(self._tensors), "the names of a run's state have changed"
        if self._memory.is_pinned():
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._taken.record()

    def settle(self) -> None:
        """Until all of it is copied."""
        if self._taken is not None:
            self._taken.synchronize()

    def not_finite(self) -> str | None:
        """The name of a tensor that is not finite."""
        if _is_finite(self._weights):
            return None
        return next(name for name, tensor in self._tensors.items() if not _is_finite(tensor))

    @property
    def content(self) -> memoryview:
        """The file, until the next `take`."""
        return self._memory.numpy().data

    def _allocate(self, state: dict[str, Tensor], pinned: bool) -> None:
        # Large items first, so that all are aligned; each dtype in one piece.
        names = sorted(state, key=lambda name: (-state[name].itemsize, str(state[name].dtype), name))
        ends = list(accumulate((state[name].nbytes for name in names), initial=0))
        spans = dict(zip(names, pairwise(ends), strict=True))
        header = {
            name: {"dtype": DTYPES[state[name].dtype], "shape": list(state[name].shape), "data_offsets": list(span)}
            for name, span in spans.items()
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        self._memory = torch.empty(first + ends[-1], dtype=torch.uint8, pin_memory=pinned)
        self._memory[:first] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        tensors = self._memory[first:]
        for name, (start, end) in spans.items():
            self._tensors[name] = tensors[start:end].view(state[name].dtype).view(state[name].shape)
        weights = [spans[name] for name in names if state[name].dtype == torch.float32]
        if weights:
            self._weights = tensors[weights[0][0] : weights[-1][1]].view(torch.float32)


def _is_finite(tensor: Tensor) -> bool:
    """By numpy, whose min and max are one thread's work without the GIL, and pass a NaN on."""
    values = tensor.numpy()
    return not tensor.is_floating_point() or not values.size or bool(np.isfinite((values.min(), values.max())).all())
