// The noise stream, and the fused operation `noise`: uint8 frames to noised network inputs.
// Plain form: advrad_fast/philox.py and advrad_fast/reference/diffusion.py.
#include <algorithm>

#include "native.hpp"
#include "philox.hpp"

namespace advrad {

ADVRAD_CLONES
void integers(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* ADVRAD_RESTRICT out) {
    const Stream s = stream;
    for (std::size_t i = 0; i < groups; ++i) {
        const Words w = philox4x32({first + static_cast<std::uint32_t>(i), s.draw, s.image_id, 0}, s.seed);
        out[4 * i] = w.r0;
        out[4 * i + 1] = w.r1;
        out[4 * i + 2] = w.r2;
        out[4 * i + 3] = w.r3;
    }
}

ADVRAD_CLONES
void normals(const Stream& stream, std::uint32_t first, std::size_t groups, float* ADVRAD_RESTRICT out) {
    const Stream s = stream;
    for (std::size_t i = 0; i < groups; ++i) {
        const Words w = philox4x32({first + static_cast<std::uint32_t>(i), s.draw, s.image_id, 0}, s.seed);
        const Pair a = box_muller(w.r0, w.r1), b = box_muller(w.r2, w.r3);
        out[4 * i] = a.first;
        out[4 * i + 1] = a.second;
        out[4 * i + 2] = b.first;
        out[4 * i + 3] = b.second;
    }
}

namespace {

constexpr std::size_t kBlock = 1024;  // elements worked on at a time: stays in the first-level cache

}  // namespace

// One channel of one block of pixels (at most kBlock) with its noise.
ADVRAD_CLONES
void noise_block(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t count,
                 const float* ADVRAD_RESTRICT eps, float signal, float noise, float input_scale, float* ADVRAD_RESTRICT out) {
    float x[kBlock];
    load_channel(pixels, channels, channel, count, x);
    for (std::size_t i = 0; i < count; ++i) out[i] = input_scale * (signal * x[i] + noise * eps[i]);
}

void noise(const std::uint8_t* images, const Shape& shape, std::uint64_t seed, float signal, float noise, float input_scale,
           float* out) {
    // A block may start and end inside a group of four elements, where the plane's size is no multiple of four.
    float eps[kBlock + 8];
    for (std::size_t draw = 0; draw < shape.draws; ++draw) {
        const Stream stream{seed, static_cast<std::uint32_t>(draw), 0};
        for (std::size_t channel = 0; channel < shape.channels; ++channel) {
            for (std::size_t pixel = 0; pixel < shape.plane(); pixel += kBlock) {
                const std::size_t count = std::min(kBlock, shape.plane() - pixel);
                const std::size_t element = channel * shape.plane() + pixel, shift = element % 4;
                normals(stream, static_cast<std::uint32_t>(element / 4), (shift + count + 3) / 4, eps);
                for (std::size_t n = 0; n < shape.images; ++n)  // every image has the same noise: drawn once
                    noise_block(images + n * shape.image() + pixel * shape.channels, shape.channels, channel, count, eps + shift,
                                signal, noise, input_scale, out + (n * shape.draws + draw) * shape.image() + element);
            }
        }
    }
}

}  // namespace advrad
