// The fused operation `noise`: uint8 frames to noised network inputs.
// Plain form: advrad_fast/reference/diffusion.py, and smoothing.py for lattice noise.
#include <algorithm>

#include "native.hpp"
#include "philox.hpp"
#include "threads.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace advrad {

namespace {

constexpr std::size_t kBlock = kNoiseBlock;  // elements worked on at a time: stays in the first-level cache
constexpr std::size_t kTask = 4;      // blocks a task
constexpr std::size_t kChannels = 3;
constexpr std::size_t kCaches = 16 << 20;  // bytes that may stay in a cache until the network reads them

// `count` pixels of one channel, uint8 to [-1, 1].
template <int Channels>
ADVRAD_INLINE void load_channel(const std::uint8_t* ADVRAD_RESTRICT pixels, std::size_t count, float* ADVRAD_RESTRICT x) {
    for (std::size_t i = 0; i < count; ++i) x[i] = static_cast<float>(pixels[i * Channels]) * kPixelScale - 1.0f;
}

// The same with lattice noise added before the scaling, in integers.
template <int Channels>
ADVRAD_INLINE void load_channel(const std::uint8_t* ADVRAD_RESTRICT pixels, const std::int32_t* ADVRAD_RESTRICT z,
                                std::size_t count, float* ADVRAD_RESTRICT x) {
    for (std::size_t i = 0; i < count; ++i)
        x[i] = static_cast<float>(static_cast<std::int32_t>(pixels[i * Channels]) + z[i]) * kPixelScale - 1.0f;
}

// `z` may be null.
ADVRAD_INLINE void load_channel(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, const std::int32_t* z,
                                std::size_t count, float* x) {
    if (z == nullptr)
        channels == 1 ? load_channel<1>(pixels, count, x) : load_channel<3>(pixels + channel, count, x);
    else
        channels == 1 ? load_channel<1>(pixels, z, count, x) : load_channel<3>(pixels + channel, z, count, x);
}

// Both round to the nearest, ties to even; NaN stays NaN.
ADVRAD_INLINE std::uint16_t to_bf16(float x) {
    const std::uint32_t i = bits(x), rounded = (i + 0x7FFFu + ((i >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>(x != x ? (i >> 16) | 0x40u : rounded);
}

ADVRAD_INLINE std::uint16_t to_fp16(float x) {
    const std::uint32_t i = bits(x), sign = (i >> 16) & 0x8000u, magnitude = i & 0x7FFFFFFFu;
    // Below 2^-14 the result is subnormal: adding 1/2 leaves it, rounded, in the low bits of the significand.
    const std::uint32_t small = bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return static_cast<std::uint16_t>(sign | half);
}

template <typename T, typename Convert>
ADVRAD_INLINE void store(const float* ADVRAD_RESTRICT x, std::size_t count, std::size_t stride, T* ADVRAD_RESTRICT out,
                         Convert convert) {
    if (stride == 1)
        for (std::size_t i = 0; i < count; ++i) out[i] = convert(x[i]);
    else
        for (std::size_t i = 0; i < count; ++i) out[i * stride] = convert(x[i]);
}

// Past the caches: what is too large to stay in them would otherwise be read before it is written.
ADVRAD_INLINE void stream(const float* ADVRAD_RESTRICT x, std::size_t count, float* out) {
#if defined(__SSE2__)
    if (reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
        std::size_t i = 0;
        for (; i + 4 <= count; i += 4) _mm_stream_ps(out + i, _mm_loadu_ps(x + i));
        for (; i < count; ++i) out[i] = x[i];
        return;
    }
#endif
    std::copy_n(x, count, out);
}

// Before another thread may read what was streamed.
ADVRAD_INLINE void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

struct Noises {
    float normal[kBlock + 8];
    std::int32_t lattice[kBlock + 8];
};

}  // namespace

// One channel of one block of pixels (at most kBlock), with its noise, to `out` in the format and at the stride asked for.
ADVRAD_CLONES
void noise_block(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t count, const float* eps,
                 const std::int32_t* z, const NoiseSettings& settings, void* out, std::size_t offset, std::size_t stride,
                 bool past_caches) {
    const float signal = settings.signal, noise = settings.noise, input_scale = settings.input_scale;
    float x[kBlock];
    load_channel(pixels, channels, channel, z, count, x);
    if (z != nullptr)
        for (std::size_t i = 0; i < count; ++i) x[i] = input_scale * (signal * x[i]);
    else
        for (std::size_t i = 0; i < count; ++i) x[i] = input_scale * (signal * x[i] + noise * eps[i]);
    switch (settings.format) {
        case Format::fp32:
            if (past_caches && stride == 1)
                stream(x, count, static_cast<float*>(out) + offset);
            else
                store(x, count, stride, static_cast<float*>(out) + offset, [](float v) { return v; });
            break;
        case Format::fp16:
            store(x, count, stride, static_cast<std::uint16_t*>(out) + offset, to_fp16);
            break;
        case Format::bf16:
            store(x, count, stride, static_cast<std::uint16_t*>(out) + offset, to_bf16);
            break;
    }
}

ADVRAD_CLONES
void noised_pixels(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t count, const float* eps,
                   const NoiseSettings& settings, float* out) {
    const float signal = settings.signal, noise = settings.noise, input_scale = settings.input_scale;
    float x[kBlock];
    load_channel(pixels, channels, channel, nullptr, count, x);
    for (std::size_t i = 0; i < count; ++i) out[i] = input_scale * (signal * x[i] + noise * eps[i]);
}

void noise(const std::uint8_t* images, const Shape& shape, std::uint64_t seed, const NoiseSettings& settings, void* out) {
    const std::size_t draws = shape.draws, plane = shape.plane(), channels = shape.channels;
    const std::size_t chunk = kBlock * kTask, chunks = (plane + chunk - 1) / chunk;
    const bool past_caches = shape.images * draws * shape.image() * sizeof(float) > kCaches;
    const bool lattice = settings.lattice.thresholds != nullptr;
    parallel(draws * chunks, settings.threads, [&](std::size_t task, std::size_t) {
        const std::size_t draw = task / chunks, begin = task % chunks * chunk, end = std::min(plane, begin + chunk);
        const Stream stream{seed, settings.first_draw + static_cast<std::uint32_t>(draw), 0, 0};
        Noises noises[kChannels];
        const float* eps[kChannels];
        for (std::size_t pixel = begin; pixel < end; pixel += kBlock) {
            const std::size_t count = std::min(kBlock, end - pixel);
            std::size_t shift[kChannels];
            for (std::size_t c = 0; c < channels; ++c) {
                // A block may start and end inside a group of four elements, where the plane's size is no multiple of four.
                const std::size_t element = c * plane + pixel, groups = (element % 4 + count + 3) / 4;
                const auto first = static_cast<std::uint32_t>(element / 4);
                shift[c] = element % 4;
                eps[c] = noises[c].normal + shift[c];
                if (lattice)
                    lattice_noise(stream, first, groups, settings.lattice, noises[c].lattice);
                else if (settings.normals != nullptr)
                    eps[c] = settings.normals + draw * shape.image() + element;
                else
                    normals(stream, first, groups, noises[c].normal);
            }
            for (std::size_t n = 0; n < shape.images; ++n) {  // every image has the same noise: drawn once
                const std::size_t start = (n * draws + draw) * shape.image();
                for (std::size_t c = 0; c < channels; ++c)
                    noise_block(images + n * shape.image() + pixel * channels, channels, c, count, eps[c],
                                lattice ? noises[c].lattice + shift[c] : nullptr, settings, out,
                                start + (settings.channels_last ? pixel * channels + c : c * plane + pixel),
                                settings.channels_last ? channels : 1, past_caches);
            }
        }
        if (past_caches) fence();
    });
}

}  // namespace advrad
