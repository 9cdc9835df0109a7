"""Integer, bit and conversion instructions against Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_emulation.formats import TYPES
from gpu_emulation.snippets import apply

EDGES = (0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
COUNT = 64


def samples(kind: str, seed: int) -> np.ndarray[Any, Any]:
    """Raw bits: edges, their negatives and random words."""
    bits = TYPES[kind].bits
    generator = np.random.default_rng(seed)
    edges = [*EDGES, *(-edge for edge in EDGES), 1 << (bits - 1), (1 << (bits - 1)) - 1]
    values = [edge & ((1 << bits) - 1) for edge in edges]
    values += [int(word) >> (64 - bits) for word in generator.integers(0, 1 << 64, COUNT, dtype=np.uint64)]
    return np.array(generator.permutation(np.array(values, dtype=np.uint64)), dtype=f"u{bits // 8}")


def number(raw: int, kind: str) -> int:
    bits = TYPES[kind].bits
    return raw - (1 << bits) if kind[0] == "s" and raw >> (bits - 1) else raw


def cut(value: int, kind: str) -> int:
    return value & ((1 << TYPES[kind].bits) - 1)


def check(instruction: str, result: str, kinds: tuple[str, ...], expected: Callable[..., int], *, seed: int = 0) -> None:
    operands = [samples(kind, seed + i) for i, kind in enumerate(kinds)]
    count = min(map(len, operands))
    operands = [operand[:count] for operand in operands]
    got = apply(instruction, result, list(zip(kinds, operands, strict=True)))
    for i in range(count):
        numbers = [number(int(operand[i]), kind) for operand, kind in zip(operands, kinds, strict=True)]
        assert int(got[i]) == expected(*numbers) & ((1 << (32 if result == "pred" else TYPES[result].bits)) - 1), numbers


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@pytest.mark.parametrize("kind", INTEGERS)
def test_arithmetic(kind: str) -> None:
    bits = TYPES[kind].bits
    check(f"add.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a + b)
    check(f"sub.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a - b)
    check(f"mul.lo.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a * b)
    check(f"mul.hi.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: (a * b) >> bits)
    check(f"mad.lo.{kind} $d, $0, $1, $2;", kind, (kind, kind, kind), lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} $d, $0, $1, $2;", kind, (kind, kind, kind), lambda a, b, c: ((a * b) >> bits) + c)
    check(f"min.{kind} $d, $0, $1;", kind, (kind, kind), min)
    check(f"max.{kind} $d, $0, $1;", kind, (kind, kind), max)
    check(f"sad.{kind} $d, $0, $1, $2;", kind, (kind, kind, kind), lambda a, b, c: c + abs(a - b))


@pytest.mark.parametrize("kind", WIDER)
def test_wide_products(kind: str) -> None:
    wide = WIDER[kind]
    check(f"mul.wide.{kind} $d, $0, $1;", wide, (kind, kind), lambda a, b: a * b)
    check(f"mad.wide.{kind} $d, $0, $1, $2;", wide, (kind, kind, wide), lambda a, b, c: a * b + c)


def test_24_bit_products() -> None:
    def low(value: int, kind: str) -> int:
        value &= 0xFFFFFF
        return value - (1 << 24) if kind == "s32" and value >> 23 else value

    for kind in ("u32", "s32"):
        check(f"mul24.lo.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b, kind=kind: low(a, kind) * low(b, kind))
        check(f"mul24.hi.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b, kind=kind: (low(a, kind) * low(b, kind)) >> 16)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind: str) -> None:
    check(f"neg.{kind} $d, $0;", kind, (kind,), lambda a: -a)
    check(f"abs.{kind} $d, $0;", kind, (kind,), abs)


@pytest.mark.parametrize("sign", ["add", "sub"])
def test_saturating_sums(sign: str) -> None:
    def expected(a: int, b: int) -> int:
        return max(-(1 << 31), min((1 << 31) - 1, a + b if sign == "add" else a - b))

    check(f"{sign}.sat.s32 $d, $0, $1;", "s32", ("s32", "s32"), expected)


@pytest.mark.parametrize("kind", INTEGERS)
def test_quotients_go_towards_zero(kind: str) -> None:
    def quotient(a: int, b: int) -> int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    # Divisors are made odd and positive in their low bits so that none is 0 or -1.
    or_3 = f"or.b{TYPES[kind].bits} $1, $1, 3;\nand.b{TYPES[kind].bits} $1, $1, -5;\n"
    check(or_3 + f"div.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: quotient(a, number(cut((b | 3) & -5, kind), kind)))
    check(
        or_3 + f"rem.{kind} $d, $0, $1;",
        kind,
        (kind, kind),
        lambda a, b: a - quotient(a, d := number(cut((b | 3) & -5, kind), kind)) * d,
    )


def test_carries_make_a_128_bit_sum_and_product() -> None:
    a, b = samples("u64", 1), samples("u64", 2)
    text = "mov.b64 {%r20, %r21}, $0; mov.b64 {%r22, %r23}, $1;\n"
    sums = text + "add.cc.u32 %r24, %r20, %r22; addc.cc.u32 %r25, %r21, %r23; addc.u32 %r26, 0, 0; mov.b64 $d, {%r25, %r26};"
    got = apply(sums, "b64", [("u64", a), ("u64", b)])
    assert [int(x) for x in got] == [(int(x) + int(y)) >> 32 for x, y in zip(a, b, strict=True)]
    differences = (
        text + "sub.cc.u32 %r24, %r20, %r22; subc.cc.u32 %r25, %r21, %r23; subc.u32 %r26, 0, 0; mov.b64 $d, {%r25, %r26};"
    )
    got = apply(differences, "b64", [("u64", a), ("u64", b)])
    assert [int(x) for x in got] == [((int(x) - int(y)) >> 32) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
    products = text + (
        "mul.lo.u32 %r24, %r20, %r22; mul.hi.u32 %r25, %r20, %r22;\n"
        "mad.lo.cc.u32 %r25, %r20, %r23, %r25; madc.hi.u32 %r26, %r20, %r23, 0;\n"
        "mad.lo.cc.u32 %r25, %r21, %r22, %r25; madc.hi.u32 %r26, %r21, %r22, %r26; mov.b64 $d, {%r25, %r26};"
    )
    got = apply(products, "b64", [("u64", a & np.uint64(0xFFFFFFFFFFFF)), ("u64", b & np.uint64(0xFFFFFFFFFFFF))])
    for x, y, z in zip(a, b, got, strict=True):
        x, y = int(x) & 0xFFFFFFFFFFFF, int(y) & 0xFFFFFFFFFFFF
        low, high = (x & 0xFFFFFFFF, x >> 32), (y & 0xFFFFFFFF, y >> 32)
        assert int(z) == ((low[0] * high[0] + ((low[0] * high[1] + low[1] * high[0]) << 32)) >> 32) & (2**64 - 1)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind: str) -> None:
    check(f"and.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a & b)
    check(f"or.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a | b)
    check(f"xor.{kind} $d, $0, $1;", kind, (kind, kind), lambda a, b: a ^ b)
    check(f"not.{kind} $d, $0;", kind, (kind,), lambda a: ~a)
    check(f"cnot.{kind} $d, $0;", kind, (kind,), lambda a: int(a == 0))


@pytest.mark.parametrize("kind", ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"])
def test_shifts_of_any_amount(kind: str) -> None:
    bits = TYPES[kind].bits
    if kind[0] == "b":
        check(f"shl.{kind} $d, $0, $1;", kind, (kind, "u32"), lambda a, b: a << min(b, bits))
    check(f"shr.{kind} $d, $0, $1;", kind, (kind, "u32"), lambda a, b: a >> min(b, bits))


def test_funnel_shifts() -> None:
    for mode, amount in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
        check(
            f"shf.l.{mode}.b32 $d, $0, $1, $2;",
            "b32",
            ("b32", "b32", "u32"),
            lambda a, b, c, amount=amount: ((b << 32 | a) << amount(c)) >> 32,
        )
        check(
            f"shf.r.{mode}.b32 $d, $0, $1, $2;",
            "b32",
            ("b32", "b32", "u32"),
            lambda a, b, c, amount=amount: (b << 32 | a) >> amount(c),
        )


def _extract(a: int, position: int, length: int, kind: str) -> int:
    """The ISA's own loop."""
    bits = TYPES[kind].bits
    position, length = position & 255, length & 255
    sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, bits - 1) & 1
    return sum((a >> (position + i) & 1 if i < length and position + i < bits else sign) << i for i in range(bits))


