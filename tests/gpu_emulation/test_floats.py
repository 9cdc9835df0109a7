"""Floating-point instructions against exact fractions, rounded here bit by bit in plain Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_emulation.formats import TYPES
from gpu_emulation.snippets import apply

# Bits of the fraction and of the exponent.
SHAPES = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "f64": (52, 11)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
MODES = ("rn", "rz", "rm", "rp")

Value = Fraction | float  # a float only for infinities, NaN and -0.0


def decode(raw: int, kind: str) -> Value:
    mantissa, exponent = SHAPES[kind]
    sign = raw >> (mantissa + exponent)
    field, fraction = raw >> mantissa & ((1 << exponent) - 1), raw & ((1 << mantissa) - 1)
    if field == (1 << exponent) - 1:
        return math.nan if fraction else (-math.inf if sign else math.inf)
    if not field and not fraction and sign:
        return -0.0
    scale = max(field, 1) - ((1 << (exponent - 1)) - 1) - mantissa
    value = Fraction(fraction + (1 << mantissa if field else 0)) * Fraction(2) ** scale
    return -value if sign else value


def encode(value: Value, kind: str, mode: str = "rn", *, negative_zero: bool = False) -> int:
    """Rounds once."""
    mantissa, exponent = SHAPES[kind]
    top = ((1 << exponent) - 1) << mantissa
    sign_bit = 1 << (mantissa + exponent)
    if isinstance(value, float):
        if math.isnan(value):
            return NAN[kind]
        if math.isinf(value):
            return top | (sign_bit if value < 0 else 0)
        return sign_bit if math.copysign(1, value) < 0 else 0
    if value == 0:
        return sign_bit if negative_zero else 0
    negative, size = value < 0, abs(value)
    lowest = 2 - (1 << (exponent - 1))
    power = lowest
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    for candidate in (guess, guess - 1):
        if Fraction(2) ** candidate <= size:
            power = max(lowest, candidate)
            break
    units = size / Fraction(2) ** (power - mantissa)
    whole = units.numerator // units.denominator
    rest = units - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole += int(up)
    raw = whole + ((power - lowest) << mantissa)  # a carry moves into the exponent by itself
    if raw >= top:
        finite = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        raw = top - 1 if finite else top
    return raw | (sign_bit if negative else 0)


def samples(kind: str, seed: int, count: int = 160) -> np.ndarray[Any, Any]:
    """Zeros, subnormals, limits, infinities, NaN, numbers near one another, and random bits."""
    mantissa, exponent = SHAPES[kind]
    bits = 1 + mantissa + exponent
    one, top = ((1 << (exponent - 1)) - 1) << mantissa, ((1 << exponent) - 1) << mantissa
    edges = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, one - 1, top - 1, top, top + 1, top | 1 << (mantissa - 1)]
    edges += [edge | 1 << (bits - 1) for edge in edges]
    generator = np.random.default_rng(seed)
    anything = generator.integers(0, 1 << bits, count, dtype=np.uint64)
    near_one = np.uint64(one) + generator.integers(0, 4 << mantissa, count, dtype=np.uint64) - np.uint64(2 << mantissa)
    values = np.concatenate([np.array(edges * 3, dtype=np.uint64), anything, near_one])
    return generator.permutation(values).astype(f"u{bits // 8}")


def negative(value: Value) -> bool:
    return math.copysign(1, value) < 0 if isinstance(value, float) else value < 0


def add(a: Value, b: Value) -> Value:
    """Exactly; infinities, NaN and -0 by IEEE 754's rules."""
    if not (finite(a) and finite(b)):
        return (0.0 if finite(a) else float(a)) + (0.0 if finite(b) else float(b))
    if isinstance(a, float) and isinstance(b, float):
        return -0.0
    return Fraction(a) + Fraction(b)


def finite(value: Value) -> bool:
    return isinstance(value, Fraction) or math.isfinite(value)


