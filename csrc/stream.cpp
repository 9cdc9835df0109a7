// The noise stream.  Plain form: advrad_fast/philox.py and advrad_fast/lattice.py.
#include <algorithm>

#include "native.hpp"
#include "philox.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define ADVRAD_AVX512 1
#include <immintrin.h>
// GCC 12's own header: _mm512_undefined_epi32 is meant to be that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace advrad {

namespace {

// The loops that a compiler vectorises as it can.
ADVRAD_CLONES
void integers_anywhere(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* ADVRAD_RESTRICT out) {
    const Stream s = stream;
    for (std::size_t i = 0; i < groups; ++i) {
        const Words w = philox4x32({first + static_cast<std::uint32_t>(i), s.draw, s.image_id, s.block}, s.seed);
        out[4 * i] = w.r0;
        out[4 * i + 1] = w.r1;
        out[4 * i + 2] = w.r2;
        out[4 * i + 3] = w.r3;
    }
}

ADVRAD_CLONES
void normals_anywhere(const Stream& stream, std::uint32_t first, std::size_t groups, float* ADVRAD_RESTRICT out) {
    const Stream s = stream;
    for (std::size_t i = 0; i < groups; ++i) {
        const Words w = philox4x32({first + static_cast<std::uint32_t>(i), s.draw, s.image_id, s.block}, s.seed);
        const Pair a = box_muller(w.r0, w.r1), b = box_muller(w.r2, w.r3);
        out[4 * i] = a.first;
        out[4 * i + 1] = a.second;
        out[4 * i + 2] = b.first;
        out[4 * i + 3] = b.second;
    }
}

#if ADVRAD_AVX512

// Compilers see neither that a 32 x 32 multiplication needs no shuffle when its factors already sit in 64-bit lanes, nor how to
// interleave four results cheaply: by hand it is twice as fast.  The arithmetic is philox.hpp's, operation by operation.
#define ADVRAD_WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define ADVRAD_WIDE_INLINE ADVRAD_WIDE inline __attribute__((always_inline))

constexpr std::size_t kLanes = 16;  // counters at a time

// Eight counters in 64-bit lanes; what is above 32 bits is left over from multiplications, and ignored.
struct Lanes {
    __m512i r0, r1, r2, r3;
};

ADVRAD_WIDE_INLINE __m512i all64(std::uint32_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }

ADVRAD_WIDE_INLINE Lanes philox_lanes(__m512i counter, const Stream& s) {
    const __m512i m0 = all64(0xD2511F53u), m1 = all64(0xCD9E8D57u);
    Lanes c = {counter, all64(s.draw), all64(s.image_id), all64(s.block)};
    std::uint32_t k0 = static_cast<std::uint32_t>(s.seed), k1 = static_cast<std::uint32_t>(s.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m512i p0 = _mm512_mul_epu32(c.r0, m0), p1 = _mm512_mul_epu32(c.r2, m1);
        // 0x96: exclusive or of three.
        c = {_mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c.r1, all64(k0), 0x96), p1,
             _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c.r3, all64(k1), 0x96), p0};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// The low halves of sixteen 64-bit lanes.
ADVRAD_WIDE_INLINE __m512i pack(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi32(a, _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), b);
}

// Sixteen counters from `first` on, a 32-bit lane each.
ADVRAD_WIDE_INLINE Lanes philox_wide(std::uint32_t first, const Stream& s) {
    const __m512i ascending = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    // In 32-bit arithmetic: the counter wraps.
    const Lanes a = philox_lanes(_mm512_add_epi32(ascending, all64(first)), s);
    const Lanes b = philox_lanes(_mm512_add_epi32(ascending, all64(first + 8)), s);
    return {pack(a.r0, b.r0), pack(a.r1, b.r1), pack(a.r2, b.r2), pack(a.r3, b.r3)};
}

