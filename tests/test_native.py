"""What the C++ operations refuse, and what they leave alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from operations import Case, coefficients, filled, frames, frozen

from advrad_fast import _native
from advrad_fast.config import ScoreConfig


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
        "out": filled((4, 3, 16, 24)), "first_draw": 0, "normals": np.zeros((2, 3, 16, 24), dtype=np.float32), "threads": 1,
    }  # fmt: skip


def error_arguments(case: Case) -> dict[str, Any]:
    n, h, w, _ = case.images.shape
    return {
        "images": case.images, "inputs": case.inputs, "outputs": case.outputs, "draws": case.draws, "input_coefficient": -1.1,
        "output_coefficient": 0.5, "scale_weights": (0.25,) * 4, "filter_size": 15, "mu": case.mu,
        "inverse_spread": case.inverse_spread, "maps": filled((n, h, w)), "scores": filled((n,)), "threads": 1,
    }  # fmt: skip


ARRAYS: list[Callable[[Any], Any]] = [
    lambda a: 1,
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
    lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape) if a.itemsize > 1 else a[::-1],
]
INTEGERS = {
    "draws": [0, -1, 1, 3, 2**70], "seed": [-1, 2**64], "filter_size": [0, -1, 2, 257, 2**70],
    "first_draw": [-1, 2**32 - 1, 2**32], "threads": [0, -1, 1025, 2**70],
}  # fmt: skip
FLOATS = [math.nan, math.inf, -math.inf, 1e39, 10**400, True, None, "1", np.ones(1), 1j]


def refused(function: Callable[..., None], arguments: dict[str, Any], name: str, value: object) -> None:
    # Some wrong arguments show as a mismatch with the next array.
    also = {"draws": "|out|normals|scores", "images": "|out|normals", "outputs": "|images|inputs"}.get(name, "")
    with pytest.raises(ValueError, match=f"^({name}{also}): expected "):
        function(**{**arguments, name: value})
    for key in ("out", "maps", "scores"):
        assert key not in arguments or np.isnan(arguments[key]).all(), "written before the check"


@pytest.mark.parametrize("change", range(len(ARRAYS)))
@pytest.mark.parametrize("name", ["images", "normals", "out"])
def test_noise_refuses_arrays(rng: np.random.Generator, name: str, change: int) -> None:
    arguments = noise_arguments(rng)
    refused(_native.noise, arguments, name, ARRAYS[change](arguments[name]))


@pytest.mark.parametrize("change", range(len(ARRAYS)))
@pytest.mark.parametrize("name", ["images", "inputs", "outputs", "mu", "inverse_spread", "maps", "scores"])
def test_reconstruction_error_refuses_arrays(rng: np.random.Generator, name: str, change: int) -> None:
    arguments = error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    refused(_native.reconstruction_error, arguments, name, ARRAYS[change](arguments[name]))


def test_what_may_be_none(rng: np.random.Generator) -> None:
    noise, error = noise_arguments(rng), error_arguments(Case(rng, (2, 16, 24, 3, 2), coefficients()))
    for name in ("images", "out"):
        refused(_native.noise, noise, name, None)
    for name in ("outputs", "mu", "inverse_spread", "scores"):
        refused(_native.reconstruction_error, error, name, None)
    refused(_native.reconstruction_error, {**error, "images": None}, "inputs", None)
    for name in ("images", "inputs", "maps"):
        _native.reconstruction_error(**{**error, name: None})
        assert np.isfinite(error["scores"]).all()


@pytest.mark.parametrize("function", [_native.noise, _native.lattice_noise])
@pytest.mark.parametrize("value", [1, "x", np.zeros(2, dtype=np.uint64)])
def test_lattices_are_refused(rng: np.random.Generator, function: Callable[..., None], value: object) -> None:
    arguments = noise_arguments(rng) if function is _native.noise else {"count": 4, "seed": 0}
    refused(function, arguments, "lattice", value)


def test_normals_beside_a_lattice_are_refused(rng: np.random.Generator) -> None:
    arguments = {**noise_arguments(rng), "lattice": _native.Lattice(np.array([1, 2], dtype=np.uint64))}
    refused(_native.noise, arguments, "normals", arguments["normals"])


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
    outputs = np.zeros((1, c, h, w), dtype=np.float32)
    arguments = error_arguments(Case(rng, (1, 16, 16, 1, 1), coefficients()))
    refused(_native.reconstruction_error, arguments, "outputs", outputs)


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
