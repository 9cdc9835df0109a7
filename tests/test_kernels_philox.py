"""The device functions of kernels/philox.py: known answers, and the oracles of advrad_fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import philox_probes
import pytest
from numpy.typing import NDArray
from test_philox import KNOWN, words

from advrad_fast import lattice, philox
from advrad_fast.schedule import Coefficients

#: Worst seen against the exact Box-Muller over 8 million random words, interpreted (without FMA): 1.4e-6.
NORMALS_ABS = 2e-6


def exact(r0: NDArray[np.uint32], r1: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Box-Muller in float64: the uniforms are exact, the angle is that of the exact pi."""
    u1, u2 = ((r0 >> 8) + 1.0) / 2**24, (r1 >> 8) / 2.0**24
    radius = np.sqrt(-2.0 * np.log(u1))
    return np.stack([radius * np.cos(2 * np.pi * u2), radius * np.sin(2 * np.pi * u2)], axis=-1)


def test_known_answers(interpreter: Any) -> None:
    for counter, key, result in KNOWN:
        low, high = words(key)
        got = interpreter.call(philox_probes.philox, np.array([words(counter)], np.uint32), high << 32 | low)
        assert got.tolist() == [words(result)]


def test_words_are_those_of_the_oracle(interpreter: Any, rng: np.random.Generator) -> None:
    counter = rng.integers(0, 2**32, (4096, 4), dtype=np.uint32)
    for key in (0, 2**64 - 1, 0x299F31D0A4093822):
        got = interpreter.call(philox_probes.philox, counter, key)
        np.testing.assert_array_equal(got, philox.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32)))


def test_normals_are_near_the_exact_ones(interpreter: Any, rng: np.random.Generator) -> None:
    """Random words, and the ends and joints of both polynomials."""
    edges = (np.array([0, 1, 2, 3, 2**23 - 1, 2**23, 2**24 - 2, 2**24 - 1]) << 8).astype(np.uint32)
    joints = (np.round(2.0 ** np.arange(0.5, 24)) * 256).astype(np.uint32) - np.arange(-2, 3, dtype=np.int64)[:, None] * 256
    turns = (np.arange(16) * 2**28 + np.arange(-2, 3)[:, None] * 256) % 2**32
    first = np.concatenate([edges, joints.ravel() % 2**32, 2**32 - 256 * np.arange(1, 2000)]).astype(np.uint32)
    second = np.concatenate([edges, turns.ravel(), rng.integers(0, 2**32, 100)]).astype(np.uint32)
    r0, r1 = (a.ravel() for a in np.meshgrid(first, second))
    r0 = np.concatenate([r0, rng.integers(0, 2**32, 1 << 18, dtype=np.uint32)])
    r1 = np.concatenate([r1, rng.integers(0, 2**32, 1 << 18, dtype=np.uint32)])
    got = np.stack(interpreter.call(philox_probes.normals, r0, r1), axis=-1)
    difference = np.abs(got - exact(r0, r1))
    assert difference.max() <= NORMALS_ABS
    assert np.isfinite(got).all() and np.abs(got).max() <= 5.77


def test_small_radii_keep_their_digits(interpreter: Any) -> None:
    """Beside u1 = 1 the logarithm vanishes; its relative error must not grow there."""
    r0 = (2**32 - 256 * np.arange(2, 20_000)).astype(np.uint32)
    got, _ = interpreter.call(philox_probes.normals, r0, np.zeros_like(r0))
    wanted = exact(r0, np.zeros_like(r0))[:, 0]
    assert np.abs(got / wanted - 1).max() < 4e-7  # worst seen: 2.4e-7


def test_normals_of_the_stream(way: Any) -> None:
    """Through the whole kernel: with these coefficients the network's inputs are the noise itself."""
    images = np.zeros((1, 64, 64, 3), np.uint8)
    for seed, draw in ((0, 0), (2**64 - 1, 2**32 - 1)):
        got = way.noise(images, 1, seed, Coefficients(0.0, 1.0, 1.0, 1.0, 1.0), first_draw=draw, image_ids=[2**31 - 1]).ravel()
        stream = philox.integers(got.size, seed=seed, draw=draw, image_id=2**31 - 1).reshape(-1, 2)
        assert np.abs(got - exact(stream[:, 0], stream[:, 1]).ravel()).max() <= NORMALS_ABS
        assert np.abs(got - philox.normals(got.size, seed=seed, draw=draw, image_id=2**31 - 1)).max() <= NORMALS_ABS + 1.5e-6


@pytest.mark.parametrize("sigma", [1 / 255, 0.0625, 0.25, 1.0, 2.0])
def test_lattice_values_at_every_threshold(interpreter: Any, rng: np.random.Generator, sigma: float) -> None:
    """At each threshold, one below and one above, at the ends, and anywhere: integers, so exactly."""
    table = lattice.thresholds(sigma)
    near = np.concatenate([table - np.uint64(1), table, table + np.uint64(1)])
    u = np.concatenate([near, [0, 1, 2**60 - 2, 2**60 - 1], rng.integers(0, 2**60, 20_000)]).astype(np.uint64)
    u = u[u < 2**60]
    got = interpreter.call(philox_probes.lattice, u, table, sigma)
    np.testing.assert_array_equal(got, np.searchsorted(table, u, side="right") - len(table) // 2)


@pytest.mark.parametrize("sigma", [1 / 255, 0.25, 2.0])
def test_lattice_noise_of_the_stream(way: Any, sigma: float) -> None:
    table = lattice.thresholds(sigma)
    images = np.zeros((1, 32, 32, 1), np.uint8)
    one = Coefficients(1.0, 0.0, 1.0, 1.0, 1.0)
    got = way.noise(images, 2, 5, one, table=table, sigma=sigma, first_draw=7, image_ids=[3])
    steps = np.rint((got.astype(np.float64) + 1.0) * 127.5).astype(np.int64)
    for i in range(2):
        np.testing.assert_array_equal(steps[i].ravel(), lattice.integers(1024, sigma, seed=5, draw=7 + i, image_id=3))
