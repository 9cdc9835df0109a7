"""What a source of frames is, and the two simplest: any iterable and any callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from advrad_fast import checks
from advrad_fast.errors import AdvRADError, ConfigError, expected


class _Idle(Enum):
    IDLE = "IDLE"


#: What a source gives where there is no frame yet, but nothing is wrong either: no part has passed, the folder is empty.
IDLE: Final = _Idle.IDLE


@dataclass(frozen=True, eq=False)
class Frame:
    """What a source gives.

    Attributes:
        pixels: what :meth:`advrad_fast.Detector.inspect` takes.
        item: what the frame is called at its source: a file's path, the number of a video's frame.
        error: why there are no pixels; the frame becomes an ERROR.
        lost: frames that the source knows to have lost just before this one.
    """

    pixels: object
    item: str | None = None
    error: AdvRADError | None = None
    lost: int = 0


@runtime_checkable
class Source(Protocol):
    """Where frames come from.

    Attributes:
        name: in every result; no password belongs into it.
        live: frames that are not inspected in time are stale: by default the stream then inspects the newest.
        restartable: :meth:`open` may be called again, also while a read of an earlier iterator still hangs in a thread that
            the stream has given up.
    """

    @property
    def name(self) -> str: ...
    @property
    def live(self) -> bool: ...
    @property
    def restartable(self) -> bool: ...

    def open(self) -> Iterator[Any]:
        """Connect, and return an iterator: each ``next`` is a read.

        It gives a :class:`Frame`, anything else that a detector inspects, or ``IDLE``.  It raises what it likes: the stream
        reports it and opens the source again.  Its ``close``, where it has one, is called in the end.
        """


class Frames:
    """Frames from any Python iterable: a list, a generator, a data loader.

    Args:
        iterable: gives arrays or PIL images, or ``IDLE``.
        name: in the results.
        live: whether to inspect the newest frame (True) or all of them (False, the default) where they come too fast.
        copy: arrays are copied when they are read, so that the iterable may use its memory again.
    """

    restartable = False

    def __init__(self, iterable: Iterable[Any], *, name: str = "frames", live: bool = False, copy: bool = True) -> None:
        if not checks.several(iterable):
            raise ConfigError(expected("iterable", "an iterable of frames", type(iterable)))
        self.name, self.live = checks.text("name", name), checks.truth("live", live)
        self._frames, self._copy = iterable, checks.truth("copy", copy)
        self._iterator: Iterator[Any] | None = None

    def open(self) -> Iterator[Any]:
        """The iterable's one iterator: after an error the stream goes on where it stands."""
        if self._iterator is None:
            frames = iter(self._frames)
            self._iterator = _Copies(frames) if self._copy else frames
        return self._iterator


class Calls:
    """Frames from a function without arguments, such as a camera library's ``grab``.

    It may block until a part passes (then set ``deadline_ms=None``, or let it return ``IDLE`` now and then), raise, and end the
    stream with StopIteration.  None is not a frame: it becomes an ERROR.

    Args:
        function: returns an array or a PIL image, or ``IDLE``.
        name: in the results.
        live: whether to inspect the newest frame (the default) or all of them where they come too fast.
        copy: arrays are copied when they are read, so that the function may use its memory again.
    """

    restartable = False

    def __init__(self, function: Callable[[], Any], *, name: str = "frames", live: bool = True, copy: bool = True) -> None:
        if not callable(function):
            raise ConfigError(expected("function", "a function without arguments", type(function)))
        self.name, self.live = checks.text("name", name), checks.truth("live", live)
        self._function, self._copy = function, checks.truth("copy", copy)

    def open(self) -> Iterator[Any]:
        """An iterator that calls the function."""
        calls = _Each(self._function)
        return _Copies(calls) if self._copy else calls


def as_source(source: object) -> Source:
    """A source as it is, an iterable as :class:`Frames`, a callable as :class:`Calls`.

    Raises:
        ConfigError: it is none of them.
    """
    if isinstance(source, Source):
        return source
    if callable(source):
        return Calls(source)
    if checks.several(source):
        return Frames(source)
    raise ConfigError(expected("source", "a source of advrad_fast.line, an iterable or a callable", source))


class _Each:
    """Not a generator: that would be over after the first exception."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._function()


class _Copies:
    def __init__(self, frames: Iterator[Any]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        frame = next(self._frames)
        return frame.copy() if isinstance(frame, np.ndarray) else frame
