"""Logic, shifts, bit fields and permutations."""

from __future__ import annotations

import numpy as np

from gpu_emulation.errors import UninitialisedRead
from gpu_emulation.formats import Array, Type, literal_bits, type_named
from gpu_emulation.opcodes.integer import elementwise
from gpu_emulation.parser import Literal
from gpu_emulation.rules import Build, Step, rule
from gpu_emulation.strand import Mask, Strand

B32, U32 = type_named("b32"), type_named("u32")


@rule("and", "or", "xor")
def logic(build: Build) -> Step:
    kind = build.type("pred", "b16", "b32", "b64")
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[build.opcode]
    return elementwise(build.destination(kind), function, build.source(kind), build.source(kind))


@rule("not")
def invert(build: Build) -> Step:
    kind = build.type("pred", "b16", "b32", "b64")
    return elementwise(build.destination(kind), np.invert, build.source(kind))


@rule("cnot")
def logical_not(build: Build) -> Step:
    kind = build.type("b16", "b32", "b64")
    return elementwise(build.destination(kind), lambda a: (a == 0).astype(a.dtype), build.source(kind))


@rule("shl", "shr")
def shift(build: Build) -> Step:
    """Amounts over the width count as the width: zeros, or the sign."""
    left = build.opcode == "shl"
    kind = build.type(*(("b16", "b32", "b64") if left else ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")))
    write, value, amount = build.destination(kind), build.source(kind), build.source(U32)
    signed = kind.kind == "s"

    def compute(a: Array, b: Array) -> Array:
        by = np.minimum(b, np.uint32(kind.bits - 1)).astype(a.dtype)
        if left:
            return np.asarray(np.where(b >= kind.bits, a.dtype.type(0), a << by))
        return np.asarray(a >> by if signed else np.where(b >= kind.bits, a.dtype.type(0), a >> by))

    return elementwise(write, compute, value, amount)


@rule("shf")
def funnel(build: Build) -> Step:
    """The upper (l) or lower (r) word of the 64-bit value b:a, shifted."""
    left = build.need("l", "r") == "l"
    wraps = build.need("wrap", "clamp") == "wrap"
    kind = build.type("b32")
    write, low, high, amount = build.destination(kind), build.source(kind), build.source(kind), build.source(U32)

    def compute(a: Array, b: Array, c: Array) -> Array:
        by = (c & np.uint32(31) if wraps else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        return (both << by >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return elementwise(write, compute, low, high, amount)


@rule("lop3")
def three_inputs(build: Build) -> Step:
    """Any function of three bits, by its truth table."""
    kind = build.type("b32")
    write, a, b, c = build.destination(kind), build.source(kind), build.source(kind), build.source(kind)
    operand = build.operand()
    if not isinstance(operand, Literal):
        raise build.unknown("the table is no literal")
    table = literal_bits(operand.text, type_named("u8"))

    def compute(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), dtype=np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return result

    return elementwise(write, compute, a, b, c)


def _count(value: Array) -> Array:
    return np.bitwise_count(value).astype(np.uint32) if hasattr(np, "bitwise_count") else _count_slowly(value)


def _count_slowly(value: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8).reshape(len(value), -1), axis=1)
    return np.asarray(bits.sum(axis=1).astype(np.uint32))


def _spread_down(value: Array) -> Array:
    """Sets all bits below the highest one."""
    by = 1
    while by < value.dtype.itemsize * 8:
        value = value | (value >> value.dtype.type(by))
        by *= 2
    return value


@rule("popc", "clz")
def count(build: Build) -> Step:
    kind = build.type("b32", "b64")
    write, value = build.destination(U32), build.source(kind)
    if build.opcode == "popc":
        return elementwise(write, _count, value)
    return elementwise(write, lambda a: np.uint32(kind.bits) - _count(_spread_down(a)), value)


@rule("brev")
def reverse(build: Build) -> Step:
    kind = build.type("b32", "b64")

    def compute(a: Array) -> Array:
        word = a.dtype.type
        for by in (1, 2, 4, 8, 16, 32)[: 5 if kind.bits == 32 else 6]:
            pattern = sum(((1 << by) - 1) << at for at in range(0, kind.bits, 2 * by))
            a = ((a & word(pattern)) << word(by)) | ((a >> word(by)) & word(pattern))
        return a

    return elementwise(build.destination(kind), compute, build.source(kind))


@rule("bfind")
def find(build: Build) -> Step:
    """The highest bit that differs from the sign; 0xffffffff if there is none."""
    distance = bool(build.take("shiftamt"))
    kind = build.type("u32", "s32", "u64", "s64")
    write, value = build.destination(U32), build.source(kind)

    def compute(a: Array) -> Array:
        bits = np.where(a < 0, ~a, a).view(kind.raw) if kind.kind == "s" else a
        found = _count(_spread_down(bits)) - np.uint32(1)
        if distance:
            found = np.where(bits == 0, found, np.uint32(kind.bits - 1) - found)
        return found

    return elementwise(write, compute, value)


def _low_bits(length: Array, kind: Type) -> Array:
    """A mask of ``length`` ones, up to the width."""
    word = kind.raw.type
    short = np.minimum(length, np.uint32(kind.bits - 1)).astype(kind.raw)
    return np.asarray(np.where(length >= kind.bits, word(2**kind.bits - 1), (word(1) << short) - word(1)))


@rule("bfe")
def extract(build: Build) -> Step:
    """Position and length count modulo 256; bits beyond the top are zeros, or the sign."""
    kind = build.type("u32", "s32", "u64", "s64")
    write, value, position, length = build.destination(kind), build.source(kind), build.source(U32), build.source(U32)
    top = np.uint32(kind.bits - 1)

    def compute(a: Array, pos: Array, size: Array) -> Array:
        pos, size = pos & np.uint32(255), size & np.uint32(255)
        raw = a.view(kind.raw)
        field = np.where(pos > top, kind.raw.type(0), raw >> np.minimum(pos, top).astype(kind.raw)) & _low_bits(size, kind)
        if kind.kind == "u":
            return np.asarray(field)
        sign_at = np.minimum(pos + size - np.uint32(1), top).astype(kind.raw)
        negative = ((raw >> sign_at) & kind.raw.type(1)).astype(bool) & (size > 0)
        # The field's own top bit may lie beyond the value: all from its true end upwards takes the sign.
        kept = np.minimum(size, np.where(pos > top, np.uint32(0), np.uint32(kind.bits) - np.minimum(pos, top)))
        return np.asarray(np.where(negative, field | ~_low_bits(kept, kind), field))

    return elementwise(write, compute, value, position, length)


@rule("bfi")
def insert(build: Build) -> Step:
    kind = build.type("b32", "b64")
    write, field, base = build.destination(kind), build.source(kind), build.source(kind)
    position, length = build.source(U32), build.source(U32)
    top = np.uint32(kind.bits - 1)

    def compute(a: Array, b: Array, pos: Array, size: Array) -> Array:
        pos, size = pos & np.uint32(255), size & np.uint32(255)
        by = np.minimum(pos, top).astype(kind.raw)
        mask = np.where(pos > top, kind.raw.type(0), _low_bits(size, kind) << by)
        return np.asarray((b & ~mask) | ((a << by) & mask))

    return elementwise(write, compute, field, base, position, length)


@rule("bmsk")
def make_mask(build: Build) -> Step:
    wraps = build.need("clamp", "wrap") == "wrap"
    build.type("b32")
    write, position, length = build.destination(B32), build.source(U32), build.source(U32)

    def compute(pos: Array, size: Array) -> Array:
        if wraps:
            pos, size = pos & np.uint32(31), size & np.uint32(31)
        moved = np.minimum(pos, np.uint32(31))
        return np.where(pos > 31, np.uint32(0), _low_bits(size, B32) << moved)

    return elementwise(write, compute, position, length)


@rule("szext")
def extend(build: Build) -> Step:
    """The lowest bits of a word, extended by zeros or the sign."""
    wraps = build.need("clamp", "wrap") == "wrap"
    kind = build.type("u32", "s32")
    write, value, length = build.destination(kind), build.source(kind), build.source(U32)

    def compute(a: Array, size: Array) -> Array:
        size = size & np.uint32(31) if wraps else np.minimum(size, np.uint32(32))
        mask = _low_bits(size, B32)
        field = a.view(np.uint32) & mask
        sign = (field >> np.where(size == 0, np.uint32(0), size - np.uint32(1))) & np.uint32(1)
        return np.where((kind.kind == "s") & (size > 0) & (sign == 1), field | ~mask, field)

    return elementwise(write, compute, value, length)


@rule("prmt")
def permute(build: Build) -> Step:
    """Picks four of the eight bytes b:a; bit 3 of a selector replicates the byte's sign."""
    kind = build.type("b32")
    mode = build.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    to, a, b = build.target(kind), build.loose(kind), build.loose(kind)
    literal = build.instruction.operands[3:4]
    c = build.source(kind)
    # The special modes as selectors by the two lowest bits of c.
    special = {
        "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
        "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
        "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
        "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
        "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
        "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
    }

    def compute(x: Array, y: Array, selector: Array) -> Array:
        if mode:
            selector = np.array(special[mode], dtype=np.uint32)[selector & np.uint32(3)]
        both = (y.astype(np.uint64) << np.uint64(32)) | x
        result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), dtype=np.uint32)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
            if not mode:
                byte = np.where(pick & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
            result |= byte << np.uint32(8 * i)
        return result

    nibbles = literal_bits(literal[0].text, kind) if isinstance(literal[0], Literal) and not mode else None

    def step(strand: Strand, mask: Mask) -> None:
        (x, x_junk), (y, y_junk) = a(strand, mask), b(strand, mask)
        junk = x_junk | y_junk << 4
        if junk and nibbles is None:
            raise UninitialisedRead("undefined bytes are permuted, nobody knows where to")
        moved = sum((junk >> ((nibbles or 0) >> 4 * i & 7) & 1) << i for i in range(4)) if junk else 0
        if to is not None:
            strand.write(to, compute(x, y, c(strand, mask)), mask, moved)

    return step
