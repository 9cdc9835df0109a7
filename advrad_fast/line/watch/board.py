"""What the page shows, gathered from a stream's results in memory that does not grow."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

from advrad_fast.detector import Outcome
from advrad_fast.line.drift import DriftState
from advrad_fast.line.results import StreamInspection
from advrad_fast.line.stream import InspectionStream, StreamStatus
from advrad_fast.line.watch.pictures import Pictures, pictures

_log = logging.getLogger(__name__)

TREND = 240  #: results in the score trend
REJECTS = 12  #: parts that were not OK whose pictures are kept
_WAITING = 4  # of them that wait to be drawn; beyond it the oldest has no picture
_LIVE = 8  # pictures of the newest results that are kept, for browsers that are a little behind
_RATE = 10.0  # seconds over which results a second are counted

_CODES = {outcome: code for code, outcome in enumerate(Outcome)}

Point = tuple[int, float | None, int, float]


@dataclass(frozen=True)
class Publication:
    """One state of the page.  Immutable: many clients send it.

    Attributes:
        number: counts publications from 1.
        state: JSON, an object.
        points: the score trend: sequence, score, outcome (0 OK, 1 DEFECT, 2 ABSTAIN, 3 ERROR) and threshold.
        at: ``time.monotonic`` when it was made.
        ended: whether this is the last.
    """

    number: int
    state: str
    points: tuple[Point, ...]
    at: float
    ended: bool

    def message(self, after: int) -> tuple[bytes, int]:
        """As a server-sent event with the points after a sequence and how old the state is now; and the last point's sequence."""
        fresh = [point for point in self.points if point[0] > after]
        points = json.dumps(fresh, separators=(",", ":"), allow_nan=False)
        waited = round(1e3 * (time.monotonic() - self.at))
        text = f'event: state\ndata: {{"points":{points},"waited_ms":{waited},"state":{self.state}}}\n\n'
        return text.encode(), (fresh[-1][0] if fresh else after)


