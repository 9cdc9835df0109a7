"""The smoothed detector's scores on the fake driver against the CPU's, what they may depend on, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from emulated_engine import EmulatedEngine
from gpu_emulation.driver import Code, FakeDriver
from test_cuda import FRAME, INVERSE_SPREAD, MU, engine, frames, settings, weights_of  # noqa: F401  # a fixture

from advrad_fast.backends.cpu_votes import CpuVotes
from advrad_fast.backends.cuda import CudaBackend
from advrad_fast.backends.cuda_votes import BATCH, CudaVotes
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, ImageError, InferenceError

SIGMA = 0.25
CONFIG = settings(prediction="x0")
IMAGE = frames()[3]
Make = Callable[..., CudaVotes]

# Relative difference of a score, worst seen over the parametrisations and 10 seeds of 7 draws: 4.9e-7, times 4.
BOUND = 2e-6


@pytest.fixture
def make(engine: EmulatedEngine) -> Iterator[Make]:  # noqa: F811
    """Makes voters, and closes them."""
    made: list[CudaVotes] = []

    def build(config: DetectorConfig = CONFIG, **options: Any) -> CudaVotes:
        options = {"sigma": SIGMA, "precision": "fp32", "cache_dir": False, "batch": 3, "weights": weights_of(config), **options}
        made.append(CudaVotes(config, mu=MU, inverse_spread=INVERSE_SPREAD, **options))
        return made[-1]

    yield build
    for votes in made:
        votes.close()


@pytest.mark.parametrize(("prediction", "channels"), [("eps", 3), ("x0", 3), ("edm", 3), ("x0", 1)])
def test_scores_equal_the_cpus(make: Make, prediction: str, channels: int) -> None:
    """The same draws: the lattice's integers are the same on every backend."""
    config = settings(prediction=prediction, channels=channels)
    options: dict[str, Any] = {"sigma": SIGMA, "precision": "fp32", "cache_dir": False, "batch": 2, "threads": 1}
    wanted = CpuVotes(config, weights_of(config), MU, INVERSE_SPREAD, **options)
    got = make(config)
    assert got.config == wanted.config and (got.batch, got.sigma) == (3, SIGMA)
    for image in (IMAGE[..., :channels], frames()[4, ..., :channels]):
        scores = got.scores(image, seed=9, draws=7, first_draw=2)
        assert scores.dtype == np.float32 and scores.shape == (7,)
        np.testing.assert_allclose(scores, wanted.scores(image, seed=9, draws=7, first_draw=2), rtol=BOUND)


def test_a_backends_votes(engine: EmulatedEngine, make: Make) -> None:  # noqa: F811
    """What certificates ask a backend for."""
    backend = CudaBackend(CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD, precision="fp32", cache_dir=False)
    votes = backend.votes(CONFIG, weights_of(CONFIG), MU, INVERSE_SPREAD, sigma=SIGMA)
    assert isinstance(votes, CudaVotes) and (votes.batch, votes.precision) == (BATCH, "fp32")
    assert np.array_equal(votes.scores(IMAGE, seed=1, draws=2), make(batch=BATCH).scores(IMAGE, seed=1, draws=2))
    votes.close()
    backend.close()


def test_a_score_depends_on_frame_seed_and_draw_alone(make: Make) -> None:
    made = make()
    scores = made.scores(IMAGE, seed=1, draws=8)
    for first, draws in ((0, 1), (3, 5), (7, 1), (2, 4)):
        assert np.array_equal(made.scores(IMAGE, seed=1, draws=draws, first_draw=first), scores[first : first + draws])
    assert not np.array_equal(made.scores(IMAGE, seed=2, draws=8), scores)
    assert made.scores(IMAGE, seed=1, draws=0).shape == (0,)
    assert np.array_equal(made.scores(np.asfortranarray(IMAGE), seed=1, draws=8), scores)
    assert np.array_equal(make(graphs=False).scores(IMAGE, seed=1, draws=8), scores)


