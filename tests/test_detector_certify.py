"""Detector.certify: what a certificate depends on, where it stops, what it says, and that a fault is no vote."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import certifiable, small_model, without_norm
from numpy.typing import NDArray
from parts import disc, scratched
from pictures import POSE, part

from advrad_fast import Certificate, Detector, certify, lattice, voting
from advrad_fast.errors import BackendUnavailableError, ConfigError, ImageError, InferenceError, PartNotFoundError

MODEL = certifiable(without_norm(small_model(spread=True)), 0.125, 0.25)
PIXELS = 32 * 32 * 3
_rng = np.random.default_rng(1)
GOOD, BAD = disc(_rng, 32), scratched(_rng, 32)


def make(backend: str = "reference", model: Any = MODEL, **options: Any) -> Detector:
    if backend == "cpu":
        options = {"cache_dir": False, "precision": "fp32", **options}
    return Detector(model, backend=backend, **{"threads": 1, **options})


@pytest.fixture(scope="module", params=["reference", "cpu"])
def detector(request: pytest.FixtureRequest) -> Detector:
    return make(request.param)


@pytest.fixture(scope="module")
def draws() -> NDArray[np.float32]:
    """Scores of GOOD at sigma 0.25, seed 3, from the plain form."""
    return make().smoothed_scores(GOOD, 120, sigma=0.25, seed=3)


def test_backends_vote_alike(detector: Detector, draws: NDArray[np.float32]) -> None:
    got = detector.smoothed_scores(GOOD, 120, sigma=0.25, seed=3)
    assert got.dtype == np.float32 and len(set(got.tolist())) > 100
    np.testing.assert_allclose(got, draws, rtol=5e-6)  # tests/test_cpu_votes.py has what was measured
    assert not np.array_equal(detector.smoothed_scores(GOOD, 20, sigma=0.125, seed=3), draws[:20])


def test_the_weights_are_those_of_the_sigma(detector: Detector) -> None:
    smoothing = MODEL.smoothing[1]
    assert smoothing.affine is not None
    plain = dataclasses.replace(smoothing, affine=np.stack([np.ones_like(smoothing.affine[0]), 0 * smoothing.affine[1]]))
    other = make(detector.backend.split()[0], dataclasses.replace(MODEL, smoothing=(plain,)))
    assert (other.smoothed_scores(GOOD, 3, seed=0) != detector.smoothed_scores(GOOD, 3, sigma=0.25, seed=0)).all()


def test_a_score_sees_the_sum_of_image_and_noise_alone(detector: Detector) -> None:
    """x and x' under delta and delta' with x + delta = x' + delta' have one score, bit for bit."""
    z = lattice.integers(PIXELS, 0.25, seed=8).reshape(3, 32, 32).transpose(1, 2, 0)
    total = GOOD.astype(np.int64) + z
    seen = []
    for x in (GOOD, BAD, np.zeros_like(GOOD), np.full_like(GOOD, 255)):
        votes = detector._votes(MODEL.smoothing[1])
        seen.append(with_noise(votes, x, total - x))
    assert len(set(seen)) == 1
    assert seen[0] == detector.smoothed_scores(GOOD, 1, sigma=0.25, seed=8)[0]
    assert with_noise(votes, GOOD, total - GOOD + 1) != seen[0]


def test_the_noise_operation_gives_the_sum_and_nothing_else() -> None:
    """Whatever the image and the delta, one sum of integers is one number at the network's input."""
    from advrad_fast import _native as operations

    table, found = operations.Lattice(lattice.thresholds(0.25)), {}
    for seed, image in enumerate((GOOD, BAD, np.random.default_rng(0).integers(0, 256, GOOD.shape, dtype=np.uint8))):
        x = np.empty((4, 3, 32, 32), np.float32)
        operations.noise(image[None], 4, seed, 0.9, 0.4, 1.1, x, lattice=table)
        for draw in range(4):
            z = lattice.integers(PIXELS, 0.25, seed=seed, draw=draw).reshape(3, 32, 32)
            for total, value in zip((image.transpose(2, 0, 1) + z).ravel().tolist(), x[draw].ravel().tolist(), strict=True):
                assert found.setdefault(total, value) == value
    assert len(found) > 300


