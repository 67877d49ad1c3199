"""Noise belongs to (seed, purpose, step, place) and to nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.noise import Purpose, generator, gumbel, normal

WORDS = st.integers(0, 2**64 - 1)


@given(seed=WORDS, purpose=st.sampled_from(Purpose), step=WORDS, place=WORDS)
def test_a_stream_is_philox_under_the_documented_key_and_counter(
    seed: int, purpose: Purpose, step: int, place: int
) -> None:
    counter = place << 128 | step << 192
    expected = np.random.Philox(key=seed | int(purpose) << 64, counter=counter).random_raw(8)
    np.testing.assert_array_equal(generator(seed, purpose, step, place).bit_generator.random_raw(8), expected)


def test_the_known_answer_of_philox_4x64_10() -> None:
    # From the Random123 distribution (kat_vectors): counter and key all zero. numpy counts up before it draws, so its
    # first block at counter 2^256 - 1 is the one of counter 0; ours begins one block later.
    zero = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [hex(int(word)) for word in zero] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]
    ours = generator(0, Purpose.ORDER).bit_generator
    following = np.random.Philox(key=0, counter=2**256 - 1).random_raw(8)[4:]
    np.testing.assert_array_equal(ours.random_raw(4), following)


def test_the_purposes_keep_their_numbers() -> None:
    # They are in the key: another number would be another data order for every run there is.
    first = {"ORDER": 0, "AUGMENTATION": 1, "SLOTS": 2, "GATE": 3, "SCENES": 4, "WEIGHTS": 5, "INPUTS": 6}
    expected = first | {"BOOTSTRAP": 7}
    assert {purpose.name: int(purpose) for purpose in Purpose} == expected


@pytest.mark.parametrize("draw", [normal, gumbel])
@given(seed=WORDS, step=WORDS, places=st.lists(st.integers(0, 5000), max_size=12), cut=st.integers(0, 12))
def test_noise_does_not_depend_on_the_slice(draw, seed, step, places, cut) -> None:  # type: ignore[no-untyped-def]
    whole = draw(seed, Purpose.SLOTS, step, places, (3, 2))
    parts = [draw(seed, Purpose.SLOTS, step, part, (3, 2)) for part in (places[:cut], places[cut:])]
    assert whole.dtype == np.float32 and whole.shape == (len(places), 3, 2)
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    backwards = draw(seed, Purpose.SLOTS, step, places[::-1], (3, 2))
    np.testing.assert_array_equal(whole, backwards[::-1])


@given(
    a=st.tuples(st.integers(0, 3), st.sampled_from(Purpose), st.integers(0, 3), st.integers(0, 3)),
    b=st.tuples(st.integers(0, 3), st.sampled_from(Purpose), st.integers(0, 3), st.integers(0, 3)),
)
def test_distinct_streams_differ(a, b) -> None:  # type: ignore[no-untyped-def]
    draws = [normal(seed, purpose, step, [place], (8,)) for seed, purpose, step, place in (a, b)]
    assert np.array_equal(*draws) == (a == b)


def test_neighbouring_streams_do_not_overlap() -> None:
    words = [
        generator(5, Purpose.GATE, step, place).bit_generator.random_raw(2000) for step in (0, 1) for place in (0, 1)
    ]
    assert len(np.unique(np.concatenate(words))) == 8000


def test_distributions() -> None:
    places = np.arange(400)
    assert stats.kstest(normal(1, Purpose.SLOTS, 7, places, (50,)).ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(gumbel(1, Purpose.GATE, 7, places, (50,)).ravel(), "gumbel_r").pvalue > 1e-3
    # Across places as well as within: no block is like its neighbour.
    blocks = normal(1, Purpose.SLOTS, 7, places, (50,)).astype(np.float64)
    correlation = (blocks[1:] * blocks[:-1]).mean()
    assert abs(correlation) < 4 / np.sqrt(blocks[1:].size)


@pytest.mark.parametrize("field", ["seed", "step", "place"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_numbers_out_of_range_are_refused(field: str, value: int) -> None:
    arguments = {"seed": 0, "step": 0, "place": 0} | {field: value}
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        generator(arguments["seed"], Purpose.SLOTS, arguments["step"], arguments["place"])