def test_what_the_draws_cost(driver: FakeDriver, make: Make) -> None:
    """A wait and a launch a batch, updates where the draws are new; the frame goes up once a lane; no allocation."""
    made = make()
    made.scores(IMAGE, seed=1, draws=18)
    counters = driver.counters
    calls, copied = counters.calls.copy(), counters.copied_bytes.copy()
    memory = counters.allocations, counters.host_allocations
    made.scores(IMAGE, seed=1, draws=18)
    spent = dict(counters.calls - calls)
    assert spent == {
        **{"cuCtxPushCurrent_v2": 1, "cuCtxPopCurrent_v2": 1},
        **{
            "cuGraphLaunch": 6,
            "cuStreamSynchronize": 6,
            "cuGraphExecKernelNodeSetParams": 8,
        },
    }
    assert counters.copied_bytes - copied == {"htod": 2 * FRAME, "dtoh": 4 * 18}
    assert (counters.allocations, counters.host_allocations) == memory


def test_threads_take_turns(make: Make) -> None:
    made, wrong = make(), []
    wanted = [made.scores(IMAGE, seed=i, draws=4) for i in range(3)]

    def work(i: int) -> None:
        for _ in range(2):
            if not np.array_equal(made.scores(IMAGE, seed=i, draws=4), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuStreamSynchronize", "cuGraphExecKernelNodeSetParams", "cuCtxPushCurrent"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_call_fails(driver: FakeDriver, make: Make, call: str, at: int) -> None:
    made = make()
    wanted = made.scores(IMAGE, seed=1, draws=8)
    driver.fail(call, Code.OUT_OF_MEMORY, on_call=at if call != "cuCtxPushCurrent" else 1)
    with pytest.raises(InferenceError, match=f"{call}.* failed: out of memory"):
        made.scores(IMAGE, seed=2, draws=8)
    assert np.array_equal(made.scores(IMAGE, seed=1, draws=8), wanted)


def test_the_context_is_lost(driver: FakeDriver, make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    made = make()
    wanted = made.scores(IMAGE, seed=1, draws=8)
    driver.fail_work("kernel", Code.ILLEGAL_ADDRESS, on_run=5)
    with pytest.raises(InferenceError, match="illegal memory access"):
        made.scores(IMAGE, seed=1, draws=8)
    assert np.array_equal(made.scores(IMAGE, seed=1, draws=8), wanted)
    capfd.readouterr()  # pycuda says of what is gone that it is gone


def test_what_is_not_finite_is_no_vote(engine: EmulatedEngine, make: Make) -> None:  # noqa: F811
    made = make()
    wanted = made.scores(IMAGE, seed=1, draws=4)
    engine.broken = np.nan
    with pytest.raises(InferenceError, match="scores: expected finite numbers"):
        made.scores(IMAGE, seed=1, draws=4)
    engine.broken = None
    assert np.array_equal(made.scores(IMAGE, seed=1, draws=4), wanted)


def test_refusals(driver: FakeDriver, make: Make) -> None:
    made = make()
    for image in (IMAGE.astype(np.float32), IMAGE[:-1], IMAGE[None], "x"):
        with pytest.raises(ImageError, match=r"image: expected uint8 \(16, 24, 3\)"):
            made.scores(image, seed=0, draws=1)  # type: ignore[arg-type]
    for options in ({"seed": -1}, {"draws": -1}, {"draws": 1.5}, {"draws": True}, {"first_draw": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            made.scores(IMAGE, **{"seed": 0, "draws": 1, **options})  # type: ignore[arg-type]
    for options in ({"sigma": 0.0}, {"sigma": 1e3}, {"batch": 0}, {"batch": 1.0}, {"precision": "fp4"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make(**options)
    made.close()
    with pytest.raises(InferenceError, match="was closed"):
        made.scores(IMAGE, seed=0, draws=1)
    driver.fail("cuMemHostAlloc", Code.OUT_OF_MEMORY)
    with pytest.raises(BackendUnavailableError, match="cuMemHostAlloc failed: out of memory"):
        make()
