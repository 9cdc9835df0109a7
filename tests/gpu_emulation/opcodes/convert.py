"""cvt: between integers, between floats, and across."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_emulation import rounding
from gpu_emulation.formats import Array, Type, type_named
from gpu_emulation.opcodes.floating import finish
from gpu_emulation.rules import Build, Step, rule
from gpu_emulation.strand import Mask, Strand

INTEGERS = tuple(kind + str(bits) for kind in "us" for bits in (8, 16, 32, 64))
FLOATS = ("f16", "bf16", "f32", "f64")
TO_FLOAT = ("rn", "rz", "rm", "rp")
TO_INTEGRAL = ("rni", "rzi", "rmi", "rpi")

Convert = Callable[[Array], Array]


@rule("cvt")
def convert(build: Build) -> Step:
    mode = build.take(*TO_FLOAT, *TO_INTEGRAL)
    relu = build.take("relu")
    ftz = build.take("ftz")
    sat = build.take("sat")
    if build.modifiers[:1] in (["f16x2"], ["bf16x2"]):
        return _pack(build, mode, relu, ftz, sat)
    to, of = build.type(*INTEGERS, *FLOATS), build.type(*INTEGERS, *FLOATS)
    function = _function(build, to, of, mode, ftz=bool(ftz), sat=bool(sat))
    if relu:
        if to.name not in ("f16", "bf16") or of.name != "f32" or mode not in ("rn", "rz"):
            raise build.unknown("no .relu here")
        function = finish(function, to.name, relu=True)
    # An 8-bit value lives in a wider register; so may a source, of which the low bits count.
    is_integer = to.kind != "f", of.kind != "f"
    write, read = build.destination(to, wider=is_integer[0]), build.source(of, wider=is_integer[1])
    return lambda strand, mask: write(strand, function(read(strand, mask)), mask)


def _function(build: Build, to: Type, of: Type, mode: str, *, ftz: bool, sat: bool) -> Convert:
    if ftz and "f32" not in (to.name, of.name):
        raise build.unknown(".ftz without f32")
    if to.kind != "f" and of.kind != "f":
        if mode or ftz:
            raise build.unknown("no rounding between integers")
        return lambda value: _integers(value, to, of, sat=sat)
    if to.kind != "f":
        if mode not in TO_INTEGRAL:
            raise build.unknown("a float becomes an integer by .rni, .rzi, .rmi or .rpi")
        return lambda value: _float_to_integer(value, to, of, mode, ftz=ftz)
    if of.kind != "f":
        if mode not in TO_FLOAT or ftz or (to.name == "f64" and mode != "rn"):
            raise build.unknown("an integer becomes a float by .rn, .rz, .rm or .rp; f64 by .rn")
        return finish(lambda value: _integer_to_float(value, to, mode), to.name, sat=sat)
    return _floats(build, to, of, mode, ftz=ftz, sat=sat)


def _integers(value: Array, to: Type, of: Type, *, sat: bool) -> Array:
    if sat:
        limits = np.iinfo(to.view)
        low, high = np.iinfo(of.view).min, np.iinfo(of.view).max
        value = np.clip(value, of.view.type(max(limits.min, low)), of.view.type(min(limits.max, high)))
    return value.astype(to.view)


def _float_to_integer(value: Array, to: Type, of: Type, mode: str, *, ftz: bool) -> Array:
    """Clamped.  NaN is 0, but for f64 or a 64-bit integer 1 << (bits - 1) (PTX ISA, cvt)."""
    raw = value.view(of.raw)
    exact = rounding.decode(rounding.flush(raw, "f32") if ftz and of.name == "f32" else raw, of.name)
    integral = rounding.round_integral(exact, mode)
    limits = np.iinfo(to.view)
    low, high = float(limits.min), float(limits.max) + 1.0 if to.bits == 64 else float(limits.max)
    inside = (integral > low) & (integral < high)
    wide = np.uint64 if to.name == "u64" else np.int64
    result = np.where(inside, integral, 0.0).astype(wide).astype(to.view)
    result = np.where(integral <= low, to.view.type(limits.min), result)
    result = np.where(integral >= high, to.view.type(limits.max), result)
    nan = np.array([1 << (to.bits - 1) if of.name == "f64" or to.bits == 64 else 0], dtype=np.uint64).astype(to.raw)
    return np.where(np.isnan(exact), nan.view(to.view), result)


def _integer_to_float(value: Array, to: Type, mode: str) -> Array:
    if to.name == "f64":
        return value.astype(np.float64).view(np.uint64)
    if value.dtype.itemsize < 8:
        return rounding.encode(value.astype(np.float64), to.name, mode)
    # 64 bits: the two halves are exact, their sum is rounded to odd.
    high = (value >> value.dtype.type(32)).astype(np.float64) * 2.0**32
    low = (value & value.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return rounding.encode(rounding.add(high, low), to.name, mode)


def _floats(build: Build, to: Type, of: Type, mode: str, *, ftz: bool, sat: bool) -> Convert:
    same = to.name == of.name
    order = {"f16": 0, "bf16": 0, "f32": 1, "f64": 2}
    narrows = order[to.name] < order[of.name]
    if order[to.name] == order[of.name] and not same:
        raise build.unknown("between f16 and bf16")
    if same and mode in TO_FLOAT:
        raise build.unknown("a rounding mode that rounds nothing")
    if not same and (mode not in TO_FLOAT if narrows else mode):
        raise build.unknown("narrowing takes .rn, .rz, .rm or .rp; widening takes none")
    if same and to.name == "bf16" and mode:
        raise build.unknown("no integral rounding of bf16")

    def compute(value: Array) -> Array:
        raw = value.view(of.raw)
        exact = rounding.decode(rounding.flush(raw, "f32") if ftz and of.name == "f32" else raw, of.name)
        if same and mode:
            exact = rounding.round_integral(exact, mode)
        result = rounding.encode(exact, to.name, mode if narrows else "rn")
        return rounding.flush(result, "f32") if ftz and to.name == "f32" else result

    return finish(compute, to.name, sat=sat)


def _pack(build: Build, mode: str, relu: str, ftz: str, sat: str) -> Step:
    """Two f32 side by side in half precision: the first operand above the second."""
    kind = build.type("f16x2", "bf16x2")
    of = build.type("f32")
    if mode not in ("rn", "rz") or ftz or sat:
        raise build.unknown("packing takes .rn or .rz, and neither .ftz nor .sat")
    part = type_named(kind.element)

    def one(value: Array) -> Array:
        return rounding.encode(rounding.decode(value.view(np.uint32), "f32"), part.name, mode)

    function = finish(one, part.name, relu=bool(relu))
    write, upper, lower = build.destination(kind), build.source(of), build.source(of)

    def step(strand: Strand, mask: Mask) -> None:
        high, low = function(upper(strand, mask)), function(lower(strand, mask))
        write(strand, (high.astype(np.uint32) << np.uint32(16)) | low, mask)

    return step
