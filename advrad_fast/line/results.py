"""What a stream says of a frame or of a fault, and the row that is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from advrad_fast.detector import Inspection, Outcome
from advrad_fast.errors import AdvRADError, SinkError
from advrad_fast.line.drift import DriftState

Value = str | int | float | None

#: The keys of a row, in order; stable.
ROW_KEYS = (
    "run",
    "sequence",
    "source",
    "item",
    "captured_at",
    "outcome",
    "score",
    "threshold",
    "p_value",
    "backend",
    "latency_ms",
    "dropped",
    "error",
    "message",
    "drift_e_value",
    "drift_alarm",
    "drift_direction",
    "drift_since",
)


@dataclass(frozen=True)
class StreamInspection:
    """One frame's result, or one fault's: then there is no frame and the outcome is ERROR.

    Attributes:
        inspection: outcome, score, maps; made up for a fault, with the threshold that would have been used.
        frame: what the source gave; None for a fault.
        run: names the stream: no two have the same.
        sequence: counts the stream's frames and faults from 0.  A gap is what was dropped.
        source: the source's name.
        item: what the source calls the frame, such as a file's path; None where it has no name for it.
        captured_at: the wall clock, UTC, when the frame was read or the fault seen.  Durations and order do not come from it.
        latency_ms: from then to the result, by the monotonic clock.
        dropped: how many frames (and old faults) were not inspected since the result before this one.
        drift: what the stream's drift test says after this frame; None without one.
        unstored: why sinks did not take this result, or one before it; empty where all is well.
    """

    inspection: Inspection
    frame: object = field(repr=False)
    run: str
    sequence: int
    source: str
    item: str | None
    captured_at: datetime
    latency_ms: float
    dropped: int
    drift: DriftState | None = None
    unstored: tuple[SinkError, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """OK, DEFECT, ABSTAIN or ERROR.  Only OK means a good part."""
        return self.inspection.outcome

    @property
    def score(self) -> float | None:
        """The anomaly score; None for ABSTAIN and ERROR."""
        return self.inspection.score

    @property
    def error(self) -> AdvRADError | None:
        """Why there is no score."""
        return self.inspection.error

    def row(self) -> Mapping[str, Value]:
        """What is kept, with the keys ``ROW_KEYS``; JSON can hold all of it."""
        i, drift = self.inspection, self.drift
        values: tuple[Value, ...] = (
            self.run,
            self.sequence,
            self.source,
            self.item,
            self.captured_at.isoformat(timespec="microseconds"),
            str(i.outcome),
            i.score,
            i.threshold,
            i.p_value,
            i.backend,
            round(self.latency_ms, 3),
            self.dropped,
            None if i.error is None else type(i.error).__name__,
            None if i.error is None else str(i.error),
            None if drift is None else drift.e_value,
            None if drift is None else drift.alarm,
            None if drift is None or drift.direction is None else str(drift.direction),
            None if drift is None or drift.alarm_at is None else drift.alarm_at.isoformat(timespec="microseconds"),
        )
        return dict(zip(ROW_KEYS, values, strict=True))

    def light(self) -> StreamInspection:
        """The same without frame, map and mask."""
        return replace(self, frame=None, inspection=replace(self.inspection, anomaly_map=None, mask=None))
