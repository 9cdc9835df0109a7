"""Deliberate bugs: each kind of fault raises its own error, in every order of warps."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from gpu_emulation import (
    BarrierDeadlock,
    EmulationError,
    GlobalRace,
    InvalidLaunch,
    InvalidModule,
    Memory,
    MemoryFault,
    Misaligned,
    Module,
    NoProgress,
    SharedRace,
    Trap,
    UninitialisedRead,
    UnknownInstruction,
)
from gpu_emulation.snippets import HEAD, kernel, launch

ORDERS = [None, *range(8)]
every_order = pytest.mark.parametrize("seed", ORDERS)

STATIC = ".shared .align 16 .b8 buffer[1024];\n"
DYNAMIC = ".extern .shared .align 16 .b8 buffer[];\n"

# Thread i: %r10 = in[i], written to buffer[4 * i]; %r11 is its address there.
STAGE = """
  mul.wide.u32 %rd10, %r3, 4;
  add.u64 %rd11, %rd0, %rd10;
  add.u64 %rd12, %rd1, %rd10;
  ld.global.u32 %r10, [%rd11];
  shl.b32 %r11, %r3, 2;
  mov.u32 %r12, buffer;
  add.u32 %r11, %r11, %r12;
  st.shared.u32 [%r11], %r10;
"""
# Takes the value of the thread with the number xor 32: one of another warp.
TAKE = """
  xor.b32 %r13, %r11, 128;
  ld.shared.u32 %r14, [%r13];
  st.global.u32 [%rd12], %r14;
"""


def words(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.arange(count, dtype=np.uint32) * 3 + 1


@every_order
def test_the_exchange_is_right_with_its_barrier(seed: int | None) -> None:
    results, report = launch(kernel(STAGE + "bar.sync 0;" + TAKE, outside=STATIC), [words(256), 1024], block=256, seed=seed)
    np.testing.assert_array_equal(results[1].view(np.uint32), words(256)[np.arange(256) ^ 32])
    assert report.barriers == 1 and report.stored.unique == report.stored.requested == 1024


@every_order
def test_missing_barrier(seed: int | None) -> None:
    """Which error it is depends on who comes first: the value is read before it is written, or without order after it."""
    with pytest.raises((SharedRace, UninitialisedRead)) as caught:
        launch(kernel(STAGE + TAKE, outside=STATIC), [words(256), 1024], block=256, seed=seed)
    assert any("ld.shared" in note or "st.shared" in note for note in caught.value.__notes__)


@every_order
def test_missing_second_barrier(seed: int | None) -> None:
    """The buffer is used again while others may still read it."""
    again = "st.shared.u32 [%r11], %r14;"
    with pytest.raises(SharedRace):
        launch(kernel(STAGE + "bar.sync 0;" + TAKE + again, outside=STATIC), [words(256), 1024], block=256, seed=seed)
    launch(kernel(STAGE + "bar.sync 0;" + TAKE + "bar.sync 0;" + again, outside=STATIC), [words(256), 1024], block=256, seed=seed)


@every_order
def test_a_read_by_several_threads_is_remembered(seed: int | None) -> None:
    """All threads read word 0, thread 0 as the last of its warp or not; then thread 0 writes it."""
    body = STAGE + "bar.sync 0;\nld.shared.u32 %r14, [buffer];\nsetp.ne.u32 %p1, %r3, 0;\n{between}\n@%p1 ret;\n"
    body += "st.shared.u32 [buffer], %r3;"
    with pytest.raises(SharedRace):
        launch(kernel(body.format(between=""), outside=STATIC), [words(64), 4], block=64, seed=seed)
    launch(kernel(body.format(between="bar.sync 0;"), outside=STATIC), [words(64), 4], block=64, seed=seed)


@every_order
def test_lanes_of_a_warp_need_a_warp_barrier(seed: int | None) -> None:
    exchange = TAKE.replace("128", "4")
    with pytest.raises(SharedRace):
        launch(kernel(STAGE + exchange, outside=STATIC), [words(32), 128], seed=seed)
    results, _ = launch(kernel(STAGE + "bar.warp.sync -1;" + exchange, outside=STATIC), [words(32), 128], seed=seed)
    np.testing.assert_array_equal(results[1].view(np.uint32), words(32)[np.arange(32) ^ 1])


@every_order
def test_barrier_for_some_warps_orders_only_those(seed: int | None) -> None:
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; reading across the halves is a race."""
    meet = "shr.u32 %r20, %r3, 6;\nadd.u32 %r20, %r20, 1;\nbar.sync %r20, 64;\n"
    alone = "setp.lt.u32 %p1, %r3, 64;\n@%p1 bra L1;\nbar.sync 2, 64;\nbra L2;\nL1: bar.sync 1, 64;\nL2:\n"
    results, _ = launch(kernel(STAGE + alone + TAKE, outside=STATIC), [words(128), 512], block=128, seed=seed)
    np.testing.assert_array_equal(results[1].view(np.uint32), words(128)[np.arange(128) ^ 32])
    with pytest.raises((SharedRace, UninitialisedRead)):
        launch(kernel(STAGE + alone + TAKE.replace("128", "256"), outside=STATIC), [words(128), 512], block=128, seed=seed)
    launch(kernel(STAGE + meet + TAKE, outside=STATIC), [words(128), 512], block=128, seed=seed)


