"""Instructions of a whole warp: shfl, vote, match, redux, activemask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_emulation.errors import UninitialisedRead
from gpu_emulation.formats import Array, type_named
from gpu_emulation.opcodes.floating import choose
from gpu_emulation.rules import Build, Control, Step, rule
from gpu_emulation.strand import WARP, Bools, Mask, Strand

PRED, B32, U32 = type_named("pred"), type_named("b32"), type_named("u32")
LANES = np.arange(WARP, dtype=np.int64)


def rows(strand: Strand, value: Array) -> Array:
    """A value as (warps, 32)."""
    return strand.whole(value).reshape(-1, WARP)


@rule("shfl")
def shuffle(build: Build) -> Control:
    build.need("sync")
    mode = build.need("up", "down", "bfly", "idx")
    build.type("b32")
    first, second = build.pair()
    write, write_valid = build.destination(B32, first), build.destination(PRED, second)
    value, lane, clamp, members = build.source(B32), build.source(U32), build.source(U32), build.source(U32)

    def step(strand: Strand, mask: Mask) -> None:
        a, b, c = (rows(strand, read(strand, mask)) for read in (value, lane, clamp))
        by, limits = (b & np.uint32(31)).astype(np.int64), c.astype(np.int64)
        limit, segment = limits & 31, (limits >> 8) & 31
        highest = (LANES & segment) | (limit & ~segment)
        lowest = LANES & segment
        if mode == "up":
            from_ = LANES - by
            valid = from_ >= highest
        elif mode == "down":
            from_ = LANES + by
            valid = from_ <= highest
        elif mode == "bfly":
            from_ = LANES ^ by
            valid = from_ <= highest
        else:
            from_ = lowest | (by & ~segment)
            valid = from_ <= highest
        from_ = np.where(valid, from_, LANES)
        here = rows(strand, strand.bools(mask))
        there = np.take_along_axis(here, from_, axis=1)
        absent = (here & ~there).ravel()
        if absent.any():
            raise UninitialisedRead(f"{strand.who(absent)} shuffles a value from a lane that takes no part")
        write(strand, np.take_along_axis(a, from_, axis=1).ravel(), mask)
        write_valid(strand, valid.ravel(), mask)

    return Control("warp", source=members, step=step)


@rule("activemask")
def active_mask(build: Build) -> Step:
    build.type("b32")
    write = build.destination(B32)
    return lambda strand, mask: write(strand, _ballot(strand, strand.bools(mask)), mask)


def _ballot(strand: Strand, flags: Bools) -> Array:
    """Each warp's flags as a word, in each of its lanes."""
    words = (rows(strand, flags).astype(np.uint32) << LANES.astype(np.uint32)).sum(axis=1, dtype=np.uint32)
    return np.repeat(words, WARP)


@rule("vote")
def vote(build: Build) -> Control:
    """Over the lanes that execute it together; each lane counts only those that its member mask names."""
    build.need("sync")
    mode = build.need("all", "any", "uni", "ballot")
    result = build.type("b32" if mode == "ballot" else "pred")
    write, flag, members = build.destination(result), build.source(PRED), build.source(U32)

    def step(strand: Strand, mask: Mask) -> None:
        here = _ballot(strand, strand.bools(mask)) & strand.whole(members(strand, mask))
        yes = _ballot(strand, strand.whole(flag(strand, mask)) & strand.bools(mask)) & here
        if mode == "ballot":
            write(strand, yes, mask)
        elif mode == "any":
            write(strand, yes != 0, mask)
        elif mode == "all":
            write(strand, yes == here, mask)
        else:
            write(strand, (yes == here) | (yes == 0), mask)

    return Control("warp", source=members, step=step)


@rule("match")
def match(build: Build) -> Control:
    """Which lanes hold the same value as this one."""
    build.need("any")
    build.need("sync")
    kind = build.type("b32", "b64")
    write, value, members = build.destination(B32), build.source(kind), build.source(U32)

    def step(strand: Strand, mask: Mask) -> None:
        a = rows(strand, value(strand, mask))
        equal = (a[:, :, None] == a[:, None, :]) & rows(strand, strand.bools(mask))[:, None, :]
        words = (equal.astype(np.uint32) << LANES.astype(np.uint32)).sum(axis=2, dtype=np.uint32)
        write(strand, words.ravel() & strand.whole(members(strand, mask)), mask)

    return Control("warp", source=members, step=step)


@rule("redux")
def reduce_warp(build: Build) -> Control:
    """One value from all lanes of the warp."""
    build.need("sync")
    name = build.need("add", "min", "max", "and", "or", "xor")
    magnitude, nan = bool(build.take("abs")), bool(build.take("NaN"))
    kind = build.type("u32", "s32", "b32", "f32")
    fitting = {"u": ("add", "min", "max"), "s": ("add", "min", "max"), "b": ("and", "or", "xor"), "f": ("min", "max")}
    if name not in fitting[kind.kind] or ((magnitude or nan) and kind.kind != "f"):
        raise build.unknown("no such reduction of the type")
    write, value, members = build.destination(kind), build.source(kind), build.source(U32)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }

    def two(a: Array, b: Array) -> Array:
        if kind.kind == "f":
            return choose(a, b, "f32", larger=name == "max", nan=nan, magnitude=magnitude)
        return functions[name](a, b)

    def step(strand: Strand, mask: Mask) -> None:
        a, here = rows(strand, value(strand, mask)), rows(strand, strand.bools(mask))
        words = a.view(np.uint32) if kind.kind == "f" else a
        named = rows(strand, members(strand, mask))
        result = np.zeros(words.shape, dtype=words.dtype)
        for word in np.unique(named[here]):  # lanes with one mask reduce together
            group = here & (named == word)
            first = np.argmax(group, axis=1)
            total = np.take_along_axis(words, first[:, None], axis=1)[:, 0]
            if magnitude:
                total = total & np.uint32(0x7FFFFFFF)
            for lane in range(WARP):
                joins = group[:, lane] & (first != lane)
                if joins.any():
                    total = np.where(joins, two(total, words[:, lane]), total)
            result = np.where(group, total[:, None], result)
        write(strand, result.ravel(), mask)

    return Control("warp", source=members, step=step)
