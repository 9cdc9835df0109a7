"""Integer arithmetic and comparison: add, sub, mul, mad, div, rem, min, max, abs, neg, carries, dot products, setp, set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_emulation.errors import EmulationError
from gpu_emulation.formats import SIGNED, UNSIGNED, Array, Type, type_named
from gpu_emulation.rules import Build, Source, Step, Writer, rule
from gpu_emulation.strand import Mask, Strand

INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
WIDER = {"u16": "u32", "u32": "u64", "s16": "s32", "s32": "s64"}


def elementwise(write: Writer, function: Callable[..., Array], *sources: Source) -> Step:
    """A step that applies ``function`` to the operands."""
    if len(sources) == 2:
        first, second = sources
        return lambda strand, mask: write(strand, function(first(strand, mask), second(strand, mask)), mask)
    return lambda strand, mask: write(strand, function(*[source(strand, mask) for source in sources]), mask)


def high_product(a: Array, b: Array, kind: Type) -> Array:
    """The upper half of the product."""
    if kind.bits < 64:
        wide = type_named(WIDER[kind.name]).view
        product = a.astype(wide) * b.astype(wide)
        return np.asarray((product >> wide.type(kind.bits)).astype(kind.view))
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    cross = (ua & low) * (ub & low) >> half
    middle = (ua >> half) * (ub & low) + cross
    other = (ua & low) * (ub >> half) + (middle & low)
    high = (ua >> half) * (ub >> half) + (middle >> half) + (other >> half)
    if kind.kind == "s":  # the unsigned product takes -x for 2**64 - x
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return np.asarray(high.view(kind.view))


def wide_product(a: Array, b: Array, kind: Type) -> Array:
    wide = type_named(WIDER[kind.name]).view
    return np.asarray(a.astype(wide) * b.astype(wide))


def clamp_sum(a: Array, b: Array, sign: int) -> Array:
    """.sat for s32."""
    exact = a.astype(np.int64) + sign * b.astype(np.int64)
    return np.asarray(np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32))


def add_sub(build: Build) -> Step:
    """add and sub, with the carry chain's add.cc, addc, sub.cc and subc."""
    subtract = build.opcode.startswith("sub")
    takes_carry = build.opcode in ("addc", "subc")
    keeps_carry = bool(build.take("cc"))
    saturates = not keeps_carry and not takes_carry and bool(build.take("sat"))
    kind = build.type(*(("s32",) if saturates else ("u32", "s32", "u64", "s64") if keeps_carry or takes_carry else INTEGERS))
    write, first, second = build.destination(kind), build.source(kind), build.source(kind)
    if saturates:
        return elementwise(write, lambda a, b: clamp_sum(a, b, -1 if subtract else 1), first, second)
    if keeps_carry or takes_carry:
        return _carrying(write, first, second, kind, subtract=subtract, takes=takes_carry, keeps=keeps_carry)
    return elementwise(write, np.subtract if subtract else np.add, first, second)


def _carrying(write: Writer, first: Source, second: Source, kind: Type, *, subtract: bool, takes: bool, keeps: bool) -> Step:
    """The carry (of a subtraction: the borrow) is 0 or 1 for each lane."""
    raw = kind.raw

    def step(strand: Strand, mask: Mask) -> None:
        a, b = first(strand, mask).view(raw), second(strand, mask).view(raw)
        carry = strand.carry.astype(raw) if takes else np.zeros(1, dtype=raw)
        if subtract:
            part = a - b
            result = part - carry
            out = (a < b) | (part < carry)
        else:
            part = a + b
            result = part + carry
            out = (part < a) | (result < part)
        if keeps:
            strand.carry = np.where(strand.bools(mask), out, strand.carry.astype(bool)).astype(np.uint64)
        write(strand, result, mask)

    return step


@rule("addc", "subc")
def add_carry(build: Build) -> Step:
    return add_sub(build)


def multiply(build: Build) -> Step:
    part = build.need("lo", "hi", "wide")
    kind = build.type(*(WIDER if part == "wide" else INTEGERS))
    write = build.destination(type_named(WIDER[kind.name]) if part == "wide" else kind)
    first, second = build.source(kind), build.source(kind)
    product = _product(part, kind)
    return elementwise(write, product, first, second)


def _product(part: str, kind: Type) -> Callable[[Array, Array], Array]:
    if part == "lo":
        return np.multiply
    if part == "hi":
        return lambda a, b: high_product(a, b, kind)
    return lambda a, b: wide_product(a, b, kind)


