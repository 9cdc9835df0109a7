"""A page of a running stream whose source does as it is told, and clients of it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from streams import Memory, detector, frames

from advrad_fast import Detector
from advrad_fast.line import IDLE, InspectionStream
from advrad_fast.line.watch import WatchPage


class Line:
    """A source: parts come when :meth:`part` is called; nothing is wrong between them."""

    name, live, restartable = "line <b>7</b>", False, True

    def __init__(self) -> None:
        self._given: list[Any] = []
        self._change = threading.Condition()
        self._frames = frames(20)

    def part(self, *parts: Any) -> None:
        """Let frames pass, or exceptions; without one, any frame."""
        with self._change:
            self._given.extend(parts or [self._frames[0]])
            self._change.notify_all()

    def open(self) -> Iterator[Any]:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._given, 0.02)
                part = self._given.pop(0) if self._given else IDLE
            if isinstance(part, BaseException):
                raise part
            if callable(part):
                part()
                continue
            yield part


class Running:
    """A stream with its page; iterates in a thread of its own."""

    def __init__(self, model: Detector, **options: Any) -> None:
        self.line, self.results, self.memory = Line(), [], Memory()
        self.page = WatchPage(port=0, **options)
        self.stream = InspectionStream(model, self.line, deadline_ms=2e4, sinks=[self.memory, self.page])  # no read hangs
        self.page.attach(self.stream)
        self._thread = threading.Thread(target=self._iterate)
        self._thread.start()

    def _iterate(self) -> None:
        for result in self.stream:
            self.results.append(result)

    def end(self) -> None:
        self.stream.stop()
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        self.stream.close()


@contextmanager
def running(model: Detector | None = None, **options: Any) -> Iterator[Running]:
    made = Running(model or detector(), **options)
    try:
        yield made
    finally:
        made.end()


def get(
    page: WatchPage, path: str, headers: dict[str, str] | None = None, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by their small names, body."""
    with closing(http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": host or f"127.0.0.1:{page.port}", **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        endless = found.get("content-type", "").startswith("text/event-stream")
        return answer.status, found, b"" if endless else answer.read()


class Listener:
    """Reads states, as a browser does."""

    def __init__(self, page: WatchPage) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
        self._connection.request("GET", "/events")
        self.answer = self._connection.getresponse()
        self.points: list[Any] = []
        self.waited_ms = 0

    def next(self) -> dict[str, Any] | None:
        """The next state; None at the end."""
        while line := self.answer.readline():
            if line.startswith(b"data: "):
                message = json.loads(line.removeprefix(b"data: "))
                self.points += message["points"]
                self.waited_ms = message["waited_ms"]
                state: dict[str, Any] = message["state"]
                return state
        return None

    def until(self, wanted: Any) -> dict[str, Any]:
        """The first state that is as wanted: fails only if it never comes."""
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            state = self.next()
            assert state is not None, "the stream has ended"
            if wanted(state):
                return state
        raise AssertionError("it did not come")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def threshold_between(model: Detector) -> tuple[Any, Any]:
    """Two frames, the model's threshold set so that the first is OK and the second a DEFECT."""
    dark, bright = np.full((32, 32, 3), 90, np.uint8), np.zeros((32, 32, 3), np.uint8)
    bright[8:20, 8:20] = 255
    scores = [model.inspect(frame).score for frame in (dark, bright)]
    assert scores[0] is not None and scores[1] is not None and scores[0] != scores[1]
    model.threshold = sum(scores) / 2  # type: ignore[arg-type]
    return (dark, bright) if scores[0] < scores[1] else (bright, dark)
