"""Floating-point arithmetic: add, sub, mul, fma, div, min, max, neg, abs, square roots and the approximations.

Basic operations are exact to the last bit in every rounding mode (:mod:`gpu_emulation.rounding`); flushed operands and results
(.ftz) are flushed before and after rounding.  The ``.approx`` and ``.full`` functions are *better* than the device's: they are
computed in float64 and rounded once, where a GPU errs by 1 or 2 ulp (sin and cos by 2**-20.9 absolute).  Results at poles and for
infinities are the device's; div.approx and div.full lose the quotient for divisors over 2**126 there, but not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_emulation import rounding
from gpu_emulation.formats import Array, Type, type_named
from gpu_emulation.opcodes.integer import elementwise
from gpu_emulation.rules import Build, Source, Step, rule
from gpu_emulation.strand import Mask, Strand

FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")
MODES = ("rn", "rz", "rm", "rp")

# Bits of the operands -> bits of the result, of one scalar type.
Scalar = Callable[..., Array]


def per_element(kind: Type, function: Scalar) -> Scalar:
    """A function of scalars on packed operands."""
    if not kind.element:
        return lambda *operands: function(*[operand.view(kind.raw) for operand in operands])
    part = type_named(kind.element).raw
    shift = kind.raw.type(kind.bits // 2)

    def both(*operands: Array) -> Array:
        words = [operand.view(kind.raw) for operand in operands]
        low = function(*[word.astype(part) for word in words])
        high = function(*[(word >> shift).astype(part) for word in words])
        packed: Array = (high.astype(kind.raw) << shift) | low
        return packed

    return both


def packed(build: Build, kind: Type, function: Scalar, operands: int) -> Step:
    """A function of scalars on both halves of packed operands; a half of which an operand's is undefined stays undefined.

    Compilers use one half alone.
    """
    to, compute = build.target(kind), per_element(kind, function)
    reads = [build.loose(kind) for _ in range(operands)]
    size = kind.nbytes // 2
    halves = [((1 << size) - 1) << (i * size) for i in range(2)]

    def step(strand: Strand, mask: Mask) -> None:
        values, junk = zip(*[read(strand, mask) for read in reads], strict=True)
        undefined = sum(half for half in halves if any(bits & half for bits in junk))
        if to is not None:
            strand.write(to, compute(*values), mask, undefined)

    return step


def finish(function: Scalar, kind: str, *, ftz: bool = False, sat: bool = False, relu: bool = False) -> Scalar:
    """Adds .ftz, .sat and .relu to a function of scalars of ``kind``."""
    if not (ftz or sat or relu):
        return function

    def compute(*operands: Array) -> Array:
        result = function(*[rounding.flush(operand, kind) if ftz else operand for operand in operands])
        if ftz:
            result = rounding.flush(result, kind)
        if sat:
            result = rounding.saturate(result, kind)
        if relu:  # negative to +0, NaN stays
            sign = result.dtype.type(1 << (result.dtype.itemsize * 8 - 1))
            zero = result.dtype.type(0)
            result = np.where((result & sign).astype(bool) & ~np.isnan(rounding.decode(result, kind)), zero, result)
        return result

    return compute


def _rounding(build: Build, kind: str, mode: str, ftz: str, sat: str) -> None:
    if kind == "f64" and (mode not in ("", "rn") or ftz or sat):
        raise build.unknown("f64 is rounded to nearest only, and neither flushed nor saturated")
    if kind in ("f16", "bf16") and mode not in ("", "rn"):
        raise build.unknown("half precision is rounded to nearest only")
    if kind == "bf16" and (ftz or sat):
        raise build.unknown("no .ftz or .sat for bf16")


def _native(operation: Callable[[Any, Any], Any], kind: str) -> Scalar:
    """To nearest in f32 and f64: NumPy's own."""
    float_type = rounding.NATIVE[kind]
    return lambda a, b: rounding.canonical(operation(a.view(float_type), b.view(float_type)).view(a.dtype), kind)


def _exact(operation: Callable[..., Array], kind: str, mode: str) -> Scalar:
    return lambda *operands: rounding.encode(operation(*[rounding.decode(word, kind) for word in operands], mode), kind, mode)


BASIC: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any, str], Any]]] = {
    "add": (np.add, rounding.add),
    "sub": (np.subtract, lambda a, b, mode: rounding.add(a, -b, mode)),
    "mul": (np.multiply, rounding.multiply),
}


