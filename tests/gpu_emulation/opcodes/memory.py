"""ld, st, atom, red, cp.async, ldmatrix and cache policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_emulation import rounding
from gpu_emulation.formats import Array, Type, integer, type_named
from gpu_emulation.opcodes.floating import choose, per_element
from gpu_emulation.parser import Literal, Sink
from gpu_emulation.rules import Build, Control, Source, Step, rule
from gpu_emulation.strand import WARP, Mask, Strand

VALUES = (*(kind + str(bits) for kind in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")
SCOPES = ("cta", "cluster", "gpu", "sys")
EVICTION = ("L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate")
PREFETCH = ("L2::64B", "L2::128B", "L2::256B")
B32, B64, U32 = type_named("b32"), type_named("b64"), type_named("u32")


def _space(build: Build, *spaces: str) -> str:
    """The state space; .shared::cta is .shared, that of another CTA of the cluster is not known."""
    return build.need(*spaces, "shared::cta").partition("::")[0]


def _order(build: Build, strong: tuple[str, ...]) -> tuple[str, str]:
    """The memory order and its scope; "" for a weak access."""
    build.take("weak")
    order = build.take("volatile", *strong)
    scope = build.need(*SCOPES) if order and order != "volatile" else ""
    return order, scope


def _policy(build: Build, *, hinted: bool) -> None:
    """The cache policy after the other operands: read, so that it must be there, and without effect."""
    if hinted:
        build.source(B64)


@rule("ld")
def load(build: Build) -> Step:
    order, scope = _order(build, ("relaxed", "acquire"))
    space = _space(build, "global", "shared", "local", "const", "param")
    build.take("ca", "cg", "cs", "lu", "cv")
    coherent = not build.take("nc")
    build.take(*EVICTION)
    hinted = bool(build.take("L2::cache_hint"))
    build.take(*PREFETCH)
    count = int((build.take("v2", "v4", "v8") or "v1")[1:])
    kind = build.type(*VALUES)
    if (not coherent and (space != "global" or order)) or (order and space not in ("global", "shared")):
        raise build.unknown(f"no such load from .{space}")
    width = kind.nbytes * count
    if width > 32 or (width == 32 and space != "global"):
        raise build.unknown(f"{width} bytes at once")
    writers = [build.destination(kind, item, wider=True) for item in build.vector(count)]
    address = build.address(space)
    _policy(build, hinted=hinted)
    from_space = "global" if space == "const" else space

    def step(strand: Strand, mask: Mask) -> None:
        where = address(strand, mask)
        if from_space == "param" and where.shape[0] == 1:
            words = _parameter(strand, int(where[0]), width, count)
        else:
            words = strand.batch.access.load(strand, from_space, where, width, count, mask, strong=bool(order), coherent=coherent)
        if order == "acquire" and scope in ("gpu", "sys"):
            strand.batch.order.acquire(strand.thread[strand.bools(mask)], strand.batch.launch.step)
        for write, word in zip(writers, words, strict=True):
            write(strand, word, mask)

    return step


def _parameter(strand: Strand, offset: int, width: int, count: int) -> list[Array]:
    """A parameter is the same for all lanes."""
    data = strand.batch.parameters[offset : offset + width]
    if offset + width > strand.batch.parameter_bytes or offset % width:
        raise strand.batch.access.outside(offset, width)
    return [data.view(f"u{width // count}")[i : i + 1] for i in range(count)]


@rule("st")
def store(build: Build) -> Step:
    order, scope = _order(build, ("relaxed", "release"))
    space = _space(build, "global", "shared", "local")
    build.take("wb", "cg", "cs", "wt")
    build.take(*EVICTION)
    hinted = bool(build.take("L2::cache_hint"))
    count = int((build.take("v2", "v4", "v8") or "v1")[1:])
    kind = build.type(*VALUES)
    width = kind.nbytes * count
    if width > 32 or (width == 32 and space != "global") or (order and space == "local"):
        raise build.unknown(f"{width} bytes at once, or an ordered store to .{space}")
    address = build.address(space)
    readers = [build.source(kind, item, wider=True) for item in build.vector(count)]
    _policy(build, hinted=hinted)

    def step(strand: Strand, mask: Mask) -> None:
        where = address(strand, mask)
        words = [read(strand, mask).view(kind.raw) for read in readers]
        if order == "release" and scope in ("gpu", "sys"):
            strand.batch.order.release(strand.thread[strand.bools(mask)], strand.batch.launch.step)
        strand.batch.access.store(strand, space, where, width, words, mask, strong=bool(order))

    return step


# (bits in memory, operands) -> bits in memory
Update = Callable[[Array, list[Array]], Array]


def _integer_update(name: str, kind: Type) -> Update | None:
    view = kind.view

    def of(function: Callable[[Array, Array], Any]) -> Update:
        return lambda old, operands: np.asarray(function(old.view(view), operands[0].view(view))).view(kind.raw)

    functions: dict[str, tuple[str, Callable[[Array, Array], Any]]] = {
        "add": ("us", np.add),
        "min": ("us", np.minimum),
        "max": ("us", np.maximum),
        "and": ("b", np.bitwise_and),
        "or": ("b", np.bitwise_or),
        "xor": ("b", np.bitwise_xor),
        "exch": ("b", lambda old, new: new),
        "inc": ("u", lambda old, top: np.where(old >= top, kind.raw.type(0), old + kind.raw.type(1))),
        "dec": ("u", lambda old, top: np.where((old == 0) | (old > top), top, old - kind.raw.type(1))),
    }
    if name == "cas":
        return (lambda old, operands: np.where(old == operands[0], operands[1], old)) if kind.kind == "b" else None
    kinds, function = functions[name]
    narrow = kind.bits < 32 or (name in ("inc", "dec") and kind.bits != 32) or (kind.name == "s64" and name == "add")
    return None if kind.kind not in kinds or narrow else of(function)


def _float_update(name: str, kind: Type) -> Update | None:
    scalar = kind.element or kind.name
    if name == "add":

        def add(a: Array, b: Array) -> Array:
            return rounding.encode(rounding.add(rounding.decode(a, scalar), rounding.decode(b, scalar)), scalar)

        function = per_element(kind, add)
        return lambda old, operands: function(old, operands[0])
    if name in ("min", "max") and scalar in ("f16", "bf16"):
        pick = per_element(kind, lambda a, b: choose(a, b, scalar, larger=name == "max", nan=False))
        return lambda old, operands: pick(old, operands[0])
    return None


@rule("atom", "red")
def atomic(build: Build) -> Step:
    """Additions of floats are rounded to nearest, in the order of the lanes; f32 subnormals are kept."""
    returns = build.opcode == "atom"
    order = build.take_any("relaxed", "acquire", "release", "acq_rel")
    scope = build.take_any(*SCOPES) or "gpu"
    space = build.take_any("global", "shared", "shared::cta").partition("::")[0]
    if not space or (not returns and order == "acquire"):
        raise build.unknown("no state space, or no such order")
    if space == "global" and scope in ("cta", "cluster"):
        raise build.unknown("global atomics of less than the GPU's scope")
    name = build.need("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    no_ftz = bool(build.take("noftz"))
    hinted = bool(build.take("L2::cache_hint"))
    count = int((build.take("v2", "v4", "v8") or "v1")[1:])
    kinds = ("b32", "b64", "b16", "u32", "u64", "s32", "s64", "f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
    kind = build.type(*kinds)
    half = (kind.element or kind.name) in ("f16", "bf16")
    update = (_float_update if kind.kind == "f" else _integer_update)(name, kind)
    if update is None or no_ftz != half or (count > 1 and (kind.kind != "f" or space != "global")):
        raise build.unknown("no such operation on the type")
    if not returns and name in ("exch", "cas"):
        raise build.unknown("red returns nothing")
    writers = [build.destination(kind, item) for item in build.vector(count)] if returns and not _sunk(build) else []
    address = build.address(space)
    operands = [[build.source(kind, item) for item in build.vector(count)] for _ in range(2 if name == "cas" else 1)]
    _policy(build, hinted=hinted)
    width = kind.nbytes * count
    wide = scope in ("gpu", "sys") and space == "global"

    def step(strand: Strand, mask: Mask) -> None:
        where = address(strand, mask)
        words = [[read(strand, mask).view(kind.raw) for read in readers] for readers in operands]
        threads, now = strand.thread[strand.bools(mask)], strand.batch.launch.step
        if wide and order in ("release", "acq_rel"):
            strand.batch.order.release(threads, now)
        old = strand.batch.access.atomic(strand, space, where, width, update, words, mask)
        if wide and order in ("acquire", "acq_rel"):
            strand.batch.order.acquire(threads, now)
        for write, word in zip(writers, old, strict=False):
            write(strand, word, mask)

    return step


def _sunk(build: Build) -> bool:
    """Whether the result is not wanted: then the operand is used up."""
    if isinstance(build.instruction.operands[0], Sink):
        build.operand()
        return True
    return False


@rule("createpolicy")
def create_policy(build: Build) -> Step:
    """A cache policy says nothing about values: it is zero."""
    build.need("fractional")
    build.need("L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged")
    build.take("L2::evict_unchanged", "L2::evict_first")
    kind = build.type("b64")
    write = build.destination(kind)
    if build.left():
        build.source(type_named("f32"))
    return lambda strand, mask: write(strand, np.zeros(1, dtype=np.uint64), mask)


def _literal(build: Build) -> int:
    operand = build.operand()
    value = integer(operand.text) if isinstance(operand, Literal) else None
    if value is None:
        raise build.unknown("no literal number")
    return value


@rule("cp")
def copy(build: Build) -> Step:
    """cp.async to shared memory, its groups and its waits.  Bulk copies are not known."""
    build.need("async")
    if build.take("commit_group"):
        return lambda strand, mask: strand.batch.access.commit(strand, mask)
    if build.take("wait_all"):
        return lambda strand, mask: strand.batch.access.wait(strand, -1, mask)
    if build.take("wait_group"):
        newest = _literal(build)
        return lambda strand, mask: strand.batch.access.wait(strand, newest, mask)
    policy = build.need("ca", "cg")
    _space(build, "shared")
    build.need("global")
    hinted = bool(build.take("L2::cache_hint"))
    build.take(*PREFETCH)
    shared, source = build.address("shared"), build.address("global")
    width = _literal(build)
    if width not in ((16,) if policy == "cg" else (4, 8, 16)):
        raise build.unknown(f"{width} bytes")
    full = np.array([width], dtype=np.uint32)
    optional = build.left() > (1 if hinted else 0)
    size: Source = build.source(U32) if optional else lambda strand, mask: full
    _policy(build, hinted=hinted)

    def step(strand: Strand, mask: Mask) -> None:
        strand.batch.access.copy_async(strand, shared(strand, mask), source(strand, mask), width, size(strand, mask), mask)

    return step


@rule("ldmatrix")
def load_matrix(build: Build) -> Control:
    """8 x 8 matrices of 16-bit elements: lane 8m + r gives the address of row r of matrix m, lane 4r + c gets its pair c."""
    build.need("sync")
    build.need("aligned")
    build.need("m8n8")
    count = int(build.need("x1", "x2", "x4")[1:])
    transposed = bool(build.take("trans"))
    _space(build, "shared")
    build.type("b16")
    writers = [build.destination(B32, item) for item in build.vector(count)]
    address = build.address("shared")

    def step(strand: Strand, mask: Mask) -> None:
        where = strand.whole(address(strand, mask))
        lanes = strand.bools(mask) & (strand.tid % WARP < 8 * count)
        rows = strand.batch.access.load(strand, "shared", where, 16, 4, lanes, strong=False)
        words = np.stack([strand.whole(row) for row in rows], axis=1)  # (lanes, 4): a row of eight elements
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 4, 8, 8)  # (warps, matrix, row, column)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, WARP)
        for i, write in enumerate(writers):
            write(strand, np.ascontiguousarray(pairs[:, i]).ravel(), mask)

    everybody = np.array([0xFFFFFFFF], dtype=np.uint32)
    return Control("warp", source=lambda strand, mask: everybody, step=step)
