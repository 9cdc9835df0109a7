"""setp and set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_emulation import rounding
from gpu_emulation.formats import Array, Type, type_named
from gpu_emulation.rules import Build, Source, Step, rule
from gpu_emulation.strand import Mask, Strand

PRED = type_named("pred")
BITS = ("b16", "b32", "b64")
UNSIGNED = ("u16", "u32", "u64")
SIGNED = ("s16", "s32", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")

ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ANY_FLOAT = tuple(ORDERED) + tuple(name + "u" for name in ORDERED) + ("num", "nan")


def comparison(build: Build, name: str, kind: Type, *, ftz: bool) -> Callable[[Array, Array], Array]:
    """The comparison's function, if the type has it."""
    if kind.kind == "f":
        if name not in ANY_FLOAT or (ftz and kind.name in ("bf16", "f64")):
            raise build.unknown(f"no comparison .{name}{'.ftz' if ftz else ''} of .{kind.name}")
        return lambda a, b: _compare_floats(name, a, b, kind.name, ftz)
    if ftz:
        raise build.unknown("no .ftz for integers")
    allowed = ("eq", "ne") if kind.kind == "b" else tuple(ORDERED) + (tuple(UNSIGNED_NAMES) if kind.kind == "u" else ())
    if name not in allowed:
        raise build.unknown(f"no comparison .{name} of .{kind.name}")
    return ORDERED[UNSIGNED_NAMES.get(name, name)]


def _compare_floats(name: str, a: Array, b: Array, kind: str, ftz: bool) -> Array:
    if kind in ("f32", "f64") and not ftz:
        x, y = a, b
    else:
        raws = [word.view(np.uint32 if kind == "f32" else np.uint16) for word in (a, b)]
        x, y = (rounding.decode(rounding.flush(raw, kind) if ftz else raw, kind) for raw in raws)
    nan: Array = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return nan if name == "nan" else np.logical_not(nan)
    if len(name) == 3:
        return np.asarray(np.logical_or(nan, ORDERED[name[:2]](x, y)))
    return np.asarray(np.logical_and(np.logical_not(nan), ORDERED[name](x, y)))


def _read(build: Build) -> tuple[str, str, bool]:
    name = build.need(*ANY_FLOAT, *UNSIGNED_NAMES)
    return name, build.take("and", "or", "xor"), bool(build.take("ftz"))


def _combine(operation: str, result: Array, other: Array) -> Array:
    combined: Array = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[operation](result, other)
    return combined


@rule("setp")
def set_predicate(build: Build) -> Step:
    """p|q = (a cmp b) op c and not (a cmp b) op c."""
    name, operation, ftz = _read(build)
    if build.modifiers[-1:] in (["f16x2"], ["bf16x2"]):
        return _packed(build, name, operation, ftz=ftz)
    kind = build.type(*BITS, *UNSIGNED, *SIGNED, *FLOATS)
    function = comparison(build, name, kind, ftz=ftz)
    first, second = build.pair()
    write, write_other = build.destination(PRED, first), build.destination(PRED, second)
    a, b = build.source(kind), build.source(kind)
    with_: Source | None = build.source(PRED) if operation else None

    def step(strand: Strand, mask: Mask) -> None:
        result = np.asarray(function(a(strand, mask), b(strand, mask)))
        opposite = ~result
        if with_ is not None:
            other = with_(strand, mask)
            result, opposite = _combine(operation, result, other), _combine(operation, opposite, other)
        write(strand, result, mask)
        write_other(strand, opposite, mask)

    return step


def _packed(build: Build, name: str, operation: str, *, ftz: bool) -> Step:
    """p is of the low halves, q of the high ones."""
    kind = build.type("f16x2", "bf16x2")
    scalar = type_named(kind.element)
    function = comparison(build, name, scalar, ftz=ftz)
    first, second = build.pair()
    writers = build.destination(PRED, first), build.destination(PRED, second)
    a, b = build.source(kind), build.source(kind)
    with_: Source | None = build.source(PRED) if operation else None

    def step(strand: Strand, mask: Mask) -> None:
        x, y = a(strand, mask), b(strand, mask)
        for write, shift in zip(writers, (0, 16), strict=True):
            halves = [(word >> np.uint32(shift)).astype(np.uint16).view(scalar.view) for word in (x, y)]
            result = np.asarray(function(*halves))
            write(strand, result if with_ is None else _combine(operation, result, with_(strand, mask)), mask)

    return step


@rule("set")
def set_value(build: Build) -> Step:
    """All ones, or 1.0, where the comparison holds."""
    name, operation, ftz = _read(build)
    if operation:
        raise build.unknown("no boolean operation in set")
    result = build.type("u32", "s32", "f32")
    kind = build.type(*BITS, *UNSIGNED, *SIGNED, *FLOATS)
    function = comparison(build, name, kind, ftz=ftz)
    yes = np.uint32(0x3F800000 if result.kind == "f" else 0xFFFFFFFF)
    write, a, b = build.destination(result), build.source(kind), build.source(kind)
    return lambda strand, mask: write(strand, np.where(function(a(strand, mask), b(strand, mask)), yes, np.uint32(0)), mask)
