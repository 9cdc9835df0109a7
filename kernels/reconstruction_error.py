"""The fused operation ``reconstruction_error`` in Triton: network outputs to anomaly maps and scores (Algorithm 4).

Plain form: :func:`advrad_fast.reference.score.reconstruction_error` (:func:`~advrad_fast.reference.smoothing.smoothed_error`
with a lattice); C++ twin: ``csrc/reconstruction_error.cpp``.  Unlike the twin it draws the noise again instead of reading
the network's inputs: on a GPU memory is what is short.

Two launches; three for filters above 65.  ``errors_kernel`` reads the outputs, once, and the frame, forms the difference of
image and reconstruction, pools it to the four scales within a warp, and writes the weighted sum of the squares, averaged over
channels and draws: float32 at full size.  ``deviation_kernel`` filters that map, subtracts mu, and takes the maximum with an
integer atomic, whose result does not depend on the order.  Without ``maps`` no anomaly map is written.  Of a filter above 65
``rows_kernel`` first sums the rows.

Why there is an intermediate map, of 4 bytes written and at least 4 read a pixel (not a pixel and draw): the filter needs the
errors of (s - 1) / 2 pixels around, on all sides, and programs can't exchange them.  Doing it in one launch means to compute
them again in every program: with tiles small enough to make 128 programs of one 256 x 256 frame (16 x 32), a window of 15 would
have each output read, and its noise drawn, (16 + 16) (32 + 16) / 512 = 3 times, and one of 31 6 times.  The map of such
a frame is 262 kB, and is read again at once.

Arguments of ``errors_kernel``, as a launcher passes them:

- images: uint8 (frames, H, W, C); image_ids: int32 (frames,); outputs: (results * draws, C, H, W); errors: float32
  (results, H, W), written; scores: float32 (results,), set to 0.
- thresholds, half, lattice_scale, seed, first_draw: as for ``noise_kernel``; unread where the variant's noise is ``none``.
- draws: of each result; groups: results of each frame; results; height; width.
- pixel_scale, offset, noise_scale, output_scale: the difference is ``pixel_scale * pixel + offset + noise_scale * eps +
  output_scale * output``; see :func:`advrad_fast.kernels.arguments.error_scales`.
- weight_1, weight_2, weight_4, weight_8: of the four scales, divided by channels * draws.

Arguments of ``rows_kernel``: errors; sums: float32 (results, H, W), written; results, height, width; filter_size: odd.

Arguments of ``deviation_kernel``: errors, or sums in the wide variant; mu, inverse_spread: float32 (H, W), the latter not below
0; maps: float32 (results, H, W), unread without the variant's maps; scores; results, height, width; filter_size: odd; tiles:
programs a row, :func:`advrad_fast.kernels.arguments.tiles`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from advrad_fast.kernels import arguments
from advrad_fast.kernels.arguments import Lattice
from advrad_fast.kernels.noise import pixel
from advrad_fast.kernels.philox import lattice4, normals4

COLUMNS = 32  #: of a program of errors_kernel: 8 x 32 pixels, one warp, so that pooling never leaves it
ROWS = 8  #: of a program of the other two, of arguments.SPAN columns
NUM_WARPS = 4

NOISES = ("none", "gaussian", "lattice")


@triton.jit
def rows_joined(t, ROWS: tl.constexpr):
    """Rows in blocks of 2 * ROWS, of which each half is alike: in every row the sum of both halves."""
    halves = tl.reshape(t, [8 // (2 * ROWS), 2, ROWS, t.shape[1]])
    return tl.reshape(tl.broadcast_to(tl.sum(halves, 1, keep_dims=True), halves.shape), t.shape)


@triton.jit
def columns_joined(t):
    """In both of two neighbouring columns their sum."""
    pairs = tl.reshape(t, [t.shape[0], t.shape[1] // 2, 2])
    return tl.reshape(tl.broadcast_to(tl.sum(pairs, 2, keep_dims=True), pairs.shape), t.shape)


@triton.jit(do_not_specialize=("seed", "first_draw"))  # as in noise_kernel
def errors_kernel(
    images, image_ids, outputs, errors, scores, thresholds, seed: tl.uint64, first_draw: tl.int64, draws, groups, results, height,
    width, pixel_scale, offset, noise_scale, output_scale, weight_1, weight_2, weight_4, weight_8, half, lattice_scale,
    CHANNELS: tl.constexpr, NOISE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = COLUMNS // 4
    result = tl.program_id(2).to(tl.int64)
    frame = (tl.program_id(2) // groups).to(tl.int64)
    first_draw += (tl.program_id(2) % groups).to(tl.int64) * draws
    # Both are multiples of 8; that the compiler sees it is what makes loads and stores wide.
    width = width // 8 * 8
    height = height // 8 * 8
    y = tl.program_id(1) * 8 + tl.arange(0, 8)
    # A column here is a group of four pixels.
    column = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (y < height)[:, None] & (x < width)[None, :]
    # Groups outside repeat the last one inside: their errors are never stored.
    group = tl.minimum(y, height - 1)[:, None] * (width // 4) + tl.minimum(column, width // 4 - 1)[None, :]
    at = y[:, None] * width + x[None, :]
    plane = height * width
    words = (images + frame * plane * CHANNELS).to(tl.pointer_type(tl.uint32), bitcast=True)
    w0 = tl.load(words + group * CHANNELS)
    w1, w2 = w0, w0
    if CHANNELS == 3:
        w1 = tl.load(words + (group * CHANNELS + 1))
        w2 = tl.load(words + (group * CHANNELS + 2))
    image_id = tl.load(image_ids + frame).to(tl.uint32)
    zero = tl.zeros([8, GROUPS], tl.float32)
    # Weighted sums of squares: at scale 1 of the four pixels, at scale 2 of the two halves, at scales 4 and 8.
    e0, e1, e2, e3, e01, e23, e4, e8 = zero, zero, zero, zero, zero, zero, zero, zero
    for draw in range(draws):
        counter = (first_draw + draw).to(tl.uint32)
        row = outputs + (result * draws + draw) * CHANNELS * plane
        v0, v1, v2 = w0, w1, w2
        # Not unrolled: three channels side by side need more registers than there are.
        for c in tl.range(CHANNELS, loop_unroll_factor=1):
            o = tl.load(row + (c * plane + at), mask=inside, other=0.0).to(tl.float32) * output_scale
            even, odd = tl.split(tl.reshape(o, [8, GROUPS, 2, 2]))
            o0, o2 = tl.split(even)
            o1, o3 = tl.split(odd)
            if CHANNELS == 3:
                # This channel's four pixels are bytes 0, 3, 6 and 9; the next one's come there by a shift over all twelve.
                x0, x1, x2, x3 = pixel(v0, 0), pixel(v0, 3), pixel(v1, 2), pixel(v2, 1)
                v0, v1, v2 = (v0 >> 8) | (v1 << 24), (v1 >> 8) | (v2 << 24), v2 >> 8
            else:
                x0, x1, x2, x3 = pixel(v0, 0), pixel(v0, 1), pixel(v0, 2), pixel(v0, 3)
            element = (c * (plane // 4) + group).to(tl.uint32)
            if NOISE == "lattice":
                z0, z1, z2, z3 = lattice4(element, counter, image_id, seed, thresholds, half, lattice_scale)
                x0, x1, x2, x3 = x0 + z0, x1 + z1, x2 + z2, x3 + z3
            d0, d1 = pixel_scale * x0.to(tl.float32) + (o0 + offset), pixel_scale * x1.to(tl.float32) + (o1 + offset)
            d2, d3 = pixel_scale * x2.to(tl.float32) + (o2 + offset), pixel_scale * x3.to(tl.float32) + (o3 + offset)
            if NOISE == "gaussian":
                z0, z1, z2, z3 = normals4(element, counter, image_id, seed)
                d0, d1, d2, d3 = d0 + noise_scale * z0, d1 + noise_scale * z1, d2 + noise_scale * z2, d3 + noise_scale * z3
            e0, e1, e2, e3 = e0 + d0 * d0, e1 + d1 * d1, e2 + d2 * d2, e3 + d3 * d3
            d01, d23 = rows_joined(d0 + d1, 1), rows_joined(d2 + d3, 1)
            e01, e23 = e01 + d01 * d01, e23 + d23 * d23
            d4 = rows_joined(d01 + d23, 2)
            e4 += d4 * d4
            d8 = columns_joined(rows_joined(d4, 4))
            e8 += d8 * d8
    # The sums above are of 4, 16 and 64 differences: their means' squares are these over 16, 256 and 4096.
    coarse = e4 * (weight_4 / 256) + e8 * (weight_8 / 4096)
    e01, e23 = e01 * (weight_2 / 16) + coarse, e23 * (weight_2 / 16) + coarse
    e0, e1, e2, e3 = e0 * weight_1 + e01, e1 * weight_1 + e01, e2 * weight_1 + e23, e3 * weight_1 + e23
    e = tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [8, COLUMNS])
    tl.store(errors + result * plane + at, e, mask=inside)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(scores + result, 0.0, mask=first)


@triton.jit
def shifted(t, by):
    """Along the last axis, ``t[i + by]`` at i; what would come from outside is of no use."""
    last: tl.constexpr = t.shape[1] - 1
    source = tl.minimum(tl.maximum(tl.arange(0, t.shape[1]) + by, 0), last)
    return tl.gather(t, tl.broadcast_to(source[None, :], t.shape), 1)


@triton.jit
def rows_summed(errors, x, y, inside_x, width, height, reach):
    """Sums over the window's rows, at columns x and rows y of one map.

    No running sums, here and below: a subtraction would smear an infinity, and lose small values beside large ones.
    """
    total = tl.zeros([y.shape[0], x.shape[0]], tl.float32)
    for dy in range(-reach, reach + 1):
        row = y + dy
        inside = ((row >= 0) & (row < height))[:, None] & inside_x[None, :]
        total += tl.load(errors + (row[:, None] * width + x[None, :]), mask=inside, other=0.0)
    return total


@triton.jit
def rows_kernel(errors, sums, results, height, width, filter_size, SPAN: tl.constexpr, ROWS: tl.constexpr):
    result = tl.program_id(2).to(tl.int64)
    width = width // 8 * 8
    height = height // 8 * 8
    x = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = (y < height)[:, None] & (x < width)[None, :]
    total = rows_summed(errors + result * height * width, x, y, x < width, width, height, filter_size // 2)
    tl.store(sums + result * height * width + (y[:, None] * width + x[None, :]), total, mask=own)


@triton.jit
def deviation_kernel(
    errors, mu, inverse_spread, maps, scores, results, height, width, filter_size, tiles, MAPS: tl.constexpr, WIDE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    result = tl.program_id(2).to(tl.int64)
    width = width // 8 * 8
    height = height // 8 * 8
    reach = filter_size // 2
    margin = 0
    if not WIDE:
        margin = (reach + 3) // 4 * 4
    start = tl.program_id(0) * (SPAN - 2 * margin) - margin
    start = start // 4 * 4
    x = start + tl.arange(0, SPAN)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_x = (x >= 0) & (x < width)
    errors += result * height * width
    if WIDE:
        total = tl.zeros([ROWS, SPAN], tl.float32)
        for dx in range(-reach, reach + 1):
            column = x + dx
            inside = (y < height)[:, None] & ((column >= 0) & (column < width))[None, :]
            total += tl.load(errors + (y[:, None] * width + column[None, :]), mask=inside, other=0.0)
    else:
        total = rows_summed(errors, x, y, inside_x, width, height, reach)
        # Sums of 1, 2, 4, ... columns by doubling; those that make up the window are added.
        doubled = total
        done = 1
        step = 1
        while 2 * step <= filter_size:
            doubled += shifted(doubled, step)
            step *= 2
            if filter_size & step != 0:
                total += shifted(doubled, done)
                done += step
        total = shifted(total, -reach)
    # The mean is over the part of the window that lies inside the image.
    rows = tl.minimum(y + reach + 1, height) - tl.maximum(y - reach, 0)
    columns = tl.minimum(x + reach + 1, width) - tl.maximum(x - reach, 0)
    share_y = tl.math.div_rn(1.0, tl.maximum(rows, 1).to(tl.float32))
    share_x = tl.math.div_rn(1.0, tl.maximum(columns, 1).to(tl.float32))
    own_x = (x >= start + margin) & (x < start + SPAN - margin) & inside_x
    own = (y < height)[:, None] & own_x[None, :]
    at = y[:, None] * width + x[None, :]
    mean = total * (share_y[:, None] * share_x[None, :])
    value = tl.abs(mean - tl.load(mu + at, mask=own, other=0.0)) * tl.load(inverse_spread + at, mask=own, other=0.0)
    if MAPS:
        tl.store(maps + result * height * width + at, value, mask=own)
    # Of numbers that are not negative the bits are in the numbers' order, and NaN, its sign cleared, is above all: none is lost.
    bits = tl.where(value == value, value, float("nan")).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    best = tl.max(tl.reshape(tl.where(own, bits, 0), [ROWS * SPAN]), 0)
    tl.atomic_max(scores.to(tl.pointer_type(tl.int32), bitcast=True) + result, best, sem="relaxed")


def reconstruction_error(
    images: Any,
    outputs: Any,
    draws: int,
    input_coefficient: float,
    output_coefficient: float,
    scale_weights: tuple[float, float, float, float],
    filter_size: int,
    mu: Any,
    inverse_spread: Any,
    maps: Any | None,
    scores: Any,
    *,
    seed: int,
    signal: float,
    noise: float,
    input_scale: float,
    first_draw: int = 0,
    lattice: Lattice | None = None,
    image_ids: Any | None = None,
) -> None:
    """Algorithm 4: fill ``scores``, and ``maps`` if given, from the network's outputs, on the current stream.

    What the reconstruction x~ lacks of the image is ``x + input_coefficient * inputs + output_coefficient * outputs``, with the
    inputs that :func:`advrad_fast.kernels.noise.noise` made from the same seed, draws and coefficients.  With a lattice the
    reconstruction is held against the noised image: x is left out.  See :func:`advrad_fast.schedule.error_coefficients`.

    A NaN among a score's outputs makes it NaN, and an infinity makes it NaN or infinite: a fault never gives a finite score.

    Args:
        images: uint8 (N, H, W, C); H and W are multiples of 8 up to 4096, C is 1 or 3.  Each has the same number of results.
        outputs: float16, bfloat16 or float32 (results * draws, C, H, W), the network's raw outputs, image-major; those of an
            image are draws first_draw and on.
        draws: neighbouring outputs that share one result: their errors are averaged.
        scale_weights: of the errors at 1, 1/2, 1/4 and 1/8 of the size, 0 or above.
        filter_size: side of the mean filter, odd, in [1, 255] pixels.
        mu, inverse_spread: float32 (H, W): the normal map, and one over its spread, 0 or above.
        maps: float32 (results, H, W), written with the anomaly maps; None: none is written.
        scores: float32 (results,), written with the maps' maxima.
        seed, signal, noise, input_scale, first_draw, lattice, image_ids: of the inputs.

    All tensors are contiguous, at addresses that are multiples of 16, and on the current device.

    Raises:
        ConfigError: naming the argument.
    """
    n, height, width, channels = arguments.frames(images)
    draws = arguments.integer("draws", draws, 1, 1 << 20)
    arguments.tensor("outputs", outputs, arguments.FLOATS, (None, channels, height, width))
    if height % 8 or width % 8 or outputs.shape[0] % (n * draws):
        wanted = f"(k * {n * draws}, {channels}, H, W), with sides that are multiples of 8"
        raise arguments.ConfigError(arguments.expected("outputs", wanted, tuple(outputs.shape)))
    results = outputs.shape[0] // draws
    arguments.integer("outputs: results", results, 1, arguments.MAX_FRAMES)
    if arguments.integer("filter_size", filter_size, 1, 255) % 2 == 0:
        raise arguments.ConfigError(arguments.expected("filter_size", "an odd number", filter_size))
    for name, value, shape in (("mu", mu, (height, width)), ("inverse_spread", inverse_spread, (height, width)),
                               ("scores", scores, (results,)), ("maps", maps, (results, height, width))):  # fmt: skip
        if value is not None or name != "maps":
            arguments.tensor(name, value, ("float32",), shape)
    weights = [arguments.real("scale_weights", w, 0.0) / (channels * draws) for w in scale_weights]
    seed, first_draw, image_ids = arguments.stream(images, seed, first_draw, results // n * draws, image_ids)
    thresholds, half, lattice_scale = arguments.table(lattice, image_ids)
    coefficients = (
        arguments.real(k, v)
        for k, v in (("input_coefficient", input_coefficient), ("output_coefficient", output_coefficient), ("signal", signal),
                     ("noise", noise), ("input_scale", input_scale))
    )  # fmt: skip
    pixel_scale, offset, noise_scale, output_scale = arguments.error_scales(*coefficients, lattice=lattice is not None)
    kind = "lattice" if lattice is not None else "gaussian" if noise_scale else "none"
    errors = mu.new_empty((results, height, width))
    errors_kernel[(triton.cdiv(width, COLUMNS), height // 8, results)](
        images, image_ids, outputs, errors, scores, thresholds, seed, first_draw, draws, results // n, results, height, width,
        pixel_scale, offset, noise_scale, output_scale, *weights, half, lattice_scale, CHANNELS=channels, NOISE=kind,
        COLUMNS=COLUMNS, num_warps=1,
    )  # fmt: skip
    wide = filter_size > arguments.NARROW
    if wide:
        sums = mu.new_empty((results, height, width))
        rows_kernel[(triton.cdiv(width, arguments.SPAN), triton.cdiv(height, ROWS), results)](
            errors, sums, results, height, width, filter_size, SPAN=arguments.SPAN, ROWS=ROWS, num_warps=NUM_WARPS
        )
        errors = sums
    across = arguments.tiles(width, filter_size)
    deviation_kernel[(across, triton.cdiv(height, ROWS), results)](
        errors, mu, inverse_spread, errors if maps is None else maps, scores, results, height, width, filter_size, across,
        MAPS=maps is not None, WIDE=wide, SPAN=arguments.SPAN, ROWS=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