@every_order
def test_barrier_in_divergent_code(seed: int | None) -> None:
    body = "setp.lt.u32 %p1, %r3, 16;\n@%p1 bra L1;\nbar.sync 0;\nL1:\n"
    with pytest.raises(BarrierDeadlock, match="divergent"):
        launch(kernel(body), [4, 4], block=64, seed=seed)


@every_order
def test_barrier_that_a_warp_never_reaches(seed: int | None) -> None:
    body = "setp.lt.u32 %p1, %r3, 32;\n@%p1 bra L1;\nbar.sync 1, 64;\nL1:\n"
    with pytest.raises(BarrierDeadlock, match="32 of 64"):
        launch(kernel(body), [4, 4], block=64, seed=seed)


@every_order
def test_two_barriers_crossed(seed: int | None) -> None:
    body = "setp.lt.u32 %p1, %r3, 32;\n@%p1 bra L1;\nbar.sync 0;\nbar.sync 1;\nbra L2;\nL1:\nbar.sync 1;\nbar.sync 0;\nL2:\n"
    with pytest.raises(BarrierDeadlock, match="none can go on"):
        launch(kernel(body), [4, 4], block=64, seed=seed)


@every_order
def test_a_barrier_does_not_wait_for_warps_that_have_exited(seed: int | None) -> None:
    """PTX ISA, exit: barriers waiting on all threads are released when those that hold them up exit."""
    body = "setp.lt.u32 %p1, %r3, 32;\n@%p1 ret;\nbar.sync 0;\n"
    _, report = launch(kernel(body), [4, 4], block=64, seed=seed)
    assert report.barriers == 1


@every_order
def test_warp_instruction_of_lanes_that_never_come(seed: int | None) -> None:
    body = "setp.lt.u32 %p1, %r3, 16;\n@%p1 bra L1;\nL2: bra L3;\nL1: shfl.sync.bfly.b32 %r20, %r3, 1, 31, -1;\nL3:\n"
    with pytest.raises(BarrierDeadlock, match="never come"):
        launch(kernel(body), [4, 4], seed=seed)


@every_order
def test_warp_instruction_whose_mask_leaves_the_lane_out(seed: int | None) -> None:
    with pytest.raises(BarrierDeadlock, match="does not name it"):
        launch(kernel("shfl.sync.bfly.b32 %r20, %r3, 1, 31, 0xffff;"), [4, 4], seed=seed)


@every_order
def test_shuffle_from_a_lane_that_takes_no_part(seed: int | None) -> None:
    body = "setp.ge.u32 %p1, %r3, 16;\n@%p1 ret;\nshfl.sync.bfly.b32 %r20, %r3, 16, 31, 0xffff;"
    with pytest.raises(UninitialisedRead, match="takes no part"):
        launch(kernel(body), [4, 4], seed=seed)


