"""Floating-point arithmetic with one rounding, in every PTX rounding mode.

The device rounds an exact result once.  Here the exact result is first rounded to float64 *to odd* (Boldo and Melquiond,
"Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57, 2008): cut
off, and the last bit set if anything was lost.  Rounding that once more to a format of at most 51 bits gives what a single
rounding would have given, in every mode.  So add, sub, mul, div, sqrt and fma of f16, bf16 and f32 are exact to the last bit,
subnormals included.  f64 is NumPy's own, to nearest only; its fma is exact (by fractions where the quick way could overflow).

NaN: a result that is NaN is the canonical one, 0x7fff (f16, bf16) or 0x7fffffff (f32), as PTX says; f64 keeps NumPy's.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.formats import Array

F64 = NDArray[np.float64]

SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}
CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
NATIVE: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def decode(raw: Array, kind: str) -> F64:
    """Raw bits as float64: exact."""
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    exact: F64 = raw.view(NATIVE[kind]).astype(np.float64)
    return exact


def encode(exact: F64, kind: str, mode: str = "rn") -> Array:
    """Float64 (rounded to odd where it is not exact) -> raw bits of ``kind``, rounded once by ``mode``: rn, rz, rm or rp."""
    if kind == "f64":
        return exact.view(np.uint64)
    if kind == "bf16":
        return _encode_bf16(exact, mode)
    near = exact.astype(NATIVE[kind])
    if mode != "rn":
        back = near.astype(np.float64)
        lower, upper = NATIVE[kind](-np.inf), NATIVE[kind](np.inf)
        if mode == "rz":
            near = np.where(np.abs(back) > np.abs(exact), np.nextafter(near, NATIVE[kind](0)), near)
        elif mode == "rm":
            near = np.where(back > exact, np.nextafter(near, lower), near)
        else:
            near = np.where(back < exact, np.nextafter(near, upper), near)
    return canonical(near.view(np.uint16 if kind == "f16" else np.uint32), kind)


def _encode_bf16(exact: F64, mode: str) -> Array:
    """By way of f32 rounded to odd: 24 bits are at least 8 + 2."""
    cut = encode(exact, "f32", "rz")
    inexact = cut.view(np.float32).astype(np.float64) != exact
    odd = cut | (inexact & ~np.isnan(exact)).astype(np.uint32)
    low = odd & np.uint32(0xFFFF)
    up = {
        "rn": (low > 0x8000) | ((low == 0x8000) & ((odd >> np.uint32(16)) & np.uint32(1)).astype(bool)),
        "rz": np.zeros(odd.shape, bool),
        "rm": (low != 0) & (odd >> np.uint32(31)).astype(bool),
        "rp": (low != 0) & ~(odd >> np.uint32(31)).astype(bool),
    }[mode]
    result = ((odd >> np.uint32(16)) + up).astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(CANONICAL_NAN["bf16"]), result)


def canonical(raw: Array, kind: str) -> Array:
    """Every NaN as PTX writes it."""
    if kind == "f64":
        return raw
    magnitude = raw & raw.dtype.type(CANONICAL_NAN[kind])
    nan = magnitude > raw.dtype.type({"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000}[kind])
    return np.where(nan, raw.dtype.type(CANONICAL_NAN[kind]), raw) if nan.any() else raw


def flush(raw: Array, kind: str) -> Array:
    """.ftz: subnormals become zeros of their sign."""
    word = raw.dtype.type
    sign, mantissa = {"f16": (0x8000, 0x3FF), "bf16": (0x8000, 0x7F), "f32": (0x80000000, 0x7FFFFF)}[kind]
    subnormal = (raw & word(sign - 1)) - word(1) < word(mantissa)  # a zero wraps around to the largest number
    return np.where(subnormal, raw & word(sign), raw) if subnormal.any() else raw


def saturate(raw: Array, kind: str) -> Array:
    """.sat: clamped to [0, 1], NaN to +0."""
    value = decode(raw, kind)
    return encode(np.where(value > 0, np.minimum(value, 1.0), 0.0), kind)


def _odd(rounded: F64, error: F64) -> F64:
    """``rounded`` + ``error`` (an exact sum, ``rounded`` its nearest) rounded to odd."""
    bits = rounded.view(np.int64)
    move = (error != 0) & np.isfinite(rounded) & np.isfinite(error) & ((bits & 1) == 0)
    if not move.any():
        return rounded
    outward = (error > 0) == (rounded > 0)
    towards = np.where(rounded == 0, np.copysign(5e-324, error), (bits + np.where(outward, 1, -1)).view(np.float64))
    return np.where(move, towards, rounded)


def two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """Knuth: the nearest sum and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: F64, b: F64) -> tuple[F64, F64]:
    """Dekker: the nearest product and its error; exact unless something over- or underflows."""
    product = a * b
    split = 134217729.0  # 2**27 + 1
    ah, bh = a * split, b * split
    ah, bh = ah - (ah - a), bh - (bh - b)
    al, bl = a - ah, b - bh
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def add(a: F64, b: F64, mode: str = "rn") -> F64:
    """a + b to odd; ``mode`` matters for the sign of a zero alone: towards minus infinity it is negative, unless of +0 and +0."""
    total = _odd(*two_sum(a, b))
    if mode == "rm":
        positive = (a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b)
        return np.where((total == 0) & ~positive, -0.0, total)
    return total


