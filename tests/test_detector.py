"""The detector: what an inspection says, on what it depends, and that a fault is never OK."""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model
from numpy.typing import NDArray
from parts import disc, scratched
from pictures import POSE, part, scene

from advrad_fast import AdvRADError, Detector, Inspection, Outcome, calibrate
from advrad_fast.backends.base import Scores
from advrad_fast.errors import (
    BackendUnavailableError,
    CalibrationError,
    ConfigError,
    ImageError,
    InferenceError,
    ModelFileError,
    PartNotFoundError,
)

MODEL = small_model(spread=True)
_rng = np.random.default_rng(1)
GOOD, BAD = disc(_rng, 32), scratched(_rng, 32)


def make(backend: str = "reference", model: Any = MODEL, **options: Any) -> Detector:
    if backend == "cpu":
        options = {"cache_dir": False, "precision": "fp32", **options}
    return Detector(model, backend=backend, **{"threads": 1, **options})


@pytest.fixture(scope="module", params=["reference", "cpu"])
def shared(request: pytest.FixtureRequest) -> Detector:
    return make(request.param)


@pytest.fixture
def detector(shared: Detector) -> Iterator[Detector]:
    yield shared
    shared.threshold = MODEL.threshold


def same(a: Inspection, b: Inspection) -> bool:
    """Bit for bit, but for the timings."""

    def arrays(i: Inspection) -> list[bytes | None]:
        return [None if array is None else array.tobytes() for array in (i.anomaly_map, i.mask)]

    def rest(i: Inspection) -> tuple[object, ...]:
        return i.outcome, i.score, i.threshold, i.p_value, i.backend, repr(i.error)

    return rest(a) == rest(b) and arrays(a) == arrays(b)


def test_outcome_is_score_above_threshold_exactly(detector: Detector) -> None:
    score = detector.inspect(BAD).score
    assert score is not None
    below, above = math.nextafter(score, -math.inf), math.nextafter(score, math.inf)
    for threshold, outcome in (
        (below, Outcome.DEFECT),
        (score, Outcome.OK),
        (above, Outcome.OK),
        (-1.0, Outcome.DEFECT),
        (1e300, Outcome.OK),
    ):
        detector.threshold = threshold
        inspection = detector.inspect(BAD)
        assert (inspection.score, inspection.threshold, inspection.outcome) == (score, threshold, outcome)
        assert inspection.anomaly_map is not None and inspection.mask is not None
        assert np.array_equal(inspection.mask, inspection.anomaly_map.astype(np.float64) > threshold)
        assert inspection.mask.any() == (outcome is Outcome.DEFECT)
        assert detector.inspect(BAD, maps=False).outcome is outcome


def test_a_small_defect_is_marked_in_part_and_where_it_is(detector: Detector) -> None:
    values = detector.inspect(BAD).anomaly_map
    assert values is not None
    detector.threshold = float(np.sort(values.ravel())[-6])
    mask = detector.inspect(BAD).mask
    assert mask is not None and mask.dtype == np.bool_
    assert mask.sum() == 5
    assert mask.ravel()[values.argmax()]


def test_score_is_the_maps_maximum_and_p_value_is_conformal(detector: Detector) -> None:
    for frame in (GOOD, BAD, np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)):
        inspection = detector.inspect(frame)
        assert inspection.anomaly_map is not None and inspection.score is not None
        assert inspection.anomaly_map.dtype == np.float32
        assert inspection.anomaly_map.shape == (32, 32)
        assert float(inspection.anomaly_map.max()) == inspection.score
        assert inspection.p_value == calibrate.p_value(MODEL.calibration_scores, [inspection.score])[0]
        by_hand = (1 + sum(c >= inspection.score for c in MODEL.calibration_scores)) / (1 + len(MODEL.calibration_scores))
        assert inspection.p_value == by_hand


def test_maps_only_where_asked_for(detector: Detector) -> None:
    full, bare = detector.inspect(GOOD), detector.inspect(GOOD, maps=False)
    assert bare.anomaly_map is None and bare.mask is None
    assert (bare.outcome, bare.score, bare.p_value) == (full.outcome, full.score, full.p_value)
    assert [i.mask for i in detector.inspect_batch([GOOD], maps=False)] == [None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, [1.0], 1j, 10**400])
def test_thresholds_that_are_refused(value: Any) -> None:
    detector = make()
    with pytest.raises(ConfigError, match="threshold: expected a finite number"):
        detector.threshold = value
    assert detector.threshold == MODEL.threshold


@pytest.mark.parametrize("value", [0, -3.5, np.float32(0.1), np.float64(2.0), sys.float_info.max, 5e-324])
def test_thresholds_that_are_taken(value: Any) -> None:
    detector = make()
    detector.threshold = value
    assert type(detector.threshold) is float
    assert detector.threshold == value
    assert 0.0 < detector.false_alarm_rate <= 1.0
    assert MODEL.threshold == small_model().threshold  # the model keeps its own


