"""Sources, sinks and detectors that misbehave on demand, for the tests of streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from models import small_model
from numpy.typing import NDArray

from advrad_fast import Detector
from advrad_fast.line import StreamInspection


def detector(**changes: Any) -> Detector:
    """Of 32 x 32 frames, on the CPU, in a millisecond."""
    return Detector(small_model(**changes), backend="cpu", cache_dir=False, threads=1, precision="fp32")


def frames(count: int, seed: int = 3) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


class Scripted:
    """A restartable source: each connection runs one function, which yields frames, raises, or blocks.

    The last function serves all further connections.
    """

    name, live, restartable = "scripted", False, True

    def __init__(self, *connections: Callable[[], Iterator[Any]]) -> None:
        self.connections = connections
        self.opened = 0

    def open(self) -> Iterator[Any]:
        script = self.connections[min(self.opened, len(self.connections) - 1)]
        self.opened += 1
        return script()


class Hang:
    """``hang()`` does not return until the test is over."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.since: list[float] = []

    def __call__(self) -> None:
        self.since.append(time.monotonic())
        self.release.wait(60.0)


class Memory:
    """A sink that keeps what it takes, and fails as told."""

    def __init__(self, *, fail: Callable[[StreamInspection], bool] = lambda result: False, retry: bool = True) -> None:
        self.name, self.retry = "memory", retry
        self.fail, self.closed = fail, 0
        self.taken: list[StreamInspection] = []

    def write(self, result: StreamInspection) -> None:
        if self.fail(result):
            raise OSError("no space left")
        self.taken.append(result)

    def close(self) -> None:
        self.closed += 1


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """For what another thread does: fails only if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
