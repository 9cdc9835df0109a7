"""The fused operation ``noise`` in C++ against its plain form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import NOISE_ABS, SHAPES, coefficients, frames, frozen, run_noise

from advrad_fast import _native, lattice
from advrad_fast.reference import diffusion, smoothing
from advrad_fast.schedule import Coefficients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_noise_equals_reference(rng: np.random.Generator, shape: tuple[int, int, int, int, int], seed: int) -> None:
    n, h, w, channels, draws = shape
    images, c = frozen(frames(rng, n, h, w, channels)), coefficients()
    got = run_noise(images, draws, seed, c)
    eps = diffusion.draw_noise((channels, h, w), seed=seed, draws=draws, image_ids=[0] * n)
    expected = diffusion.noise(torch.from_numpy(images.copy()), eps, c).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=NOISE_ABS)


@pytest.mark.parametrize("side", [(1, 1), (1, 7), (3, 5), (33, 31), (45, 67)])
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_of_any_size(rng: np.random.Generator, side: tuple[int, int], channels: int) -> None:
    """Planes that are no multiple of the generator's four values."""
    images = frames(rng, 2, *side, channels)
    unit = Coefficients(0.0, 1.0, 1.0, 1.0, 1.0)
    got = run_noise(images, 2, 3, unit)
    for i, draw in enumerate([0, 1, 0, 1]):
        np.testing.assert_array_equal(got[i].ravel(), _native.normals(got[i].size, 3, draw))


def test_noise_free_inputs_are_the_normalised_image(rng: np.random.Generator) -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    got = run_noise(images, 1, 0, Coefficients(1.0, 0.0, 1.0, 1.0, 1.0))
    np.testing.assert_array_equal(got, diffusion.normalise(torch.from_numpy(images)).numpy())
    assert got.min() == -1.0 and got.max() == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_lattice_inputs_equal_reference(rng: np.random.Generator, shape: tuple[int, int, int, int, int]) -> None:
    n, h, w, channels, draws = shape
    images, c, sigma = frozen(frames(rng, n, h, w, channels)), coefficients(), 0.25
    got = run_noise(images, draws, 5, c, lattice=_native.Lattice(lattice.thresholds(sigma)))
    z = smoothing.draw_lattice_noise((channels, h, w), sigma, seed=5, draws=draws, image_ids=[0] * n)
    expected = smoothing.lattice_inputs(torch.from_numpy(images.copy()), z, c).numpy()
    np.testing.assert_allclose(got, expected, rtol=2**-22, atol=NOISE_ABS)


def test_lattice_inputs_are_on_the_lattice(rng: np.random.Generator) -> None:
    """What a certificate rests on: every input is an integer number of steps from black, whatever the frame."""
    images = frames(rng, 3, 16, 16, 3)
    table = _native.Lattice(lattice.thresholds(0.125))
    got = run_noise(images, 2, 1, Coefficients(1.0, 0.0, 1.0, 1.0, 1.0), lattice=table)
    steps = np.rint((got.astype(np.float64) + 1.0) * 127.5).astype(np.int64)
    z = steps - images.transpose(0, 3, 1, 2).repeat(2, axis=0)
    for i in range(6):
        np.testing.assert_array_equal(z[i].ravel(), lattice.integers(768, 0.125, seed=1, draw=i % 2))
        np.testing.assert_array_equal(got[i], steps[i].astype(np.float32) * np.float32(2 / 255) - np.float32(1))
    assert steps.min() < 0 and steps.max() > 255  # nothing is clipped