STORE = "mad.wide.u32 %rd10, %r0, 4, %rd1;\nst.global.u32 [%rd10], %r0;"


@every_order
def test_out_of_bounds_by_one_element(seed: int | None) -> None:
    launch(kernel(STORE), [4, 256], grid=2, seed=seed)
    with pytest.raises(MemoryFault, match="out of bounds") as caught:
        launch(kernel(STORE), [4, 252], grid=2, seed=seed)
    assert caught.value.nbytes == 4 and caught.value.space == "global" and "0 bytes past its end" in caught.value.nearest
    assert "st.global.u32" in caught.value.__notes__[0] and "entry k" in caught.value.__notes__[1]


def test_out_of_bounds_below_and_across_the_end() -> None:
    with pytest.raises(MemoryFault, match="4 bytes before it"):
        launch(kernel("ld.global.u32 %r10, [%rd0+-4];"), [words(4), 4])
    with pytest.raises(MemoryFault, match="16 bytes at global"):
        launch(kernel("ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd0+16];"), [words(6), 4])


def test_an_address_cut_to_32_bits() -> None:
    with pytest.raises(MemoryFault):
        launch(kernel("cvt.u32.u64 %r10, %rd0;\ncvt.u64.u32 %rd10, %r10;\nld.global.u32 %r11, [%rd10];"), [words(4), 4])


@pytest.mark.parametrize("code", ["ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd0+8];", "st.global.u16 [%rd1+1], %h1;"])
def test_misaligned(code: str) -> None:
    with pytest.raises(Misaligned):
        launch(kernel("mov.u16 %h1, 1;" + code), [words(8), 4])


def test_use_after_free_and_double_free() -> None:
    memory = Memory()
    address = memory.alloc(128)
    parameters = struct.pack("<QQ", address, address)
    memory.free(address)
    with pytest.raises(MemoryFault, match="use after free") as caught:
        Module(kernel(STORE)).launch("k", (1, 1, 1), (32, 1, 1), parameters, memory)
    assert caught.value.nearest.endswith("freed")
    with pytest.raises(MemoryFault, match="double free"):
        memory.free(address)


@pytest.mark.parametrize("space", ["shared", "local"])
def test_out_of_bounds_in_small_spaces(space: str) -> None:
    variable = f".{space} .align 4 .b8 small[8];\n"
    body = (variable if space == "local" else "") + f"mov.u32 %r10, small;\nst.{space}.u32 [%r10+{{}}], 7;"
    outside = variable if space == "shared" else ""
    launch(kernel(body.format(4), outside=outside), [4, 4])
    with pytest.raises(MemoryFault, match=f"{space} address 0x8"):
        launch(kernel(body.format(8), outside=outside), [4, 4])


@every_order
def test_dynamic_shared_memory_too_small(seed: int | None) -> None:
    text = kernel(STAGE, outside=DYNAMIC)
    launch(text, [words(64), 4], block=64, dynamic_shared=256, seed=seed)
    with pytest.raises(MemoryFault) as caught:
        launch(text, [words(64), 4], block=64, dynamic_shared=252, seed=seed)
    assert caught.value.space == "shared" and caught.value.address == 252


@every_order
def test_global_write_by_two_threads(seed: int | None) -> None:
    """By two CTAs, two warps, and two lanes: different values race, equal ones do not."""
    for grid, block in ((2, 32), (1, 64), (1, 32)):
        with pytest.raises(GlobalRace):
            launch(kernel("st.global.u32 [%rd1], %r0;"), [4, 4], grid=grid, block=block, seed=seed)
        results, _ = launch(kernel("st.global.u32 [%rd1], 7;"), [4, 4], grid=grid, block=block, seed=seed)
        assert results[1].view(np.uint32)[0] == 7


@every_order
def test_global_read_and_write_by_two_ctas(seed: int | None) -> None:
    """In place, one element to the left: the neighbour may have been overwritten."""
    body = "mad.wide.u32 %rd10, %r0, 4, %rd0;\nld.global.u32 %r10, [%rd10+4];\nst.global.u32 [%rd10], %r10;"
    with pytest.raises(GlobalRace):
        launch(kernel(body), [words(65), 4], grid=2, seed=seed)


