"""Small Triton kernels; run as a script it writes their PTX for each target: ``python triton_kernels.py OUT CC [CC ...]``.

A process of its own, as Triton must not be imported beside its interpreter, and its compiler is not asked for a driver.
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def rows(x, out, n, BLOCK: tl.constexpr):
    """Sum and maximum of each row of a (programs, n) array."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * n + at, mask=at < n, other=0.0)
        top = tl.maximum(top, tl.load(x + row * n + at, mask=at < n, other=float("-inf")))
    tl.store(out + 2 * row, tl.sum(total))
    tl.store(out + 2 * row + 1, tl.max(top))


@triton.jit
def pipelined(x, out, n, BLOCK: tl.constexpr):
    """Column sums by asynchronous copies into shared memory."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=3):
        total += tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), total)


@triton.jit
def transpose(x, out, n, BLOCK: tl.constexpr):
    """(32, 64) to (64, 32), through shared memory."""
    short, long = tl.arange(0, 32), tl.arange(0, 64)
    tile = tl.load(x + short[:, None] * 64 + long[None, :])
    tl.store(out + long[:, None] * 32 + short[None, :], tl.trans(tile))


@triton.jit
def words(x, out, n, BLOCK: tl.constexpr):
    """The stream of Philox4x32-10 with key n."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(n, at)
    flat = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK * 4])
    tl.store(out + tl.program_id(0) * BLOCK * 4 + tl.arange(0, BLOCK * 4), flat)


@triton.jit
def grid_sum(x, out, n, BLOCK: tl.constexpr):
    """Each program adds up its part; the last to come adds up the parts.  out: counter, total, parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    programs = tl.num_programs(0)
    tl.store(out + 2 + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n, other=0)))
    if tl.atomic_add(out, 1, sem="acq_rel") == programs - 1:
        part = tl.arange(0, 64)
        tl.store(out + 1, tl.sum(tl.load(out + 2 + part, mask=part < programs, other=0)))


# Kernel, type of x, type of out, BLOCK.
KERNELS = {
    "copy_f32": (copy, "fp32", "fp32", 1024),
    "copy_u8": (copy, "u8", "u8", 1024),
    "rows": (rows, "fp32", "fp32", 256),
    "rows_f16": (rows, "fp16", "fp32", 256),
    "pipelined": (pipelined, "fp32", "fp32", 256),
    "transpose_f16": (transpose, "fp16", "fp16", 1),
    "transpose_u8": (transpose, "u8", "u8", 1),
    "words": (words, "i32", "i32", 256),
    "grid_sum": (grid_sum, "i32", "i32", 256),
}


def main(out: str, *targets: str) -> None:
    for target in map(int, targets):
        for name, (kernel, x, y, block) in KERNELS.items():
            source = ASTSource(
                fn=kernel,
                signature={"x": f"*{x}", "out": f"*{y}", "n": "i32", "BLOCK": "constexpr"},
                constexprs={(3,): block},
                attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
            )
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32))
            (Path(out) / f"{name}_sm{target}_shared{compiled.metadata.shared}.ptx").write_text(compiled.asm["ptx"])


if __name__ == "__main__":
    main(*sys.argv[1:])
