"""PTX's scalar types: sizes, NumPy forms and immediates.

A register holds raw bits: an unsigned integer array of its width, or booleans for a predicate.  An instruction views those bits
as its own type.  f16, f32 and f64 have NumPy types; bf16 and the packed types stay raw and are taken apart where they are used.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_emulation.errors import InvalidModule, UnknownInstruction

Array = NDArray[Any]

UNSIGNED: dict[int, np.dtype[Any]] = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED: dict[int, np.dtype[Any]] = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}


@dataclass(frozen=True)
class Type:
    """One PTX type.

    Attributes:
        name: as PTX spells it, without the dot.
        bits: width; 1 for a predicate.
        kind: "u", "s", "b" (bits), "f" (float) or "p" (predicate).
        element: the scalar of a packed type ("f16" of f16x2), "" of a scalar.
    """

    name: str
    bits: int
    kind: str
    element: str = ""

    @property
    def nbytes(self) -> int:
        return self.bits // 8

    @property
    def raw(self) -> np.dtype[Any]:
        """How a register of this width is stored."""
        return np.dtype(bool) if self.kind == "p" else UNSIGNED[self.bits]

    @property
    def view(self) -> np.dtype[Any]:
        """How an instruction of this type sees the bits."""
        if self.kind == "s":
            return SIGNED[self.bits]
        if self.name in ("f16", "f32", "f64"):
            return np.dtype(f"f{self.nbytes}")
        return self.raw


TYPES: dict[str, Type] = {
    kind + str(bits): Type(kind + str(bits), bits, kind) for kind in ("b", "u", "s") for bits in (8, 16, 32, 64)
}
TYPES |= {
    "pred": Type("pred", 1, "p"),
    "f16": Type("f16", 16, "f"),
    "bf16": Type("bf16", 16, "f"),
    "f32": Type("f32", 32, "f"),
    "f64": Type("f64", 64, "f"),
    "f16x2": Type("f16x2", 32, "f", "f16"),
    "bf16x2": Type("bf16x2", 32, "f", "bf16"),
    "f32x2": Type("f32x2", 64, "f", "f32"),
}


def type_named(name: str) -> Type:
    if name not in TYPES:
        raise UnknownInstruction(f"unknown type .{name}")
    return TYPES[name]


_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9][0-9]*)U?")
_FLOAT32 = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_FLOAT64 = re.compile(r"0[dD]([0-9a-fA-F]{16})")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


def integer(text: str) -> int | None:
    """The value of an integer literal, or None."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].lower()
    base = 16 if digits.startswith("0x") else 2 if digits.startswith("0b") else 8 if len(digits) > 1 and digits[0] == "0" else 10
    value = int(digits, base)
    return -value if match[1] else value


def is_literal(text: str) -> bool:
    return integer(text) is not None or any(form.fullmatch(text) for form in (_FLOAT32, _FLOAT64, _DECIMAL))


def literal_bits(text: str, to: Type) -> int:
    """The bits of a literal as ``to``.

    Raises:
        InvalidModule: the literal does not fit: an integer out of range, an integer for a float instruction, and so on.
    """
    value = integer(text)
    if to.kind == "p":
        if value is None:
            raise InvalidModule(f"{text} is no predicate")
        return int(value != 0)
    if value is not None:
        if to.kind == "f":
            raise InvalidModule(f"the integer {text} stands for a .{to.name}")
        if not -(1 << (to.bits - 1)) <= value < 1 << to.bits:
            raise InvalidModule(f"{text} does not fit .{to.name}")
        return value & ((1 << to.bits) - 1)
    bits: int | None = None
    if match := _FLOAT32.fullmatch(text):
        if to.bits == 32 and not to.element:
            return int(match[1], 16)
        number = struct.unpack(">f", bytes.fromhex(match[1]))[0]
    elif match := _FLOAT64.fullmatch(text):
        number = struct.unpack(">d", bytes.fromhex(match[1]))[0]
        bits = int(match[1], 16)
    elif _DECIMAL.fullmatch(text):
        number = float(text)
    else:
        raise InvalidModule(f"{text} is no literal")
    if to.name == "f64" or (to.name == "b64" and bits is not None):
        return int.from_bytes(struct.pack(">d", number), "big") if bits is None else bits
    if to.name == "f32":
        with np.errstate(over="ignore"):
            return int(np.float64(number).astype(np.float32).view(np.uint32))
    raise InvalidModule(f"the literal {text} stands for a .{to.name}")


def resize(raw: Array, bits: int, *, signed: bool = False) -> Array:
    """Raw bits cut to a smaller width, or extended by zeros or the sign."""
    have = raw.dtype.itemsize * 8
    if have == bits:
        return raw
    if signed and have < bits:
        return raw.view(SIGNED[have]).astype(SIGNED[bits]).view(UNSIGNED[bits])
    return raw.astype(UNSIGNED[bits])
