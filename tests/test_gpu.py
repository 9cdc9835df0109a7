"""Each compiled kernel through the launcher against its C++ twin: on the fake driver's emulated GPU, and on a real one.

``pytest -m gpu`` is the check on a machine with a GPU; the bodies are the same, only the shapes are larger.  The kernels are
compiled for that GPU when the tests run, so triton is needed, or ADVRAD_KERNELS names a folder of compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_emulation.fixtures import real_gpu_reason
from numpy.typing import NDArray
from operations import SHAPES, Case, coefficients, frames, run_noise

from advrad_fast import _native, lattice, schedule
from advrad_fast.config import ScoreConfig
from advrad_fast.kernels.launcher import Gpu, Kernels, open_gpu
from advrad_fast.kernels.manifest import Manifest, read_manifest

# Worst seen on the emulator, in units of the noise's standard deviation (about 1), and the factor on it.  The bounds on fp16 add
# half a unit in its last place.  They held on an H200.
NOISE_ABS = 4 * 7.2e-7
FP16_RELATIVE = 2.0**-11


class OnGpu:
    """Kernels with their arguments in NumPy arrays: copied there, launched on one stream, copied back."""

    def __init__(self, gpu: Gpu, manifest: Manifest, *, real: bool) -> None:
        self.cuda, self.kernels = gpu.cuda, Kernels(manifest, gpu)
        self.stream = gpu.cuda.Stream()
        self.kept: list[Any] = []
        self.shapes = SHAPES if real else [(1, 8, 8, 3, 1), (2, 16, 24, 3, 3), (1, 24, 40, 3, 2)]
        self.shapes = [shape for shape in self.shapes if shape[3] == 3]

    def there(self, array: NDArray[Any]) -> Any:
        """Device memory with the array's content, alive until :meth:`back` has waited: a launch keeps nothing alive."""
        place = self.cuda.mem_alloc(array.nbytes)
        self.cuda.memcpy_htod(place, np.ascontiguousarray(array))
        self.kept.append(place)
        return place

    def empty(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, NDArray[Any]]:
        """Device memory full of 0xFF bytes, and pinned memory for its content."""
        host = self.cuda.pagelocked_empty(shape, dtype)
        place = self.cuda.mem_alloc(host.nbytes)
        self.cuda.memset_d8_async(place, 0xFF, host.nbytes, self.stream)
        return place, host

    def back(self, *pairs: tuple[Any, NDArray[Any]]) -> list[NDArray[Any]]:
        for place, host in pairs:
            self.cuda.memcpy_dtoh_async(host, place, self.stream)
        self.stream.synchronize()
        self.kept.clear()
        return [host.copy() for _, host in pairs]

    def noise(self, images: NDArray[np.uint8], draws: int, seed: int, c: Any, dtype: Any, sigma: float | None) -> NDArray[Any]:
        n, h, w, channels = images.shape
        kind = "gaussian" if sigma is None else "lattice"
        word = {np.float32: "fp32", np.float16: "fp16"}[dtype]
        table = lattice.thresholds(sigma if sigma is not None else 0.1)
        out = self.empty((n * draws, channels, h, w), dtype)
        signal = c.input_scale * c.signal
        self.kernels.load("noise", layout="nchw", dtype=word, noise=kind, channels=channels)(
            self.stream,
            images=self.there(images),
            image_ids=self.there(np.zeros(n, np.int32)),
            out=out[0],
            thresholds=self.there(table),
            seed=seed,
            first_draw=0,
            draws=draws,
            frames=n,
            items=h * w // (4 if word == "fp32" else 8),
            pixel_scale=signal * 2 / 255,
            offset=-signal,
            noise_scale=0.0 if sigma is not None else c.input_scale * c.noise,
            half=len(table) // 2,
            lattice_scale=255 * (sigma or 0.1),
        )
        return self.back(out)[0]

    def reconstruction_error(self, case: Case, config: ScoreConfig) -> list[NDArray[Any]]:
        """Scores and maps of Algorithm 4, in two launches."""
        n, h, w, channels = case.images.shape
        results = len(case.outputs) // case.draws
        a, b = schedule.error_coefficients(case.c)
        x = 1 + a * case.c.input_scale * case.c.signal
        place = self.cuda.mem_alloc(4 * results * h * w)
        scores, maps = self.empty((results,), np.float32), self.empty((results, h, w), np.float32)
        weights = [weight / (channels * case.draws) for weight in config.scale_weights]
        common = {"errors": place, "scores": scores[0], "results": results, "height": h, "width": w}
        self.kernels.load("errors", dtype="fp32", noise="gaussian", channels=channels)(
            self.stream,
            images=self.there(case.images),
            image_ids=self.there(np.zeros(n, np.int32)),
            outputs=self.there(case.outputs),
            thresholds=self.there(lattice.thresholds(0.1)),
            seed=case.seed,
            first_draw=0,
            draws=case.draws,
            groups=results // n,
            pixel_scale=x * 2 / 255,
            offset=-x,
            noise_scale=a * case.c.input_scale * case.c.noise,
            output_scale=b,
            half=1,
            lattice_scale=1.0,
            **{f"weight_{2**i}": weight for i, weight in enumerate(weights)},
            **common,
        )
        margin = (config.filter_size // 2 + 3) // 4 * 4
        self.kernels.load("deviation", maps=True, wide=False)(
            self.stream,
            mu=self.there(case.mu),
            inverse_spread=self.there(case.inverse_spread),
            maps=maps[0],
            filter_size=config.filter_size,
            tiles=-(-w // (128 - 2 * margin)),
            **common,
        )
        return self.back(scores, maps)

    def votes(self, scores: NDArray[np.float32], thresholds: NDArray[np.float32], ranks: NDArray[np.int64]) -> list[NDArray[Any]]:
        n, draws = scores.shape
        counts, statistics = self.empty((n, len(thresholds)), np.int64), self.empty((n, len(ranks)), np.float32)
        common = {"scores": self.there(scores), "images": n, "draws": draws}
        for name, given, result, values in (
            ("votes_counts", "thresholds", "counts", (thresholds, counts)),
            ("votes_ranks", "ranks", "statistics", (ranks, statistics)),
        ):
            arguments = {given: self.there(values[0]), result: values[1][0], "count": len(values[0])}
            self.kernels.load(name)(self.stream, **arguments, **common)
        return self.back(counts, statistics)


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def on_gpu(request: pytest.FixtureRequest, compiled: Any) -> Iterator[OnGpu]:
    if request.param == "real":
        reason = real_gpu_reason()
        if reason is not None:
            pytest.skip(reason)
        with open_gpu() as gpu:
            major, minor = gpu.capability
            yield OnGpu(gpu, read_manifest(compiled(f"sm_{major}{minor}")), real=True)
        return
    driver = request.getfixturevalue("driver")
    manifest = request.getfixturevalue("executable")
    for kernel in manifest.kernels:
        driver.modules.know(manifest.image(kernel, "cubin"), manifest.image(kernel, "ptx").decode(), kernel.arch)
    with open_gpu() as gpu:
        yield OnGpu(gpu, manifest, real=False)


@pytest.mark.parametrize(
    ("dtype", "sigma"),
    [(np.float32, None), (np.float32, 0.125), (np.float16, None)],
    ids=["fp32-gaussian", "fp32-lattice", "fp16-gaussian"],
)
def test_noise(on_gpu: OnGpu, rng: np.random.Generator, dtype: Any, sigma: float | None) -> None:
    c = coefficients()
    for n, h, w, channels, draws in on_gpu.shapes:
        images = frames(rng, n, h, w, channels)
        options = {} if sigma is None else {"lattice": _native.Lattice(lattice.thresholds(sigma))}
        expected = run_noise(images, draws, 5, c, **options)
        got = on_gpu.noise(images, draws, 5, c, dtype, sigma).astype(np.float32)
        relative = FP16_RELATIVE if dtype == np.float16 else 0.0
        np.testing.assert_allclose(got, expected, rtol=relative, atol=NOISE_ABS)


@pytest.mark.parametrize("filter_size", [1, 15])
def test_reconstruction_error(on_gpu: OnGpu, rng: np.random.Generator, filter_size: int) -> None:
    config = ScoreConfig(filter_size=filter_size)
    for shape in on_gpu.shapes:
        case = Case(rng, shape, coefficients())
        expected, expected_maps, tolerance = case.plain(config)
        scores, maps = on_gpu.reconstruction_error(case, config)
        np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=tolerance)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)


def test_votes(on_gpu: OnGpu, rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 300)).astype(np.float32)
    scores[1, 17] = np.nan
    thresholds = rng.normal(size=11).astype(np.float32)
    ranks = np.array([0, 150, 299], np.int64)
    expected_counts, expected_statistics = _native.votes(scores, thresholds, ranks)
    counts, statistics = on_gpu.votes(scores, thresholds, ranks)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(statistics, expected_statistics)