def binary(build: Build) -> Step:
    """add, sub, mul."""
    mode, ftz, sat = build.take(*MODES), build.take("ftz"), build.take("sat")
    kind = build.type(*FLOATS)
    scalar = kind.element or kind.name
    _rounding(build, scalar, mode, ftz, sat)
    native, exact = BASIC[build.opcode]
    near = scalar in ("f32", "f64") and mode in ("", "rn")
    function = finish(
        _native(native, scalar) if near else _exact(exact, scalar, mode or "rn"), scalar, ftz=bool(ftz), sat=bool(sat)
    )
    if kind.element:
        return packed(build, kind, function, 2)
    write = build.destination(kind)
    half = None if build.opcode == "mul" or ftz else _half(build, kind)
    first = build.source(kind) if half is None else _widened(build.source(half), half)
    return elementwise(write, per_element(kind, function), first, build.source(kind))


def _half(build: Build, kind: Type) -> Type | None:
    """The second type of add.f32.f16 and its like: operands in half precision, widened first, which is exact."""
    return build.type("f16", "bf16") if kind.name == "f32" and build.modifiers else None


def _widened(read: Source, kind: Type) -> Source:
    return lambda strand, mask: rounding.encode(rounding.decode(read(strand, mask).view(kind.raw), kind.name), "f32")


def _fma_f32(a: Array, b: Array, c: Array) -> Array:
    """To nearest.  The float64 sum is right unless it lies halfway between two f32, or is subnormal: then take the exact way."""
    product = a.view(np.float32).astype(np.float64) * b.view(np.float32)
    addend = c.view(np.float32).astype(np.float64)
    total = product + addend
    result = total.astype(np.float32).view(np.uint32)
    doubtful = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == 0x10000000
    doubtful |= np.abs(total) < 2.0**-125
    if doubtful.any():
        product, addend, _ = np.broadcast_arrays(product, addend, total)
        exact = rounding.add(product[doubtful], addend[doubtful])
        result = result.copy()
        result[doubtful] = rounding.encode(exact, "f32")
    return rounding.canonical(result, "f32")


def _fma_f64(a: Array, b: Array, c: Array) -> Array:
    return rounding.multiply_add_f64(*[word.view(np.float64) for word in (a, b, c)]).view(np.uint64)


def fused(build: Build) -> Step:
    """fma, and mad with a rounding mode, which is the same."""
    mode, ftz, sat, relu = build.need(*MODES), build.take("ftz"), build.take("sat"), build.take("relu")
    kind = build.type(*FLOATS)
    scalar = kind.element or kind.name
    _rounding(build, scalar, mode, ftz, sat)
    if relu and scalar not in ("f16", "bf16"):
        raise build.unknown("no .relu")
    if scalar == "f64":
        function: Scalar = _fma_f64
    elif scalar == "f32" and mode == "rn":
        function = _fma_f32
    else:
        function = _exact(rounding.multiply_add, scalar, mode)
    function = finish(function, scalar, ftz=bool(ftz), sat=bool(sat), relu=bool(relu))
    if kind.element:
        return packed(build, kind, function, 3)
    write = build.destination(kind)
    half = None if ftz else _half(build, kind)
    factors = [build.source(kind) if half is None else _widened(build.source(half), half) for _ in range(2)]
    return elementwise(write, per_element(kind, function), *factors, build.source(kind))


@rule("fma")
def fma(build: Build) -> Step:
    return fused(build)


def divide(build: Build) -> Step:
    mode = build.need(*MODES, "approx", "full")
    ftz = build.take("ftz")
    kind = build.type("f32", "f64")
    _rounding(build, kind.name, "" if mode in ("approx", "full") else mode, ftz, "")
    if kind.name == "f64" and mode != "rn":
        raise build.unknown("no approximate division of f64")
    near = mode in ("rn", "approx", "full")
    function = finish(_native(np.divide, kind.name) if near else _exact(rounding.divide, "f32", mode), kind.name, ftz=bool(ftz))
    return elementwise(build.destination(kind), per_element(kind, function), build.source(kind), build.source(kind))


def choose(a: Array, b: Array, kind: str, *, larger: bool, nan: bool, magnitude: bool = False) -> Array:
    """The smaller or larger of two; -0 is below +0; a NaN gives way to a number unless ``nan``."""
    x, y = rounding.decode(a, kind), rounding.decode(b, kind)
    if magnitude:
        x, y = np.abs(x), np.abs(y)
        clear = a.dtype.type((1 << (a.dtype.itemsize * 8 - 1)) - 1)
        a, b = a & clear, b & clear
    take_b = (y > x) if larger else (y < x)
    sign = a.dtype.type(1 << (a.dtype.itemsize * 8 - 1))
    b_negative = (b & sign).astype(bool)
    take_b |= (x == 0) & (y == 0) & (~b_negative if larger else b_negative)
    take_b |= np.isnan(x)
    result = np.where(take_b, b, a)
    if nan:
        result = np.where(np.isnan(x), a, result)
        result = np.where(np.isnan(y), b, result)
    return rounding.canonical(result, kind)


