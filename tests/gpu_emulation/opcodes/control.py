"""bra, ret, exit, bar, barrier, fences, trap, and hints that do nothing."""

from __future__ import annotations

from gpu_emulation.errors import InvalidModule, Trap
from gpu_emulation.formats import type_named
from gpu_emulation.parser import Name
from gpu_emulation.rules import Build, Control, Step, rule
from gpu_emulation.strand import Mask, Strand

U32 = type_named("u32")


@rule("bra")
def branch(build: Build) -> Control:
    build.take("uni")
    operand = build.operand()
    if not isinstance(operand, Name) or operand.text not in build.function.labels:
        raise InvalidModule("a branch to no label")
    return Control("branch", target=build.function.labels[operand.text])


@rule("ret", "exit")
def leave(build: Build) -> Control:
    """In an entry both end the thread."""
    if build.opcode == "ret":
        build.take("uni")
    return Control("exit")


@rule("bar", "barrier")
def barrier(build: Build) -> Control:
    """bar.sync is barrier.sync.aligned; bar.warp.sync orders the lanes of a warp."""
    if build.opcode == "bar" and build.take("warp"):
        build.need("sync")
        members = build.source(U32)
        return Control("warp", source=members, step=lambda strand, mask: None, synchronises=True)
    build.take("cta")
    build.need("sync")  # .arrive and .red are not known
    aligned = build.opcode == "bar" or bool(build.take("aligned"))
    number = build.source(U32)
    count = build.source(U32) if build.left() else None
    return Control("barrier", source=number, count=count, aligned=aligned)


@rule("membar", "fence")
def fence(build: Build) -> Step:
    """Releases and acquires; one of the CTA's scope orders nothing between CTAs and is not needed beside barriers here."""
    if build.opcode == "membar":
        scope = build.need("cta", "gl", "sys", "gpu")
    else:
        build.take("acq_rel", "sc")
        scope = build.need("cta", "gpu", "sys", "cluster")
    wide = scope not in ("cta", "cluster")

    def step(strand: Strand, mask: Mask) -> None:
        if wide:
            threads, now = strand.thread[strand.bools(mask)], strand.batch.launch.step
            strand.batch.order.release(threads, now)
            strand.batch.order.acquire(threads, now)

    return step


@rule("trap")
def trap(build: Build) -> Step:
    def step(strand: Strand, mask: Mask) -> None:
        raise Trap(f"{strand.who(strand.bools(mask))} executed trap")

    return step


@rule("nanosleep")
def sleep(build: Build) -> Step:
    build.need("u32")
    build.source(U32)
    return lambda strand, mask: None