class Board:
    """Takes results in the stream's thread, which costs it no more than keeping a reference, and draws in another.

    Args:
        deadline: seconds after which a result is old, if the stream has a frame in hand or its source gives no sign of life.
        hold: seconds for which the last result is shown while the source says that no part has come.
        heartbeat: seconds from one publication to the next at most.
    """

    def __init__(self, *, deadline: float, hold: float, heartbeat: float) -> None:
        self._deadline, self._hold, self._heartbeat = deadline, hold, heartbeat
        self._lock = threading.Lock()
        self._outcomes: Counter[Outcome] = Counter()
        self._dropped = 0
        self._points: deque[Point] = deque(maxlen=TREND)
        self._times: deque[float] = deque(maxlen=TREND)
        self._newest: StreamInspection | None = None
        self._newest_at = 0.0
        self._to_draw: deque[StreamInspection] = deque(maxlen=_WAITING)
        # What follows belongs to the thread that publishes, but for the pictures, which are only read elsewhere.
        self._live: dict[int, Pictures] = {}
        self._rejects: dict[int, tuple[dict[str, Any], Pictures | None]] = {}
        self._number = 0
        self._free_at = self._started = time.monotonic()

    def add(self, result: StreamInspection) -> None:
        """A new result."""
        score = None if result.score is None else float(f"{result.score:.6g}")
        point = (result.sequence, score, _CODES[result.outcome], float(f"{result.inspection.threshold:.6g}"))
        now = time.monotonic()
        with self._lock:
            self._outcomes[result.outcome] += 1
            self._dropped += result.dropped
            self._points.append(point)
            self._times.append(now)
            self._newest, self._newest_at = result, now
            if result.outcome in (Outcome.DEFECT, Outcome.ABSTAIN):
                self._to_draw.append(result)

    @property
    def waits_to_be_drawn(self) -> bool:
        """Whether there are rejects whose pictures have not been made."""
        return bool(self._to_draw)

    def picture(self, sequence: int, view: str) -> bytes | None:
        """A JPEG file, ``frame`` or ``map``, of one of the newest results or rejects; None if there is none (any more)."""
        found = self._live.get(sequence) or self._rejects.get(sequence, (None, None))[1]
        if found is None or view not in ("frame", "map"):
            return None
        return found.frame if view == "frame" else found.map

    def publish(self, stream: InspectionStream | None, *, draw: bool, ended: bool) -> Publication:
        """The next state.  Called by one thread.

        Args:
            stream: where the results come from, if it is known.
            draw: also make the newest result's pictures: somebody is watching.
            ended: there will be no further result.
        """
        source = None if stream is None else stream.status
        with self._lock:
            newest, newest_at = self._newest, self._newest_at
            outcomes = {str(outcome): self._outcomes[outcome] for outcome in Outcome}
            dropped = self._dropped
            points, times = tuple(self._points), tuple(self._times)
            rejects = [self._to_draw.popleft() for _ in range(len(self._to_draw))]
        for reject in rejects:
            drawn = self._live.get(reject.sequence) or _draw(reject)
            self._rejects[reject.sequence] = (_described(reject, drawn), drawn)
        for old in list(islice(self._rejects, max(0, len(self._rejects) - REJECTS))):
            del self._rejects[old]
        shown = None if newest is None else self._drawn(newest, draw)
        now = time.monotonic()
        recent = [at for at in times if now - at <= _RATE]
        state = {
            "run": newest.run if newest is not None else None if stream is None else stream.run,
            "name": newest.source if newest is not None else None if stream is None else stream.source,
            "at_ms": round(1e3 * now),
            "deadline_ms": round(1e3 * self._deadline),
            "hold_ms": round(1e3 * self._hold),
            "ended": ended,
            "idle": self._is_idle(source, sum(outcomes.values()), newest_at, now),
            "age_ms": None if newest is None else round(1e3 * (now - newest_at)),
            "result": None if newest is None else _described(newest, shown),
            "outcomes": outcomes,
            "dropped": dropped if source is None else source.dropped,
            "per_second": round(len(recent) / max(now - recent[0], 1.0), 2) if recent else 0.0,
            "drift": None if newest is None else _drift(newest.drift),
            "source": None if source is None else _source(source),
            "rejects": [description for description, _ in reversed(self._rejects.values())],
        }
        self._number += 1
        return Publication(self._number, json.dumps(state, separators=(",", ":"), allow_nan=False), points, now, ended)

    def _drawn(self, result: StreamInspection, draw: bool) -> Pictures | None:
        known = self._live.get(result.sequence) or self._rejects.get(result.sequence, (None, None))[1]
        if known is not None or not draw:
            return known
        made = _draw(result)
        if made is not None:
            self._live[result.sequence] = made
            for old in list(islice(self._live, max(0, len(self._live) - _LIVE))):
                del self._live[old]
        return made

    def _is_idle(self, source: StreamStatus | None, results: int, newest_at: float, now: float) -> bool:
        """Whether there is nothing to say because no part has come, rather than because something hangs."""
        if source is None or not source.connected:
            return False
        if source.read - source.dropped - results <= 0:
            self._free_at = now
            return True
        # A frame is in hand.  Since when, only the last result and the last look without one can tell.
        return now - max(newest_at, self._free_at) <= max(self._deadline, self._heartbeat)


def _draw(result: StreamInspection) -> Pictures | None:
    try:
        return pictures(result)
    except Exception:  # out of memory, say: the outcome has to be shown all the same
        _log.exception("%s: result %d cannot be drawn", result.source, result.sequence)
        return None


def _described(result: StreamInspection, drawn: Pictures | None) -> dict[str, Any]:
    row = result.row()
    keys = ("sequence", "captured_at", "outcome", "score", "threshold", "p_value", "backend", "latency_ms")
    item = None if result.item is None else result.item.rpartition("/")[2]
    views = [] if drawn is None else ["frame"] if drawn.map is None else ["frame", "map"]
    return {**{key: row[key] for key in keys}, "item": item, "message": row["message"], "views": views}


def _drift(state: DriftState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return {
        "frames": state.frames,
        "e_value": min(state.e_value, 1e300),
        "level": state.level,
        "direction": state.direction,
        "alarm_at": None if state.alarm_at is None else state.alarm_at.isoformat(timespec="seconds"),
        "onset_frame": state.onset_frame,
    }


def _source(status: StreamStatus) -> dict[str, Any]:
    return {
        "connected": status.connected,
        "faults": status.faults,
        "hanging": status.hanging,
        "opened": status.opened,
        "sinks": [{"name": sink.name, "waiting": sink.waiting, "lost": sink.lost} for sink in status.sinks],
    }
