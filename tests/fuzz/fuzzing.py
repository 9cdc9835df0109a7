"""Fuzzing that can be repeated: numbered cases, each with a generator of its own, under a limit of time and of memory."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import limited

#: To run one case alone: its number.
VARIABLE = "ADVRAD_FUZZ_CASE"

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 8, 16, 4096, 2**31, 2**53, 2**62, -(2**63),
    0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"),
    "", "F16", "F32", "F64", "BF16", "eps", "\ud800", "\0", "x" * 5000, "../../x", "/etc/passwd",
    [], [0], [1, 1], [8, 16], [0, 512], [[[[[[[[[[]]]]]]]]]],
    {}, {"a": 1}, {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 512]},
]  # fmt: skip


def fuzz(
    attempt: Callable[[np.random.Generator], bool], count: int, *, seed: int, seconds: float = 1.0, megabytes: int = 256
) -> int:
    """Run cases 0 to ``count`` - 1; how many of them ``attempt`` returned True for.

    Args:
        attempt: is given the case's generator; may raise nothing.
        seconds: of CPU time that no case may take.
        megabytes: of address space that no case may take on top of what the process has.

    Raises:
        AssertionError: naming the case and the command that runs it again.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    chosen = range(count) if VARIABLE not in os.environ else [int(os.environ[VARIABLE])]
    accepted = 0
    trace = Path(tempfile.gettempdir()) / f"advrad-fuzz-{os.getpid()}"  # says which case it was, should the interpreter crash
    with trace.open("wb", buffering=0) as file, limited(megabytes):
        for case in chosen:
            os.pwrite(file.fileno(), f"{test} seed {seed} case {case:8d}\n".encode(), 0)
            started, problem = time.process_time(), None
            try:
                accepted += bool(attempt(np.random.default_rng((seed, case))))
            except Exception as error:
                problem = error
            took = time.process_time() - started
            if problem is not None or took > seconds:
                what = f"took {took:.1f} s" if problem is None else f"{type(problem).__name__}: {str(problem)[:500]}"
                again = f"{VARIABLE}={case} python -m pytest -m 'slow or not slow' '{test}'"
                raise AssertionError(f"case {case} of seed {seed}: {what}\nagain: {again}") from problem
    trace.unlink()
    if VARIABLE in os.environ:
        pytest.skip(f"case {chosen[0]} passes")
    return accepted


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        found.extend(slots(item))
    return found


def edit_json(rng: np.random.Generator, value: Any) -> None:
    """Replace, delete, add, nudge or swap somewhere."""
    places = slots(value)
    if not places:
        return
    container, key = places[rng.integers(len(places))]
    nasty = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
    kind = rng.integers(5)
    if kind == 0:
        container[key] = nasty
    elif kind == 1:
        del container[key]
    elif kind == 2:
        if isinstance(container, dict):
            container[str(nasty)[:20]] = nasty
        else:
            container.append(nasty)
    elif kind == 3 and type(container[key]) in (int, float):
        container[key] += int(rng.choice([-512, -8, -4, -1, 1, 4, 8, 512]))
    else:
        other, place = places[rng.integers(len(places))]
        if type(other[place]) is type(container[key]) and not isinstance(other[place], dict):
            container[key], other[place] = other[place], container[key]


_NUMBERS = [b"1e400", b"-1e400", b"9" * 400, b"NaN", b"-Infinity", b"0x10", b"1.5.5", b"01", b"-0", b"1e-400", b"null"]


def edit_text(rng: np.random.Generator, text: bytes) -> bytes:
    """Repeat a piece (keys, values, brackets), put a number that is none in place of one, or nest without end."""
    raw = bytearray(text)
    kind = rng.integers(3)
    at = int(rng.integers(len(raw) + 1))
    if kind == 0:
        raw[at:at] = raw[at : at + int(rng.integers(60))]
    elif kind == 1:
        digits = [i for i, byte in enumerate(raw) if byte in b"0123456789"]
        if digits:
            at = digits[rng.integers(len(digits))]
            raw[at : at + 1] = _NUMBERS[rng.integers(len(_NUMBERS))]
    else:
        raw[at:at] = rng.choice([b"[", b'{"a":', b"]", b"}", b'"', b","]) * int(rng.choice([1, 2, 50_000]))
    return bytes(raw)


_INTEGERS = [0, 1, 2, 3, 7, 8, 15, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def edit_bytes(rng: np.random.Generator, data: bytes, until: int | None = None) -> bytes:
    """Cut, insert, repeat or remove a piece, flip bits, or write an integer that is asking for trouble.

    Args:
        until: bits are flipped and integers written before this offset alone, half of the time.
    """
    raw = bytearray(data)
    if not raw:
        return b"\0"
    end = len(raw) if until is None or rng.random() < 0.5 else min(until, len(raw))
    kind, at = rng.integers(7), int(rng.integers(end))
    length = int(rng.integers(1, 64))
    if kind == 0:
        del raw[int(rng.integers(len(raw))) :]
    elif kind == 1:
        raw[at:at] = rng.bytes(length)
    elif kind == 2:
        raw[at:at] = raw[at : at + length]
    elif kind == 3:
        del raw[at : at + length]
    elif kind == 4:
        size = int(rng.choice([1, 2, 4]))
        number = _INTEGERS[rng.integers(len(_INTEGERS))] & (1 << 8 * size) - 1
        raw[at : at + size] = number.to_bytes(size, "big" if rng.random() < 0.5 else "little")
    else:
        for place in rng.integers(0, end, rng.integers(1, 9)):
            raw[place] ^= 1 << int(rng.integers(8))
    return bytes(raw)
