"""The noise stream as Triton device functions; :mod:`advrad_fast.philox` and :mod:`advrad_fast.lattice` define it.

Counter layout: ``(element // 4, draw, image_id, block)``, key ``(seed & 0xffffffff, seed >> 32)``; block 0 makes normals,
blocks 1 and 2 lattice noise.  Nothing here is specific to a vendor or an interpreter.  Logarithm, sine and cosine are
polynomials: ``tl.sin`` and ``tl.cos`` carry a slow path for huge angles (2,464 instructions for 16 normals a thread on sm_80,
against 664 with the GPU's approximate functions), the approximate functions are inline assembly for one vendor, and the
approximate logarithm loses all digits beside 1.

Accuracy of :func:`normals4` against the exact Box-Muller in float64: within 2e-6 with a correctly rounded square root (worst seen
1.4e-6, tests/test_kernels_philox.py; NumPy's own float32 form is within 1.5e-6).  CUDA's ``sqrt.approx.f32`` may add 2**-23
of the value, 7e-7 at the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011): counter and key as uint32, four uint32 words back."""
    for _ in tl.static_range(10):
        # One wide multiplication instead of a high and a low one.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words4(group, draw, image_id, block: tl.constexpr, seed):
    """The four words of each group of four elements: ``group`` uint32, any shape; draw, image_id uint32, seed uint64."""
    zero = group * 0
    return philox4x32(group, zero + draw, zero + image_id, zero + block, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def box_muller(r0, r1):
    """Two words to two standard normals: u1 = ((r0 >> 8) + 1) / 2**24 in (0, 1], u2 = (r1 >> 8) / 2**24 in [0, 1)."""
    # log u1 = e log 2 + log(1 + g), g in [sqrt(1/2) - 1, sqrt(2) - 1]; a minimax polynomial for -2 log(1 + g) / g, relative
    # error 1.7e-7.  Near u1 = 1, e is 0 and g exact, so the radius keeps its digits where the logarithm vanishes.
    count = ((r0 >> 8) + 1).to(tl.int32).to(tl.float32)
    # 2**24 u1 is a whole number; sqrt(1/2) is 0x3F3504F3, and 151 - 24 the exponent's bias.
    bits = count.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3 - (151 << 23))
    e = (bits >> 23).to(tl.float32)
    g = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = 0.20213811 * g + -0.32445195
    q = q * g + 0.34501666
    q = q * g + -0.39800328
    q = q * g + 0.49939817
    q = q * g + -0.6667012
    q = q * g + 1.0000073
    q = q * g + -1.9999999
    radius = tl.sqrt(q * g + e * -1.3862944)
    # The angle in turns, minus the nearest half turn: in [-1/4, 1/4), exact.  Half turns change only the sign.
    turn = r1 & 0xFFFFFF00
    half = (turn + 0x40000000) & 0x80000000
    x = (turn << 1).to(tl.int32, bitcast=True).to(tl.float32) * 1.1641532e-10  # 2**-33
    z = x * x
    s = 39.536705 * z + -76.54978
    s = s * z + 81.601006
    s = s * z + -41.341656
    s = s * z + 6.283185
    c = 56.242428 * z + -85.240334
    c = c * z + 64.93459
    c = c * z + -19.739172
    c = c * z + 0.99999994
    radius = (radius.to(tl.uint32, bitcast=True) ^ half).to(tl.float32, bitcast=True)
    return radius * c, radius * x * s


@triton.jit
def normals4(group, draw, image_id, seed):
    """The normals of the four elements of each group: four float32 tensors of the shape of ``group``."""
    r0, r1, r2, r3 = words4(group, draw, image_id, 0, seed)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return z0, z1, z2, z3


@triton.jit
def lattice_value(high, low, thresholds, half, scale):
    """#{T_j <= u} - half for u = high << 28 | low >> 4: int32, exactly, with one look into the table.

    A float32 estimate y of ``scale`` Phi^-1(u), where scale = 255 sigma, is off by less than 0.25 (Abramowitz and Stegun,
    26.2.23: 4.5e-4 of scale, and scale is at most 510).  The value is floor(y) or floor(y) + 1 if the error is below 1/2, and the
    integer threshold between the two decides which; so no rounding in the estimate can show in the result.

    Args:
        high, low: uint32, the words of blocks 1 and 2.
        thresholds: pointer to int64 or uint64 (2 half,), ascending, below 2**60.
        half: int32 scalar.
        scale: float32 scalar.
    """
    upper = high.to(tl.int32, bitcast=True) < 0
    # The tail probability of u or of its mirror image, in (0, 1/2].
    tail_high = tl.where(upper, ~high, high)
    tail_low = tl.where(upper, ~low, low) >> 4
    p = tail_high.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064e-10 + (
        tail_low.to(tl.int32, bitcast=True).to(tl.float32) * 8.6736174e-19 + 4.3368087e-19
    )
    t = tl.sqrt(-1.3862944 * tl.log2(p))
    numerator = (0.010328 * t + 0.802853) * t + 2.515517
    denominator = ((0.001308 * t + 0.189269) * t + 1.432788) * t + 1.0
    y = (t - numerator / denominator) * scale
    at = tl.floor(tl.where(upper, y, -y)).to(tl.int32)
    at = tl.minimum(tl.maximum(at, -half), half - 1)
    threshold = tl.load(thresholds + (at + half)).to(tl.uint64)
    u = high.to(tl.uint64) << 28 | (low >> 4).to(tl.uint64)
    return at + (threshold <= u).to(tl.int32)


@triton.jit
def lattice4(group, draw, image_id, seed, thresholds, half, scale):
    """The lattice noise of the four elements of each group, in steps of 1/255: four int32 tensors of the shape of ``group``."""
    h0, h1, h2, h3 = words4(group, draw, image_id, 1, seed)
    l0, l1, l2, l3 = words4(group, draw, image_id, 2, seed)
    z0 = lattice_value(h0, l0, thresholds, half, scale)
    z1 = lattice_value(h1, l1, thresholds, half, scale)
    z2 = lattice_value(h2, l2, thresholds, half, scale)
    z3 = lattice_value(h3, l3, thresholds, half, scale)
    return z0, z1, z2, z3