def with_noise(votes: Any, x: NDArray[np.uint8], z: NDArray[np.int64]) -> float:
    """The score under a given delta: the noise operation is replaced, what follows it is not."""
    from advrad_fast.backends import cpu_votes, reference

    scale = votes._coefficients.input_scale * votes._coefficients.signal

    def noise(frame: NDArray[np.uint8], draws: int, seed: int, *rest: Any, **options: Any) -> None:
        inputs = (frame[0].astype(np.int64) + z).transpose(2, 0, 1).astype(np.float32) * np.float32(2 / 255) - np.float32(1)
        rest[3][:] = inputs * np.float32(scale)

    def integers(count: int, sigma: float, *, seed: int, draw: int) -> NDArray[np.int32]:
        return z.transpose(2, 0, 1).astype(np.int32).reshape(-1)

    with pytest.MonkeyPatch.context() as patch:
        if isinstance(votes, reference.ReferenceVotes):
            patch.setattr(reference.lattice, "integers", integers)
            return float(votes.scores(x, seed=0, draws=1)[0])
        patch.setattr(cpu_votes, "operations", Patched(cpu_votes.operations, noise))
        return float(votes.scores(x, seed=0, draws=1)[0])


class Patched:
    def __init__(self, native: Any, noise: Any) -> None:
        self._native, self.noise = native, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class Drawn:
    """Votes from a list, in batches of any size."""

    def __init__(self, scores: NDArray[np.float32], batch: int) -> None:
        self._scores, self.batch, self.asked = scores, batch, 0

    def scores(self, image: Any, *, seed: int, draws: int, first_draw: int = 0) -> NDArray[np.float32]:
        assert 0 < draws <= self.batch and first_draw == self.asked
        self.asked += draws
        return self._scores[first_draw : first_draw + draws]


def drawing(scores: NDArray[np.float32], batch: int) -> tuple[Detector, Drawn]:
    """A detector whose draws at sigma 0.25 are these."""
    votes = Drawn(scores, batch)
    STAND_IN._smoothed[0.25] = votes
    return STAND_IN, votes


STAND_IN = make()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 1.0),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([None, 0.0, 0.1, 0.2]),
    st.integers(0, 2**32 - 1),
)
def test_the_batch_decides_nothing(p: float, batch: int, max_votes: int, radius: float | None, seed: int) -> None:
    scores = (np.random.default_rng(seed).random(max_votes) < p).astype(np.float32)
    certificates = []
    for size in (1, batch, max_votes):
        detector, votes = drawing(scores, size)
        certificates.append(detector.certify(GOOD, radius, sigma=0.25, max_votes=max_votes, threshold=0.5))
        used = certificates[-1].votes
        assert used <= votes.asked < used + size  # no batch after the one that settles it
    assert certificates[0] == certificates[1] == certificates[2]
    if radius is not None:  # one vote at a time, by hand
        test = certify.DecisionTest(radius, 0.25, pixels=PIXELS)
        for vote in scores > 0.5:
            if test.update(np.array([vote])):
                break
        assert certificates[0] == test.certificate(0.5)


def test_what_a_certificate_says(detector: Detector, draws: NDArray[np.float32]) -> None:
    low, high = float(draws.min()), float(draws.max())
    for threshold, outcome in ((2 * high, "OK"), (low / 2, "DEFECT")):
        certificate = detector.certify(GOOD, 0.2, sigma=0.25, seed=3, threshold=threshold)
        assert certificate == Certificate(
            outcome=outcome,
            radius=0.2,
            votes=32,
            p_lower=certify.vote_probability(0.2, 0.25, pixels=PIXELS),
            sigma=0.25,
            alpha=0.001,
            threshold=threshold,
            method="anytime",
        )
        most = detector.certify(GOOD, sigma=0.25, seed=3, threshold=threshold, max_votes=100, alpha=0.01)
        bound = float(certify.anytime_lower_bound(100, 100, 0.005))
        assert (most.outcome, most.votes, most.p_lower, most.alpha) == (outcome, 100, bound, 0.01)
        assert most.radius == float(certify.radius(bound, 0.25, pixels=PIXELS)) > 0.2
    middle = detector.certify(GOOD, 0.2, sigma=0.25, seed=3, threshold=float(np.median(draws)))
    assert (middle.outcome, middle.radius) == ("ABSTAIN", 0.0) and 5 < middle.votes < 120
    short = detector.certify(GOOD, 0.2, sigma=0.25, seed=3, threshold=2 * high, max_votes=31)
    assert (short.outcome, short.votes, short.radius) == ("ABSTAIN", 31, 0.0)
    none = detector.certify(GOOD, sigma=0.25, seed=3, threshold=float(np.median(draws)), max_votes=100)
    assert (none.outcome, none.radius, none.votes) == ("ABSTAIN", 0.0, 100)


