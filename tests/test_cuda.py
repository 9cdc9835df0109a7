"""The CUDA backend on the fake driver: pycuda, launcher and the kernels' PTX are real; ONNX Runtime stands in for TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from emulated_engine import EmulatedEngine, teach
from gpu_emulation.driver import Code, FakeDriver
from numpy.typing import NDArray

from advrad_fast import graph
from advrad_fast.backends.base import Scores
from advrad_fast.backends.cpu import CpuBackend
from advrad_fast.backends.cuda import CudaBackend
from advrad_fast.backends.reference import ReferenceBackend
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, ScoreConfig, UNetConfig
from advrad_fast.errors import ConfigError, ImageError, InferenceError

HEIGHT, WIDTH = 16, 24


def settings(**changes: Any) -> DetectorConfig:
    prediction, channels = changes.pop("prediction", "eps"), changes.get("channels", 3)
    return DetectorConfig(
        unet=UNetConfig(
            in_channels=channels, base_channels=8, channel_mult=(1, 2), norm_groups=4, patch=2, prediction=prediction
        ),
        diffusion=DiffusionConfig(draws=changes.pop("draws", 2)),
        score=ScoreConfig(filter_size=changes.pop("filter_size", 5)),
        image=ImageConfig(height=HEIGHT, width=WIDTH, **changes),
    )


CONFIG = settings()


def weights_of(config: DetectorConfig) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(7)
    made = {}
    for name, shape in graph.expected_tensors(config.unet).items():
        values = rng.standard_normal(shape)
        scale = np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 5.0
        made[name] = (1.0 + 0.3 * values if "norm" in name and name.endswith("weight") else values / scale).astype(np.float32)
    return made


MU = np.linspace(0.0, 0.2, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
INVERSE_SPREAD = np.linspace(0.5, 2.0, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)


def frames() -> NDArray[np.uint8]:
    """Black, white, saturated red, a gradient, noise."""
    images = np.zeros((5, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[1] = 255
    images[2, ..., 0] = 255
    images[3] = np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None]
    images[4] = np.random.default_rng(3).integers(0, 256, images[4].shape)
    return images


@pytest.fixture
def engine(driver: FakeDriver, executable: Any, monkeypatch: pytest.MonkeyPatch) -> EmulatedEngine:
    teach(driver, executable)
    monkeypatch.setenv("ADVRAD_KERNELS", str(executable.folder))
    return EmulatedEngine(driver, monkeypatch)


@pytest.fixture
def make(engine: EmulatedEngine) -> Iterator[Callable[..., CudaBackend]]:
    """Makes backends, and closes them."""
    made: list[CudaBackend] = []

    def build(config: DetectorConfig = CONFIG, **options: Any) -> CudaBackend:
        options = {"precision": "fp32", "cache_dir": False, "weights": weights_of(config), **options}
        made.append(CudaBackend(config, mu=MU, inverse_spread=INVERSE_SPREAD, **options))
        return made[-1]

    yield build
    for backend in made:
        backend.close()


def difference(got: Scores, wanted: Scores) -> float:
    """The worst of scores and maps, relative to a map's largest value."""
    assert got.maps is not None and wanted.maps is not None
    scores = np.abs(got.scores - wanted.scores) / wanted.scores
    maps = np.abs(got.maps - wanted.maps).max(axis=(1, 2)) / wanted.maps.max(axis=(1, 2))
    return float(max(scores.max(), maps.max()))


# Of :func:`difference`, worst seen over 10 seeds: fp32, over the four parametrisations, 7.9e-7, times 4; fp16 2.0e-4, times 4.
# On a real GPU, whose network has other kernels: test_gpu_backend.
BOUNDS = {"fp32": 3.2e-6, "fp16": 8e-4}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_equals_the_reference(make: Callable[..., CudaBackend], prediction: str) -> None:
    config, images = settings(prediction=prediction), frames()
    weights = weights_of(config)
    backend = make(config)
    assert (backend.name, backend.precision) == ("cuda", "fp32")
    got = backend.score(images, seed=11, want_maps=True)
    assert got.maps is not None and got.scores.dtype == got.maps.dtype == np.float32
    np.testing.assert_array_equal(got.scores, got.maps.max(axis=(1, 2)))
    for other in (
        ReferenceBackend(config, weights, MU, INVERSE_SPREAD),
        CpuBackend(config, weights, MU, INVERSE_SPREAD, precision="fp32", cache_dir=False, threads=1),
    ):
        assert difference(got, other.score(images, seed=11, want_maps=True)) <= BOUNDS["fp32"]


