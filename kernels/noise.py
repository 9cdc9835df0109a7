"""The fused operation ``noise`` in Triton: uint8 frames to noised network inputs, on tensors of a GPU.

Plain form: :func:`advrad_fast.reference.diffusion.noise`, or :func:`~advrad_fast.reference.smoothing.lattice_inputs` with a
lattice; C++ twin: ``csrc/noise.cpp``.

A thread takes as many neighbouring pixels as fill a store of 128 bits (8 in fp16 and bf16, 4 in fp32), with all their channels:
so a frame's bytes are read once, whole, in loads of 8 (4) bytes a channel, and every output is written once.  Its noise is
drawn in registers.  A program makes up to DRAWS_PER_PROGRAM draws from one read of its pixels: with many draws a frame is read
once for every four of them.

Arguments of ``noise_kernel``, as a launcher passes them:

- images: uint8 (frames, H, W, C); image_ids: int32 (frames,), of the noise stream; out: (frames * draws, C, H, W), image-major,
  or (frames * draws, H, W, C).
- thresholds: int64 or uint64 (2 half,), of the lattice; half: int32; lattice_scale: 255 sigma.  Unread without a lattice.
- seed; first_draw in [0, 2**32); draws: of each frame; frames; items = H * W / PIXELS.
- pixel_scale = input_scale * signal * 2 / 255, offset = -input_scale * signal, noise_scale = input_scale * noise: the inputs are
  ``pixel_scale * pixel + offset + noise_scale * eps``, or ``pixel_scale * (pixel + z) + offset``; see
  :func:`advrad_fast.kernels.arguments.noise_scales`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from advrad_fast.kernels import arguments
from advrad_fast.kernels.arguments import Lattice
from advrad_fast.kernels.philox import lattice4, normals4

BLOCK = 64  #: items (threads) a program: few, so that one small frame fills a large GPU
NUM_WARPS = 2
DRAWS_PER_PROGRAM = 4


@triton.jit
def pixel(word, index: tl.constexpr):
    """Byte ``index`` of a word, as int32."""
    return ((word >> (8 * index)).to(tl.uint32) & 0xFF).to(tl.int32)


@triton.jit
def interleaved(v):
    """Four or eight tensors, side by side in a new last dimension."""
    if len(v) == 4:
        return tl.reshape(tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3])), [v[0].shape[0], 4])
    else:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        return tl.reshape(tl.join(even, odd), [v[0].shape[0], 8])


# A seed or first draw of 1 is a number like any other: Triton's own launcher would make it a constant, without a type.
@triton.jit(do_not_specialize=("seed", "first_draw"))
def noise_kernel(
    images, image_ids, out, thresholds, seed: tl.uint64, first_draw: tl.int64, draws, frames, items, pixel_scale, offset,
    noise_scale, half, lattice_scale, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, LATTICE: tl.constexpr,
    BLOCK: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    WORD: tl.constexpr = tl.uint64 if PIXELS == 8 else tl.uint32
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < items
    frame = tl.program_id(1).to(tl.int64)
    # Three words hold a thread's pixels; as a tuple, because a tensor's sides are powers of two.
    words = (images + frame * items * (PIXELS * CHANNELS)).to(tl.pointer_type(WORD), bitcast=True)
    w = ()
    for i in tl.static_range(CHANNELS):
        w = w + (tl.load(words + (item * CHANNELS + i), mask=inside, other=0),)
    image_id = tl.load(image_ids + frame).to(tl.uint32)
    first = tl.program_id(2) * DRAWS
    for draw in range(first, tl.minimum(first + DRAWS, draws)):
        counter = (first_draw + draw).to(tl.uint32)
        row = out + (frame * draws + draw) * items * (PIXELS * CHANNELS)
        made = ()
        for c in tl.static_range(CHANNELS):
            for g in tl.static_range(PIXELS // 4):
                group = ((c * items + item) * (PIXELS // 4) + g).to(tl.uint32)
                if LATTICE:
                    z = lattice4(group, counter, image_id, seed, thresholds, half, lattice_scale)
                else:
                    z = normals4(group, counter, image_id, seed)
                for i in tl.static_range(4):
                    x = pixel(w[((4 * g + i) * CHANNELS + c) // PIXELS], ((4 * g + i) * CHANNELS + c) % PIXELS)
                    if LATTICE:
                        value = pixel_scale * (x + z[i]).to(tl.float32) + offset
                    else:
                        value = noise_scale * z[i] + (pixel_scale * x.to(tl.float32) + offset)
                    made = made + (value.to(out.dtype.element_ty),)
        for j in tl.static_range(CHANNELS):
            v = ()
            for i in tl.static_range(PIXELS):
                if CHANNELS_LAST:
                    # The j-th store of a thread holds its values j * PIXELS and on, in order of pixel and channel.
                    v = v + (made[((j * PIXELS + i) % CHANNELS) * PIXELS + (j * PIXELS + i) // CHANNELS],)
                else:
                    v = v + (made[j * PIXELS + i],)
            start = item * CHANNELS + j if CHANNELS_LAST else j * items + item
            at_element = start[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
            tl.store(row + at_element, interleaved(v), mask=inside[:, None])


def noise(
    images: Any,
    draws: int,
    seed: int,
    signal: float,
    noise: float,
    input_scale: float,
    out: Any,
    *,
    first_draw: int = 0,
    lattice: Lattice | None = None,
    channels_last: bool = False,
    image_ids: Any | None = None,
) -> None:
    """Fill ``out`` with the network's inputs, ``input_scale * (signal * x + noise * eps)``, on the current stream.

    With a lattice the noise is added to the pixels in integers instead: ``input_scale * signal * (x + z)``.

    Args:
        images: uint8 (N, H, W, C), C of 1 or 3, sides up to 4096, H * W a multiple of 8; x is this in [-1, 1].
        draws: noise draws an image, numbers first_draw and on of the stream.
        seed: in [0, 2**64).
        signal, noise, input_scale: as in :class:`advrad_fast.schedule.Coefficients`, finite.
        out: float16, bfloat16 or float32 (N * draws, C, H, W), image-major, or (N * draws, H, W, C) if ``channels_last``;
            written.
        image_ids: int32 (N,), of the stream; zeros if None, as in the C++ twin.

    All tensors are contiguous, at addresses that are multiples of 16, and on the current device.

    Raises:
        ConfigError: naming the argument.
    """
    n, height, width, channels = arguments.frames(images)
    draws = arguments.integer("draws", draws, 1, 1 << 20)
    shape = (n * draws, height, width, channels) if channels_last else (n * draws, channels, height, width)
    arguments.tensor("out", out, arguments.FLOATS, shape)
    coefficients = (arguments.real(k, v) for k, v in (("signal", signal), ("noise", noise), ("input_scale", input_scale)))
    pixel_scale, offset, noise_scale = arguments.noise_scales(*coefficients, lattice=lattice is not None)
    seed, first_draw, image_ids = arguments.stream(images, seed, first_draw, draws, image_ids)
    thresholds, half, lattice_scale = arguments.table(lattice, image_ids)
    items = height * width // (4 if arguments.dtype_of(out) == "float32" else 8)
    noise_kernel[(triton.cdiv(items, BLOCK), n, triton.cdiv(draws, DRAWS_PER_PROGRAM))](
        images, image_ids, out, thresholds, seed, first_draw, draws, n, items, pixel_scale, offset, noise_scale, half,
        lattice_scale, CHANNELS=channels, CHANNELS_LAST=channels_last, LATTICE=lattice is not None, BLOCK=BLOCK,
        DRAWS=DRAWS_PER_PROGRAM, num_warps=NUM_WARPS,
    )  # fmt: skip
