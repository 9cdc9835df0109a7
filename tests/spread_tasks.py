"""Tasks for the tests of spreading: workers import them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from advrad_fast import Detector, ModelFile
from advrad_fast.errors import DatasetError


def offset(value: int) -> int:
    return value


def square(state: int, task: int) -> int:
    return state + task * task


def fails(state: int, task: int) -> int:
    if task == 2:
        raise DatasetError("task 2")
    return task


def marks(state: str, task: int) -> tuple[int, int]:
    """Says that it ran, and in which process, in a file of its own; slowly enough to be killed meanwhile."""
    (Path(state) / f"{task}-{time.time_ns()}").write_text(str(os.getpid()))
    time.sleep(0.15)
    return task, os.getpid()


def dies_once(state: str, task: int) -> int:
    """Kills its process the first time task 3 is run, as a lack of memory would."""
    ran = Path(state) / str(task)
    first = not ran.exists()
    with ran.open("a") as file:
        file.write("x")
    if task == 3 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * 10


def dies(state: int, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


class Slow(Detector):
    """Slow enough to be killed meanwhile."""

    def inspect(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return super().inspect(*arguments, **options)

    def certify(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return super().certify(*arguments, **options)


def slow(folder: Path, model: ModelFile) -> Detector:
    """Makes one and says in which process: the name of a file in ``folder``."""
    (folder / str(os.getpid())).touch()
    return Slow(model, backend="cpu", threads=1, cache_dir=False)
