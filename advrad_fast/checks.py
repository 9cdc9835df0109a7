"""Checks of arguments: whatever somebody hands over is a number, or an array of numbers, or an error that names it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import AdvRADError, ConfigError, expected

MAX_COUNT = 2**53  #: largest count: every integer up to it is a float64


def finite(name: str, value: object) -> float:
    """A finite number that is no truth value, as a float, or a ConfigError."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max  # float() would overflow
    if not real or too_large or not math.isfinite(value):  # type: ignore[arg-type]
        raise ConfigError(expected(name, "a finite number", value))
    return float(value)  # type: ignore[arg-type]


def share(name: str, value: object) -> float:
    """A number in (0, 1) as a float, or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating) or not 0.0 < value < 1.0:
        raise ConfigError(expected(name, "a number in (0, 1)", value))
    return float(value)


def number(name: str, value: object, low: float, high: float, wanted: str = "a number") -> float:
    """A finite number in [low, high] as a float, or a ConfigError."""
    try:
        made = finite(name, value)
    except ConfigError:
        made = math.nan
    if not low <= made <= high:
        raise ConfigError(expected(name, f"{wanted} in [{low:.12g}, {high:.12g}]", value))
    return made


def integer(name: str, value: object, low: int = 0, high: int = MAX_COUNT) -> int:
    """An integer in [low, high] as an int, or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        limits = f">= {low}" if high == MAX_COUNT else f"in [{low}, {high}]"
        raise ConfigError(expected(name, f"an integer {limits}", value))
    return int(value)


def truth(name: str, value: object) -> bool:
    """True or False, or a ConfigError: of other objects Python's own truth is a guess."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(expected(name, "True or False", value))
    return bool(value)


def text(name: str, value: object) -> str:
    """A text, not empty and without NUL, or a ConfigError."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(expected(name, "a text", value))
    return value


def path(name: str, value: object) -> str:
    """A path that a file can have, or a ConfigError: no descriptor, no bytes, and not empty, which for SQLite means no file."""
    made = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    try:
        possible = isinstance(made, str) and made and "\0" not in made and os.fsencode(made)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ConfigError(expected(name, "a path", value))
    return str(made)


def several(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it holds things to go through.  Text is one thing here; an array of no dimensions is iterable in name only."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) != 0


def array(name: str, value: object, error: type[AdvRADError] = ConfigError) -> NDArray[Any]:
    """An array of integers, truth values or real numbers, or an ``error``: neither text nor objects, dates nor ragged lists."""
    try:
        made = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as problem:  # RuntimeError: a tensor that has a gradient
        raise error(f"{expected(name, 'an array of numbers', value)}: {problem}") from problem
    if made.dtype.kind not in "biuf":
        raise error(expected(name, "an array of numbers", f"{type(value).__name__} of dtype {made.dtype}"))
    return made


def floats(name: str, value: object, error: type[AdvRADError] = ConfigError) -> NDArray[np.float64]:
    """:func:`array` as float64; where that loses a number, it is infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(array(name, value, error), dtype=np.float64)
