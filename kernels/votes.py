"""The fused operation ``votes`` in Triton: smoothed scores to what a certificate counts.

Plain form: :func:`advrad_fast.reference.smoothing.votes`; C++ twin: ``csrc/votes.cpp``.

``counts_kernel``: a program reads an image's scores once for eight thresholds.  ``ranks_kernel``: a program finds one order
statistic, bit by bit: the largest key that has at most ``rank`` keys below it is the key of that rank.  The first HELD
scores stay in registers meanwhile, so up to that many are read once; beyond, the rest is read again for each of 32 bits.

Arguments of ``counts_kernel``: scores float32 (images, draws); thresholds float32 (count,); counts int64 (images, count),
written; images; draws; count.

Arguments of ``ranks_kernel``: scores; ranks int64 (count,) in [0, draws); statistics float32 (images, count), written; images;
draws; count.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from advrad_fast.kernels import arguments

THRESHOLDS = 8  #: of a program
BLOCK = 256  #: scores compared at a time
HELD = 4096
COUNTS_WARPS, RANKS_WARPS = 4, 8


@triton.jit
def counts_kernel(scores, thresholds, counts, images, draws, count, BLOCK: tl.constexpr, THRESHOLDS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * THRESHOLDS + tl.arange(0, THRESHOLDS)
    wanted = t < count
    threshold = tl.load(thresholds + t, mask=wanted, other=0.0)
    above = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
    fault = tl.zeros([BLOCK], tl.int32)
    for start in range(0, draws, BLOCK):
        d = start + tl.arange(0, BLOCK)
        # Nothing is below what stands for the scores outside.
        s = tl.load(scores + image * draws + d, mask=d < draws, other=float("-inf"))
        above += (s[None, :] > threshold[:, None]).to(tl.int32)
        fault |= (s != s).to(tl.int32)
    total = tl.sum(above, 1)
    total = tl.where(tl.max(fault, 0) != 0, -1, total)
    tl.store(counts + image * count + t, total.to(tl.int64), mask=wanted)


@triton.jit
def keys(s, inside):
    """float32 as uint32 in the same order; the largest number outside."""
    bits = s.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)
    return tl.where(inside, key, 0xFFFFFFFF)


@triton.jit
def ranks_kernel(scores, ranks, statistics, images, draws, count, HELD: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    scores += image * draws
    rank = tl.load(ranks + tl.program_id(1))
    d = tl.arange(0, HELD)
    s = tl.load(scores + d, mask=d < draws, other=0.0)
    held = keys(s, d < draws)
    fault = (s != s).to(tl.int32)
    for start in range(HELD, draws, HELD):
        s = tl.load(scores + start + d, mask=start + d < draws, other=0.0)
        fault |= (s != s).to(tl.int32)
    found = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    while bit != 0:
        candidate = found | bit
        below = (held < candidate).to(tl.int32)
        for start in range(HELD, draws, HELD):
            s = tl.load(scores + start + d, mask=start + d < draws, other=0.0)
            below += (keys(s, start + d < draws) < candidate).to(tl.int32)
        found = tl.where(tl.sum(below, 0) <= rank, candidate, found)
        bit = bit >> 1
    bits = tl.where(found >= 0x80000000, found ^ 0x80000000, ~found)
    bits = tl.where(tl.max(fault, 0) != 0, 0x7FC00000, bits).to(tl.uint32)
    tl.store(statistics + image * count + tl.program_id(1), bits.to(tl.float32, bitcast=True))


def votes(scores: Any, thresholds: Any, ranks: Any) -> tuple[Any, Any]:
    """How many of each image's scores are above each threshold, and their order statistics, on the current stream.

    Args:
        scores: float32 (N, draws).
        thresholds: float32 (T,), no NaN; T may be 0.
        ranks: int64 (R,) in [0, draws), 0 for the smallest; R may be 0.  Neither is looked at here, which would wait for the GPU:
            with a NaN among the thresholds or a rank outside, the results for it have no meaning.

    Returns:
        counts int64 (N, T) and order statistics float32 (N, R); -1 and NaN for an image with a NaN score.

    Raises:
        ConfigError: naming the argument.
    """
    images, draws = arguments.tensor("scores", scores, ("float32",), (None, None)).shape
    made = []
    for name, value, dtype in (("thresholds", thresholds, "float32"), ("ranks", ranks, "int64")):
        if arguments.dtype_of(value) != dtype or len(value.shape) != 1:
            raise arguments.ConfigError(arguments.expected(name, f"a tensor of {dtype} (n,)", value))
        made.append(value.shape[0])
    counts, statistics = ranks.new_empty((images, made[0])), scores.new_empty((images, made[1]))
    if made[0]:
        counts_kernel[(images, triton.cdiv(made[0], THRESHOLDS))](
            scores, thresholds, counts, images, draws, made[0], BLOCK=BLOCK, THRESHOLDS=THRESHOLDS, num_warps=COUNTS_WARPS
        )
    if made[1]:
        ranks_kernel[(images, made[1])](scores, ranks, statistics, images, draws, made[1], HELD=HELD, num_warps=RANKS_WARPS)
    return counts, statistics
