// What the engine does with up to 32 pixels and 32 channels at a time: one set of functions for each kind of processor.
// Activations are bfloat16, channels last; sums are fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../native.hpp"

namespace advrad::engine {

using Bf16 = std::uint16_t;

constexpr std::size_t kPixels = 16;  // of a tile: its rows
constexpr std::size_t kLanes = 16;   // output channels of a tile of weights
constexpr std::size_t kDepth = 32;   // products a step
constexpr std::size_t kWeightTile = kLanes * kDepth;

// Part of the sum behind an output: `steps` times 32 consecutive values of every pixel, step j from offsets[j] on.
struct Run {
    const Bf16* pixels[2];  // the first pixel of each of the two tiles
    std::size_t stride;     // bytes from one pixel to the next
    const std::int32_t* offsets;
    std::size_t steps;
};

// Two tiles of pixels times one or two tiles of output channels, and what is done with the sums.
struct Block {
    const Run* runs;
    std::size_t run_count;
    const Bf16* weights;  // for each step, `columns` tiles: [16 pairs of products][16 lanes][2]
    std::size_t columns;  // 1 or 2
    std::size_t valid[2];  // pixels of each tile that count, up to 16
    std::size_t channels;  // output channels that count, up to 16 * columns

    const float* bias;  // 32 values; null: none
    // Either sums + bias as they are, 32 a pixel, for both tiles in turn ...
    float* raw;
    // ... or silu(sums + bias + residual) in bf16.  Strides in values.
    const Bf16* residual[2];  // null: none
    std::size_t residual_stride;
    bool silu;
    Bf16* out[2];
    std::size_t out_stride;
    float* moments;  // null, or 32 sums and 32 sums of squares over pixels, added to
};

struct Kernels {
    const char* name;
    void (*begin)();  // on every thread, before the others ...
    void (*end)();    // ... and after them
    void (*block)(const Block& block);
    // out = silu(in * scale + shift), or without silu: `pixels` pixels in a row.
    void (*normalise)(const Bf16* in, std::size_t pixels, std::size_t channels, const float* scale, const float* shift, bool silu,
                      Bf16* out);
    // out = softmax(in[0 .. count)), zeros up to `padded`.  Overwrites in.
    void (*softmax)(float* in, std::size_t count, std::size_t padded, Bf16* out);
    // `count` values to bf16; each `patch` of them go to the next pixel, `stride` values on.
    void (*fold)(const float* in, std::size_t count, std::size_t patch, Bf16* out, std::size_t stride);
};

const Kernels& portable_kernels();
const Kernels* amx_kernels();  // null where the processor or the system has none

ADVRAD_INLINE Bf16 to_bf16(float x) {
    std::uint32_t i;
    std::memcpy(&i, &x, sizeof i);
    if ((i & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<Bf16>((i >> 16) | 0x40u);  // stays a NaN
    return static_cast<Bf16>((i + 0x7FFFu + ((i >> 16) & 1u)) >> 16);
}

ADVRAD_INLINE float from_bf16(Bf16 x) {
    const std::uint32_t i = std::uint32_t{x} << 16;
    float y;
    std::memcpy(&y, &i, sizeof y);
    return y;
}

}  // namespace advrad::engine