def _insert(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


@given(st.data())
@settings(max_examples=8)
def test_bit_fields(data: st.DataObject) -> None:
    words = st.lists(st.integers(0, 2**64 - 1), min_size=32, max_size=32)
    small = st.lists(st.integers(0, 80) | st.integers(250, 260), min_size=32, max_size=32)
    a, b = (np.array(data.draw(words), dtype=np.uint64) for _ in range(2))
    position, length = (np.array(data.draw(small), dtype=np.uint32) for _ in range(2))
    for kind in ("u32", "s32", "u64", "s64"):
        bits = TYPES[kind].bits
        x, y = a.astype(f"u{bits // 8}"), b.astype(f"u{bits // 8}")
        got = apply(f"bfe.{kind} $d, $0, $1, $2;", kind, [(kind, x), ("u32", position), ("u32", length)])
        assert got.tolist() == [_extract(int(v), int(p), int(n), kind) for v, p, n in zip(x, position, length, strict=True)]
        if kind[0] == "u":
            got = apply(
                f"bfi.b{bits} $d, $0, $1, $2, $3;", f"b{bits}", [(kind, x), (kind, y), ("u32", position), ("u32", length)]
            )
            assert got.tolist() == [
                _insert(int(v), int(w), int(p), int(n), bits) for v, w, p, n in zip(x, y, position, length, strict=True)
            ]


def test_counting_bits() -> None:
    for bits in (32, 64):
        kind = f"b{bits}"
        check(f"popc.{kind} $d, $0;", "u32", (kind,), lambda a: a.bit_count())
        check(f"clz.{kind} $d, $0;", "u32", (kind,), lambda a, bits=bits: bits - a.bit_length())
        check(f"brev.{kind} $d, $0;", kind, (kind,), lambda a, bits=bits: int(f"{a:0{bits}b}"[::-1], 2))
        check(f"bfind.u{bits} $d, $0;", "u32", (f"u{bits}",), lambda a: a.bit_length() - 1)
        check(f"bfind.s{bits} $d, $0;", "u32", (f"s{bits}",), lambda a: (a if a >= 0 else ~a).bit_length() - 1)
        check(f"bfind.shiftamt.u{bits} $d, $0;", "u32", (f"u{bits}",), lambda a, bits=bits: bits - a.bit_length() if a else -1)


def test_masks_and_extensions() -> None:
    check("bmsk.clamp.b32 $d, $0, $1;", "b32", ("u32", "u32"), lambda a, b: (((1 << min(b, 32)) - 1) << min(a, 32)) & 0xFFFFFFFF)
    check("bmsk.wrap.b32 $d, $0, $1;", "b32", ("u32", "u32"), lambda a, b: ((1 << (b & 31)) - 1) << (a & 31))
    check("szext.clamp.u32 $d, $0, $1;", "u32", ("u32", "u32"), lambda a, b: a & ((1 << min(b, 32)) - 1))

    def signed(a: int, b: int) -> int:
        length = min(b, 32)
        field = a & ((1 << length) - 1)
        return field - (1 << length) if length and field >> (length - 1) else field

    check("szext.clamp.s32 $d, $0, $1;", "s32", ("s32", "u32"), signed)


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1E, 0x78])
def test_three_input_logic(table: int) -> None:
    def expected(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    check(f"lop3.b32 $d, $0, $1, $2, {table:#x};", "b32", ("b32", "b32", "b32"), expected)


def test_permutations() -> None:
    def default(a: int, b: int, c: int) -> int:
        both, result = a | b << 32, 0
        for i in range(4):
            pick = c >> 4 * i & 15
            byte = both >> 8 * (pick & 7) & 255
            result |= ((0xFF if byte >> 7 else 0) if pick & 8 else byte) << 8 * i
        return result

    check("prmt.b32 $d, $0, $1, $2;", "b32", ("b32", "b32", "b32"), default)
    # From the ISA's tables, for c mod 4 = 1.
    for mode, selector in {"f4e": 0x4321, "b4e": 0x6701, "rc8": 0x1111, "ecl": 0x3211, "ecr": 0x1110, "rc16": 0x3232}.items():
        check(f"prmt.b32.{mode} $d, $0, $1, 5;", "b32", ("b32", "b32"), lambda a, b, s=selector: default(a, b, s))


@pytest.mark.parametrize(("x", "y"), [("s32", "s32"), ("u32", "u32"), ("s32", "u32"), ("u32", "s32")])
def test_dot_product_of_bytes(x: str, y: str) -> None:
    def bytes_of(value: int, kind: str) -> list[int]:
        return [number(byte, kind[0] + "8") for byte in (value & 0xFFFFFFFF).to_bytes(4, "little")]

    check(
        f"dp4a.{x}.{y} $d, $0, $1, $2;",
        "b32",
        ("b32", "b32", "b32"),
        lambda a, b, c: c + sum(i * j for i, j in zip(bytes_of(a, x), bytes_of(b, y), strict=True)),
    )


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_comparisons(kind: str) -> None:
    for name, function in COMPARISONS.items():
        check(f"setp.{name}.{kind} $d, $0, $1;", "pred", (kind, kind), lambda a, b, f=function: int(f(a, b)))
    if kind[0] == "u":
        for name, ordered in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
            check(f"setp.{name}.{kind} $d, $0, $1;", "pred", (kind, kind), lambda a, b, f=COMPARISONS[ordered]: int(f(a, b)))


def test_comparisons_join_predicates() -> None:
    code = "setp.gt.s32 %p2, $2, 0;\nsetp.lt.{op}.s32 %p3|$d, $0, $1, {no}%p2;"
    joins: dict[str, Callable[[bool, bool], bool]] = {
        "and": lambda p, q: p and q,
        "or": lambda p, q: p or q,
        "xor": lambda p, q: p != q,
    }
    for op, join in joins.items():
        for no in ("", "!"):
            check(
                code.format(op=op, no=no),
                "pred",
                ("s32", "s32", "s32"),
                lambda a, b, c, join=join, no=no: int(join(not a < b, (c > 0) != bool(no))),
            )


NARROW = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@pytest.mark.parametrize("of", NARROW)
def test_conversions_between_integers(of: str) -> None:
    for to in NARROW:
        bits = max(16, TYPES[to].bits)
        # Into an 8-bit value the register is wider and extended by zeros or the sign.
        result = f"b{bits}"
        check(f"cvt.{to}.{of} $d, $0;", result, (of,), lambda a, to=to: number(cut(a, to), to))
        low, high = (
            (-(1 << (TYPES[to].bits - 1)), (1 << (TYPES[to].bits - 1)) - 1) if to[0] == "s" else (0, (1 << TYPES[to].bits) - 1)
        )
        check(f"cvt.sat.{to}.{of} $d, $0;", result, (of,), lambda a, low=low, high=high: max(low, min(high, a)))


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=32, max_size=32), st.lists(st.integers(0, 2**64 - 1), min_size=32, max_size=32)
)
@settings(max_examples=6)
def test_high_products_of_anything(a: list[int], b: list[int]) -> None:
    x, y = np.array(a, dtype=np.uint64), np.array(b, dtype=np.uint64)
    for kind in ("u64", "s64"):
        got = apply(f"mul.hi.{kind} $d, $0, $1;", kind, [(kind, x), (kind, y)])
        assert got.tolist() == [cut((number(i, kind) * number(j, kind)) >> 64, kind) for i, j in zip(a, b, strict=True)]
