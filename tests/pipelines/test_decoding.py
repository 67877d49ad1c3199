"""The decoder's memory, and the messages between it and its workers; what it decodes is tested through the stream."""

import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.decoding import Decoding, InThread, Processes
from pipelines.decoding.memory import Layout
from pipelines.decoding.messages import receive, send
from pipelines.samples import encode

VALUES = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4), max_leaves=10)


@given(
    messages=st.lists(st.tuples(VALUES, st.lists(st.binary(max_size=50), max_size=5)), max_size=4),
    large=st.booleans(),
)
def test_messages_arrive_as_they_were_sent(messages: list[tuple[object, list[bytes]]], large: bool) -> None:
    """Also those that no socket has room for, sent in several pieces."""
    messages = [(value, [data * (20_000 if large else 1) for data in payload]) for value, payload in messages]
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.settimeout(10)
            thread = threading.Thread(target=lambda: [send(ours, *message) for message in messages])
            thread.start()
            for value, payload in messages:
                got, content = receive(theirs)
                assert got == value and content == b"".join(payload)
            thread.join()
        with pytest.raises(EOFError):
            receive(theirs)


def test_whoever_does_not_read_or_write_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            send(ours, None, [bytes(10**7)])
        with pytest.raises(TimeoutError):
            receive(ours)


@given(rows=st.integers(1, 5), size=st.tuples(st.integers(1, 9), st.integers(1, 9)), with_masks=st.booleans())
def test_pixels_of_a_layout_do_not_overlap(rows: int, size: tuple[int, int], with_masks: bool) -> None:
    layout = Layout(rows, size, with_masks)
    block = bytearray(layout.bytes)
    images, masks = layout.views(block)
    assert images.shape == (rows, *size, 3) and masks.shape == (rows if with_masks else 0, *size)
    images[...], masks[...] = 255, 2**16 - 1
    assert sum(block) == 255 * (images.nbytes + masks.nbytes)


@pytest.mark.parametrize(("workers", "chunk"), [(2, 1), (1, 64)])
def test_steps_come_in_order_however_they_are_cut(workers: int, chunk: int) -> None:
    """Bad samples and rows left out too, some steps ahead."""
    decoding = Decoding((4, 6), with_masks=True)
    ids = np.arange(24, dtype=np.uint16).reshape(4, 6)
    good = [encode(str(n), np.full((4, 6, 3), n, dtype=np.uint8), ids + n, {"num_objects": n}) for n in range(6)]
    steps = [[*good[:2], None, {}, *good[2:4]], good[4:], [None], [{"image.png": b"?"}]]
    for members in good:
        del members["__key__"]
    decoders = InThread(decoding, 6), Processes(workers, decoding, 6, chunk=chunk)
    try:
        for decoder in decoders:
            for step, samples in enumerate(steps):
                decoder.submit(samples, step, 0)
        for samples in steps:
            alone, spread = (decoder.take() for decoder in decoders)
            assert alone.found == spread.found
            for row, (members, found) in enumerate(zip(samples, alone.found, strict=True)):
                assert found is None if members is None else isinstance(found, int if len(members) > 1 else str)
                if isinstance(found, int):
                    for decoded in (alone, spread):
                        assert (decoded.images[row] == found).all() and (decoded.masks[row] == ids + found).all()
            for decoder in decoders:
                decoder.release()
    finally:
        for decoder in decoders:
            decoder.close()