def multiply(a: F64, b: F64, mode: str = "rn") -> F64:
    """a * b: exact for factors of at most 26 bits and f32's range."""
    return a * b


def multiply_add(a: F64, b: F64, c: F64, mode: str = "rn") -> F64:
    """a * b + c to odd, for factors of at most 26 bits and f32's range: then the product is exact."""
    return add(a * b, c, mode)


def divide(a: F64, b: F64, mode: str = "rn") -> F64:
    """a / b to odd, for operands of at most 26 bits and f32's range."""
    quotient = a / b
    product, error = two_product(quotient, b)
    rest = (a - product) - error  # exact: a and the product agree in their leading bits
    return _odd(quotient, np.where(b < 0, -rest, rest))


def square_root(a: F64, mode: str = "rn") -> F64:
    """sqrt(a) to odd, for an operand of at most 26 bits and f32's range."""
    root = np.sqrt(a)
    product, error = two_product(root, root)
    return _odd(root, (a - product) - error)


def multiply_add_f64(a: F64, b: F64, c: F64) -> F64:
    """a * b + c in float64, rounded once to nearest."""
    a, b, c = (np.atleast_1d(value) for value in np.broadcast_arrays(a, b, c))
    high, low = two_product(a, b)
    first, second = two_sum(c, low)
    third, fourth = two_sum(high, first)
    result = third + add(fourth, second)
    sizes = np.stack([np.abs(a), np.abs(b), np.abs(high), np.abs(c)])
    quick = ((sizes < 2.0**500) & ((sizes > 2.0**-400) | (sizes == 0))).all(axis=0)
    if not quick.all():
        result = result.copy()
        for i in np.flatnonzero(~quick):
            result[i] = _multiply_add_one(float(a[i]), float(b[i]), float(c[i]))
    # With an exactly zero operand the quick way can lose the sign of a zero; plain arithmetic has it right.
    zero = (high == 0) | (c == 0)
    return np.where(zero & quick & ((low == 0) | (c == 0)) & (result == 0), a * b + c, result)


def _multiply_add_one(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return float(np.float64(a) * np.float64(b) + np.float64(c)) if a == 0 or b == 0 else 0.0
    try:
        return float(exact)  # correctly rounded
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def round_integral(value: F64, mode: str) -> F64:
    """To an integral value: rni, rzi, rmi or rpi; the sign of zero is kept."""
    result: Any = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](value)
    return np.asarray(result)
