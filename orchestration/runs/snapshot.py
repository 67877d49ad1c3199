"""A rank's state in this machine's memory, laid out as the file that it becomes."""

import json
from collections.abc import Iterable

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
        self._taken: torch.cuda.Event | None = None

    def take(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Copies tensors by name; the same names, shapes and dtypes each time."""
        if not self._tensors:
            known = dict(state)
            self._allocate(known)
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
        for name, tensor in self._tensors.items():
            values = tensor.numpy()  # whose min and max are single threads, without the GIL, and pass a NaN on
            if tensor.is_floating_point() and values.size and not np.isfinite((values.min(), values.max())).all():
                return name
        return None

    @property
    def content(self) -> memoryview:
        """The file, until the next `take`."""
        return self._memory.numpy().data

    def _allocate(self, state: dict[str, Tensor]) -> None:
        header: dict[str, dict[str, object]] = {}
        end = 0
        for name, value in sorted(state.items(), key=lambda entry: (-entry[1].itemsize, entry[0])):  # aligned, so
            start, end = end, end + value.nbytes
            header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        self._memory = torch.empty(first + end, dtype=torch.uint8, pin_memory=any(v.is_cuda for v in state.values()))
        self._memory[:first] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        for name, entry in header.items():
            start, end = entry["data_offsets"]  # type: ignore[misc]
            piece = self._memory[first + start : first + end]
            self._tensors[name] = piece.view(state[name].dtype).view(state[name].shape)
