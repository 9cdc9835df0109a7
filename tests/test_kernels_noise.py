"""The fused operation ``noise`` in Triton: interpreted, and as PTX, against its plain form and the C++ twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from operations import coefficients, frames, run_noise

from advrad_fast import _native, lattice
from advrad_fast.reference import diffusion, smoothing
from advrad_fast.schedule import Coefficients

# N, H, W, C, draws: sides whose product 8 divides, several programs, a partly filled one, more draws than a program makes.
SHAPES = [(1, 8, 8, 1, 1), (2, 24, 41, 1, 3), (3, 5, 8, 3, 2), (1, 40, 24, 3, 5)]
SIGMAS = (0.0625, 1.0)
#: Each shape with one spread of the lattice, and the other pairs behind ``slow``: Triton's interpreter takes seconds for each.
LATTICES = [
    pytest.param(shape, SIGMAS[(i + j) % 2], marks=[pytest.mark.slow] * j) for j in (0, 1) for i, shape in enumerate(SHAPES)
]

#: Against the plain form in float32 and the C++ twin, standard deviation about 1.  Worst seen over all cases and ways: 1.2e-6, of
#: which half is the float32 of the other side.  Factor 2.
ABS = 2.4e-6


def plain(images: np.ndarray, draws: int, seed: int, c: Coefficients, ids: list[int], first: int = 0) -> np.ndarray:
    n, h, w, channels = images.shape
    eps = diffusion.draw_noise((channels, h, w), seed=seed, draws=first + draws, image_ids=ids)
    eps = eps.reshape(n, first + draws, channels, h, w)[:, first:].reshape(-1, channels, h, w).double()
    return diffusion.noise(torch.from_numpy(images.copy()), eps, c).numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_equals_reference(way: Any, rng: np.random.Generator, shape: tuple[int, int, int, int, int]) -> None:
    n, h, w, channels, draws = shape
    images, c = frames(rng, n, h, w, channels), coefficients()
    got = way.noise(images, draws, 2**64 - 1, c, first_draw=1, image_ids=list(range(n)))
    np.testing.assert_allclose(got, plain(images, draws, 2**64 - 1, c, list(range(n)), 1), rtol=0, atol=ABS)
    np.testing.assert_allclose(way.noise(images, draws, 3, c), run_noise(images, draws, 3, c), rtol=0, atol=ABS)


@pytest.mark.parametrize(("shape", "sigma"), LATTICES)
def test_lattice_inputs(way: Any, rng: np.random.Generator, shape: tuple[int, int, int, int, int], sigma: float) -> None:
    """The same integers as everywhere, and a float of which nothing but its last bits can differ."""
    n, h, w, channels, draws = shape
    images, table, one = frames(rng, n, h, w, channels), lattice.thresholds(sigma), Coefficients(1.0, 0.0, 1.0, 1.0, 1.0)
    got = way.noise(images, draws, 5, one, table=table, sigma=sigma)
    native = run_noise(images, draws, 5, one, lattice=_native.Lattice(table))
    z = smoothing.draw_lattice_noise((channels, h, w), sigma, seed=5, draws=draws, image_ids=[0] * n).numpy()
    steps = images.transpose(0, 3, 1, 2).repeat(draws, axis=0) + z
    np.testing.assert_array_equal(np.rint((got.astype(np.float64) + 1.0) * 127.5), steps)
    np.testing.assert_allclose(got, native, rtol=2**-22, atol=2.4e-7)  # worst seen: 0.43 of that
    c = coefficients()
    expected = smoothing.lattice_inputs(torch.from_numpy(images.copy()), torch.from_numpy(z), c).numpy()
    np.testing.assert_allclose(
        way.noise(images, draws, 5, c, table=table, sigma=sigma), expected, rtol=2**-21, atol=4.8e-7
    )  # 0.43


def test_the_same_integer_gives_the_same_input(way: Any, rng: np.random.Generator) -> None:
    """What a certificate rests on: an input is a function of the integer x + z, whatever the frame and the place."""
    images, sigma = frames(rng, 3, 32, 32, 3), 0.25
    table, c = lattice.thresholds(sigma), coefficients()
    got = way.noise(images, 2, 5, c, table=table, sigma=sigma)
    z = smoothing.draw_lattice_noise((3, 32, 32), sigma, seed=5, draws=2, image_ids=[0] * 3).numpy()
    steps = (images.transpose(0, 3, 1, 2).repeat(2, axis=0) + z).ravel()
    order = np.argsort(steps, kind="stable")
    same = np.diff(steps[order]) == 0
    np.testing.assert_array_equal(got.ravel()[order][1:][same], got.ravel()[order][:-1][same])
    assert (np.diff(got.ravel()[order])[~same] > 0).all() and same.sum() > 1000


def test_formats_and_layouts(way: Any, rng: np.random.Generator) -> None:
    """fp16 and bf16 are the fp32 values rounded to nearest even; channels last are the same values elsewhere."""
    from emulated import bf16

    images, c = frames(rng, 2, 24, 24, 3), coefficients()
    single = way.noise(images, 5, 9, c)
    half = way.noise(images, 5, 9, c, dtype="fp16")
    np.testing.assert_array_equal(half, single.astype(np.float16))
    last = way.noise(images, 5, 9, c, dtype="fp16", channels_last=True)
    np.testing.assert_array_equal(last, half.transpose(0, 2, 3, 1))
    if hasattr(way, "kernel") and way.target != "sm_75":  # Triton's interpreter has no bf16 to trust
        np.testing.assert_array_equal(way.noise(images, 5, 9, c, dtype="bf16"), bf16(single))


def test_draws_and_neighbours_change_nothing(way: Any, rng: np.random.Generator) -> None:
    images, c = frames(rng, 3, 16, 24, 3), coefficients()
    whole = way.noise(images, 6, 2, c, image_ids=[4, 5, 6])
    for i in range(3):
        for draw in (0, 5):
            alone = way.noise(images[i : i + 1], 1, 2, c, first_draw=draw, image_ids=[4 + i])
            np.testing.assert_array_equal(alone[0], whole[6 * i + draw])


def test_the_ways_agree(
    rng: np.random.Generator, interpreter: Any, emulators: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The PTX of four targets gives the same bits; Triton's interpreter has no FMA, and differs in the last ones."""
    from emulated import Emulator
    from kernel_builds import EXECUTED

    images, c = frames(rng, 1, 24, 40, 3), coefficients()
    manifest = request.getfixturevalue("executable")
    made = {target: emulators.setdefault(target, Emulator(manifest, target)).noise(images, 3, 1, c) for target in EXECUTED}
    for target in EXECUTED:
        np.testing.assert_array_equal(made[target], made["sm_80"])
    np.testing.assert_allclose(interpreter.noise(images, 3, 1, c), made["sm_80"], rtol=0, atol=ABS)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("draws", [1, 4, 16])
