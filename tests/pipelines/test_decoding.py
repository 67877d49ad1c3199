"""The decoder's memory, and the messages between it and its workers; what it decodes is tested through the stream."""

import mmap
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.decoding import Decoding, InThread, Processes
from pipelines.decoding.arena import Arena, mapped
from pipelines.decoding.memory import Layout
from pipelines.decoding.messages import receive, send
from pipelines.samples import encode

VALUES = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4), max_leaves=10)


@given(values=st.lists(VALUES, max_size=4), large=st.booleans())
def test_messages_arrive_as_they_were_sent(values: list[object], large: bool) -> None:
    """Also those that no socket has room for, sent in several pieces."""
    sent = [[value, "x" * 300_000] if large else value for value in values]
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.settimeout(10)
            thread = threading.Thread(target=lambda: [send(ours, value) for value in sent])
            thread.start()
            for value in sent:
                assert receive(theirs) == value
            thread.join()
        with pytest.raises(EOFError):
            receive(theirs)


def test_whoever_does_not_read_or_write_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            send(ours, "x" * 10**7)
        with pytest.raises(TimeoutError):
            receive(ours)


@given(sizes=st.lists(st.integers(0, 3 * mmap.ALLOCATIONGRANULARITY), min_size=1, max_size=6))
def test_blocks_of_an_arena_do_not_overlap_and_are_the_same_for_both_sides(sizes: list[int]) -> None:
    arena = Arena()
    blocks = [arena.block(size) for size in sizes]
    for number, (size, block) in enumerate(zip(sizes, blocks, strict=True), start=1):
        assert len(block.memory) >= max(1, size)
        block.memory[:] = bytes([number]) * len(block.memory)
    for number, block in enumerate(blocks, start=1):
        theirs = mapped(arena.descriptor, block.offset, len(block.memory))
        assert set(theirs[:]) == set(block.memory[:]) == {number}


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
    for members in good:
        del members["__key__"]
    # What is decoded takes ever more room, and less again.
    swollen = [[{**good[5], "other": bytes(size)}] * 3 for size in (10**5, 10**6)]
    steps = [[*good[:2], None, {}, *good[2:4]], good[4:], [None], [{"image.png": b"?"}], *swollen, good[:3]]
    decoders = InThread(decoding, 6), Processes(workers, decoding, 6, chunk=chunk)
    try:
        for decoder in decoders:
            decoder.submit(steps[0], 0, 0)
        for step, samples in enumerate(steps, start=1):  # one ahead
            for decoder in decoders:
                decoder.submit(steps[step % len(steps)], step, 0)
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
