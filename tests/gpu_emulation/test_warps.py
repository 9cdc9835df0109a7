"""Instructions of a warp, atomics, vectors, asynchronous copies and special registers, against plain Python."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from gpu_emulation import Memory, Module, SharedRace, UninitialisedRead
from gpu_emulation.snippets import Array, apply, kernel, launch

ORDERS = [None, 1, 2, 3]
orders = pytest.mark.parametrize("seed", ORDERS)


def words(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)


def shuffled(mode: str, values: list[int], by: int, limit: int, segment: int) -> list[tuple[int, int]]:
    """The ISA's own description of shfl.sync: value and predicate of each lane."""
    result = []
    for lane in range(32):
        highest = (lane & segment) | (limit & ~segment)
        lowest = lane & segment
        j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        valid = j >= highest if mode == "up" else j <= highest
        result.append((values[j if valid else lane], int(valid)))
    return result


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    values = words(64)
    for by in (0, 1, 5, 16, 31):
        for width in (32, 8):
            segment, limit = (32 - width) & 31, 0 if mode == "up" else 31
            code = f"shfl.sync.{mode}.b32 $d|%p2, $0, {by}, {segment << 8 | limit}, -1;\n"
            got = apply(code, "b32", [("b32", values)])
            valid = apply(code.replace("$d", "%r40") + "selp.u32 $d, 1, 0, %p2;", "b32", [("b32", values)])
            for warp in (0, 32):
                want = shuffled(mode, values[warp : warp + 32].tolist(), by, limit, segment)
                assert list(zip(got[warp : warp + 32].tolist(), valid[warp : warp + 32].tolist(), strict=True)) == want