def test_bytes_moved(target: str, draws: int, executable: Any, rng: np.random.Generator) -> None:
    """One read of the frame for every four draws, one write of every output, in the widest accesses."""
    from emulated import Emulator

    emulator, images = Emulator(executable, target), frames(rng, 2, 32, 64, 3)
    out = emulator.noise(images, draws, 1, coefficients(), dtype="fp16")
    (report,) = emulator.reports
    assert report.stored.widths == {128: out.nbytes // 16} and report.stored.unique == out.nbytes
    assert report.loaded.unique == images.nbytes + 8  # and two image ids
    frame = sum(count * bits // 8 for bits, count in report.loaded.widths.items() if bits == 64)
    assert frame == images.nbytes * -(-draws // 4)
    assert report.loaded.requested + report.stored.requested <= 1.15 * (images.nbytes + out.nbytes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", torch.zeros(1, 8, 8, 3)), ("images", torch.zeros(1, 8, 8, 2, dtype=torch.uint8)),
        ("images", torch.zeros(1, 3, 5, 3, dtype=torch.uint8)), ("images", torch.zeros(8, 8, 3, dtype=torch.uint8)),
        ("images", None), ("images", torch.zeros(1, 8, 16, 3, dtype=torch.uint8)[:, :, ::2]), ("draws", 0), ("draws", True),
        ("seed", -1), ("seed", 2**64), ("signal", float("nan")), ("noise", 10**400), ("input_scale", "1"),
        ("out", torch.zeros(2, 3, 8, 8, dtype=torch.float64)), ("out", torch.zeros(1, 3, 8, 8)), ("first_draw", 2**32 - 1),
        ("lattice", 1), ("image_ids", torch.zeros(1)), ("image_ids", torch.zeros(2, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_noise_refuses(name: str, value: object) -> None:
    from advrad_fast.errors import ConfigError
    from advrad_fast.kernels.noise import noise

    arguments: dict[str, Any] = {
        "images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "draws": 2, "seed": 0, "signal": 0.9, "noise": 0.4,
        "input_scale": 1.0, "out": torch.zeros(2, 3, 8, 8),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"^{name}: expected "):
        noise(**{**arguments, name: value})