def test_fp16_equals_the_reference(engine: EmulatedEngine, make: Callable[..., CudaBackend]) -> None:
    engine.use("fp16")
    backend, images = make(precision="auto"), frames()
    assert backend.precision == "fp16"
    wanted = ReferenceBackend(CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD).score(images, seed=11, want_maps=True)
    assert difference(backend.score(images, seed=11, want_maps=True), wanted) <= BOUNDS["fp16"]


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_grey_equals_the_reference(driver: FakeDriver, make: Callable[..., CudaBackend], prediction: str) -> None:
    """One channel: its own kernels, and a third of the bytes."""
    config, images = settings(prediction=prediction, channels=1), frames()[..., 1:2]
    weights, backend = weights_of(config), make(config)
    got = backend.score(images, seed=11, want_maps=True)
    for other in (
        ReferenceBackend(config, weights, MU, INVERSE_SPREAD),
        CpuBackend(config, weights, MU, INVERSE_SPREAD, precision="fp32", cache_dir=False, threads=1),
    ):
        assert difference(got, other.score(images, seed=11, want_maps=True)) <= BOUNDS["fp32"]
    _, _, copied = spent(driver, lambda: backend.score(images[:1], seed=11, want_maps=False))
    assert copied == {"htod": HEIGHT * WIDTH, "dtoh": 4}
    with pytest.raises(ImageError, match=r"expected uint8 \(N, 16, 24, 1\)"):
        backend.score(frames(), seed=11, want_maps=False)


@pytest.mark.parametrize("filter_size", [1, 67])
def test_filters_of_every_size(make: Callable[..., CudaBackend], filter_size: int) -> None:
    """Also those that take a kernel more."""
    config, images = settings(filter_size=filter_size), frames()
    got = make(config).score(images, seed=3, want_maps=True)
    wanted = ReferenceBackend(config, weights_of(config), MU, INVERSE_SPREAD).score(images, seed=3, want_maps=True)
    assert difference(got, wanted) <= BOUNDS["fp32"]


def test_result_depends_on_frame_and_seed_alone(make: Callable[..., CudaBackend]) -> None:
    backend, images = make(), frames()
    together = backend.score(images, seed=5, want_maps=True)
    assert together.maps is not None
    for i in reversed(range(len(images))):
        alone = backend.score(images[i : i + 1], seed=5, want_maps=True)
        assert alone.maps is not None and np.array_equal(alone.maps[0], together.maps[i])
        assert backend.score(images[i : i + 1], seed=6, want_maps=False).scores != together.scores[i]
        assert backend.score(images[i : i + 1], seed=5, want_maps=False).scores == together.scores[i]
    for seed in (2**64 - 1, 2**63, 0):
        with_map, without = (backend.score(images[:1], seed=seed, want_maps=maps) for maps in (True, False))
        assert with_map.scores == without.scores and without.maps is None
    assert set(together.timings) == {"device"}
    assert backend.score(images[:0], seed=0, want_maps=True).scores.shape == (0,)


# What a frame costs the host

FRAME = HEIGHT * WIDTH * 3
PUSHED = {"cuCtxPushCurrent_v2": 1, "cuCtxPopCurrent_v2": 1}


def spent(driver: FakeDriver, action: Callable[[], Scores]) -> tuple[Scores, dict[str, int], dict[str, int]]:
    """What an action gives, and the driver's calls and the bytes copied by it."""
    counters = driver.counters
    calls, copied = counters.calls.copy(), counters.copied_bytes.copy()
    before = counters.synchronisations, counters.allocations, counters.host_allocations
    result = action()
    after = counters.synchronisations, counters.allocations, counters.host_allocations
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 0, 0]  # one wait, no memory
    return result, dict(counters.calls - calls), dict(counters.copied_bytes - copied)


