// The plain form: what the tiles of kernels_amx.cpp are checked against, and what runs under the sanitizers.
#include <algorithm>
#include <cmath>

#include "kernels.hpp"

namespace advrad::engine {

namespace {

float silu(float x) { return x / (1.0f + std::exp(-x)); }

void nothing() {}

void block(const Block& b) {
    const std::size_t lanes = b.columns * kLanes;
    for (std::size_t tile = 0; tile < 2; ++tile) {
        for (std::size_t m = 0; m < b.valid[tile]; ++m) {
            float sums[2 * kLanes] = {};
            const Bf16* weights = b.weights;
            for (std::size_t r = 0; r < b.run_count; ++r) {
                const Run& run = b.runs[r];
                const Bf16* pixel = run.pixels[tile] + m * run.stride / sizeof(Bf16);
                for (std::size_t step = 0; step < run.steps; ++step) {
                    for (std::size_t k = 0; k < kDepth; ++k) {
                        const float x = from_bf16(pixel[run.offsets[step] + static_cast<std::ptrdiff_t>(k)]);
                        const Bf16* row = weights + (k / 2) * 2 * kLanes + k % 2;
                        for (std::size_t lane = 0; lane < lanes; ++lane)
                            sums[lane] += x * from_bf16(row[(lane / kLanes) * kWeightTile + 2 * (lane % kLanes)]);
                    }
                    weights += b.columns * kWeightTile;
                }
            }
            if (b.raw) {
                float* raw = b.raw + (tile * kPixels + m) * 2 * kLanes;
                for (std::size_t lane = 0; lane < lanes; ++lane) raw[lane] = sums[lane] + (b.bias ? b.bias[lane] : 0.0f);
                continue;
            }
            for (std::size_t lane = 0; lane < b.channels; ++lane) {
                float y = sums[lane] + (b.bias ? b.bias[lane] : 0.0f);
                if (b.residual[tile]) y += from_bf16(b.residual[tile][m * b.residual_stride + lane]);
                if (b.moments) {
                    b.moments[lane] += y;
                    b.moments[2 * kLanes + lane] += y * y;
                }
                b.out[tile][m * b.out_stride + lane] = to_bf16(b.silu ? silu(y) : y);
            }
        }
    }
}

void normalise(const Bf16* in, std::size_t pixels, std::size_t channels, const float* scale, const float* shift, bool activate,
               Bf16* out) {
    for (std::size_t p = 0; p < pixels; ++p)
        for (std::size_t c = 0; c < channels; ++c) {
            const float y = from_bf16(in[p * channels + c]) * scale[c] + shift[c];
            out[p * channels + c] = to_bf16(activate ? silu(y) : y);
        }
}

void softmax(float* in, std::size_t count, std::size_t padded, Bf16* out) {
    const float top = *std::max_element(in, in + count);
    float sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += in[i] = std::exp(in[i] - top);
    for (std::size_t i = 0; i < count; ++i) out[i] = to_bf16(in[i] / sum);
    std::fill(out + count, out + padded, Bf16{0});
}

void fold(const float* in, std::size_t count, std::size_t patch, Bf16* out, std::size_t stride) {
    for (std::size_t i = 0; i < count; ++i) out[i / patch * stride + i % patch] = to_bf16(in[i]);
}

}  // namespace

const Kernels& portable_kernels() {
    static const Kernels kernels{"portable", nothing, nothing, block, normalise, softmax, fold};
    return kernels;
}

}  // namespace advrad::engine
