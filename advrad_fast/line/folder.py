"""Frames from a folder that a camera, or another program, writes image files into."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advrad_fast import checks
from advrad_fast.errors import ImageError, SourceError
from advrad_fast.image_paths import IMAGE_SUFFIXES
from advrad_fast.images import load_image
from advrad_fast.line.frames import IDLE, Frame

_BREATH = 0.02  # seconds: the longest without a sign of life while nothing happens

_Version = tuple[int, int, int]  # modification time, size, inode


@dataclass
class _Pending:
    version: _Version
    since: float
    order: int


class WatchedFolder:
    """Each image file that is written into a folder, once, when it is complete.

    The folder is looked through again and again, which works on every file system, network shares included, and takes a tenth
    of a processor at most.  A file is complete when its size and time of change have stood still for ``settle_ms``.  One that
    is not an image after all is an ERROR.  A file that is written anew under the same name is taken again.  Hidden
    files and those without a suffix of ``advrad_fast.image_paths.IMAGE_SUFFIXES`` are left alone: the safest way to hand a file
    over is to write it under such a name and then to rename it; with that, ``settle_ms=0`` takes files at once.

    Files come in the order in which they were seen; those seen at the same time by their time of change, then by name.

    Args:
        folder: must exist.
        existing: also take the files that are there already, at the start.
        recursive: also take files in folders below it; links to folders are not followed.
        settle_ms: how long a file must have stood still.
        interval_ms: from one look to the next.

    Raises:
        ConfigError: an argument is out of range.
    """

    live = False
    restartable = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        existing: bool = False,
        recursive: bool = False,
        settle_ms: float = 200.0,
        interval_ms: float = 50.0,
    ) -> None:
        self._settle, self._interval = (
            checks.number(name, value, 0.0, 3_600_000.0, "a number of milliseconds") / 1e3
            for name, value in (("settle_ms", settle_ms), ("interval_ms", interval_ms))
        )
        self._folder, self._recursive = Path(checks.path("folder", folder)), checks.truth("recursive", recursive)
        self.name = f"folder {self._folder}"
        self._done: dict[str, _Version] | None = {} if checks.truth("existing", existing) else None  # None until the first look

    def open(self) -> Generator[Any, None, None]:
        """Look through the folder until closed.

        Raises:
            SourceError: there is no such folder, or it cannot be read.
        """
        try:
            if self._done is None:
                self._done = self._look()
            else:
                os.scandir(self._folder).close()
        except OSError as error:
            raise SourceError(f"{self.name}: {error}") from error
        return self._files()

    def _files(self) -> Generator[Any, None, None]:
        pending: dict[str, _Pending] = {}
        done = self._done if self._done is not None else {}
        seen = 0
        while True:
            start = time.monotonic()
            there = self._look()
            for known in (done, pending):
                for path in [path for path in list(known) if path not in there]:
                    known.pop(path, None)  # an earlier iterator, given up but not yet ended, may be here too
            for path, version in sorted(there.items(), key=lambda entry: (entry[1][0], entry[0])):
                if done.get(path) == version:
                    pending.pop(path, None)  # as it was before it was touched
                elif path not in pending:
                    pending[path] = _Pending(version, start, seen)
                    seen += 1
                elif pending[path].version != version:
                    pending[path].version, pending[path].since = version, start
            ready = [path for path, file in pending.items() if start - file.since >= self._settle]
            for path in sorted(ready, key=lambda path: pending[path].order):
                yield _load(path)
                # Only now, when the next one is asked for, is it certain that this one arrived.
                done[path] = pending.pop(path).version
            yield IDLE
            now = time.monotonic()
            again = now + max(self._interval, 9.0 * (now - start)) if not ready else now
            while (left := again - time.monotonic()) > 0.0:
                time.sleep(min(left, _BREATH))
                yield IDLE

    def _look(self) -> dict[str, _Version]:
        found: dict[str, _Version] = {}
        folders = [os.fspath(self._folder)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        if self._recursive and entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():  # noqa: PTH122
                            stat = entry.stat()
                            found[entry.path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    except FileNotFoundError:
                        continue  # gone since the folder was read
        return found


def _load(path: str) -> Frame:
    try:
        return Frame(load_image(path), item=path)
    except ImageError as error:
        return Frame(None, item=path, error=error)