def test_false_alarm_rate() -> None:
    detector = make()
    assert detector.false_alarm_rate == pytest.approx(5 / 51)  # the most that j / 51 allows below 0.1
    for rate, wanted in ((0.5, 25 / 51), (1 / 51, 1 / 51), (0.02, 1 / 51)):
        detector.false_alarm_rate = rate
        assert detector.threshold == calibrate.conformal_threshold(MODEL.calibration_scores, rate)
        assert detector.false_alarm_rate == pytest.approx(wanted)
        assert detector.false_alarm_rate <= rate
    detector.threshold = 0.5  # below all calibration scores
    assert detector.false_alarm_rate == 1.0
    detector.threshold = 2.0  # the largest of them
    assert detector.false_alarm_rate == 1 / 51


@pytest.mark.parametrize(
    ("rate", "error"), [(0.001, CalibrationError), (0.0, ConfigError), (1.0, ConfigError), (math.nan, ConfigError)]
)
def test_a_rate_that_cannot_be_had_changes_nothing(rate: float, error: type[Exception]) -> None:
    detector = make()
    with pytest.raises(error):
        detector.false_alarm_rate = rate
    assert detector.threshold == MODEL.threshold


def test_seeds(detector: Detector) -> None:
    assert same(detector.inspect(GOOD), detector.inspect(GOOD))
    assert same(detector.inspect(GOOD), detector.inspect(GOOD, seed=0))  # the default
    scores = {detector.inspect(GOOD, seed=seed).score for seed in (0, 1, 2**32, 2**64 - 1)}
    assert len(scores) == 4
    assert same(detector.inspect_batch([GOOD], seed=5)[0], detector.inspect(GOOD, seed=np.uint64(5)))  # type: ignore[arg-type]


def test_the_detectors_seed_and_none() -> None:
    assert same(make(seed=9).inspect(GOOD), make().inspect(GOOD, seed=9))
    secret = make(seed=None)
    assert len({secret.inspect(GOOD, maps=False).score for _ in range(4)}) == 4
    assert len({i.score for i in secret.inspect_batch([GOOD] * 4, maps=False)}) == 4
    assert same(secret.inspect(GOOD, seed=9), make(seed=9).inspect(GOOD))


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.5, "0"])
def test_seeds_that_are_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed: expected"):
        make(seed=seed)
    detector = make()
    with pytest.raises(ConfigError, match="seed: expected"):
        detector.inspect(GOOD, seed=seed)
    with pytest.raises(ConfigError, match="seed: expected"):
        detector.inspect_batch([GOOD], seed=seed)


BROKEN: list[Any] = [
    None,
    "frame.png",
    GOOD.astype(np.int32),
    np.zeros((0, 4), np.uint8),
    np.full((32, 32), np.nan),
    np.full((32, 32), 2.0),
    GOOD[None],
]


@pytest.mark.parametrize("frame", BROKEN)
def test_a_bad_frame_is_raised(frame: Any) -> None:
    with pytest.raises(ImageError, match="frame: expected"):
        make().inspect(frame)


def test_in_a_batch_bad_frames_are_errors_in_their_places(detector: Detector, caplog: pytest.LogCaptureFixture) -> None:
    frames = [GOOD, BROKEN[0], BAD, *BROKEN[1:], GOOD]
    with caplog.at_level(logging.WARNING, "advrad_fast"):
        results = detector.inspect_batch(iter(frames))
    assert len(results) == len(frames)
    for place, frame in ((0, GOOD), (2, BAD), (len(frames) - 1, GOOD)):
        assert same(results[place], detector.inspect(frame))
    failed = [r for i, r in enumerate(results) if i not in (0, 2, len(frames) - 1)]
    for result in failed:
        assert result.outcome is Outcome.ERROR
        assert (result.score, result.p_value, result.anomaly_map, result.mask) == (None, None, None, None)
        assert isinstance(result.error, ImageError)
        assert result.threshold == detector.threshold
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [f"frame {i}" for i in (1, *range(3, len(frames) - 1))]
    assert detector.inspect_batch([]) == []


def test_abstain_where_there_is_no_part() -> None:
    detector = make(model=small_model(pose=POSE))
    blank = np.full((100, 120), 200, np.uint8)
    inspection = detector.inspect(blank)
    assert inspection.outcome is Outcome.ABSTAIN
    assert (inspection.score, inspection.p_value, inspection.anomaly_map, inspection.mask) == (None, None, None, None)
    assert isinstance(inspection.error, PartNotFoundError)
    found = detector.inspect(part())
    assert found.outcome in (Outcome.OK, Outcome.DEFECT)
    assert found.anomaly_map is not None and found.anomaly_map.shape == (100, 120)
    batch = detector.inspect_batch([blank, part(), None])
    assert [r.outcome for r in batch] == [Outcome.ABSTAIN, found.outcome, Outcome.ERROR]


