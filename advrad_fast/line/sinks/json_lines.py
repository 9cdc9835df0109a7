"""Results as JSON lines in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from advrad_fast import checks
from advrad_fast.errors import SinkError
from advrad_fast.line.results import StreamInspection


class JsonLines:
    """Appends a line a result to a file; a reader sees whole lines as soon as they are there.

    A line that has been handed over survives the process (``kill -9``); with ``fsync`` also the machine's power.  A line cut
    short by a crash in an earlier run is ended first, so that it spoils no other.

    Args:
        path: the file; made if it is missing.
        fsync: wait for the disk after every line: milliseconds each.

    Raises:
        ConfigError: an argument is of the wrong type.
        SinkError: the file cannot be opened for appending.
    """

    retry = True

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = False) -> None:
        file = checks.path("path", path)
        self.name = f"json lines {file}"
        self._fsync = checks.truth("fsync", fsync)
        self._cut_short = True  # the last line may be
        try:
            # Unbuffered: a line that failed must not come out of a buffer later.
            self._file = Path(file).open("ab+", buffering=0)  # noqa: SIM115  (closed by close)
            self._end_last_line()
        except OSError as error:
            raise SinkError(f"{self.name}: {error}") from error

    def write(self, result: StreamInspection) -> None:
        """Append the line."""
        line = (json.dumps(result.row(), allow_nan=False) + "\n").encode()
        if self._cut_short:
            self._end_last_line()
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"wrote {written} of {len(line)} bytes: is the disk full?")
            if self._fsync:
                os.fsync(self._file.fileno())
        except OSError:
            self._cut_short = True
            self._file.truncate(end)  # no half line, and none twice
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _end_last_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        if end > 0:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._cut_short = False