def test_a_vote_is_a_defect_above_the_threshold_alone() -> None:
    scores = np.full(40, 0.75, np.float32)
    for threshold, outcome in ((0.75, "OK"), (np.nextafter(0.75, 0), "DEFECT")):
        detector, _ = drawing(scores, 8)
        assert detector.certify(GOOD, 0.2, sigma=0.25, threshold=float(threshold)).outcome == outcome


def test_the_models_threshold_and_seed_are_the_default(detector: Detector) -> None:
    certificate = detector.certify(GOOD, 0.01, sigma=0.25, seed=3)
    assert certificate.threshold == MODEL.smoothing[1].threshold != detector.threshold
    assert certificate == detector.certify(GOOD, 0.01, sigma=0.25, seed=3)
    seeds = []
    scores = detector._votes(MODEL.smoothing[1]).scores

    class Spy:
        batch = 4

        def scores(self, image: Any, *, seed: int, draws: int, first_draw: int = 0) -> NDArray[np.float32]:
            seeds.append(seed)
            return scores(image, seed=seed, draws=draws, first_draw=first_draw)

    other = make(seed=0)
    other._smoothed[0.25] = Spy()
    for _ in range(3):
        other.certify(GOOD, sigma=0.25, max_votes=8)
    assert len(set(seeds)) == 3 and len(seeds) == 6  # fresh for every certificate, one for all its batches


def test_the_choice_of_sigma(detector: Detector) -> None:
    def chosen(radius: float | None, **options: Any) -> float:
        return detector.certify(GOOD, radius, **{"max_votes": 1000, "threshold": 1e9, **options}).sigma

    assert chosen(0.1) == 0.125
    assert chosen(0.5) == 0.25  # 4 sigmas of 0.125 take over 10,000 votes
    assert chosen(0.2, max_votes=40) == 0.25  # 100 votes there, 32 here
    assert chosen(0.1, sigma=0.25) == 0.25
    assert chosen(None, max_votes=20) == 0.125
    hopeless = detector.certify(GOOD, 1.2, max_votes=100)
    assert (hopeless.outcome, hopeless.sigma) == ("ABSTAIN", 0.25)
    with pytest.raises(ConfigError, match=r"radius: expected at most .* at sigma 0\.25"):
        chosen(5.0)


def test_least_votes() -> None:
    assert voting.least_votes(0.2, 0.25, 0.001, pixels=PIXELS, max_votes=10_000) == 32
    assert voting.least_votes(0.2, 0.25, 0.001, pixels=PIXELS, max_votes=31) is None
    assert voting.least_votes(2.0, 0.25, 0.001, pixels=PIXELS, max_votes=10_000) is None
    assert voting.least_votes(0.55, 0.25, 0.001, pixels=PIXELS, max_votes=10_000) in range(400, 800)


def test_progress_and_interruption(detector: Detector) -> None:
    seen: list[tuple[int, int]] = []
    detector.certify(GOOD, 0.2, sigma=0.25, seed=3, threshold=0.0, on_votes=lambda *now: seen.append(now))
    assert [n for n, _ in seen] == sorted({n for n, _ in seen}) and seen[-1][0] >= 32
    assert all(n == defects for n, defects in seen)

    def interrupt(votes: int, defects: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detector.certify(GOOD, 0.2, sigma=0.25, seed=3, on_votes=interrupt)
    assert detector.certify(GOOD, 0.2, sigma=0.25, seed=3, threshold=0.0).votes == 32


def test_threads_share_a_detector(detector: Detector) -> None:
    fresh = make(detector.backend.split()[0])
    wanted = [detector.certify(GOOD, 0.1, sigma=0.25, seed=i, max_votes=60) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda i: fresh.certify(GOOD, 0.1, sigma=0.25, seed=i, max_votes=60), range(6)))
    assert got == wanted