@every_order
def test_global_bytes_side_by_side_are_no_race(seed: int | None) -> None:
    body = "cvt.u64.u32 %rd10, %r0;\nadd.u64 %rd10, %rd10, %rd1;\nst.global.u8 [%rd10], %r0;"
    results, _ = launch(kernel(body), [4, 128], grid=4, seed=seed)
    np.testing.assert_array_equal(results[1], np.arange(128, dtype=np.uint8))


# Every CTA adds its number to a sum of its own; the last one to come adds them up.  in: counter and sums; out: the total.
LAST_CTA = """
  setp.ne.u32 %p1, %r3, 0;
  @%p1 ret;
  mad.wide.u32 %rd10, %r1, 4, %rd0;
  st.global.u32 [%rd10+4], %r1;
  {release}
  atom.global.{order}add.u32 %r10, [%rd0], 1;
  {acquire}
  mov.u32 %r11, %nctaid.x;
  sub.u32 %r11, %r11, 1;
  setp.ne.u32 %p2, %r10, %r11;
  @%p2 ret;
  mov.u32 %r12, 0;
  mov.u32 %r13, 0;
LOOP:
  mad.wide.u32 %rd11, %r12, 4, %rd0;
  ld.global.u32 %r14, [%rd11+4];
  add.u32 %r13, %r13, %r14;
  add.u32 %r12, %r12, 1;
  setp.le.u32 %p3, %r12, %r11;
  @%p3 bra LOOP;
  st.global.u32 [%rd1], %r13;
"""


@every_order
@pytest.mark.parametrize(
    ("release", "order", "acquire", "right"),
    [
        ("membar.gl;", "", "membar.gl;", True),
        ("", "gpu.acq_rel.", "", True),
        ("fence.acq_rel.gpu;", "gpu.relaxed.", "fence.acq_rel.gpu;", True),
        ("", "gpu.relaxed.", "", False),
        ("membar.cta;", "", "membar.cta;", False),
        ("", "gpu.release.", "", False),
        ("", "gpu.acquire.", "", False),
    ],
)
def test_the_last_cta_needs_release_and_acquire(release: str, order: str, acquire: str, right: bool, seed: int | None) -> None:
    text = kernel(LAST_CTA.format(release=release, order=order, acquire=acquire))
    counters = np.zeros(41, dtype=np.uint32)
    if right:
        results, _ = launch(text, [counters, 4], grid=40, seed=seed)
        assert results[1].view(np.uint32)[0] == sum(range(40))
    else:
        with pytest.raises(GlobalRace):
            launch(text, [counters, 4], grid=40, seed=seed)


@every_order
def test_atomics_and_plain_accesses_do_not_mix(seed: int | None) -> None:
    counter = np.zeros(1, dtype=np.uint32)
    results, _ = launch(kernel("red.global.add.u32 [%rd0], 1;"), [counter, 4], grid=3, block=64, seed=seed)
    assert results[0][0] == 192
    with pytest.raises(GlobalRace):
        launch(kernel("red.global.add.u32 [%rd0], 1;\nld.global.u32 %r10, [%rd0];"), [counter, 4], grid=3, seed=seed)


def test_noncoherent_load_of_what_the_launch_writes() -> None:
    body = "mad.wide.u32 %rd10, %r0, 4, %rd0;\nst.global.u32 [%rd10], %r0;\nld.global.nc.u32 %r10, [%rd10];"
    with pytest.raises(GlobalRace, match=r"\.nc"):
        launch(kernel(body), [words(32), 4])