def multiply(a: Value, b: Value) -> Value:
    if finite(a) and finite(b) and a != 0 and b != 0:
        return Fraction(a) * Fraction(b)
    signs = [math.nan if value != value else -1.0 if negative(value) else 1.0 for value in (a, b)]
    sizes = [abs(float(value)) if not finite(value) or value == 0 else 1.0 for value in (a, b)]
    product = signs[0] * signs[1] * (sizes[0] * sizes[1])
    return Fraction(0) if product == 0 and not negative(product) else product


def divide(a: Value, b: Value) -> Value:
    if b != 0 and finite(b):
        return multiply(a, 1 / Fraction(b))
    if b != b:
        return math.nan
    return multiply(a, math.copysign(math.inf, -1 if negative(b) else 1) if b == 0 else -0.0 if b < 0 else Fraction(0))


def check(instruction: str, kind: str, operands: Sequence[np.ndarray[Any, Any]], expected: Callable[..., int]) -> None:
    got = apply(instruction, kind, [(kind, operand) for operand in operands])
    for i, bits in enumerate(got):
        raws = [int(operand[i]) for operand in operands]
        want = expected(*raws)
        assert int(bits) == want, f"{instruction}: {[hex(raw) for raw in raws]} gave {int(bits):#x}, not {want:#x}"


def zero_sign(value: Value, mode: str, a: Value, b: Value) -> bool:
    """Whether an exact sum of zero is negative: towards minus infinity it is, unless both were +0."""
    both_positive = all(x == 0 and not negative(x) for x in (a, b))
    return value == 0 and mode == "rm" and not both_positive


@pytest.mark.parametrize(("kind", "mode"), [("f16", "rn"), ("bf16", "rn"), *(("f32", mode) for mode in MODES)])
def test_sums_products_and_fused(kind: str, mode: str) -> None:
    a, b, c = (samples(kind, seed) for seed in (1, 2, 3))

    def rounded_sum(x: Value, y: Value) -> int:
        return encode(total := add(x, y), kind, mode, negative_zero=zero_sign(total, mode, x, y))

    check(f"add.{mode}.{kind} $d, $0, $1;", kind, [a, b], lambda x, y: rounded_sum(decode(x, kind), decode(y, kind)))
    check(
        f"mul.{mode}.{kind} $d, $0, $1;",
        kind,
        [a, b],
        lambda x, y: encode(multiply(decode(x, kind), decode(y, kind)), kind, mode),
    )
    check(
        f"fma.{mode}.{kind} $d, $0, $1, $2;",
        kind,
        [a, b, c],
        lambda x, y, z: rounded_sum(multiply(decode(x, kind), decode(y, kind)), decode(z, kind)),
    )


def test_subtraction_is_the_sum_with_the_opposite() -> None:
    for kind in ("f16", "bf16", "f32"):
        sign = 1 << (TYPES[kind].bits - 1)
        a, b = samples(kind, 4), samples(kind, 5)
        for mode in MODES if kind == "f32" else ("rn",):
            flipped = (b ^ b.dtype.type(sign)).astype(b.dtype)
            left = apply(f"sub.{mode}.{kind} $d, $0, $1;", kind, [(kind, a), (kind, b)])
            right = apply(f"add.{mode}.{kind} $d, $0, $1;", kind, [(kind, a), (kind, flipped)])
            np.testing.assert_array_equal(left, right)


@given(st.data())
@settings(max_examples=12)
def test_fused_multiply_add_near_ties(data: st.DataObject) -> None:
    """Sums that cancel, or that lie next to the middle of two floats, where rounding twice would be wrong."""
    mantissa = st.integers(0, 2**23 - 1)
    words = st.builds(lambda m, e, s: s << 31 | (127 + e) << 23 | m, mantissa, st.integers(-3, 3), st.integers(0, 1))
    a, b = (np.array(data.draw(st.lists(words, min_size=32, max_size=32)), dtype=np.uint32) for _ in range(2))
    product = a.view(np.float32).astype(np.float64) * b.view(np.float32)
    shift = 2.0 ** data.draw(st.integers(-30, 30))
    c = (-product.astype(np.float32) * np.float32(shift)).astype(np.float32).view(np.uint32)
    for mode in MODES:

        def expected(x: int, y: int, z: int, mode: str = mode) -> int:
            p = multiply(decode(x, "f32"), decode(y, "f32"))
            total = add(p, decode(z, "f32"))
            return encode(total, "f32", mode, negative_zero=zero_sign(total, mode, p, decode(z, "f32")))

        check(f"fma.{mode}.f32 $d, $0, $1, $2;", "f32", [a, b, c], expected)