class Faulty:
    """A backend that returns one score and a map of it; or raises."""

    name, precision = "faulty", "fp32"

    def __init__(self, score: float | Exception) -> None:
        self.value = score

    def score(self, images: NDArray[np.uint8], *, seed: int, want_maps: bool) -> Scores:
        if isinstance(self.value, Exception):
            raise self.value
        maps = np.full(images.shape[:3], self.value, np.float32) if want_maps else None
        return Scores(np.array([self.value], np.float32), maps, {"noise": 0.0, "network": 0.0, "error": 0.0})


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, InferenceError("the engine failed")])
def test_a_fault_of_the_backend_is_never_ok(monkeypatch: pytest.MonkeyPatch, value: Any, maps: bool) -> None:
    detector = make()
    monkeypatch.setattr(detector, "_backend", Faulty(value))
    with pytest.raises(InferenceError):
        detector.inspect(GOOD, maps=maps)
    for result in detector.inspect_batch([GOOD, BAD], maps=maps):
        assert result.outcome is Outcome.ERROR
        assert result.score is None
        assert isinstance(result.error, InferenceError)


def test_a_bug_is_not_hidden_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two documented kinds of failure become ERROR."""
    detector = make()
    monkeypatch.setattr(detector, "_backend", Faulty(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        detector.inspect_batch([GOOD])


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (20, 48), (7, 7), (1, 1)])
def test_maps_come_back_in_the_frames_size(shape: tuple[int, int]) -> None:
    detector = make()
    for frame in (scene(*shape), scene(*shape)[:, :, 0]):
        inspection = detector.inspect(frame)
        assert inspection.score is not None
        for threshold in (inspection.score, math.nextafter(inspection.score, 0)):
            detector.threshold = threshold
            again = detector.inspect(frame)
            assert again.anomaly_map is not None and again.mask is not None
            assert again.anomaly_map.shape == again.mask.shape == shape
            assert again.anomaly_map.max() <= inspection.score * (1 + 1e-6)
            # One pixel of the map is above the threshold: it must not vanish on the way to the frame.
            assert again.mask.any() == (again.outcome is Outcome.DEFECT) == (threshold < inspection.score)


def test_backends_agree_on_decisions() -> None:
    rng = np.random.default_rng(2)
    lit = [
        (light * make_part(rng, 48)).astype(np.uint8) for light in np.linspace(0.1, 1.0, 10) for make_part in (disc, scratched)
    ]
    frames = [*lit, GOOD, BAD]
    wanted = make().inspect_batch(frames, maps=False)
    scores = np.array([w.score for w in wanted])
    # The bands are the parity bounds of test_backends.py.
    for precision, band, decided in (("fp32", 5e-6, 18), ("auto", 5e-2, 6)):
        got = make("cpu", precision=precision).inspect_batch(frames, maps=False)
        count = 0
        for threshold in np.quantile(scores, [0.25, 0.5, 0.75]):
            outside = np.abs(scores - threshold) > band * threshold
            count += int(outside.sum())
            values = np.array([g.score for g in got])
            assert ((values > threshold) == (scores > threshold))[outside].all()
        assert count >= 3 * decided, f"the {precision} band leaves only {count} of {3 * len(frames)} decisions to compare"


def test_what_an_inspection_says_about_itself(detector: Detector) -> None:
    inspection = detector.inspect(GOOD)
    assert inspection.backend == detector.backend in ("reference (fp32)", "cpu (fp32)")
    assert set(inspection.timings) == {"prepare", "noise", "network", "error", "total"}
    parts = [inspection.timings[k] for k in ("prepare", "noise", "network", "error")]
    assert all(ms >= 0 for ms in parts)
    assert sum(parts) <= inspection.timings["total"]
    assert inspection.error is None
    assert "anomaly_map" not in repr(inspection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        inspection.outcome = Outcome.OK  # type: ignore[misc]
    with pytest.raises(TypeError):
        inspection.timings["total"] = 0.0  # type: ignore[index]
    assert Outcome.OK == "OK" and str(Outcome.DEFECT) == "DEFECT"


def test_unknown_backends_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend: expected one of .*'npu'"):
        Detector(MODEL, backend="npu")
    with pytest.raises(ModelFileError, match="cannot be read"):
        Detector.load(tmp_path / "none.safetensors")
    assert issubclass(BackendUnavailableError, AdvRADError)


def test_loading_gives_the_same_detector(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "a", half=True)
    loaded = Detector.load(str(tmp_path / "a"), backend="reference", seed=3)
    assert loaded.model.fingerprint == MODEL.fingerprint
    assert same(loaded.inspect(BAD), make(seed=3).inspect(BAD))


_SCRIPT = """
import sys
import numpy as np
from advrad_fast import Detector
inspection = Detector.load(sys.argv[1], backend="cpu", cache_dir=False, threads=1).inspect(np.zeros((32, 32, 3), np.uint8))
assert inspection.score > 0 and inspection.mask is not None
heavy = {"torch", "triton", "pycuda", "tensorrt", "scipy", "skimage", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_inspecting_on_the_cpu_loads_no_torch(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "a")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path / "a")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