def test_unwritten_memory() -> None:
    with pytest.raises(UninitialisedRead, match="thread 0 of CTA 0 reads 4 bytes at global"):
        launch(kernel("ld.global.u32 %r10, [%rd0];"), [4, 4])
    with pytest.raises(UninitialisedRead, match="shared"):
        launch(kernel("ld.shared.u32 %r10, [buffer];", outside=STATIC), [4, 4])
    with pytest.raises(UninitialisedRead, match="local"):
        launch(kernel(".local .align 4 .b8 small[8];\nld.local.u32 %r10, [small];"), [4, 4])
    # One byte of four is missing.
    partly = "mov.u16 %h1, 1;\nst.shared.u16 [buffer], %h1;\nst.shared.u8 [buffer+2], %h1;\nld.shared.u{} %r10, [buffer+{}];"
    launch(kernel(partly.format(8, 2), outside=STATIC), [4, 4], block=1)
    with pytest.raises(UninitialisedRead, match="shared"):
        launch(kernel(partly.format(32, 0), outside=STATIC), [4, 4], block=1)


def test_unwritten_registers() -> None:
    with pytest.raises(UninitialisedRead, match="%r20 is read before"):
        launch(kernel("add.u32 %r10, %r20, 1;"), [4, 4])
    some = "setp.lt.u32 %p1, %r3, 5;\n@%p1 mov.u32 %r20, 1;\n{} add.u32 %r10, %r20, 1;"
    launch(kernel(some.format("@%p1")), [4, 4])
    with pytest.raises(UninitialisedRead, match="%r20 is read by thread 5 of CTA 0"):
        launch(kernel(some.format("")), [4, 4])
    with pytest.raises(UninitialisedRead, match="%p5"):
        launch(kernel("@%p5 mov.u32 %r10, 1;"), [4, 4])


def test_undefined_bytes_may_be_moved_but_not_used() -> None:
    """Compilers pack undefined bytes beside others, and leave them out again later."""
    pack = "prmt.b32 %r10, %r3, %r20, 0x5410;\nmov.b64 %rd10, {%r10, %r21};\nmov.b64 {%r11, %r12}, %rd10;\n"
    launch(kernel(pack + "prmt.b32 %r13, %r11, 0, 0x4410;\nadd.u32 %r14, %r13, 1;"), [4, 4])
    launch(kernel(pack + "mov.b32 {%h1, %h2}, %r11;\nadd.u16 %h3, %h1, 1;"), [4, 4])
    for use in ("add.u32 %r14, %r11, 1;", "add.u32 %r14, %r12, 1;", "mov.b32 {%h1, %h2}, %r11;\nadd.u16 %h3, %h2, 1;"):
        with pytest.raises(UninitialisedRead):
            launch(kernel(pack + use), [4, 4])


def test_half_of_a_packed_sum_may_be_undefined_but_not_used() -> None:
    """Compilers do packed arithmetic for the sake of one half; the other one stays undefined."""
    body = "mov.b64 %rd10, {%r3, %r20};\nmul.rn.f32x2 %rd11, %rd10, %rd10;\nmov.b64 {%r11, %r12}, %rd11;\n"
    fused = body.replace("mul.rn.f32x2 %rd11, %rd10, %rd10", "fma.rn.f32x2 %rd11, %rd10, %rd10, %rd10")
    for packed in (body, fused):
        launch(kernel(packed + "add.u32 %r13, %r11, 1;"), [4, 4])
        with pytest.raises(UninitialisedRead):
            launch(kernel(packed + "add.u32 %r13, %r12, 1;"), [4, 4])