def test_a_sum_that_rounding_twice_gets_wrong() -> None:
    """x * x = 1 + 2**-11 + 2**-24 lies halfway between two floats; the addend, too small for float64 to keep, decides."""
    x = np.float32(1 + 2.0**-12)
    for tiny, expected in ((2.0**-100, 1 + 2.0**-11 + 2.0**-23), (-(2.0**-100), 1 + 2.0**-11)):
        operands = [("f32", np.array([value], dtype=np.float32).view(np.uint32)) for value in (x, x, tiny)]
        got = apply("fma.rn.f32 $d, $0, $1, $2;", "f32", operands)
        assert got.view(np.float32)[0] == np.float32(expected)


def test_fused_f64_is_exact() -> None:
    a, b, c = (samples("f64", seed, 300) for seed in (1, 2, 3))
    # Sums that cancel all but the product's tail.
    near = np.random.default_rng(0).standard_normal((2, 300))
    a = np.concatenate([a, near[0].view(np.uint64)])
    b = np.concatenate([b, near[1].view(np.uint64)])
    c = np.concatenate([c, (-(near[0] * near[1])).view(np.uint64)])
    got = apply("fma.rn.f64 $d, $0, $1, $2;", "f64", [("f64", x) for x in (a, b, c)]).view(np.float64)
    for i, value in enumerate(got):
        x, y, z = (decode(int(w[i]), "f64") for w in (a, b, c))
        product = multiply(x, y)
        total = add(product, z)
        if isinstance(total, float) and math.isnan(total):
            assert math.isnan(value)
        else:
            assert int(value.view(np.uint64)) == encode(total, "f64"), (x, y, z)


@pytest.mark.parametrize("mode", MODES)
def test_division_and_reciprocal(mode: str) -> None:
    a, b = samples("f32", 6), samples("f32", 7)
    check(
        f"div.{mode}.f32 $d, $0, $1;", "f32", [a, b], lambda x, y: encode(divide(decode(x, "f32"), decode(y, "f32")), "f32", mode)
    )
    check(f"rcp.{mode}.f32 $d, $0;", "f32", [a], lambda x: encode(divide(Fraction(1), decode(x, "f32")), "f32", mode))


@pytest.mark.parametrize("mode", MODES)
def test_square_root(mode: str) -> None:
    def expected(raw: int) -> int:
        value = decode(raw, "f32")
        if isinstance(value, float):
            return encode(math.nan if math.isnan(value) or value == -math.inf else value, "f32")
        if value <= 0:
            return encode(value if value == 0 else math.nan, "f32")
        scaled = value * 4**200  # an integer
        assert scaled.denominator == 1
        root = math.isqrt(scaled.numerator)
        exact = root * root == scaled.numerator
        return encode(Fraction(2 * root + (0 if exact else 1), 2) / 2**200, "f32", mode)

    check(f"sqrt.{mode}.f32 $d, $0;", "f32", [samples("f32", 8)], expected)


def flushed(raw: int) -> int:
    return raw & 0x80000000 if not raw & 0x7F800000 else raw


