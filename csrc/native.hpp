// The fused operations for CPUs, on raw pointers.  bindings.cpp checks every argument before it calls them.
#pragma once

#include <cstddef>
#include <cstdint>

// One copy of the function for each vector width, chosen when the library is loaded.  Needs GNU indirect functions, and
// GCC 12 for these names; elsewhere (aarch64, musl, Clang) the compiler's default vectors serve.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ADVRAD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADVRAD_CLONES
#endif

#if defined(_MSC_VER)
#define ADVRAD_INLINE __forceinline
#define ADVRAD_RESTRICT __restrict
#else
#define ADVRAD_INLINE inline __attribute__((always_inline))
#define ADVRAD_RESTRICT __restrict__
#endif

namespace advrad {

// What picks one noise image out of the stream; see advrad_fast/philox.py.
struct Stream {
    std::uint64_t seed = 0;
    std::uint32_t draw = 0;
    std::uint32_t image_id = 0;
};

// `images` frames of height x width pixels, interleaved channels (1 or 3); `draws` noise draws for each.
struct Shape {
    std::size_t images = 0, height = 0, width = 0, channels = 0, draws = 0;
    std::size_t plane() const { return height * width; }
    std::size_t image() const { return plane() * channels; }
};

struct ErrorSettings {
    float signal = 0, noise = 0, skip = 0, out = 0;
    float weights[4] = {};        // of the scales 1, 1/2, 1/4, 1/8
    std::size_t filter_size = 1;  // odd
};

// Words, and normals, of the groups [first, first + groups): 4 * groups values.
void integers(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* out);
void normals(const Stream& stream, std::uint32_t first, std::size_t groups, float* out);

// out[n * draws + d] = input_scale * (signal * x[n] + noise * eps[d]), channels first.
void noise(const std::uint8_t* images, const Shape& shape, std::uint64_t seed, float signal, float noise, float input_scale,
           float* out);

// Algorithm 4 from the network's outputs.  `maps` may be null; a NaN anywhere in an image's outputs makes its score NaN.
void reconstruction_error(const std::uint8_t* images, const float* outputs, const Shape& shape, std::uint64_t seed,
                          const ErrorSettings& settings, const float* mu, const float* inverse_spread, float* maps,
                          float* scores);

// `count` pixels of one channel, uint8 to [-1, 1].
template <int Channels>
ADVRAD_INLINE void load_channel(const std::uint8_t* ADVRAD_RESTRICT pixels, std::size_t count, float* ADVRAD_RESTRICT x) {
    constexpr float scale = static_cast<float>(2.0 / 255.0);
    for (std::size_t i = 0; i < count; ++i) x[i] = static_cast<float>(pixels[i * Channels]) * scale - 1.0f;
}

ADVRAD_INLINE void load_channel(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t count,
                                float* x) {
    if (channels == 1)
        load_channel<1>(pixels, count, x);
    else
        load_channel<3>(pixels + channel, count, x);
}

}  // namespace advrad