UNKNOWN = {
    "opcode": "frobnicate.u32 %r10, %r3;",
    "matrix product": "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1};",
    "bulk copy": "cp.async.bulk.shared.global [%r1], [%rd0], 16;",
    "call": "call.uni foo;",
    "modifier": "add.rn.fancy.f32 %f1, %f1, %f1;",
    "modifier of another opcode": "add.hi.u32 %r10, %r3, %r3;",
    "modifier after the type": "add.u32.sat %r10, %r3, %r3;",
    "type": "add.e4m3 %r10, %r3, %r3;",
    "type of another opcode": "popc.f32 %r10, %f1;",
    "conversion": "cvt.rn.tf32.f32 %r10, %f1;",
    "cache modifier": "ld.global.L1::never.u32 %r10, [%rd0];",
    "state space": "ld.tensor.u32 %r10, [%rd0];",
    "generic address": "ld.u32 %r10, [%rd0];",
    "special register": "mov.u32 %r10, %clock;",
    "barrier": "bar.arrive 0, 64;",
    "atomic": "atom.global.sub.u32 %r10, [%rd0], 1;",
    "rounding of f64": "add.rz.f64 %d1, %d1, %d1;",
    "directive": ".branchtargets L1;",
    "conversion without rounding": "cvt.f16.f32 %h1, %f1;",
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_instructions_are_refused_at_load(what: str) -> None:
    """Behind a return, where it would never run."""
    with pytest.raises(UnknownInstruction, match="line"):
        Module(kernel("ret;\n" + UNKNOWN[what]))


INVALID = {
    "too few operands": "add.u32 %r10, %r3;",
    "too many operands": "add.u32 %r10, %r3, %r3, %r3;",
    "register of another width": "add.u32 %rd10, %r3, %r3;",
    "32-bit global address": "ld.global.u32 %r10, [%r3];",
    "no such label": "bra NOWHERE;",
    "vector of another length": "ld.global.v2.u32 {%r10, %r11, %r12}, [%rd0];",
    "literal that does not fit": "mov.u16 %h1, 65536;",
    "integer for a float": "add.f32 %f1, %f1, 1;",
    "variable of another space": "st.global.u32 [buffer], %r3;",
    "brace that is not closed": "{",
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_modules_are_refused(what: str) -> None:
    with pytest.raises(InvalidModule):
        Module(kernel(INVALID[what], outside=STATIC))


@pytest.mark.parametrize("text", ["", "no PTX", HEAD + ".surprise 3;", HEAD + ".func f() { ret; }", "\x7fELF\x02\x01\x01"])
def test_what_is_no_module(text: str) -> None:
    with pytest.raises(InvalidModule):
        Module(text)


def test_launches_that_do_not_fit() -> None:
    module, memory = Module(kernel("", directives=".maxntid 64, 1, 1")), Memory()
    assert module.entries["k"].max_threads == 64 and module.target == "sm_80"
    good = bytes(16)

    def run(
        name: str = "k", grid: tuple[int, ...] = (1, 1, 1), block: tuple[int, ...] = (32, 1, 1), p: bytes = good, s: int = 0
    ) -> None:
        module.launch(name, grid, block, p, memory, dynamic_shared=s)  # type: ignore[arg-type]

    run()
    bad: list[tuple[str, Callable[[], None]]] = [
        ("no entry", lambda: run("j")),
        ("15 bytes", lambda: run(p=bytes(15))),
        ("17 bytes", lambda: run(p=bytes(17))),
        ("96 threads", lambda: run(block=(96, 1, 1))),
        ("none below 1", lambda: run(grid=(0, 1, 1))),
        ("limits", lambda: run(grid=(1, 65536, 1))),
        ("limits", lambda: run(block=(1, 1, 65))),
        ("three numbers", lambda: run(grid=(1, 1))),
        ("shared", lambda: run(s=1 << 20)),
        ("shared", lambda: run(s=-1)),
    ]
    for words_, call in bad:
        with pytest.raises(InvalidLaunch, match=words_):
            call()
    required = Module(kernel("", directives=".reqntid 64"))
    with pytest.raises(InvalidLaunch, match="requires"):
        required.launch("k", (1, 1, 1), (32, 1, 1), good, memory)
    required.launch("k", (1, 1, 1), (64, 1, 1), good, memory)


def test_endless_loop_trap_and_division_by_zero() -> None:
    with pytest.raises(NoProgress):
        Module(kernel("L: bra L;")).launch("k", (1, 1, 1), (32, 1, 1), bytes(16), Memory(), step_limit=1000)
    with pytest.raises(Trap, match="thread 0 of CTA 1"):
        launch(kernel("setp.eq.u32 %p1, %r1, 1;\n@%p1 trap;"), [4, 4], grid=2)
    with pytest.raises(EmulationError, match="divides by zero"):
        launch(kernel("div.u32 %r10, 1, %r3;"), [4, 4])
    launch(kernel("setp.ne.u32 %p1, %r3, 0;\n@%p1 div.u32 %r10, 1, %r3;"), [4, 4])
