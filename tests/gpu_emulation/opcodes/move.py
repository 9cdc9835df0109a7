"""mov, cvta, selp, and predicates as values."""

from __future__ import annotations

import numpy as np

from gpu_emulation.formats import UNSIGNED, Type, type_named
from gpu_emulation.parser import Name, Register, Vector
from gpu_emulation.rules import Build, Loose, Step, rule
from gpu_emulation.strand import Mask, Strand

PRED = type_named("pred")
SCALARS = ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64", "f16", "bf16")


@rule("mov")
def move(build: Build) -> Step:
    """Undefined registers and bytes may be moved: what comes of them is undefined, and raises where it is used."""
    kind = build.type("pred", *SCALARS)
    destination, source = build.operand(), build.operand()
    if isinstance(destination, Vector):
        return _unpack(build, kind, destination, build.loose(kind, source))
    if isinstance(source, Vector):
        return _pack(build, kind, build.target(kind, destination), source)
    read, to = build.loose(kind, source), build.target(kind, destination)

    def step(strand: Strand, mask: Mask) -> None:
        value, junk = read(strand, mask)
        if to is not None:
            strand.write(to, value.view(to.type.raw), mask, junk)

    return step


def _part(build: Build, kind: Type, count: int) -> Type:
    if kind.kind != "b" or kind.bits % count or kind.bits // count not in UNSIGNED or count < 2:
        raise build.unknown(f"a vector of {count}")
    return type_named(f"b{kind.bits // count}")


def _unpack(build: Build, kind: Type, destination: Vector, read: Loose) -> Step:
    part = _part(build, kind, len(destination.items))
    targets = [build.target(part, item) for item in destination.items]

    def step(strand: Strand, mask: Mask) -> None:
        value, junk = read(strand, mask)
        for i, to in enumerate(targets):
            if to is not None:
                word = (value >> value.dtype.type(i * part.bits)).astype(part.raw)
                strand.write(to, word, mask, junk >> (i * part.nbytes) & ((1 << part.nbytes) - 1))

    return step


def _pack(build: Build, kind: Type, to: Register | None, source: Vector) -> Step:
    part = _part(build, kind, len(source.items))
    readers = [build.loose(part, item) for item in source.items]
    raw = kind.raw

    def step(strand: Strand, mask: Mask) -> None:
        total, undefined = np.zeros(1, dtype=raw), 0
        for i, read in enumerate(readers):
            value, junk = read(strand, mask)
            total = total | (value.astype(raw) << raw.type(i * part.bits))
            undefined |= junk << (i * part.nbytes)
        if to is not None:
            strand.write(to, total, mask, undefined)

    return step


@rule("cvta")
def convert_address(build: Build) -> Step:
    """Generic addresses of global memory are the global ones; other spaces have no generic window here."""
    build.take("to")
    build.need("global")
    kind = build.type("u64")
    write, operand = build.destination(kind), build.operand()
    if isinstance(operand, Name) and build.variables.get(operand.text, (None, 0))[1] >= 0:
        raise build.unknown(f"{operand.text} is no global variable")
    read = build.source(kind, operand)
    return lambda strand, mask: write(strand, read(strand, mask), mask)


@rule("selp")
def select(build: Build) -> Step:
    """Only the chosen operand must have been written."""
    kind = build.type(*SCALARS)
    write, first, second = build.destination(kind), build.source(kind), build.source(kind)
    chooser = build.source(PRED)

    def step(strand: Strand, mask: Mask) -> None:
        flag = chooser(strand, mask)
        chosen = strand.whole(flag) & strand.bools(mask)
        others = ~strand.whole(flag) & strand.bools(mask)
        if not others.any():
            write(strand, first(strand, mask), mask)
        elif not chosen.any():
            write(strand, second(strand, mask), mask)
        else:
            write(strand, np.where(flag, first(strand, chosen), second(strand, others)), mask)

    return step
