// Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, written so that a loop over counters is vectorised.
// Only + - * / and sqrt, each rounded once: every processor gives the same bits (setup.py forbids contraction).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "native.hpp"

namespace advrad {

struct Words {
    std::uint32_t r0, r1, r2, r3;
};

ADVRAD_INLINE void philox_round(Words& c, std::uint32_t k0, std::uint32_t k1) {
    const std::uint64_t p0 = std::uint64_t{c.r0} * 0xD2511F53u, p1 = std::uint64_t{c.r2} * 0xCD9E8D57u;
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c.r1 ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c.r3 ^ k1, static_cast<std::uint32_t>(p0)};
}

// Unrolled by recursion: a loop in here would keep the caller's loop from being vectorised.
template <int Rounds>
ADVRAD_INLINE void philox_rounds(Words& c, std::uint32_t k0, std::uint32_t k1) {
    if constexpr (Rounds > 0) {
        philox_round(c, k0, k1);
        philox_rounds<Rounds - 1>(c, k0 + 0x9E3779B9u, k1 + 0xBB67AE85u);
    }
}

ADVRAD_INLINE Words philox4x32(Words counter, std::uint64_t key) {
    philox_rounds<10>(counter, static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32));
    return counter;
}

ADVRAD_INLINE std::uint32_t bits(float x) {
    std::uint32_t i;
    std::memcpy(&i, &x, sizeof i);
    return i;
}

ADVRAD_INLINE float from_bits(std::uint32_t i) {
    float x;
    std::memcpy(&x, &i, sizeof x);
    return x;
}

// Natural logarithm of a positive normal number.  x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); with s = f / (2 + f),
// log(1 + f) = 2 artanh(s) = f - (f^2/2 - s (f^2/2 + s^2 P(s^2))).  P is a minimax fit: relative error of the log 8e-10.
ADVRAD_INLINE float log_positive(float x) {
    const std::uint32_t i = bits(x) + (0x3F800000u - 0x3F3504F3u);
    const float e = static_cast<float>(static_cast<std::int32_t>(i >> 23) - 127);
    const float f = from_bits((i & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    const float s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
    const float p = z * (0.66666776f + z * (0.39977571f + z * 0.29871055f));
    // log(2) in two parts, the first short enough for e times it to be exact.
    return e * 0.693145751953125f + (f - (half - (s * (half + p) + e * 1.4286068203094173e-6f)));
}

struct SinCos {
    float sin, cos;
};

// Sine and cosine for angles in [0, 2 pi + ulp].  Reduced to [-pi/4, pi/4] with pi/2 in three parts, of which the first
// two are short enough for their products with the quadrant to be exact; minimax fits, relative error below 4e-9.
ADVRAD_INLINE SinCos sin_cos(float angle) {
    const std::int32_t quadrant = static_cast<std::int32_t>(angle * 0.63661977f + 0.5f);
    const float q = static_cast<float>(quadrant);
    const float r = ((angle - q * 1.5707855224609375f) - q * 1.080433139577508e-5f) - q * 2.563344e-12f;
    const float z = r * r;
    const float s = r + r * z * (-0.16666655f + z * (0.00833216f + z * -0.00019515f));
    const float c = 1.0f - (0.5f * z - z * z * (0.041666646f + z * (-0.0013887316f + z * 2.4433155e-5f)));
    const std::uint32_t turn = static_cast<std::uint32_t>(quadrant);
    const bool swap = turn & 1u;
    const float sine = swap ? c : s, cosine = swap ? s : c;
    return {from_bits(bits(sine) ^ ((turn & 2u) << 30)), from_bits(bits(cosine) ^ (((turn + 1u) & 2u) << 30))};
}

struct Pair {
    float first, second;
};

// Two words to two standard normals; u1 in (0, 1] and u2 in [0, 1) are exact in fp32.
ADVRAD_INLINE Pair box_muller(std::uint32_t r0, std::uint32_t r1) {
    constexpr float unit = 1.0f / 16777216.0f, two_pi = 6.2831853071795864f;
    // Via int32: the conversion that every vector unit has.
    const float u1 = static_cast<float>(static_cast<std::int32_t>(r0 >> 8) + 1) * unit;
    const float u2 = static_cast<float>(static_cast<std::int32_t>(r1 >> 8)) * unit;
    const float radius = std::sqrt(-2.0f * log_positive(u1));
    const SinCos turn = sin_cos(u2 * two_pi);
    return {radius * turn.cos, radius * turn.sin};
}

}  // namespace advrad
