"""Faults injected at every line that an action runs, so that no step is forgotten when one is added."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import advrad_fast

#: What is injected.
FAULTS: list[type[Exception]] = [MemoryError, OSError, RuntimeError]

PACKAGE = str(Path(advrad_fast.__file__).parent)


@dataclass(frozen=True)
class Line:
    """A line of the package, in a function that ran it."""

    code: CodeType
    number: int

    def __str__(self) -> str:
        return f"{Path(self.code.co_filename).relative_to(PACKAGE)}:{self.number} ({self.code.co_qualname})"


def lines(action: Callable[[], object]) -> list[Line]:
    """The lines of the package that ``action`` runs in this thread, each once, in order."""
    found: dict[Line, None] = {}
    _traced(action, lambda line: found.setdefault(line))
    return list(found)


def inject(action: Callable[[], Any], at: Line, error: BaseException) -> Any:
    """``action``'s result, or what it raises, when ``error`` is raised the first time that this line is reached."""

    def raise_there(line: Line) -> None:
        if line == at:
            raise error  # which also ends the tracing

    return _traced(action, raise_there)


def injected_once(work: Callable[..., None], at: Line, error: BaseException) -> Callable[..., None]:
    """``work``, which the first time that it is called raises ``error`` when this line is reached."""
    calls = itertools.count()

    def run(*arguments: Any) -> None:
        if next(calls):
            work(*arguments)
        else:
            inject(lambda: work(*arguments), at, error)

    return run


def _traced(action: Callable[[], Any], visit: Callable[[Line], object]) -> Any:
    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            visit(Line(frame.f_code, frame.f_lineno))
        return local

    def called(frame: FrameType, event: str, _: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        return action()
    finally:
        sys.settrace(before)