@pytest.mark.parametrize("maps", [False, True])
def test_a_frame_is_one_graph(driver: FakeDriver, make: Callable[..., CudaBackend], maps: bool) -> None:
    """In steady state: one launch, one wait, no allocation, the frame in, the score out, and the map if asked for."""
    backend, images = make(), frames()
    wanted = [make(graphs=False).score(images[i : i + 1], seed=i, want_maps=maps) for i in range(5)]
    backend.score(images[:1], seed=0, want_maps=maps)
    moved = {"htod": FRAME, "dtoh": 4 + (4 * HEIGHT * WIDTH if maps else 0)}
    for i in range(5):
        got, calls, copied = spent(driver, lambda i=i: backend.score(images[i : i + 1], seed=i, want_maps=maps))  # type: ignore[misc]
        updates = {"cuGraphExecKernelNodeSetParams": 2} if i else {}
        assert calls == {**PUSHED, "cuGraphLaunch": 1, "cuStreamSynchronize": 1, **updates} and copied == moved
        assert got.scores == wanted[i].scores and np.array_equal(got.maps, wanted[i].maps)  # type: ignore[arg-type]


def test_a_frame_without_graphs(driver: FakeDriver, make: Callable[..., CudaBackend]) -> None:
    backend, images = make(graphs=False), frames()
    _, calls, copied = spent(driver, lambda: backend.score(images[:1], seed=4, want_maps=False))
    once = {"cuMemcpyHtoDAsync_v2": 1, "cuMemcpyDtoHAsync_v2": 1, "cuLaunchKernel": 3, "cuStreamSynchronize": 1}
    assert calls == {**PUSHED, **once} and copied == {"htod": FRAME, "dtoh": 4}


CAPTURING = (
    *("cuStreamBeginCapture", "cuStreamGetCaptureInfo", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"),
    *("cuGraphKernelNodeGetParams", "cuLaunchKernel", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"),
)


@pytest.mark.parametrize("call", CAPTURING)
def test_a_capture_that_fails(
    driver: FakeDriver, make: Callable[..., CudaBackend], caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Is said once, and every kernel is launched on its own from then on: the same scores."""
    backend, images = make(), frames()
    wanted = make().score(images[3:4], seed=2, want_maps=False)
    driver.fail(call, Code.STREAM_CAPTURE_UNSUPPORTED)
    for _ in range(2):
        assert backend.score(images[3:4], seed=2, want_maps=False).scores == wanted.scores
    assert caplog.text.count("no CUDA graph, every kernel is launched on its own: ") == 1
    assert driver.counters.graph_launches == 1
    assert backend.score(images[3:4], seed=2, want_maps=True).scores == wanted.scores  # which has a graph of its own
    assert driver.counters.graph_launches == 2


def test_tensorrt_cannot_be_captured(
    driver: FakeDriver, engine: EmulatedEngine, make: Callable[..., CudaBackend], caplog: pytest.LogCaptureFixture
) -> None:
    backend, images = make(), frames()
    engine.trt.fail = "execute_async_v3"
    with pytest.raises(InferenceError, match="cannot run the network"):  # neither in the capture nor outside of it
        backend.score(images[:1], seed=0, want_maps=False)
    assert "no CUDA graph" in caplog.text
    engine.trt.fail = ""
    backend.score(images[:1], seed=0, want_maps=False)
    assert driver.counters.graph_launches == 1


def test_profile(make: Callable[..., CudaBackend]) -> None:
    backend, image = make(), frames()[4]
    wanted = backend.score(image[None], seed=9, want_maps=False)
    taken = backend.profile(image, seed=9, want_maps=True, runs=3)
    assert list(taken) == ["copy_in", "noise", "network", "error", "copy_out"]
    assert all(times.shape == (3,) and times.dtype == np.float64 and (times >= 0).all() for times in taken.values())
    assert backend.score(image[None], seed=9, want_maps=False).scores == wanted.scores
    with pytest.raises(ConfigError, match="runs"):
        backend.profile(image, runs=0)
    with pytest.raises(ImageError, match="images"):
        backend.profile(image[:-1])
