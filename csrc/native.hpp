// The fused operations for CPUs, on raw pointers.  bindings.cpp checks every argument before it calls them.
#pragma once

#include <cstddef>
#include <cstdint>

// One copy of the function for each vector width, chosen when the library is loaded.  Needs GNU indirect functions, and
// GCC 12 for these names; elsewhere (aarch64, musl, Clang) the compiler's default vectors serve.
#if defined(ADVRAD_CLONES)
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ADVRAD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADVRAD_CLONES
#endif

// Before a loop whose iterations touch memory of their own: with many pointers a compiler gives up proving it.
#if defined(_MSC_VER)
#define ADVRAD_INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define ADVRAD_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADVRAD_INDEPENDENT _Pragma("GCC ivdep")
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
    std::uint32_t block = 0;  // the counter's last word: 0 for the normals, 1 and 2 for the lattice noise
};

// A Gaussian rounded to the 1/255 lattice; see advrad_fast/lattice.py.
struct Lattice {
    static constexpr std::int16_t kUnsettled = INT16_MIN;
    const std::uint64_t* thresholds = nullptr;  // ascending 60-bit integers; none: no lattice
    std::size_t count = 0;                      // even
    const std::int16_t* guide = nullptr;        // 2^16 values, by a uniform number's first 16 bits; kUnsettled: compare
};

// `images` frames of height x width pixels, interleaved channels (1 or 3); for each `groups` scores, and for each of these
// `draws` noise draws.
struct Shape {
    std::size_t images = 0, height = 0, width = 0, channels = 0, groups = 1, draws = 1;
    std::size_t plane() const { return height * width; }
    std::size_t image() const { return plane() * channels; }
};

enum class Format { fp32, fp16, bf16 };

struct NoiseSettings {
    float signal = 0, noise = 0, input_scale = 0;
    const float* normals = nullptr;  // of all draws, if they are at hand: (draws, channels, height, width)
    Lattice lattice;
    Format format = Format::fp32;
    bool channels_last = false;
    std::uint32_t first_draw = 0;
    std::size_t threads = 1;
};

struct ErrorSettings {
    float input = 0, output = 0;  // coefficients of the difference between image and reconstruction
    float weights[4] = {};        // of the scales 1, 1/2, 1/4 and 1/8
    std::size_t filter_size = 1;  // odd
    std::size_t threads = 1;
};

// Words, and normals, of the groups [first, first + groups): 4 * groups values.
void integers(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* out);
void normals(const Stream& stream, std::uint32_t first, std::size_t groups, float* out);

// Lattice noise of the same groups, in steps of the lattice; `stream.block` is ignored.
void lattice_noise(const Stream& stream, std::uint32_t first, std::size_t groups, const Lattice& lattice, std::int32_t* out);

// out[n, d] = input_scale * (signal * x[n] + noise * eps[d]); with a lattice input_scale * signal * (x[n] + z[d]).  Images
// first, then draws; channels first, or last.
void noise(const std::uint8_t* images, const Shape& shape, std::uint64_t seed, const NoiseSettings& settings, void* out);

// One channel of up to kNoiseBlock pixels of an image to fp32, with their noise `eps`: for those who want it in a place of their own.
constexpr std::size_t kNoiseBlock = 1024;
void noised_pixels(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t count, const float* eps,
                   const NoiseSettings& settings, float* out);

// Algorithm 4 on the difference x + input * inputs + output * outputs.  Without `images` x is left out, without `inputs` these.
// `maps` may be null; a NaN anywhere in a result's outputs makes its score NaN.
void reconstruction_error(const std::uint8_t* images, const float* inputs, const float* outputs, const Shape& shape,
                          const ErrorSettings& settings, const float* mu, const float* inverse_spread, float* maps,
                          float* scores);

// For each of `images` rows of `draws` scores: how many are above each threshold, and its order statistics at `ranks`
// (0-based, ascending).  A NaN in a row makes its counts -1 and its order statistics NaN.
void votes(const float* scores, std::size_t images, std::size_t draws, const float* thresholds, std::size_t threshold_count,
           const std::int64_t* ranks, std::size_t rank_count, std::int64_t* counts, float* statistics);

constexpr float kPixelScale = static_cast<float>(2.0 / 255.0);  // uint8 to [-1, 1]

}  // namespace advrad