@pytest.mark.parametrize("side", [(24, 40), (33, 31), (70, 130)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [None, 0.25])
def test_formats_and_layouts(rng: np.random.Generator, side: tuple[int, int], channels: int, sigma: float | None) -> None:
    """fp16 and bf16 are the fp32 values rounded to nearest even; channels last are the same values elsewhere."""
    images, c = frames(rng, 3, *side, channels), coefficients()
    options = {} if sigma is None else {"lattice": _native.Lattice(lattice.thresholds(sigma))}
    expected = run_noise(images, 2, 9, c, **options)
    rounded = {
        np.float32: expected,
        np.float16: expected.astype(np.float16),
        np.uint16: torch.from_numpy(expected).bfloat16().view(torch.uint16).numpy(),
    }
    for dtype, values in rounded.items():
        for channels_last in (False, True):
            wanted = values.transpose(0, 2, 3, 1) if channels_last else values
            out = np.full(wanted.shape, 0x7E11 if dtype is np.uint16 else np.nan, dtype=dtype)
            _native.noise(images, 2, 9, c.signal, c.noise, c.input_scale, out, channels_last=channels_last, **options)
            np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.float16, [0, 6, 13, 14, 22, 24, 25]), (np.uint16, [0, 13, 100, 126, 133])], ids=["fp16", "bf16"]
)
def test_rounding_at_every_magnitude(rng: np.random.Generator, dtype: type, bits: list[int]) -> None:
    """Subnormals, ties and overflow: against NumPy's and PyTorch's rounding."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for power in bits:
        for sign in (-1.0, 1.0):
            for scale in (1.0, 1.0009765625, 1.00048828125, 1.00146484375, 1.00390625, 1.01171875):
                c = Coefficients(0.5 * sign * scale * 2.0**-power, 0.0, 1.0, 1.0, 1.0)
                exact = run_noise(images, 1, 0, c)
                out = np.zeros((1, 1, 16, 16), dtype=dtype)
                _native.noise(images, 1, 0, c.signal, c.noise, c.input_scale, out)
                bf16 = torch.from_numpy(exact).bfloat16().view(torch.uint16).numpy()
                np.testing.assert_array_equal(out, bf16 if dtype is np.uint16 else exact.astype(np.float16))
    for top in (65503.0, 65504.0, 65519.0, 65519.996, 65520.0, 70000.0, 3e38):
        exact = run_noise(images, 1, 0, Coefficients(top, 0.0, 1.0, 1.0, 1.0))
        out = np.zeros((1, 1, 16, 16), dtype=dtype)
        _native.noise(images, 1, 0, top, 0.0, 1.0, out)
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        bf16 = torch.from_numpy(exact).bfloat16().view(torch.uint16).numpy()
        np.testing.assert_array_equal(out, bf16 if dtype is np.uint16 else half)


@pytest.mark.parametrize("side", [(24, 40), (33, 31)])
def test_normals_at_hand_are_the_same_noise(rng: np.random.Generator, side: tuple[int, int]) -> None:
    images, c = frames(rng, 2, *side, 3), coefficients()
    drawn = np.stack([_native.normals(3 * side[0] * side[1], 4, draw).reshape(3, *side) for draw in range(3)])
    np.testing.assert_array_equal(run_noise(images, 3, 4, c, normals=drawn), run_noise(images, 3, 4, c))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("sigma", [None, 0.125])
def test_draws_and_threads_change_nothing(rng: np.random.Generator, threads: int, sigma: float | None) -> None:
    """A draw's inputs are the same alone, in a batch, and with any number of threads."""
    images, c = frames(rng, 2, 72, 136, 3), coefficients()
    options = {} if sigma is None else {"lattice": _native.Lattice(lattice.thresholds(sigma))}
    whole = run_noise(images, 5, 2, c, **options)
    np.testing.assert_array_equal(run_noise(images, 5, 2, c, threads=threads, **options), whole)
    for draw in range(5):
        alone = run_noise(images, 1, 2, c, first_draw=draw, threads=threads, **options)
        np.testing.assert_array_equal(alone, whole[draw::5])
    last = run_noise(images, 1, 2, c, first_draw=2**32 - 1, **options)
    assert np.isfinite(last).all() and not np.array_equal(last, whole[::5])
