"""The noise stream: known answers, the C++ twin, and what makes it noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advrad_fast import _native, philox
from advrad_fast.errors import ConfigError

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

streams = {
    "seed": st.integers(0, 2**64 - 1),
    "draw": st.integers(0, 2**32 - 1),
    "image_id": st.integers(0, 2**32 - 1),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    got = philox.philox4x32(np.array([words(counter)], dtype=np.uint32), (k0, k1))
    assert got.dtype == np.uint32
    assert got.tolist() == [words(result)]


def test_first_words_of_seed_0_are_the_known_answer() -> None:
    assert philox.integers(4, seed=0).tolist() == words(KNOWN[0][2])
    assert _native.integers(4, 0).tolist() == words(KNOWN[0][2])


def test_counter_layout() -> None:
    seed = 0x299F31D0A4093822
    expected = philox.philox4x32(np.array([[2, 7, 9, 0]], dtype=np.uint32), (0xA4093822, 0x299F31D0))
    assert philox.integers(12, seed=seed, draw=7, image_id=9)[8:].tolist() == expected[0].tolist()


@given(count=st.integers(0, 300), **streams)
def test_native_integers_are_equal(count: int, seed: int, draw: int, image_id: int) -> None:
    expected = philox.integers(count, seed=seed, draw=draw, image_id=image_id)
    got = _native.integers(count, seed, draw, image_id)
    assert got.dtype == np.uint32 and got.shape == (count,)
    np.testing.assert_array_equal(got, expected)


# Worst seen in 16 million normals: 4.8e-7 and 5.0 ulp.  The C++ logarithm is within 0.83 ulp and sine and cosine within 1.52 ulp
# and 7.8e-8 for all 2**24 arguments; the rest is NumPy's.  Factor 2.
NORMALS_ABS, NORMALS_ULP = 1e-6, 10


@pytest.mark.parametrize(("seed", "draw", "image_id"), [(0, 0, 0), (2**64 - 1, 1, 3), (5, 2**32 - 1, 0)])
def test_native_normals_are_close(seed: int, draw: int, image_id: int) -> None:
    expected = philox.normals(1 << 20, seed=seed, draw=draw, image_id=image_id)
    got = _native.normals(1 << 20, seed, draw, image_id)
    assert got.dtype == np.float32
    difference = np.abs(got.astype(np.float64) - expected)
    assert difference.max() <= NORMALS_ABS
    assert (difference / np.spacing(np.abs(expected))).max() <= NORMALS_ULP


@given(count=st.integers(0, 70), **streams)
def test_a_shorter_stream_is_a_prefix(count: int, seed: int, draw: int, image_id: int) -> None:
    at = {"seed": seed, "draw": draw, "image_id": image_id}
    np.testing.assert_array_equal(philox.normals(count, **at), philox.normals(70, **at)[:count])
    np.testing.assert_array_equal(_native.normals(count, **at), _native.normals(70, **at)[:count])


@pytest.mark.parametrize("normals", [philox.normals, _native.normals])
def test_normal_and_bounded(normals: object) -> None:
    sample = normals(1 << 20, seed=11)  # type: ignore[operator]
    assert np.abs(sample).max() <= 5.77
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(stats.skew(sample)) < 5 * (6 / len(sample)) ** 0.5
    assert abs(stats.kurtosis(sample)) < 5 * (24 / len(sample)) ** 0.5


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": 2**32},  # the key's high word
        {"draw": 1},
        {"image_id": 1},
    ],
)
def test_streams_are_independent(other: dict[str, int]) -> None:
    count = 1 << 18
    a = philox.normals(count, seed=0)
    b = philox.normals(count, **{"seed": 0, **other})
    bound = 5 / count**0.5
    for f in (lambda z: z, np.square, np.abs):
        for shift in (0, 1, 2, 3, 4):
            assert abs(np.corrcoef(f(a), np.roll(f(b), shift))[0, 1]) < bound


def test_neighbours_are_independent() -> None:
    sample = philox.normals(1 << 20, seed=3)
    for f in (lambda z: z, np.square, np.abs):
        for lag in (1, 2, 3, 4, 8, 256):
            assert abs(np.corrcoef(f(sample[:-lag]), f(sample[lag:]))[0, 1]) < 5 / len(sample) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None, np.float32(1)])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        philox.check_seed(seed)
    with pytest.raises(ValueError, match="seed"):
        _native.normals(4, seed)  # type: ignore[arg-type]


def test_numpy_integers_are_seeds() -> None:
    assert philox.check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    np.testing.assert_array_equal(_native.integers(4, np.uint64(2**64 - 1)), philox.integers(4, seed=2**64 - 1))


@pytest.mark.parametrize("name", ["count", "draw", "image_id"])
@pytest.mark.parametrize("value", [-1, 2**65, 1.5, False, None, "3"])
def test_native_refuses(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected an integer in"):
        _native.normals(**{"count": 4, "seed": 0, name: value})  # type: ignore[arg-type]
