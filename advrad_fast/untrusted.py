"""Checks on what comes from a model file: strict JSON, and numbers and arrays of a known kind; else a ModelFileError."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import ModelFileError, expected

MAX_SCORES = 1 << 24  #: most calibration scores

_MAX_DEPTH = 8  # of JSON objects and lists; config.image.pose is at depth 4


def parse(name: str, data: bytes) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8, limited depth, no duplicate keys, no NaN or infinity, no huge numbers."""
    if _depth(data) > _MAX_DEPTH:
        raise ModelFileError(f"{name}: expected JSON nested at most {_MAX_DEPTH} deep")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from None
    except ValueError as error:
        raise ModelFileError(f"{name}: not JSON in UTF-8: {clip(str(error))}") from error
    if not isinstance(value, dict):
        refuse(name, "a JSON object", value)
    return value


def _depth(data: bytes) -> int:
    """How deep the brackets outside strings nest, in one linear pass: the parser's recursion is bounded before it starts.

    Up to the first error of syntax, strings are found where a JSON parser finds them.
    """
    text = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', b"", data, flags=re.DOTALL), np.uint8)
    opened = (text == ord("{")) | (text == ord("["))
    closed = (text == ord("}")) | (text == ord("]"))
    return int(np.cumsum(opened.astype(np.int32) - closed.astype(np.int32)).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ModelFileError(f"duplicate key {clip(repr(twice))}")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ModelFileError(f"expected finite numbers, got {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ModelFileError(f"expected finite numbers, got {clip(text)}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:  # more than 64 bits; also, int() takes quadratic time
        raise ModelFileError(f"expected integers of at most 64 bits, got {clip(text)}")
    return int(text)


def dump(value: object) -> str:
    """Canonical ASCII JSON."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def same_names(field_name: str, wanted: Mapping[str, object] | tuple[str, ...], got: Mapping[str, object]) -> None:
    """Refuse keys that are not exactly the wanted ones."""
    missing, unknown = sorted(set(wanted) - set(got)), sorted(map(str, set(got) - set(wanted)))
    if missing or unknown:
        raise ModelFileError(f"{field_name}: missing {clip(str(missing))}, unknown {clip(str(unknown))}")


def float32(name: str, value: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous, read-only view of a finite float32 array of this shape, or a copy where it takes one."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        refuse(name, f"a float32 array {shape}", kind(value))
    if not np.isfinite(value).all():
        refuse(name, "finite values", f"{np.count_nonzero(~np.isfinite(value))} that are not")
    view = np.ascontiguousarray(value).view()
    view.flags.writeable = False
    return view


def inverse(mu: NDArray[np.float32], spread: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """1 / spread, or ones of the shape of ``mu``; read-only."""
    values = np.ones_like(mu) if spread is None else np.float32(1.0) / spread
    values.flags.writeable = False
    return values


def spread_map(name: str, value: object, shape: tuple[int, ...], *, used: bool) -> NDArray[np.float32] | None:
    """A :func:`float32` map whose inverse is finite where the score is divided by one, else None."""
    if not used:
        if value is not None:
            refuse(name, "None, as the score's spread is false", "a map")
        return None
    if value is None:
        refuse(name, "a map, as the score's spread is true", None)
    spread = float32(name, value, shape)
    tiny = np.finfo(np.float32).tiny
    if spread.min() < tiny:
        refuse(name, f"values >= {tiny:.3g}", float(spread.min()))
    return spread


def kind(value: object) -> str:
    """An array's dtype and shape, or the type's name."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def sorted_scores(name: str, value: object) -> NDArray[np.float64]:
    """A read-only float64 copy of finite, rising float32 or float64 scores (n,)."""
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64) or value.ndim != 1:
        refuse(name, "a float32 or float64 array (n,)", kind(value))
    if not 1 <= value.size <= MAX_SCORES:
        refuse(name, f"1 to {MAX_SCORES} scores", value.size)
    if not np.isfinite(value).all() or (value[1:] < value[:-1]).any():
        refuse(name, "finite scores in rising order", "others")
    scores = value.astype(np.float64)
    scores.flags.writeable = False
    return scores


def share(name: str, value: object) -> float:
    """A number in (0, 1)."""
    checked = number(name, value)
    if not 0.0 < checked < 1.0:
        refuse(name, "a number in (0, 1)", checked)
    return checked


def number(name: str, value: object) -> float:
    """A finite number that is no truth value, as a float."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating):
        refuse(name, "a finite number", value)
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max  # float() would overflow
    if too_large or not math.isfinite(value):
        refuse(name, "a finite number", value)
    return float(value)


def clip(text: str) -> str:
    """At most 300 characters: a message must not carry the file."""
    return text if len(text) <= 300 else f"{text[:300]}..."


def refuse(name: str, wanted: str, got: object) -> NoReturn:
    """Raise the error, in at most 300 characters."""
    raise ModelFileError(clip(expected(clip(name), wanted, got)))
