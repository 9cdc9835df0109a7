"""Keeps the state of a stream's drift test in a file."""

from __future__ import annotations

import os
import time

from advrad_fast import checks
from advrad_fast.errors import ConfigError, expected
from advrad_fast.line.drift import Drift
from advrad_fast.line.results import StreamInspection


class DriftFile:
    """Saves the state of a drift test, atomically, now and then and at the end; ``Drift.restore`` reads it.

    A process that is killed loses the evidence of the last ``every_s`` seconds.  A failure to save is a result that was not
    stored.  Saving waits for the disk: put it into a ``Background``.

    Args:
        drift: the test that the stream has.
        path: the file.
        every_s: seconds between two times of saving, > 0.

    Raises:
        ConfigError: an argument is out of range or of the wrong type.
    """

    retry = False  # the next time saves all there is

    def __init__(self, drift: Drift, path: str | os.PathLike[str], *, every_s: float = 10.0) -> None:
        if not isinstance(drift, Drift):
            raise ConfigError(expected("drift", "a Drift", type(drift)))
        self._every = checks.finite("every_s", every_s)
        if not 0.0 < self._every <= 1e6:
            raise ConfigError(expected("every_s", "a number of seconds in (0, 1e6]", every_s))
        self._drift, self._path = drift, checks.path("path", path)
        self.name = f"drift {self._path}"
        self._last = time.monotonic()

    def write(self, result: StreamInspection) -> None:
        """Save, if it is time."""
        now = time.monotonic()
        if now - self._last >= self._every or (result.drift is not None and result.drift.alarm_frame == result.drift.frames):
            self._last = now
            self._drift.save(self._path)

    def close(self) -> None:
        """Save."""
        self._drift.save(self._path)
