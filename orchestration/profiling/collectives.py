"""What ranks send each other: collectives counted as torch.distributed is asked for them."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from orchestration.profiling.profile import Traffic

GATHERS = ("all_gather", "all_gather_into_tensor", "_all_gather_base")
SCATTERS = ("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base")
WHOLE = ("all_reduce", "reduce", "broadcast")
"""By which of its tensors holds all ranks' values: a gather's output, a scatter's input, or the only one."""


def sent_by_ring(operation: str, payload: int, world: int) -> float:
    """Bytes that a rank sends, on average, for a collective on a ring (Patarasuk & Yuan 2009): no order sends less.

    A sum that all ranks get is a scatter of sums and a gather: twice (W - 1) / W of the payload. All others are once
    that; of a broadcast or a sum for one rank, all ranks but one pass the whole payload on.
    """
    return (2 if operation == "all_reduce" else 1) * payload * (world - 1) / world


@contextmanager
def watched(
    note: Callable[[Traffic], None], part: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Notes this thread's collectives while it is open, and runs them, and the waiting for them, in ``part``.

    DeepSpeed looks some of them up when it is set up: open it before.
    """
    distributed: Any = torch.distributed
    thread, is_open = threading.current_thread(), True

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_open or threading.current_thread() is not thread:
                return original(*arguments, **options)
            payload = _payload(name, arguments, options)
            note(Traffic(1, payload, sent_by_ring(name, payload, distributed.get_world_size(options.get("group")))))
            with part():
                work = original(*arguments, **options)
            return None if work is None else _Waited(work, part)

        return call

    originals = {
        name: getattr(distributed, name) for name in (*GATHERS, *SCATTERS, *WHOLE) if hasattr(distributed, name)
    }
    try:
        for name, original in originals.items():
            setattr(distributed, name, wrapped(name, original))
        yield
    finally:
        is_open = False
        for name, original in originals.items():
            setattr(distributed, name, original)


class _Waited:
    """Work of torch.distributed whose waiting is timed too."""

    def __init__(self, work: Any, part: Callable[[], AbstractContextManager[Any]]) -> None:
        self._work, self._part = work, part

    def wait(self, *arguments: Any) -> Any:
        with self._part():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _payload(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Bytes of the tensor, or the list of them, that holds the values of all ranks."""
    given = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor | list)]
    return max(_bytes(value) for value in given)  # of a gather or scatter the larger one is the whole


def _bytes(value: Tensor | list[Tensor]) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(tensor.nbytes for tensor in value)