def multiply_add(build: Build) -> Step:
    """mad, and the carry chain's mad.cc and madc."""
    part = build.need("lo", "hi", "wide")
    keeps = bool(build.take("cc"))
    takes = build.opcode == "madc"
    chain = keeps or takes
    saturates = not chain and part == "hi" and bool(build.take("sat"))
    if chain and part == "wide":
        raise build.unknown("no carry with .wide")
    kind = build.type(
        *(WIDER if part == "wide" else ("u32", "s32", "u64", "s64") if chain else ("s32",) if saturates else INTEGERS)
    )
    result = type_named(WIDER[kind.name]) if part == "wide" else kind
    write, first, second, third = build.destination(result), build.source(kind), build.source(kind), build.source(result)
    product = _product(part, kind)
    if chain:

        def both(strand: Strand, mask: Mask) -> Array:
            return product(first(strand, mask), second(strand, mask))

        return _carrying(write, both, third, kind, subtract=False, takes=takes, keeps=keeps)
    if saturates:
        return elementwise(write, lambda a, b, c: clamp_sum(product(a, b), c, 1), first, second, third)
    return elementwise(write, lambda a, b, c: product(a, b) + c, first, second, third)


@rule("madc")
def multiply_add_carry(build: Build) -> Step:
    return multiply_add(build)


@rule("mul24", "mad24")
def multiply_24(build: Build) -> Step:
    part = build.need("lo", "hi")
    kind = build.type("u32", "s32")
    write, first, second = build.destination(kind), build.source(kind), build.source(kind)

    def product(a: Array, b: Array) -> Array:
        shift = np.int64(40)
        a64, b64 = (value.astype(np.int64) << shift for value in (a, b))
        if kind.kind == "s":
            exact = (a64 >> shift) * (b64 >> shift)
        else:
            exact = (a64.view(np.uint64) >> np.uint64(40)).view(np.int64) * (b64.view(np.uint64) >> np.uint64(40)).view(np.int64)
        return (exact >> np.int64(16 if part == "hi" else 0)).astype(np.uint64).astype(np.uint32).view(kind.view)

    if build.opcode == "mul24":
        return elementwise(write, product, first, second)
    third = build.source(kind)
    return elementwise(write, lambda a, b, c: product(a, b) + c, first, second, third)


def divide(build: Build) -> Step:
    """div and rem towards zero.  Division by zero and the one overflow are unspecified in PTX: they raise."""
    kind = build.type(*INTEGERS)
    write, first, second = build.destination(kind), build.source(kind), build.source(kind)
    remainder = build.opcode == "rem"

    def step(strand: Strand, mask: Mask) -> None:
        a, b = first(strand, mask), second(strand, mask)
        lanes = strand.bools(mask)
        bad = b == 0
        if kind.kind == "s":
            bad = bad | ((b == -1) & (a == np.iinfo(kind.view).min))
        bad = strand.whole(bad) & lanes
        if bad.any():
            raise EmulationError(
                f"{strand.who(bad)} divides by zero, or the lowest integer by -1: PTX does not say what comes out"
            )
        safe = np.where(b == 0, b.dtype.type(1), b)
        if kind.kind == "u":
            write(strand, a % safe if remainder else a // safe, mask)
            return
        magnitude = np.abs(a).view(kind.raw) // np.abs(safe).view(kind.raw)
        quotient = np.where((a < 0) != (safe < 0), np.negative(magnitude.view(kind.view)), magnitude.view(kind.view))
        write(strand, a - quotient * safe if remainder else quotient, mask)

    return step


@rule("rem")
def remainder(build: Build) -> Step:
    return divide(build)


def extremum(build: Build) -> Step:
    kind = build.type(*INTEGERS)
    write, first, second = build.destination(kind), build.source(kind), build.source(kind)
    return elementwise(write, np.minimum if build.opcode == "min" else np.maximum, first, second)


def negate(build: Build) -> Step:
    kind = build.type("s16", "s32", "s64")
    write, first = build.destination(kind), build.source(kind)
    return elementwise(write, np.negative if build.opcode == "neg" else np.abs, first)


@rule("sad")
def absolute_difference(build: Build) -> Step:
    kind = build.type(*INTEGERS)
    write, a, b, c = build.destination(kind), build.source(kind), build.source(kind), build.source(kind)
    return elementwise(write, lambda x, y, z: z + np.where(x < y, y - x, x - y), a, b, c)


@rule("dp4a")
def dot_product(build: Build) -> Step:
    """Four products of bytes, added to a word."""
    kinds = build.type("u32", "s32"), build.type("u32", "s32")
    result = type_named("s32" if "s32" in (kinds[0].name, kinds[1].name) else "u32")
    word = type_named("b32")
    write, a, b, c = build.destination(result), build.source(word), build.source(word), build.source(word)

    def bytes_of(value: Array, kind: Type) -> Array:
        return value.astype(np.uint32).reshape(-1, 1).view((SIGNED if kind.kind == "s" else UNSIGNED)[8]).astype(np.int64)

    def compute(x: Array, y: Array, z: Array) -> Array:
        total = (bytes_of(x, kinds[0]) * bytes_of(y, kinds[1])).sum(axis=1)
        return np.asarray((total.astype(np.uint64) + z.astype(np.uint64)).astype(np.uint32))

    return elementwise(write, compute, a, b, c)