// Four vectors to memory, interleaved: lane i of each to places 4 i and on.
ADVRAD_WIDE_INLINE void store_interleaved(const Lanes& v, void* out) {
    const __m512i a = _mm512_unpacklo_epi32(v.r0, v.r1), b = _mm512_unpackhi_epi32(v.r0, v.r1);
    const __m512i c = _mm512_unpacklo_epi32(v.r2, v.r3), d = _mm512_unpackhi_epi32(v.r2, v.r3);
    const __m512i e = _mm512_unpacklo_epi64(a, c), f = _mm512_unpackhi_epi64(a, c);
    const __m512i g = _mm512_unpacklo_epi64(b, d), h = _mm512_unpackhi_epi64(b, d);
    // e, f, g, h hold counters 0, 1, 2, 3 of every fours: a 4 x 4 transpose of 128-bit blocks is left.
    const __m512i ef0 = _mm512_shuffle_i32x4(e, f, 0x44), ef1 = _mm512_shuffle_i32x4(e, f, 0xEE);
    const __m512i gh0 = _mm512_shuffle_i32x4(g, h, 0x44), gh1 = _mm512_shuffle_i32x4(g, h, 0xEE);
    auto* to = static_cast<std::uint32_t*>(out);
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(ef0, gh0, 0x88));
    _mm512_storeu_si512(to + 16, _mm512_shuffle_i32x4(ef0, gh0, 0xDD));
    _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(ef1, gh1, 0x88));
    _mm512_storeu_si512(to + 48, _mm512_shuffle_i32x4(ef1, gh1, 0xDD));
}

ADVRAD_WIDE_INLINE __m512 real(__m512i bits) { return _mm512_castsi512_ps(bits); }
ADVRAD_WIDE_INLINE __m512 all(float value) { return _mm512_set1_ps(value); }

ADVRAD_WIDE_INLINE __m512 log_wide(__m512 x) {
    const __m512i i = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x3F800000 - 0x3F3504F3));
    const __m512 e = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(i, 23), _mm512_set1_epi32(127)));
    const __m512i mantissa = _mm512_and_si512(i, _mm512_set1_epi32(0x007FFFFF));
    const __m512 f = real(_mm512_add_epi32(mantissa, _mm512_set1_epi32(0x3F3504F3))) - all(1.0f);
    const __m512 s = f / (all(2.0f) + f), z = s * s, half = all(0.5f) * f * f;
    const __m512 p = z * (all(0.66666776f) + z * (all(0.39977571f) + z * all(0.29871055f)));
    return e * all(0.693145751953125f) + (f - (half - (s * (half + p) + e * all(1.4286068203094173e-6f))));
}

// Bit 1 as a sign bit.
ADVRAD_WIDE_INLINE __m512i sign_of_turn(__m512i turn) {
    return _mm512_slli_epi32(_mm512_and_si512(turn, _mm512_set1_epi32(2)), 30);
}

// Two words a lane to two normals a lane.
ADVRAD_WIDE_INLINE void box_muller_wide(__m512i& a, __m512i& b) {
    const __m512 unit = all(1.0f / 16777216.0f);
    const __m512 u1 = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_srli_epi32(a, 8), _mm512_set1_epi32(1))) * unit;
    const __m512 u2 = _mm512_cvtepi32_ps(_mm512_srli_epi32(b, 8)) * unit;
    const __m512 radius = _mm512_sqrt_ps(all(-2.0f) * log_wide(u1));
    const __m512 angle = u2 * all(6.2831853071795864f);
    const __m512i quadrant = _mm512_cvttps_epi32(angle * all(0.63661977f) + all(0.5f));
    const __m512 q = _mm512_cvtepi32_ps(quadrant);
    const __m512 r = ((angle - q * all(1.5707855224609375f)) - q * all(1.080433139577508e-5f)) - q * all(2.563344e-12f);
    const __m512 z = r * r;
    const __m512 s = r + r * z * (all(-0.16666655f) + z * (all(0.00833216f) + z * all(-0.00019515f)));
    const __m512 c =
        all(1.0f) - (all(0.5f) * z - z * z * (all(0.041666646f) + z * (all(-0.0013887316f) + z * all(2.4433155e-5f))));
    const __mmask16 swap = _mm512_test_epi32_mask(quadrant, _mm512_set1_epi32(1));
    const __m512 sine = radius * _mm512_mask_blend_ps(swap, s, c), cosine = radius * _mm512_mask_blend_ps(swap, c, s);
    a = _mm512_xor_si512(_mm512_castps_si512(cosine), sign_of_turn(_mm512_add_epi32(quadrant, _mm512_set1_epi32(1))));
    b = _mm512_xor_si512(_mm512_castps_si512(sine), sign_of_turn(quadrant));
}

