"""The fused operation ``reconstruction_error`` in Triton: interpreted, and as PTX, against its plain form and the C++ twin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from operations import ERROR_UNIT, Case, coefficients, run_noise

from advrad_fast import _native, lattice, schedule
from advrad_fast.config import ScoreConfig
from advrad_fast.reference import smoothing

# N, H, W, C, draws: a partly filled program, several, more than one tile of the filter.
SHAPES = [(1, 8, 8, 1, 1), (2, 24, 40, 3, 2), (1, 16, 136, 3, 3)]
SIZES = (1, 3, 15, 65, 67)

#: Of Case.plain's tolerance, which is four times the C++ twin's worst.  Worst seen over all cases and ways: 0.17.  Factor 2.
SHARE = 0.34


def run(way: Any, case: Case, config: ScoreConfig, *, maps: bool = True, smoothed: bool = False, **options: Any) -> Any:
    return way.reconstruction_error(
        case.images, case.outputs, case.draws, schedule.error_coefficients(case.c, smoothed=smoothed), config.scale_weights,
        config.filter_size, case.mu, case.inverse_spread, maps=maps, seed=case.seed, c=case.c, **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_size", SIZES)
def test_reconstruction_error_equals_reference(
    way: Any, rng: np.random.Generator, shape: tuple[int, int, int, int, int], filter_size: int
) -> None:
    case, config = Case(rng, shape, coefficients()), ScoreConfig(filter_size=filter_size)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = run(way, case, config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=SHARE * tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=SHARE * tolerance)
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    np.testing.assert_array_equal(run(way, case, config, maps=False)[0], scores)
    native, _ = case.run(config)
    np.testing.assert_allclose(scores, native, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0)])
def test_every_scale(way: Any, rng: np.random.Generator, prediction: Any, weights: tuple[float, float, float, float]) -> None:
    """x0 needs no noise at all: the variant without it."""
    case, config = Case(rng, (1, 16, 40, 3, 2), coefficients(prediction)), ScoreConfig(scale_weights=weights, filter_size=5)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = run(way, case, config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=SHARE * tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=SHARE * tolerance)


@pytest.mark.parametrize("draws", [1, 2])
def test_smoothed_error_equals_reference(way: Any, rng: np.random.Generator, draws: int) -> None:
    """With lattice noise the reconstruction is held against x + delta; here two images with two results each."""
    case, sigma, config = Case(rng, (2, 24, 40, 3, 2 * draws), coefficients("x0")), 0.25, ScoreConfig(filter_size=7)
    table = lattice.thresholds(sigma)
    case.inputs = run_noise(case.images, 2 * draws, case.seed, case.c, lattice=_native.Lattice(table))
    case.draws = draws
    scores, maps = run(way, case, config, smoothed=True, table=table, sigma=sigma)
    native_scores, native_maps = case.run(config, smoothed=True)
    z = smoothing.draw_lattice_noise((3, 24, 40), sigma, seed=case.seed, draws=2 * draws, image_ids=[0, 0])
    mu, spread = (torch.from_numpy(a.astype(np.float64)) for a in (case.mu, case.inverse_spread))
    outputs = torch.from_numpy(case.outputs).double()
    images = torch.from_numpy(case.images.copy())
    expected_scores, expected_maps = smoothing.smoothed_error(images, outputs, z, mu, spread, config, case.c, draws)
    largest = float(expected_maps.max()) / float(spread.min()) + float(mu.max())
    tolerance = ERROR_UNIT * float(spread.max()) * ((2 + float(z.abs().max()) * 2 / 255) * largest**0.5 + largest)
    for got, expected in ((scores, expected_scores), (maps, expected_maps), (native_scores, expected_scores)):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=tolerance)
    assert native_maps is not None


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_short_outputs(way: Any, rng: np.random.Generator, dtype: str) -> None:
    from emulated import bf16, from_bf16

    if dtype == "bf16" and getattr(way, "target", "sm_75") == "sm_75":
        pytest.skip("not built for sm_75, and not to be trusted in Triton's interpreter")
    case, config = Case(rng, (1, 16, 40, 3, 2), coefficients()), ScoreConfig(filter_size=15)
    short = case.outputs.astype(np.float16) if dtype == "fp16" else bf16(case.outputs)
    case.outputs = short.astype(np.float32) if dtype == "fp16" else from_bf16(short)
    expected_scores, expected_maps, tolerance = case.plain(config)
    case.outputs = short
    scores, maps = run(way, case, config, dtype=dtype)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=SHARE * tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=SHARE * tolerance)


def test_small_errors_beside_large_ones(way: Any, rng: np.random.Generator) -> None:
    """No running sum: a window that holds no outlier does not remember one."""
    case = Case(rng, (1, 40, 136, 1, 1), schedule.Coefficients(1.0, 0.0, 1.0, 1.0, 1.0))
    case.mu, case.inverse_spread = np.zeros((40, 136), np.float32), np.ones((40, 136), np.float32)
    case.outputs[:] = 1e-3
    for size in (15, 67):
        config, reach = ScoreConfig(scale_weights=(1.0, 0.0, 0.0, 0.0), filter_size=size), size // 2 + 1
        case.outputs[0, 0, 0, 0] = 1e-3
        _, quiet = run(way, case, config)
        # Of an infinity the coarser scales make NaN, weight 0 or not: in its block of 8 x 8 and wherever a window meets that.
        for value, away in ((1e9, reach), (np.inf, reach + 7)):
            case.outputs[0, 0, 0, 0] = value
            _, loud = run(way, case, config)
            np.testing.assert_array_equal(loud[0, away:], quiet[0, away:])
            np.testing.assert_array_equal(loud[0, :, away:], quiet[0, :, away:])
            assert not loud[0, 0, 0] < 1e14 and np.isfinite(loud[0, :, away:]).all()
        np.testing.assert_allclose(quiet, 1e-6, rtol=2e-4)  # 1e-3 beside x of order 1 in fp32


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(2, 0, 0, 0), (3, 2, 15, 39)])
def test_a_fault_never_gives_a_finite_score(way: Any, rng: np.random.Generator, value: float, at: tuple[int, ...]) -> None:
    case, config = Case(rng, (3, 16, 40, 3, 2), coefficients()), ScoreConfig(filter_size=3)
    clean, _ = run(way, case, config)
    case.outputs[at] = value
    scores, _ = run(way, case, config, maps=False)
    assert not math.isfinite(scores[1]) and (not math.isnan(value) or math.isnan(scores[1]))
    np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_any_order_of_programs_and_warps(target: str, executable: Any, rng: np.random.Generator) -> None:
    from emulated import Emulator

    emulator, case = Emulator(executable, target), Case(rng, (2, 24, 136, 3, 2), coefficients())
    for size in (15, 67):
        config = ScoreConfig(filter_size=size)
        scores, maps = run(emulator, case, config)
        for seed in (1, 2):
            again, same = run(emulator, case, config, order_seed=seed)
            np.testing.assert_array_equal(again, scores)
            np.testing.assert_array_equal(same, maps)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_bytes_moved(target: str, executable: Any, rng: np.random.Generator) -> None:
    """Score only: outputs and frame are read once, the intermediate map written and read once, and a score is written."""
    from emulated import Emulator

    emulator, case = Emulator(executable, target), Case(rng, (2, 64, 256, 3, 2), coefficients())
    outputs = case.outputs.astype(np.float16)
    case.outputs = outputs
    run(emulator, case, ScoreConfig(filter_size=15), maps=False, dtype="fp16")
    errors, deviation = emulator.reports
    plane = 4 * 64 * 256
    ids = 4 * 32 * (256 // 32) * (64 // 8) * 2  # every thread of every program reads its frame's id
    assert errors.loaded.requested == outputs.nbytes + case.images.nbytes + ids
    assert errors.loaded.widths[128] == outputs.nbytes // 16 and errors.stored.widths[128] == 2 * plane // 16
    assert errors.stored.unique == 2 * plane + 8
    assert deviation.loaded.unique == 4 * plane  # the map of two results, mu and inverse_spread
    assert deviation.stored.unique == 8 and set(deviation.loaded.widths) == {128}
    least = outputs.nbytes + case.images.nbytes + 2 * 2 * plane + 2 * plane + 8
    assert errors.bytes_moved + deviation.bytes_moved <= 1.15 * least


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", torch.zeros(1, 8, 12, 3, dtype=torch.uint8)), ("outputs", torch.zeros(3, 3, 8, 8)),
        ("outputs", torch.zeros(2, 8, 8, 3)), ("draws", 3), ("draws", 0), ("filter_size", 2), ("filter_size", 0),
        ("filter_size", 257), ("mu", torch.zeros(8, 9)),
        ("inverse_spread", torch.zeros(8, 8).double()), ("maps", torch.zeros(1, 8, 16)[:, :, ::2]), ("scores", torch.zeros(2)),
        ("scale_weights", (1.0, 1.0, 1.0, -0.1)), ("input_coefficient", math.nan), ("seed", -1), ("first_draw", 2**32),
    ],
)  # fmt: skip
def test_reconstruction_error_refuses(name: str, value: object) -> None:
    from advrad_fast.errors import ConfigError
    from advrad_fast.kernels.reconstruction_error import reconstruction_error

    arguments: dict[str, Any] = {
        "images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "outputs": torch.zeros(2, 3, 8, 8), "draws": 2,
        "input_coefficient": 1.0, "output_coefficient": 1.0, "scale_weights": (1.0,) * 4, "filter_size": 3,
        "mu": torch.zeros(8, 8), "inverse_spread": torch.zeros(8, 8), "maps": None, "scores": torch.zeros(1), "seed": 0,
        "signal": 1.0, "noise": 1.0, "input_scale": 1.0,
    }  # fmt: skip
    named = "outputs" if name == "images" or (name, value) == ("draws", 3) else name  # these fit nothing but the outputs badly
    with pytest.raises(ConfigError, match=f"^{named}: expected "):
        reconstruction_error(**{**arguments, name: value})