def test_alignment_is_said_and_a_part_that_is_not_found_is_no_vote() -> None:
    aligned = make(model=certifiable(small_model(pose=POSE), 0.25))
    found = aligned.certify(part(), 0.1, threshold=1e9)
    assert (found.outcome, found.aligned) == ("OK", True) and "laid level" in found.about
    blank = np.full((100, 120, 3), 200, np.uint8)
    for radius in (0.1, None):
        lost = aligned.certify(blank, radius, threshold=1e9)
        assert (lost.outcome, lost.radius, lost.votes, lost.p_lower, lost.aligned) == ("ABSTAIN", 0.0, 0, 0.0, True)
    with pytest.raises(PartNotFoundError):
        aligned.smoothed_scores(blank, 3)
    assert not make().certify(GOOD, 0.1, threshold=1e9).aligned


def test_a_fault_is_no_vote() -> None:
    for backend in ("reference", "cpu"):
        smoothing = MODEL.smoothing[1]
        assert smoothing.affine is not None
        huge = np.array(smoothing.affine)
        huge[0] = 1e6  # activations beyond fp32
        broken = make(backend, dataclasses.replace(MODEL, smoothing=(dataclasses.replace(smoothing, affine=huge),)))
        with pytest.raises(InferenceError, match="scores: expected finite numbers"):
            broken.certify(GOOD, 0.1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_memory_is_no_vote(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make(backend)
    wanted = detector.certify(GOOD, 0.1, seed=1)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    for name in ("images.prepare", "Detector._votes"):
        with monkeypatch.context() as patch:
            patch.setattr(f"advrad_fast.detector.{name}", fail)
            for call in (lambda: detector.certify(GOOD, 0.1), lambda: detector.smoothed_scores(GOOD, 4)):
                with pytest.raises(InferenceError, match="out of memory"):
                    call()
    with monkeypatch.context() as patch, pytest.raises(InferenceError, match="out of memory"):
        patch.setattr(type(detector._votes(MODEL.smoothing[0])), "scores", fail)
        detector.certify(GOOD)
    assert detector.certify(GOOD, 0.1, seed=1) == wanted


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"radius": -0.1}, "radius"),
        ({"radius": "0.1"}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"radius": float("inf")}, "radius"),
        ({"radius": True}, "radius"),
        ({"sigma": 0.3}, "sigma"),
        ({"sigma": True}, "sigma"),
        ({"sigma": "0.25"}, "sigma"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1}, "alpha"),
        ({"max_votes": 0}, "max_votes"),
        ({"max_votes": 1.0}, "max_votes"),
        ({"max_votes": True}, "max_votes"),
        ({"max_votes": 10**7}, "max_votes"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "1"}, "threshold"),
    ],
)
@pytest.mark.parametrize("sigma", [None, 0.25])
def test_refusals(detector: Detector, options: dict[str, Any], name: str, sigma: float | None) -> None:
    given = {"radius": 0.1, "sigma": sigma, **options}
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        detector.certify(GOOD, **given)
    if name in ("alpha", "max_votes", "seed", "threshold"):
        with pytest.raises(ConfigError, match=f"^{name}: expected"):
            detector.certify(GOOD, **{**given, "radius": None})


def test_more_refusals(detector: Detector) -> None:
    with pytest.raises(ImageError, match="frame"):
        detector.certify(GOOD.astype(np.int64), 0.1)
    with pytest.raises(ConfigError, match="certify: expected a model that has a sigma"):
        make(model=small_model()).certify(GOOD, 0.1)
    for draws in (0, 2.0, True):
        with pytest.raises(ConfigError, match=r"^draws: expected"):
            detector.smoothed_scores(GOOD, draws)  # type: ignore[arg-type]


def test_backend_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise BackendUnavailableError("no")

    monkeypatch.setattr(detector._backend, "votes", refuse)
    with pytest.raises(BackendUnavailableError):
        detector.certify(GOOD, 0.1)