ADVRAD_WIDE
void integers_wide(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* out) {
    for (std::size_t i = 0; i < groups; i += kLanes)
        store_interleaved(philox_wide(first + static_cast<std::uint32_t>(i), stream), out + 4 * i);
}

ADVRAD_WIDE
void normals_wide(const Stream& stream, std::uint32_t first, std::size_t groups, float* out) {
    for (std::size_t i = 0; i < groups; i += kLanes) {
        Lanes w = philox_wide(first + static_cast<std::uint32_t>(i), stream);
        box_muller_wide(w.r0, w.r1);
        box_muller_wide(w.r2, w.r3);
        store_interleaved(w, out + 4 * i);
    }
}

bool wide() {
    static const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return available;
}

#endif

}  // namespace

void integers(const Stream& stream, std::uint32_t first, std::size_t groups, std::uint32_t* out) {
    std::size_t done = 0;
#if ADVRAD_AVX512
    if (wide()) {
        done = groups / kLanes * kLanes;
        integers_wide(stream, first, done, out);
    }
#endif
    integers_anywhere(stream, first + static_cast<std::uint32_t>(done), groups - done, out + 4 * done);
}

void normals(const Stream& stream, std::uint32_t first, std::size_t groups, float* out) {
    std::size_t done = 0;
#if ADVRAD_AVX512
    if (wide()) {
        done = groups / kLanes * kLanes;
        normals_wide(stream, first, done, out);
    }
#endif
    normals_anywhere(stream, first + static_cast<std::uint32_t>(done), groups - done, out + 4 * done);
}

namespace {

// How many thresholds are at or below the uniform number whose first 32 of 60 bits are `high`; its other 28 come from
// block 2 of the stream and are only drawn where they decide.
std::int32_t settle(const Stream& stream, std::uint32_t element, std::uint32_t high, const Lattice& lattice) {
    const std::uint64_t* end = lattice.thresholds + lattice.count;
    const std::uint64_t* at = std::lower_bound(lattice.thresholds, end, std::uint64_t{high} << 28);
    if (at != end && *at >> 28 == high) {
        std::uint32_t low[4];
        integers({stream.seed, stream.draw, stream.image_id, 2}, element / 4, 1, low);
        at = std::upper_bound(at, end, std::uint64_t{high} << 28 | low[element % 4] >> 4);
    }
    return static_cast<std::int32_t>(at - lattice.thresholds) - static_cast<std::int32_t>(lattice.count / 2);
}

}  // namespace

void lattice_noise(const Stream& stream, std::uint32_t first, std::size_t groups, const Lattice& lattice,
                   std::int32_t* ADVRAD_RESTRICT out) {
    constexpr std::size_t kGroups = 256;
    std::uint32_t high[4 * kGroups];
    const Stream words{stream.seed, stream.draw, stream.image_id, 1};
    for (std::size_t start = 0; start < groups; start += kGroups) {
        const std::size_t count = std::min(kGroups, groups - start);
        const std::uint32_t group = first + static_cast<std::uint32_t>(start);
        integers(words, group, count, high);
        for (std::size_t i = 0; i < 4 * count; ++i) {
            const std::int16_t value = lattice.guide[high[i] >> 16];
            // Rare: the share of the guide's 2^16 intervals in which a threshold lies.
            out[4 * start + i] = value != Lattice::kUnsettled
                                     ? value
                                     : settle(words, 4 * group + static_cast<std::uint32_t>(i), high[i], lattice);
        }
    }
}

}  // namespace advrad