@pytest.mark.parametrize("opcode", ["add", "mul"])
def test_flushing_and_saturation(opcode: str) -> None:
    function = add if opcode == "add" else multiply
    a, b = samples("f32", 9), samples("f32", 10)

    def expected(x: int, y: int) -> int:
        return flushed(encode(function(decode(flushed(x), "f32"), decode(flushed(y), "f32")), "f32"))

    def saturated(x: int, y: int) -> int:
        value = decode(encode(function(decode(x, "f32"), decode(y, "f32")), "f32"), "f32")
        return 0 if value != value or value <= 0 else encode(min(Fraction(1), value), "f32") if value != math.inf else 0x3F800000

    check(f"{opcode}.rn.ftz.f32 $d, $0, $1;", "f32", [a, b], expected)
    check(f"{opcode}.rn.sat.f32 $d, $0, $1;", "f32", [a, b], saturated)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_smaller_and_larger(kind: str) -> None:
    def pick(x: int, y: int, *, larger: bool, nan: bool) -> int:
        a, b = decode(x, kind), decode(y, kind)
        if a != a or b != b:
            return NAN[kind] if nan or (a != a and b != b) else (y if a != a else x)
        if a == b:  # -0 is below +0
            return min(x, y) if larger else max(x, y)
        return x if (a > b) == larger else y

    a, b = samples(kind, 11), samples(kind, 12)
    for name in ("min", "max"):
        for nan in ("", ".NaN"):
            check(
                f"{name}{nan}.{kind} $d, $0, $1;",
                kind,
                [a, b],
                lambda x, y, name=name, nan=nan: pick(x, y, larger=name == "max", nan=bool(nan)),
            )


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_signs(kind: str) -> None:
    sign = 1 << (TYPES[kind].bits - 1)
    a = samples(kind, 13)
    check(f"neg.{kind} $d, $0;", kind, [a], lambda x: NAN[kind] if decode(x, kind) != decode(x, kind) else x ^ sign)
    check(f"abs.{kind} $d, $0;", kind, [a], lambda x: NAN[kind] if decode(x, kind) != decode(x, kind) else x & ~sign)