def extremum(build: Build) -> Step:
    """min and max, of three operands too."""
    ftz, nan = build.take("ftz"), build.take("NaN")
    kind = build.type("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
    scalar = kind.element or kind.name
    if (scalar == "f64" and (ftz or nan)) or (scalar == "bf16" and ftz):
        raise build.unknown("no such modifier for the type")
    larger = build.opcode == "max"

    def two(a: Array, b: Array) -> Array:
        return choose(a, b, scalar, larger=larger, nan=bool(nan))

    function: Scalar = two
    if len(build.instruction.operands) == 4:
        if kind.name != "f32":
            raise build.unknown("three operands of another type than f32")
        function = lambda a, b, c: two(two(a, b), c)  # noqa: E731
    function = finish(function, scalar, ftz=bool(ftz))
    write = build.destination(kind)
    sources = [build.source(kind) for _ in range(build.left())]
    return elementwise(write, per_element(kind, function), *sources)


def sign(build: Build) -> Step:
    """neg and abs change the sign bit; a NaN becomes the canonical one."""
    ftz = build.take("ftz")
    kind = build.type("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
    scalar = kind.element or kind.name
    if ftz and scalar in ("f64", "bf16"):
        raise build.unknown("no .ftz for the type")
    negates = build.opcode == "neg"

    def compute(a: Array) -> Array:
        bit = a.dtype.type(1 << (a.dtype.itemsize * 8 - 1))
        return rounding.canonical(a ^ bit if negates else a & ~bit, scalar)

    function = finish(compute, scalar, ftz=bool(ftz))
    return elementwise(build.destination(kind), per_element(kind, function), build.source(kind))


@rule("copysign")
def copy_sign(build: Build) -> Step:
    """The magnitude of the second operand with the sign of the first."""
    kind = build.type("f32", "f64")
    bit = kind.raw.type(1 << (kind.bits - 1))
    write, a, b = build.destination(kind), build.source(kind), build.source(kind)
    return elementwise(write, lambda x, y: (x.view(kind.raw) & bit) | (y.view(kind.raw) & ~bit), a, b)


@rule("sqrt", "rcp")
def root_or_reciprocal(build: Build) -> Step:
    mode, ftz = build.need(*MODES, "approx"), build.take("ftz")
    kind = build.type("f32", "f64")
    is_root = build.opcode == "sqrt"
    if kind.name == "f64" and (mode != "rn" or ftz):
        raise build.unknown("f64 to nearest only")
    if mode in ("rn", "approx"):
        near: Callable[[Any], Any] = np.sqrt if is_root else np.reciprocal
        native = rounding.NATIVE[kind.name]

        def function(a: Array) -> Array:
            return rounding.canonical(near(a.view(native)).view(kind.raw), kind.name)

    else:
        exact = rounding.square_root if is_root else lambda a, mode: rounding.divide(np.ones_like(a), a)
        function = _exact(exact, "f32", mode)
    function = finish(function, kind.name, ftz=bool(ftz))
    return elementwise(build.destination(kind), per_element(kind, function), build.source(kind))


APPROXIMATIONS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "rsqrt": (lambda a: 1 / np.sqrt(a), ("f32", "f64")),
    "ex2": (np.exp2, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
    "lg2": (np.log2, ("f32",)),
    "sin": (np.sin, ("f32",)),
    "cos": (np.cos, ("f32",)),
    "tanh": (np.tanh, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
}


@rule(*APPROXIMATIONS)
def approximation(build: Build) -> Step:
    compute, kinds = APPROXIMATIONS[build.opcode]
    build.need("approx")
    ftz = build.take("ftz")
    kind = build.type(*kinds)
    scalar = kind.element or kind.name
    if ftz and (build.opcode == "tanh" or scalar in ("f16", "f64")):
        raise build.unknown("no .ftz for the type")
    if scalar == "bf16" and build.opcode == "ex2" and not ftz:
        raise build.unknown(".ftz is needed for bf16")

    def function(a: Array) -> Array:
        return rounding.encode(np.asarray(compute(rounding.decode(a, scalar))), scalar)

    return elementwise(build.destination(kind), per_element(kind, finish(function, scalar, ftz=bool(ftz))), build.source(kind))


@rule("testp")
def test_property(build: Build) -> Step:
    which = build.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    kind = build.type("f32", "f64")
    tiny = rounding.SMALLEST_NORMAL[kind.name]
    test: dict[str, Callable[[Any], Any]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return elementwise(build.destination(type_named("pred")), test[which], build.source(kind))
