"""The C++ operations against their plain forms in advrad_fast.reference, and what they refuse."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from advrad_fast import _native, schedule
from advrad_fast.config import PREDICTIONS, DiffusionConfig, Prediction, ScoreConfig
from advrad_fast.reference import diffusion, score
from advrad_fast.schedule import Coefficients

BAR = schedule.alpha_bar(DiffusionConfig())

# The worst seen over all cases below, and the factor on it.
NOISE_ABS = 4 * 4.8e-7  # inputs of the network, standard deviation about 1
ERROR_UNIT = 4 * 1.0e-7  # maps and scores, in the units of Case.plain

# N, H, W, C, draws
SHAPES = [
    (1, 8, 8, 1, 1),
    (1, 8, 264, 3, 2),
    (3, 264, 8, 1, 3),
    (2, 16, 24, 3, 1),
    (5, 40, 32, 3, 2),
    (7, 24, 56, 1, 1),
    (1, 72, 136, 3, 3),
    (1, 264, 264, 3, 1),
    (2, 256, 256, 3, 1),
]


def filled(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.full(shape, np.nan, dtype=np.float32)


def frames(rng: np.random.Generator, n: int, h: int, w: int, c: int) -> NDArray[np.uint8]:
    """Noise frames, after a black, a white and a smooth one where there is room."""
    images = rng.integers(0, 256, (n, h, w, c), dtype=np.uint8)
    if n > 2:
        images[0], images[1] = 0, 255
        images[2] = (np.arange(w) * 255 // w).astype(np.uint8)[None, :, None]
    return images


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def coefficients(prediction: Prediction = "edm", timestep: int = 100) -> Coefficients:
    return schedule.coefficients(prediction, float(BAR[timestep]), 0.5)


def run_noise(images: NDArray[np.uint8], draws: int, seed: int, c: Coefficients) -> NDArray[np.float32]:
    n, h, w, channels = images.shape
    out = filled((n * draws, channels, h, w))
    _native.noise(images, draws, seed, c.signal, c.noise, c.input_scale, out)
    return out


class Case:
    """The arguments of one call of reconstruction_error."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int, int, int], c: Coefficients, seed: int = 7) -> None:
        n, h, w, channels, self.draws = shape
        self.seed, self.c = seed, c
        self.images = frozen(frames(rng, n, h, w, channels))
        self.outputs = rng.normal(size=(n * self.draws, channels, h, w)).astype(np.float32)
        self.mu = frozen(rng.uniform(0, 1, (h, w)).astype(np.float32))
        self.inverse_spread = frozen(rng.uniform(0.5, 2, (h, w)).astype(np.float32))

    def run(self, config: ScoreConfig, *, maps: bool = True) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        n, h, w, _ = self.images.shape
        scores, out = filled((n,)), filled((n, h, w)) if maps else None
        c = self.c
        _native.reconstruction_error(
            self.images, self.outputs, self.draws, self.seed, c.signal, c.noise, c.skip, c.out,
            config.scale_weights, config.filter_size, self.mu, self.inverse_spread, out, scores,
        )  # fmt: skip
        return scores, out

    def plain(self, config: ScoreConfig) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Scores and maps of the reference in float64, and what the native ones may differ by.

        The difference d of image and reconstruction carries the fp32 rounding of its terms, whose size is m; its square then
        has an absolute error of that times sqrt(E), plus its own rounding in E, plus that of E - mu.
        """
        n, h, w, channels = self.images.shape
        eps = diffusion.draw_noise((channels, h, w), seed=self.seed, draws=self.draws, image_ids=[0] * n).double()
        images = torch.from_numpy(self.images.copy())
        mu, spread = (torch.from_numpy(a.astype(np.float64)) for a in (self.mu, self.inverse_spread))
        outputs = torch.from_numpy(self.outputs).double()
        scores, maps = score.reconstruction_error(images, outputs, eps, mu, spread, config, self.c)
        errors, _ = score.reconstruction_error(images, outputs, eps, 0 * mu, 0 * spread + 1, config, self.c)
        largest = float(errors.max())
        m = 1 + abs(self.c.skip) * (self.c.signal + self.c.noise) + abs(self.c.out)
        tolerance = ERROR_UNIT * float(spread.max()) * (m * largest**0.5 + largest + float(mu.max()))
        return scores.numpy(), maps.numpy(), tolerance


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


# PyTorch takes 10 s and more over 255 x 255 windows in the large shapes.
@pytest.mark.parametrize(
    ("shape", "filter_size"), [(shape, s) for shape in SHAPES for s in (1, 3, 15, 255) if s < 255 or shape[1] * shape[2] < 10_000]
)
def test_reconstruction_error_equals_reference(
    rng: np.random.Generator, shape: tuple[int, int, int, int, int], filter_size: int
) -> None:
    case, config = Case(rng, shape, coefficients()), ScoreConfig(filter_size=filter_size)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = case.run(config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=tolerance)
    assert maps is not None
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    without_maps, _ = case.run(config, maps=False)
    np.testing.assert_array_equal(without_maps, scores)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [0, 145, 600])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0)])
def test_every_parametrisation_and_scale(
    rng: np.random.Generator, prediction: Prediction, timestep: int, weights: tuple[float, float, float, float]
) -> None:
    case = Case(rng, (2, 24, 40, 3, 2), coefficients(prediction, timestep))
    config = ScoreConfig(scale_weights=weights, filter_size=5)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = case.run(config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=tolerance)


def test_a_perfect_network_has_no_error(rng: np.random.Generator) -> None:
    """The noise drawn again is the noise of the inputs: x0 prediction of the image itself, and eps prediction of the noise."""
    case = Case(rng, (2, 32, 32, 3, 1), coefficients("eps"))
    case.mu = np.zeros((32, 32), dtype=np.float32)
    case.outputs = np.stack([_native.normals(3 * 32 * 32, case.seed).reshape(3, 32, 32)] * 2)
    scores, _ = case.run(ScoreConfig())
    assert scores.max() < 1e-12  # squares of fp32 rounding


def test_small_errors_beside_large_ones(rng: np.random.Generator) -> None:
    """No running sum: a window that holds no outlier does not remember one."""
    case = Case(rng, (1, 64, 64, 1, 1), Coefficients(1.0, 0.0, 1.0, 1.0, 1.0))
    case.mu, case.inverse_spread = np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)
    case.outputs[:] = 1e-3
    config = ScoreConfig(scale_weights=(1.0, 0.0, 0.0, 0.0), filter_size=15)
    _, quiet = case.run(config)
    case.outputs[0, 0, 0, 0] = 1e9
    _, loud = case.run(config)
    assert quiet is not None and loud is not None
    assert loud[0, 0, 0] > 1e15
    np.testing.assert_array_equal(loud[0, 8:], quiet[0, 8:])
    np.testing.assert_array_equal(loud[0, :, 8:], quiet[0, :, 8:])
    np.testing.assert_allclose(quiet, 1e-6, rtol=2e-4)  # 1e-3 beside x of order 1 in fp32


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("at", [(2, 0, 0, 0), (3, 2, 31, 23), (3, 1, 17, 9)])
@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0)])
@pytest.mark.parametrize("filter_size", [1, 15])
def test_a_fault_never_gives_a_finite_score(
    rng: np.random.Generator,
    value: float,
    at: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    filter_size: int,
) -> None:
    """One bad value in any draw of image 1, at any place: that image's score is bad, and its neighbours' are untouched."""
    case, config = Case(rng, (3, 32, 24, 3, 2), coefficients()), ScoreConfig(scale_weights=weights, filter_size=filter_size)
    clean, _ = case.run(config)
    case.outputs[at] = value
    for maps in (True, False):
        scores, _ = case.run(config, maps=maps)
        assert not math.isfinite(scores[1])
        if math.isnan(value):
            assert math.isnan(scores[1])
        np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("name", ["mu", "inverse_spread"])
def test_nan_in_the_normal_map_is_seen(rng: np.random.Generator, name: str) -> None:
    case = Case(rng, (1, 16, 16, 1, 1), coefficients())
    array = getattr(case, name).copy()
    array[15, 15] = np.nan
    setattr(case, name, array)
    assert np.isnan(case.run(ScoreConfig())[0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_neighbours(rng: np.random.Generator, channels: int) -> None:
    case, config = Case(rng, (5, 24, 32, channels, 2), coefficients()), ScoreConfig()
    inputs = run_noise(case.images, 2, case.seed, case.c)
    scores, maps = case.run(config)
    assert maps is not None
    images, outputs = case.images, case.outputs
    for i in range(5):
        case.images, case.outputs = images[i : i + 1], outputs[2 * i : 2 * i + 2]
        np.testing.assert_array_equal(run_noise(case.images, 2, case.seed, case.c), inputs[2 * i : 2 * i + 2])
        one_score, one_map = case.run(config)
        assert one_map is not None
        np.testing.assert_array_equal(one_score, scores[i : i + 1])
        np.testing.assert_array_equal(one_map, maps[i : i + 1])


def test_nothing_is_written_outside(rng: np.random.Generator) -> None:
    images = frames(rng, 3, 24, 40, 3)
    room = np.full(3 * 3 * 24 * 40 + 2, 1234.5, dtype=np.float32)
    _native.noise(images, 1, 0, 0.9, 0.4, 1.0, room[1:-1].reshape(3, 3, 24, 40))
    assert room[0] == room[-1] == 1234.5 and not (room[1:-1] == 1234.5).any()
    case = Case(rng, (3, 24, 40, 3, 1), coefficients())
    maps, scores = np.full(3 * 24 * 40 + 2, -1.0, dtype=np.float32), np.full(5, -1.0, dtype=np.float32)
    arguments = {**error_arguments(case), "maps": maps[1:-1].reshape(3, 24, 40), "scores": scores[1:-1]}
    _native.reconstruction_error(**arguments)
    assert maps[0] == maps[-1] == scores[0] == scores[-1] == -1.0
    assert (maps[1:-1] >= 0).all() and (scores[1:-1] >= 0).all()


def test_threads_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    case, config = Case(rng, (2, 64, 64, 3, 1), coefficients()), ScoreConfig()
    expected, _ = case.run(config)
    got: list[NDArray[np.float32]] = []

    def work() -> None:
        for _ in range(20):
            got.append(case.run(config)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    np.testing.assert_array_equal(np.stack(got), np.stack([expected] * 80))


def noise_arguments(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "images": frames(rng, 2, 16, 24, 3), "draws": 2, "seed": 0, "signal": 0.9, "noise": 0.4, "input_scale": 1.0,
        "out": filled((4, 3, 16, 24)),
    }  # fmt: skip


def error_arguments(case: Case) -> dict[str, Any]:
    n, h, w, _ = case.images.shape
    return {
        "images": case.images, "outputs": case.outputs, "draws": case.draws, "seed": case.seed, "signal": case.c.signal,
        "noise": case.c.noise, "skip": case.c.skip, "out_coeff": case.c.out, "scale_weights": (0.25,) * 4, "filter_size": 15,
        "mu": case.mu, "inverse_spread": case.inverse_spread, "maps": filled((n, h, w)), "scores": filled((n,)),
    }  # fmt: skip


ARRAYS: list[Callable[[Any], Any]] = [
    lambda a: None if a.ndim != 3 else 1,  # maps may be None
    lambda a: a.tolist(),
    lambda a: a.astype(np.float64),
    lambda a: a.astype(a.dtype.newbyteorder()) if a.itemsize > 1 else a.astype(np.int8),
    lambda a: a[..., :0],
    lambda a: a[:0],
    lambda a: a[None],
    lambda a: a[0],
    lambda a: np.concatenate([a, a]),
    lambda a: np.repeat(a, 2, axis=-1)[..., ::2],  # strided
    lambda a: a[::-1] if len(a) > 1 else a[..., ::-1],
    lambda a: np.frombuffer(b"\0" + a.tobytes(), dtype=np.uint8)[1:].view(a.dtype).reshape(a.shape) if a.itemsize > 1 else None,
]
INTEGERS = {"draws": [0, -1, 1, 3, 2**70], "seed": [-1, 2**64], "filter_size": [0, -1, 2, 257, 2**70]}
FLOATS = [math.nan, math.inf, -math.inf, 1e39, 10**400, True, None, "1", np.ones(1), 1j]


def refused(function: Callable[..., None], arguments: dict[str, Any], name: str, value: object) -> None:
    # A wrong draws or images shows as a mismatch with the next array.
    also = {"draws": "|outputs|out", "images": "|outputs|out"}.get(name, "")
    with pytest.raises(ValueError, match=f"^({name}{also}): expected "):
        function(**{**arguments, name: value})
    for key in ("out", "maps", "scores"):
        assert key not in arguments or np.isnan(arguments[key]).all(), "written before the check"


@pytest.mark.parametrize("change", range(len(ARRAYS)))
@pytest.mark.parametrize("name", ["images", "out"])
def test_noise_refuses_arrays(rng: np.random.Generator, name: str, change: int) -> None:
    arguments = noise_arguments(rng)
    refused(_native.noise, arguments, name, ARRAYS[change](arguments[name]))


@pytest.mark.parametrize("change", range(len(ARRAYS)))
@pytest.mark.parametrize("name", ["images", "outputs", "mu", "inverse_spread", "maps", "scores"])
def test_reconstruction_error_refuses_arrays(rng: np.random.Generator, name: str, change: int) -> None:
    arguments = error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    refused(_native.reconstruction_error, arguments, name, ARRAYS[change](arguments[name]))


def test_numbers_are_refused(rng: np.random.Generator) -> None:
    error = error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    for function, arguments in ((_native.noise, noise_arguments(rng)), (_native.reconstruction_error, error)):
        for name, argument in arguments.items():
            if isinstance(argument, float):
                for value in FLOATS:
                    refused(function, arguments, name, value)
            elif isinstance(argument, int):
                for value in (*INTEGERS[name], 1.0, True, None, "1", np.ones(1)):
                    refused(function, arguments, name, value)
    for weights in (None, 1.0, (1.0,) * 3, (1.0,) * 5, "1111", (1.0, 1.0, 1.0, -0.1), (1.0, math.nan, 1.0, 1.0), [True] * 4):
        refused(_native.reconstruction_error, error, "scale_weights", weights)


def test_numpy_numbers_are_taken(rng: np.random.Generator) -> None:
    arguments = noise_arguments(rng)
    _native.noise(**{**arguments, "draws": np.int64(2), "seed": np.uint64(1), "signal": np.float32(0.9), "noise": 0})
    assert np.isfinite(arguments["out"]).all()


@pytest.mark.parametrize(("h", "w", "c"), [(12, 16, 3), (16, 12, 3), (16, 16, 2), (16, 16, 4), (4104, 8, 1), (8, 4104, 1)])
def test_frame_shapes_are_refused(rng: np.random.Generator, h: int, w: int, c: int) -> None:
    arguments = error_arguments(Case(rng, (1, h, w, c, 1), coefficients()))
    refused(_native.reconstruction_error, arguments, "images", arguments["images"])


def test_read_only_outputs_are_refused(rng: np.random.Generator) -> None:
    arguments = noise_arguments(rng)
    refused(_native.noise, arguments, "out", frozen(filled((4, 3, 16, 24))))
    error = error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    for name in ("maps", "scores"):
        refused(_native.reconstruction_error, error, name, frozen(error[name].copy()))


def test_overlap_is_refused(rng: np.random.Generator) -> None:
    error = error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    flat = error["outputs"].ravel()
    for value in (flat[-768:].reshape(2, 16, 24), flat[:768].reshape(2, 16, 24)):
        refused(_native.reconstruction_error, error, "maps", value)
    refused(_native.reconstruction_error, error, "scores", flat[-2:])
    refused(_native.reconstruction_error, error, "maps", np.broadcast_to(error["mu"], (2, 16, 24)))
    space = filled((4 * 3 * 16 * 24,))
    images = space.view(np.uint8)[: 2 * 16 * 24 * 3].reshape(2, 16, 24, 3)
    refused(_native.noise, {**noise_arguments(rng), "images": images}, "out", space.reshape(4, 3, 16, 24))


def test_wrong_calls_are_type_errors() -> None:
    for function in (_native.noise, _native.reconstruction_error, _native.normals):
        with pytest.raises(TypeError):
            function()  # type: ignore[call-arg]


def test_weights_are_used_as_given(rng: np.random.Generator) -> None:
    """The map is linear in the weights: checked apart from the reference."""
    case = Case(rng, (1, 16, 16, 1, 1), coefficients())
    case.mu, case.inverse_spread = np.zeros((16, 16), np.float32), np.ones((16, 16), np.float32)
    config = ScoreConfig(scale_weights=(0.1, 0.2, 0.3, 0.4), filter_size=3)
    _, together = case.run(config)
    parts = np.zeros((1, 16, 16))
    for i, weight in enumerate(config.scale_weights):
        _, part = case.run(replace(config, scale_weights=tuple(weight if j == i else 0.0 for j in range(4))))  # type: ignore[arg-type]
        assert part is not None
        parts += part
    np.testing.assert_allclose(together, parts, rtol=1e-5)