def test_packed_operations_are_two_scalar_ones() -> None:
    for packed, part in (("f16x2", "f16"), ("bf16x2", "bf16"), ("f32x2", "f32")):
        low, high = [samples(part, seed) for seed in (1, 2, 3)], [samples(part, seed) for seed in (4, 5, 6)]
        bits = TYPES[part].bits
        wide = f"u{bits // 4}"
        both = [(h.astype(wide) << np.dtype(wide).type(bits)) | lo for lo, h in zip(low, high, strict=True)]
        for code, count in (("add.rn", 2), ("mul.rn", 2), ("fma.rn", 3), ("max", 2)):
            if code == "max" and part == "f32":
                continue
            operands = "$0, $1, $2"[: 4 * count - 2]
            got = apply(f"{code}.{packed} $d, {operands};", packed, [(packed, x) for x in both[:count]])
            for side, shift in ((low, 0), (high, bits)):
                alone = apply(f"{code}.{part} $d, {operands};", part, [(part, x) for x in side[:count]])
                np.testing.assert_array_equal((got >> np.dtype(wide).type(shift)).astype(alone.dtype), alone)


ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_comparisons_and_nan(kind: str) -> None:
    a, b = samples(kind, 14), samples(kind, 15)
    b[: len(b) // 3] = a[: len(b) // 3]
    values = [(decode(int(x), kind), decode(int(y), kind)) for x, y in zip(a, b, strict=True)]
    for name, function in ORDERED.items():
        for suffix in ("", "u"):
            got = apply(f"setp.{name}{suffix}.{kind} $d, $0, $1;", "pred", [(kind, a), (kind, b)])
            want = [((x != x or y != y) and suffix == "u") or (x == x and y == y and function(x, y)) for x, y in values]
            assert got.tolist() == [int(value) for value in want], (name, suffix)
    got = apply(f"setp.nan.{kind} $d, $0, $1;", "pred", [(kind, a), (kind, b)])
    assert got.tolist() == [int(x != x or y != y) for x, y in values]
    got = apply(f"setp.num.{kind} $d, $0, $1;", "pred", [(kind, a), (kind, b)])
    assert got.tolist() == [int(x == x and y == y) for x, y in values]


def test_properties() -> None:
    a = samples("f32", 16)
    values = a.view(np.float32)
    tests = {
        "finite": np.isfinite(values),
        "infinite": np.isinf(values),
        "notanumber": np.isnan(values),
        "number": ~np.isnan(values),
        "subnormal": ((a & 0x7F800000) == 0) & ((a & 0x7FFFFF) != 0),
        "normal": ((a & 0x7F800000) != 0) & ((a & 0x7F800000) != 0x7F800000),
    }
    for name, expected in tests.items():
        np.testing.assert_array_equal(apply(f"testp.{name}.f32 $d, $0;", "pred", [("f32", a)]), expected.astype(np.uint32))


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "ex2": lambda x: math.inf if x >= 1024 else 2.0**x,
    "lg2": lambda x: -math.inf if x == 0 else math.nan if x < 0 else math.log2(x),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "rsqrt": lambda x: math.copysign(math.inf, x) if x == 0 else math.nan if x < 0 else 1 / math.sqrt(x),
    "rcp": lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x,
    "sqrt": lambda x: math.nan if x < 0 else math.sqrt(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximate_functions_are_rounded_once(name: str) -> None:
    """Within one ulp of the C library's value rounded to f32: that is off by one where the two float64 differ beside a tie."""
    values = np.concatenate([np.linspace(-20, 20, 997), [0.0, -0.0, 1e-40, -1e-40, 1e38, -1e38, 126.5, -140.0]]).astype(
        np.float32
    )
    got = apply(f"{name}.approx.f32 $d, $0;", "f32", [("f32", values.view(np.uint32))]).view(np.float32)
    want = [encode(Fraction(y) if math.isfinite(y := FUNCTIONS[name](float(x))) and y else y, "f32") for x in values]
    for x, mine, theirs in zip(values, got, np.array(want, dtype=np.uint32).view(np.float32), strict=True):
        same = (np.isnan(mine) and np.isnan(theirs)) or mine == theirs
        assert same or abs(int(mine.view(np.int32)) - int(theirs.view(np.int32))) <= 1, (x, mine, theirs)
    flush = apply(f"{name}.approx.ftz.f32 $d, $0;", "f32", [("f32", np.array([1], dtype=np.uint32))]) if name != "tanh" else None
    if flush is not None:  # a subnormal counts as zero
        zero = FUNCTIONS[name](0.0)
        assert int(flush[0]) == encode(Fraction(zero) if math.isfinite(zero) else zero, "f32")


INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@pytest.mark.parametrize("of", ["f16", "bf16", "f32", "f64"])
def test_float_to_integer(of: str) -> None:
    rounds: dict[str, Callable[[Fraction], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    values = samples(of, 17)
    for to in INTEGERS:
        bits = TYPES[to].bits
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        for mode, function in rounds.items():
            got = apply(f"cvt.{mode}.{to}.{of} $d, $0;", f"b{max(bits, 16)}", [(of, values)])
            for raw, result in zip(values, got, strict=True):
                value = decode(int(raw), of)
                if value != value:
                    want = 1 << (bits - 1) if of == "f64" or bits == 64 else 0
                    want = want - (1 << bits) if to[0] == "s" and want else want
                elif value in (math.inf, -math.inf):
                    want = high if value > 0 else low
                else:
                    want = max(low, min(high, function(Fraction(value))))
                assert int(result) == want & ((1 << max(bits, 16)) - 1), (to, mode, hex(int(raw)))


@pytest.mark.parametrize("of", INTEGERS)
def test_integer_to_float(of: str) -> None:
    bits = TYPES[of].bits
    words = np.random.default_rng(0).integers(0, 1 << 64, 200, dtype=np.uint64) >> np.arange(200, dtype=np.uint64) % np.uint64(64)
    raws = np.concatenate([words, np.array([0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1], dtype=np.uint64)])
    values = (raws & np.uint64((1 << bits) - 1)).astype(f"u{bits // 8}")
    signed = values.view(f"{of[0].replace('s', 'i')}{bits // 8}")
    for to in ("f16", "bf16", "f32", "f64"):
        for mode in MODES if to != "f64" else ("rn",):
            got = apply(f"cvt.{mode}.{to}.{of} $d, $0;", to, [(of, values)])
            assert got.tolist() == [encode(Fraction(int(x)), to, mode) for x in signed], (to, mode)


def test_float_to_float() -> None:
    for of, to in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")):
        for mode in MODES:
            values = samples(of, 18, 400)
            if of == "f64":  # near the range of the result, so that not all is infinite or zero
                scaled = np.random.default_rng(1).standard_normal(200) * 2.0 ** np.random.default_rng(2).integers(-150, 130, 200)
                values = np.concatenate([values, scaled.view(np.uint64)])
            got = apply(f"cvt.{mode}.{to}.{of} $d, $0;", to, [(of, values)])
            assert got.tolist() == [encode(decode(int(x), of), to, mode, negative_zero=False) for x in values], (of, to, mode)
    for of, to in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64")):
        values = samples(of, 19)
        got = apply(f"cvt.{to}.{of} $d, $0;", to, [(of, values)])
        for raw, result in zip(values, got, strict=True):
            value = decode(int(raw), of)
            assert value != value if to == "f64" and int(result) & 0x7FF8000000000000 == 0x7FF8000000000000 else True
            if value == value:
                assert int(result) == encode(value, to)


def test_rounding_to_integral_floats() -> None:
    values = samples("f32", 20)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = apply(f"cvt.{mode}.f32.f32 $d, $0;", "f32", [("f32", values)])
        with np.errstate(all="ignore"):
            want = function(values.view(np.float32)).view(np.uint32)
        np.testing.assert_array_equal(got, np.where(np.isnan(values.view(np.float32)), NAN["f32"], want))


def test_packing_two_halves() -> None:
    a, b = samples("f32", 21), samples("f32", 22)
    for packed, part in (("f16x2", "f16"), ("bf16x2", "bf16")):
        got = apply(f"cvt.rn.{packed}.f32 $d, $0, $1;", packed, [("f32", a), ("f32", b)])
        want = [
            encode(decode(int(x), "f32"), part) << 16 | encode(decode(int(y), "f32"), part) for x, y in zip(a, b, strict=True)
        ]
        assert got.tolist() == want
    got = apply("cvt.rn.relu.bf16.f32 $d, $0;", "bf16", [("f32", a)])
    for x, result in zip(a, got, strict=True):
        value = decode(int(x), "f32")
        assert int(result) == encode(Fraction(0) if value < 0 or value == 0 else value, "bf16")


def test_literals() -> None:
    zeros = np.zeros(32, dtype=np.uint32)
    for text, value in (("0f3F800000", 1.0), ("0d3FF0000000000000", 1.0), ("0.5", 0.5), ("-1.25e2", -125.0)):
        got = apply(f"mov.f32 $d, {text};", "f32", [("f32", zeros)])
        assert got[0] == struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_half_operands_in_f32_arithmetic(half: str) -> None:
    """add, sub and fma widen them first; NaN of f32 is canonical."""
    a, b = samples(half, 23), samples(half, 24)
    c = samples("f32", 25)[: len(a)]
    a, b = a[: len(c)], b[: len(c)]
    for mode in MODES:
        got = apply(f"fma.{mode}.f32.{half} $d, $0, $1, $2;", "f32", [(half, a), (half, b), ("f32", c)])
        wide = [apply(f"cvt.f32.{half} $d, $0;", "f32", [(half, x)]) for x in (a, b)]
        np.testing.assert_array_equal(got, apply(f"fma.{mode}.f32 $d, $0, $1, $2;", "f32", [("f32", x) for x in (*wide, c)]))
        for opcode in ("add", "sub"):
            got = apply(f"{opcode}.{mode}.f32.{half} $d, $0, $1;", "f32", [(half, a), ("f32", c)])
            np.testing.assert_array_equal(
                got, apply(f"{opcode}.{mode}.f32 $d, $0, $1;", "f32", [("f32", x) for x in (wide[0], c)])
            )
