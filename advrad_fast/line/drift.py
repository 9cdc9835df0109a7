"""Has the distribution of the scores drifted away from the calibration's?  A sequential test with a stated false-alarm rate.

>>> drift = Drift(detector.model.calibration_scores)
>>> state = drift.update(detector.inspect(frame))
>>> if state.alarm:
...     call_someone(state.direction, state.alarm_at)

Dust, a lamp that ages or a camera that was touched move the scores of good parts.  The threshold then no longer means what it
says, long before anybody sees it in a count of defects.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from advrad_fast import checks
from advrad_fast.errors import AdvRADError, CalibrationError, DriftStateError, OtherDriftStateError, expected
from advrad_fast.files import write_atomically
from advrad_fast.line.bets import Bets
from advrad_fast.untrusted import parse

SCHEMA = 1  #: of a saved state
MAX_STATE_BYTES = 1 << 20  #: largest saved state that is read

_FIELDS = ("schema", "calibration", "false_alarm_rate", "contamination", "state", "stakes", "evidence", "since")
_STATE = ("frames", "e_value", "peak", "direction", "alarm_frame", "alarm_at", "onset_frame")


class Direction(StrEnum):
    """Where the scores have gone."""

    UP = "up"  #: good parts score higher: more false alarms
    DOWN = "down"  #: scores are lower: defects may pass


@dataclass(frozen=True)
class DriftState:
    """What the test says after a frame.

    Attributes:
        frames: scores taken since the test began.
        e_value: the evidence now, >= 0; below 1 where nothing speaks for a drift.
        peak: the largest so far.  1 / peak, at most 1, is a p-value that holds whenever it is looked at.
        level: an e-value of at least this is an alarm: 1 / false_alarm_rate.
        alarm: it has been reached; stays until :meth:`Drift.reset`.
        direction: of the drift that raised the alarm; None without one.
        alarm_frame: the value of ``frames`` at the alarm.
        alarm_at: when the frame that raised it was captured, where that is known.
        onset_frame: an estimate of how many frames came before the drift.
    """

    frames: int
    e_value: float
    peak: float
    level: float
    direction: Direction | None = None
    alarm_frame: int | None = None
    alarm_at: datetime | None = None
    onset_frame: int | None = None

    @property
    def alarm(self) -> bool:
        """Whether drift has been found."""
        return self.alarm_frame is not None

    @property
    def p_value(self) -> float:
        """Anytime-valid: P[p_value ever <= a] <= a without a drift, in (0, 1]."""
        return min(1.0, 1.0 / self.peak) if self.peak > 0.0 else 1.0


class HasScore(Protocol):
    """An ``Inspection`` or a ``StreamInspection``."""

    @property
    def score(self) -> float | None: ...


class Drift:
    """A sequential test of new scores against the calibration scores.  Thread-safe.

    Without a drift, P[an alarm ever, however long the line runs] <= ``false_alarm_rate``, over the draw of the calibration and of
    all frames, for any number of calibration scores and any distribution: :mod:`advrad_fast.line.bets` has the proof.
    "Without a drift" means: whatever came before, a frame is a good part like the calibration's with probability at least
    1 - ``contamination``, and anything at all otherwise.  So defects up to that share raise no alarm beyond the rate, wherever
    they score; more of them do, and so does a run of equal frames, or light that changes slowly: frames are then not independent.
    The more calibration scores there are, the smaller the drift that can be found.

    Args:
        calibration_scores: (n,), n >= 1, finite, rising; a model's.
        false_alarm_rate: in (0, 1).
        contamination: the share of frames that may be anything, in [0, 0.5].

    Raises:
        CalibrationError: the scores are empty, not finite or not sorted.
        ConfigError: a number is out of range.
    """

    def __init__(self, calibration_scores: ArrayLike, *, false_alarm_rate: float = 0.01, contamination: float = 0.02) -> None:
        scores = checks.floats("calibration_scores", calibration_scores, CalibrationError).copy()
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all() or (scores[1:] < scores[:-1]).any():
            raise CalibrationError(expected("calibration_scores", "(n,) finite scores, rising, n >= 1", scores.shape))
        self.false_alarm_rate = checks.number("false_alarm_rate", false_alarm_rate, 1e-12, 1.0 - 1e-12)
        self.contamination = checks.number("contamination", contamination, 0.0, 0.5)
        self._calibration = scores
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._bets = Bets(self._calibration.size, self.false_alarm_rate, self.contamination)
        self._above, self._below = self._bets.bounds(self._calibration)
        value = float(self._bets.fortunes().mean())
        self._state = DriftState(0, value, value, 1.0 / self.false_alarm_rate)

    @property
    def state(self) -> DriftState:
        """What the test says now."""
        return self._state

    def update(self, inspection: HasScore) -> DriftState:
        """Take one frame's result, in the order of the line; one without a score (ABSTAIN, ERROR) changes nothing.

        Args:
            inspection: an ``Inspection``, or a ``StreamInspection``, whose ``captured_at`` becomes ``alarm_at``.

        Raises:
            ConfigError: there is no score, or it is not finite.
        """
        score = getattr(inspection, "score", math.nan)
        if score is None:
            return self._state
        score = checks.finite("score", score)
        with self._lock:
            sides = self._bets.update(np.stack([score > self._above, score < self._below]))
            value, before = float(sides.mean()), self._state
            state = replace(before, frames=self._bets.frames, e_value=value, peak=max(before.peak, value))
            if not before.alarm and value >= state.level * (1.0 + 1e-9):  # far above the rounding errors
                side = int(sides.argmax())
                state = replace(
                    state,
                    direction=(Direction.UP, Direction.DOWN)[side],
                    alarm_frame=state.frames,
                    alarm_at=getattr(inspection, "captured_at", None),
                    onset_frame=self._bets.onset(side),
                )
            self._state = state
            return state

    def reset(self) -> None:
        """Begin anew, once the cause is gone.  Each test between two resets has the false-alarm rate for itself."""
        with self._lock:
            self._start()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically.

        Raises:
            ConfigError: it is no path.
            DriftStateError: it cannot be written; a file that was there is as it was.
        """
        name = checks.path("path", path)
        with self._lock:
            state, bets = self._state, self._bets
            document = {
                "schema": SCHEMA,
                "calibration": self._fingerprint(),
                "false_alarm_rate": self.false_alarm_rate,
                "contamination": self.contamination,
                "state": {
                    "frames": state.frames,
                    "e_value": state.e_value,
                    "peak": state.peak,
                    "direction": state.direction,
                    "alarm_frame": state.alarm_frame,
                    "alarm_at": None if state.alarm_at is None else state.alarm_at.isoformat(),
                    "onset_frame": state.onset_frame,
                },
                "stakes": bets.stakes.tolist(),
                "evidence": bets.evidence.tolist(),
                "since": bets.since.tolist(),
            }
        try:
            write_atomically(Path(name), json.dumps(document, allow_nan=False).encode())
        except (OSError, ValueError) as error:
            raise DriftStateError(f"{name}: cannot be written: {error}") from error

    @classmethod
    def restore(cls, path: str | os.PathLike[str], calibration_scores: ArrayLike, **settings: Any) -> Self:
        """Go on where :meth:`save` stopped.  Frames since then are forgotten, which costs evidence but not the guarantee.

        Args:
            path: the file, which is untrusted.
            calibration_scores, settings: those of the test that was saved.

        Raises:
            OtherDriftStateError: the file is of a test with another calibration or other settings.
            DriftStateError: it is missing or damaged.
            ConfigError, CalibrationError: it is no path, or as for ``Drift``.
        """
        drift, name = cls(calibration_scores, **settings), checks.path("path", path)
        try:
            with Path(name).open("rb") as file:
                data = file.read(MAX_STATE_BYTES + 1)
            if len(data) > MAX_STATE_BYTES:
                raise DriftStateError(expected("size", f"at most {MAX_STATE_BYTES} bytes", "more"))
            drift._take(parse("drift state", data))
        except OtherDriftStateError as error:
            raise OtherDriftStateError(f"{name}: {error}") from None
        except (OSError, ValueError, AdvRADError) as error:
            raise DriftStateError(f"{name}: {error}") from error
        return drift

    def _take(self, document: dict[str, Any]) -> None:
        state = document.get("state")
        if set(document) != set(_FIELDS) or not isinstance(state, dict) or set(state) != set(_STATE):
            raise DriftStateError(expected("keys", str(list(_FIELDS)), list(document)))
        if document["schema"] != SCHEMA:
            raise DriftStateError(expected("schema", str(SCHEMA), document["schema"]))
        settings = {"false_alarm_rate": self.false_alarm_rate, "contamination": self.contamination}
        for key, wanted in {"calibration": self._fingerprint(), **settings}.items():
            if document[key] != wanted:
                raise OtherDriftStateError(expected(key, f"that of this test, {wanted}", document[key]))
        bets = self._bets
        frames = _count("frames", state["frames"], 2**53)
        for key, array in (("stakes", bets.stakes), ("evidence", bets.evidence), ("since", bets.since)):
            _fill(key, array, document[key])
        if bets.since.max() > frames:
            raise DriftStateError(expected("since", f"at most frames, {frames}", int(bets.since.max())))
        bets.frames = frames
        alarm, onset, at = state["alarm_frame"], state["onset_frame"], state["alarm_at"]
        if (alarm is None) != (state["direction"] is None) or (alarm is None) != (onset is None):
            raise DriftStateError(expected("state", "alarm_frame, direction and onset_frame together", state))
        self._state = replace(
            self._state,
            frames=frames,
            e_value=_real("e_value", state["e_value"]),
            peak=_real("peak", state["peak"]),
            direction=None if alarm is None else Direction(state["direction"]),
            alarm_frame=None if alarm is None else _count("alarm_frame", alarm, frames),
            alarm_at=None if at is None else datetime.fromisoformat(at) if isinstance(at, str) else _refuse("alarm_at", at),
            onset_frame=None if alarm is None else _count("onset_frame", onset, frames),
        )

    def _fingerprint(self) -> str:
        return hashlib.sha256(self._calibration.astype("<f8").tobytes()).hexdigest()


def _refuse(name: str, value: object) -> Any:
    raise DriftStateError(expected(name, "what was saved", value))


def _count(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DriftStateError(expected(name, f"an integer in [0, {most}]", value))
    return value


def _real(name: str, value: object) -> float:
    if type(value) not in (int, float) or not 0.0 <= value < math.inf:  # type: ignore[operator]
        raise DriftStateError(expected(name, "a finite number >= 0", value))
    return float(value)  # type: ignore[arg-type]


def _fill(name: str, array: np.ndarray[Any, Any], value: object) -> None:
    """Numbers >= 0 of the array's shape into it; integers where it has integers."""
    try:
        given = np.array(value)
    except ValueError:  # ragged
        given = np.array(None)
    kinds = "i" if array.dtype.kind == "i" else "if"
    if given.dtype.kind not in kinds or given.shape != array.shape or not np.isfinite(given).all() or given.min() < 0:
        raise DriftStateError(expected(name, f"numbers >= 0 of the shape {array.shape}", f"{given.dtype} {given.shape}"))
    array[...] = given