def test_votes_and_masks() -> None:
    values = np.concatenate([words(32) & 1, np.ones(32), np.zeros(32)]).astype(np.uint32)
    ballots = [sum(int(flag) << i for i, flag in enumerate(values[at : at + 32])) for at in (0, 32, 64)]
    code = "setp.ne.u32 %p2, $0, 0;\n"
    want: dict[str, Callable[[int], int]] = {
        "any.pred": lambda word: int(word != 0),
        "all.pred": lambda word: int(word == 0xFFFFFFFF),
        "uni.pred": lambda word: int(word in (0, 0xFFFFFFFF)),
    }
    for name, function in want.items():
        got = apply(f"{code}vote.sync.{name} %p3, %p2, -1;\nselp.u32 $d, 1, 0, %p3;", "b32", [("b32", values)])
        assert got[::32].tolist() == [function(word) for word in ballots] and (got.reshape(3, 32) == got[::32, None]).all()
    got = apply(code + "vote.sync.ballot.b32 $d, %p2, -1;", "b32", [("b32", values)])
    assert got[::32].tolist() == ballots
    got = apply(code + "mov.u32 $d, 0;\n@%p2 activemask.b32 $d;", "b32", [("b32", values)])
    assert got.tolist() == [ballots[i // 32] * int(flag) for i, flag in enumerate(values)]


def test_halves_of_a_warp_that_part_vote_apart() -> None:
    code = "setp.lt.u32 %p2, %r3, 16;\nsetp.eq.u32 %p3, $0, 3;\n@%p2 bra L;\n"
    code += (
        "vote.sync.any.pred %p4, %p3, 0xffff0000;\nbra M;\nL: vote.sync.any.pred %p4, %p3, 0xffff;\nM: selp.u32 $d, 1, 0, %p4;"
    )
    got = apply(code, "b32", [("b32", np.arange(32, dtype=np.uint32))])
    assert got.tolist() == [1] * 16 + [0] * 16


def test_lanes_wait_for_one_another_at_a_warp_instruction() -> None:
    """The lower lanes come by way of code that stands further down: the others must wait for them."""
    code = (
        "setp.lt.u32 %p2, %r3, 16;\nmov.u32 %r40, $0;\n@%p2 bra FAR;\nBACK: shfl.sync.bfly.b32 $d, %r40, 16, 31, -1;\nbra END;\n"
    )
    code += "FAR: add.u32 %r40, %r40, 100;\nbra BACK;\nEND:\n"
    values = np.arange(32, dtype=np.uint32)
    got = apply(code, "b32", [("b32", values)])
    assert got.tolist() == [*range(16, 32), *range(100, 116)]


def test_matching_lanes() -> None:
    values = words(64) % 5
    got = apply("match.any.sync.b32 $d, $0, -1;", "b32", [("b32", values)])
    for i, value in enumerate(values):
        warp = values[i // 32 * 32 : i // 32 * 32 + 32]
        assert int(got[i]) == sum(1 << j for j in range(32) if warp[j] == value)


def test_reductions_of_a_warp() -> None:
    values = words(64)
    for kind, view, names in (
        ("u32", np.uint32, "add min max"),
        ("s32", np.int32, "add min max"),
        ("b32", np.uint32, "and or xor"),
    ):
        for name in names.split():
            got = apply(f"redux.sync.{name}.{kind} $d, $0, -1;", kind, [(kind, values)])
            for at in (0, 32):
                numbers = values[at : at + 32].view(view).tolist()
                total = numbers[0]
                for number in numbers[1:]:
                    total = {"add": total + number, "min": min(total, number), "max": max(total, number)}.get(name, total)
                    total = {"and": total & number, "or": total | number, "xor": total ^ number}.get(name, total)
                assert (got[at : at + 32] == total & 0xFFFFFFFF).all()
    numbers = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    numbers[3] = np.nan
    bits = numbers.view(np.uint32)
    assert apply("redux.sync.max.f32 $d, $0, -1;", "f32", [("f32", bits)]).view(np.float32)[0] == np.nanmax(numbers)
    assert apply("redux.sync.min.abs.f32 $d, $0, -1;", "f32", [("f32", bits)]).view(np.float32)[0] == np.nanmin(np.abs(numbers))
    assert apply("redux.sync.max.NaN.f32 $d, $0, -1;", "f32", [("f32", bits)])[0] == 0x7FFFFFFF


UPDATES: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda old, x: (old + x) & 0xFFFFFFFF,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda old, x: min((old, x), key=lambda word: word ^ 0x80000000),
    "max.s32": lambda old, x: max((old, x), key=lambda word: word ^ 0x80000000),
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


@orders
@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_are_some_order_of_single_ones(name: str, space: str, seed: int | None) -> None:
    """The old values that the threads got are followed like a chain from the first value to the last."""
    values = words(96) % 50 if name.startswith(("inc", "dec")) else words(96)
    where = "%rd0" if space == "global" else "cell"
    body = "mad.wide.u32 %rd10, %r3, 4, %rd1;\nmad.wide.u32 %rd11, %r3, 4, %rd2;\nld.global.u32 %r10, [%rd10];\n"
    if space == "shared":
        body += "ld.global.u32 %r11, [%rd0];\nsetp.eq.u32 %p1, %r3, 0;\n@%p1 st.shared.u32 [cell], %r11;\nbar.sync 0;\n"
    body += f"atom.{space}.{name} %r12, [{where}], %r10;\nst.global.u32 [%rd11], %r12;\n"
    if space == "shared":
        body += "bar.sync 0;\n@!%p1 ret;\nld.shared.u32 %r13, [cell];\nst.global.u32 [%rd0], %r13;\n"
    text = kernel(body, pointers=("cell", "in", "out"), outside=".shared .align 4 .b8 cell[4];\n")
    (cell, _, old), _ = launch(text, [np.array([17], np.uint32), values, 4 * 96], block=96, seed=seed)
    left: dict[int, list[int]] = {}
    for before, value in zip(old.view(np.uint32).tolist(), values.tolist(), strict=True):
        left.setdefault(before, []).append(UPDATES[name](before, value))
    # Each value's departures and arrivals balance along a chain from the first to the last.
    balance = {17: 1}
    for before, afters in left.items():
        balance[before] = balance.get(before, 0) - len(afters)
        for after in afters:
            balance[after] = balance.get(after, 0) + 1
    assert {value: count for value, count in balance.items() if count} == {int(cell[0]): 1}


@orders
def test_compare_and_swap_lets_one_win(seed: int | None) -> None:
    body = "add.u32 %r10, %r0, 1;\natom.global.cas.b32 %r11, [%rd0], 0, %r10;\nmad.wide.u32 %rd10, %r0, 4, %rd1;\n"
    (cell, old), _ = launch(
        kernel(body + "st.global.u32 [%rd10], %r11;"), [np.zeros(1, np.uint32), 4 * 128], grid=2, block=64, seed=seed
    )
    old = old.view(np.uint32)
    assert np.count_nonzero(old == 0) == 1 and set(old.tolist()) == {0, int(cell[0])} and old[cell[0] - 1] == 0


@orders
def test_the_seed_decides_who_comes_first(seed: int | None) -> None:
    """Without one the threads come in order; with one they do not, and the same seed gives the same order."""
    body = "atom.global.add.u32 %r10, [%rd0], 1;\nmad.wide.u32 %rd10, %r0, 4, %rd1;\nst.global.u32 [%rd10], %r10;"
    runs = [launch(kernel(body), [np.zeros(1, np.uint32), 4 * 512], grid=4, block=128, seed=seed)[0][1] for _ in range(2)]
    np.testing.assert_array_equal(*runs)
    ranks = runs[0].view(np.uint32)
    assert sorted(ranks.tolist()) == list(range(512)) and (ranks.tolist() == list(range(512))) == (seed is None)


def test_float_atomics() -> None:
    body = "red.global.add.f32 [%rd0], 0f3E800000;\nmov.b32 %r10, 0x3C003C00;\nred.global.add.noftz.f16x2 [%rd0+4], %r10;\n"
    body += "mov.b32 %f1, 0f3F800000;\natom.global.add.v2.f32 {%f2, %f3}, [%rd0+8], {%f1, %f1};"
    (cells, _), report = launch(kernel(body), [np.zeros(4, np.uint32), 4], grid=2, block=64)
    assert cells[0] == np.float32(32).view(np.uint32) and cells[1] == 0x58005800  # 128 in f16, twice
    assert cells[2] == cells[3] == np.float32(128).view(np.uint32)
    assert report.atomics.widths == {32: 256, 64: 128} and report.atomics.requested == 2048


@pytest.mark.parametrize(
    ("count", "kind"), [(2, "u8"), (4, "u8"), (2, "u16"), (4, "u16"), (2, "b32"), (4, "b32"), (2, "b64"), (8, "b32"), (4, "b64")]
)
def test_vectors(count: int, kind: str) -> None:
    """Loaded and stored, in the same order; policies and cache modifiers change nothing."""
    bits = int(kind[1:])
    width = bits // 8 * count
    register = {8: "h", 16: "h", 32: "r", 64: "rd"}[bits]
    names = "{" + ", ".join(f"%{register}{10 + i}" for i in range(count)) + "}"
    body = f"mad.wide.u32 %rd20, %r0, {width}, %rd0;\nmad.wide.u32 %rd21, %r0, {width}, %rd1;\n"
    body += "createpolicy.fractional.L2::evict_first.b64 %rd22, 1.0;\n"
    body += f"ld.global.L1::evict_first.L2::cache_hint.v{count}.{kind} {names}, [%rd20], %rd22;\n"
    body += f"st.global.cs.v{count}.{kind} [%rd21], {names};"
    data = np.random.default_rng(0).integers(0, 256, 64 * width).astype(np.uint8)
    (_, out), report = launch(kernel(body), [data, len(data)], grid=2)
    np.testing.assert_array_equal(out, data)
    assert report.loaded.widths == report.stored.widths == {8 * width: 64} and report.loaded.unique == len(data)


def test_narrow_loads_extend_and_narrow_stores_cut() -> None:
    data = np.array([0x80, 0x7F, 0xFF, 0x01], dtype=np.uint8)
    body = "setp.ne.u32 %p1, %r3, 0;\n@%p1 ret;\nld.global.s8 %r10, [%rd0];\nld.global.u8 %r11, [%rd0];\n"
    body += "ld.global.s16 %rd10, [%rd0+2];\n"
    body += "st.global.u32 [%rd1], %r10;\nst.global.u32 [%rd1+4], %r11;\nst.global.u64 [%rd1+8], %rd10;\n"
    body += "st.global.u8 [%rd1+16], %r10;\nst.global.u16 [%rd1+18], %r10;\nst.global.u8 [%rd1+17], %rd10;"
    (_, out), _ = launch(kernel(body), [data, 20])
    assert out.tobytes().hex() == "80ffffff" + "80000000" + "ff01000000000000" + "80ff80ff"


COPY = """
  mad.wide.u32 %rd10, %r3, 4, %rd0;
  mad.wide.u32 %rd11, %r3, 4, %rd1;
  shl.b32 %r10, %r3, 2;
  mov.u32 %r11, buffer;
  add.u32 %r11, %r11, %r10;
  cp.async.ca.shared.global [%r11], [%rd10], 4{size};
  cp.async.commit_group;
  {wait}
  {barrier}
  xor.b32 %r12, %r11, {other};
  ld.shared.u32 %r13, [%r12];
  st.global.u32 [%rd11], %r13;
"""
BUFFER = ".shared .align 16 .b8 buffer[1024];\n"


@orders
def test_asynchronous_copies(seed: int | None) -> None:
    def run(wait: str, barrier: str, other: int, size: str = "") -> Array:
        text = kernel(COPY.format(wait=wait, barrier=barrier, other=other, size=size), outside=BUFFER)
        return launch(text, [words(64), 256], block=64, seed=seed)[0][1].view(np.uint32)

    np.testing.assert_array_equal(run("cp.async.wait_group 0;", "bar.sync 0;", 128), words(64)[np.arange(64) ^ 32])
    np.testing.assert_array_equal(run("cp.async.wait_all;", "", 0), words(64))
    np.testing.assert_array_equal(run("cp.async.wait_all;", "", 0, ", 0"), np.zeros(64, np.uint32))
    # Not waited for: poison.  Waited for, but without a barrier before another thread reads.
    np.testing.assert_array_equal(run("cp.async.wait_group 1;", "", 0), np.full(64, 0xFFFFFFFF, np.uint32))
    with pytest.raises((SharedRace, UninitialisedRead)):
        run("cp.async.wait_all;", "", 128)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrix_loads(trans: str) -> None:
    """Four 8 x 8 matrices, one below the other, of the numbers 0 to 255."""
    body = "shl.b32 %r10, %r3, 4;\nmov.u32 %r11, buffer;\nadd.u32 %r11, %r11, %r10;\nmad.wide.u32 %rd10, %r3, 16, %rd0;\n"
    body += (
        "ld.global.v4.u32 {%r12, %r13, %r14, %r15}, [%rd10];\nst.shared.v4.u32 [%r11], {%r12, %r13, %r14, %r15};\nbar.sync 0;\n"
    )
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r16, %r17, %r18, %r19}}, [%r11];\n"
    body += "mad.wide.u32 %rd11, %r3, 16, %rd1;\n"
    body += "st.global.v4.u32 [%rd11], {%r16, %r17, %r18, %r19};"
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    (_, out), _ = launch(kernel(body, outside=BUFFER), [matrices, 512])
    pairs = out.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            row, column = divmod(2 * lane, 8)
            for half in range(2):
                at = (column + half, row) if trans else (row, column + half)
                assert pairs[lane, matrix, half] == matrices[matrix][at]


def test_special_registers_in_three_dimensions() -> None:
    names = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    names += ["%laneid", "%warpid", "%nwarpid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"]
    body = "mov.u32 %r10, %ctaid.z;\nmov.u32 %r11, %ctaid.y;\nmad.lo.u32 %r10, %r10, 2, %r11;\nmov.u32 %r11, %ctaid.x;\n"
    body += "mad.lo.u32 %r10, %r10, 2, %r11;\nmov.u32 %r11, %tid.z;\nmov.u32 %r12, %tid.y;\nmad.lo.u32 %r11, %r11, 3, %r12;\n"
    body += "mov.u32 %r12, %tid.x;\nmad.lo.u32 %r11, %r11, 5, %r12;\nmad.lo.u32 %r10, %r10, 45, %r11;\n"
    body += f"mad.wide.u32 %rd10, %r10, {4 * len(names)}, %rd0;\n"
    body += "\n".join(f"mov.u32 %r20, {name};\nst.global.u32 [%rd10+{4 * i}], %r20;" for i, name in enumerate(names))
    memory = Memory()
    out = memory.alloc(12 * 45 * 4 * len(names))
    module = Module(kernel(body, pointers=("out",)))
    module.launch("k", (2, 2, 3), (5, 3, 3), struct.pack("<Q", out), memory, order_seed=3)
    got = np.frombuffer(memory.read(out, 12 * 45 * 4 * len(names)), dtype=np.uint32).reshape(12, 45, len(names))
    for cta in range(12):
        for tid in range(45):
            lane = tid % 32
            below = (1 << lane) - 1
            assert got[cta, tid].tolist() == [
                *(tid % 5, tid // 5 % 3, tid // 15, 5, 3, 3),
                *(cta % 2, cta // 2 % 2, cta // 4, 2, 2, 3),
                *(lane, tid // 32, 2, 1 << lane, below, 2 * below + 1),
                *(0xFFFFFFFF & ~(2 * below + 1), 0xFFFFFFFF & ~below),
            ]
