// Tiles of Intel's AMX (bf16), and AVX-512 around them.
#include "kernels.hpp"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 12)

// GCC's own header reads a variable before it is set, on purpose (bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ADVRAD_AMX \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,avx2,bmi2")))

namespace advrad::engine {

namespace {

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

thread_local unsigned saved_control = 0;

ADVRAD_AMX void begin() {
    static const TileConfig config;
    _tile_loadconfig(&config);
    // Subnormal numbers are zero, as they are to the tiles: an activation's tail would cost a hundred cycles each time otherwise.
    saved_control = _mm_getcsr();
    constexpr unsigned kFlush = 0x8000, kZero = 0x0040;
    _mm_setcsr(saved_control | kFlush | kZero);
}

ADVRAD_AMX void end() {
    _mm_setcsr(saved_control);
    _tile_release();
}

ADVRAD_AMX inline __m512 load(const Bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

ADVRAD_AMX inline __m512 load(const Bf16* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

ADVRAD_AMX inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 2^t for t up to 2^31, relative error below 1e-4: bf16 keeps 4e-3.  On [0, 1) a near-minimax cubic; scalef takes the floor of t.
ADVRAD_AMX inline __m512 exp2_approximate(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07802451f), _mm512_set1_ps(0.22606718f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.69583353f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.99992522f));
    return _mm512_scalef_ps(p, t);
}

ADVRAD_AMX inline __m512 silu(__m512 x) {
    const __m512 e = exp2_approximate(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

template <bool Two>
ADVRAD_AMX inline void products(const Block& b) {
    _tile_zero(0);
    _tile_zero(1);
    if (Two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const Bf16* weights = b.weights;
    for (std::size_t r = 0; r < b.run_count; ++r) {
        const Run& run = b.runs[r];
        for (std::size_t step = 0; step < run.steps; ++step) {
            const std::ptrdiff_t offset = run.offsets[step];
            _tile_loadd(4, run.pixels[0] + offset, run.stride);
            _tile_loadd(6, weights, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, run.pixels[1] + offset, run.stride);
            _tile_dpbf16ps(1, 5, 6);
            if (Two) {
                _tile_loadd(7, weights + kWeightTile, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            weights += (Two ? 2 : 1) * kWeightTile;
        }
    }
}

// One tile of pixels by 16 channels: bias, residual, moments, SiLU, bf16.
template <bool Silu, bool Residual, bool Moments>
ADVRAD_AMX inline void finish(const Block& b, const float* sums, std::size_t tile, std::size_t column, __mmask16 mask) {
    const std::size_t lane = column * kLanes;
    const __m512 bias = b.bias ? _mm512_loadu_ps(b.bias + lane) : _mm512_setzero_ps();
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    const Bf16* residual = Residual ? b.residual[tile] + lane : nullptr;
    Bf16* out = b.out[tile] + lane;
    const std::size_t valid = b.valid[tile];
    for (std::size_t m = 0; m < valid; ++m, out += b.out_stride, sums += 2 * kLanes) {
        __m512 y = _mm512_add_ps(_mm512_load_ps(sums), bias);
        if (Residual) {
            y = _mm512_add_ps(y, load(residual, mask));
            residual += b.residual_stride;
        }
        if (Moments) {
            sum = _mm512_add_ps(sum, y);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        if (Silu) y = silu(y);
        _mm256_mask_storeu_epi16(out, mask, rounded(y));
    }
    if (Moments) {
        float* moments = b.moments + lane;
        _mm512_storeu_ps(moments, _mm512_add_ps(_mm512_loadu_ps(moments), sum));
        _mm512_storeu_ps(moments + 2 * kLanes, _mm512_add_ps(_mm512_loadu_ps(moments + 2 * kLanes), squares));
    }
}

template <bool Silu, bool Residual, bool Moments>
ADVRAD_AMX void finish_all(const Block& b, const float* sums) {
    for (std::size_t tile = 0; tile < 2; ++tile)
        for (std::size_t column = 0; column < b.columns; ++column) {
            const std::size_t left = b.channels - column * kLanes;
            const __mmask16 mask = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
            finish<Silu, Residual, Moments>(b, sums + tile * kPixels * 2 * kLanes + column * kLanes, tile, column, mask);
        }
}

ADVRAD_AMX void block(const Block& b) {
    alignas(64) float sums[2 * kPixels * 2 * kLanes];  // [tile][pixel][32]
    constexpr std::size_t pitch = 2 * kLanes * sizeof(float);
    float* const to = b.raw ? b.raw : sums;
    if (b.columns == 2) {
        products<true>(b);
        _tile_stored(2, to + kLanes, pitch);
        _tile_stored(3, to + kPixels * 2 * kLanes + kLanes, pitch);
    } else {
        products<false>(b);
    }
    _tile_stored(0, to, pitch);
    _tile_stored(1, to + kPixels * 2 * kLanes, pitch);
    if (b.raw) {
        if (b.bias)
            for (std::size_t m = 0; m < 2 * kPixels; ++m)
                for (std::size_t lane = 0; lane < b.columns * kLanes; lane += kLanes) {
                    float* at = to + m * 2 * kLanes + lane;
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(b.bias + lane)));
                }
        return;
    }
    switch ((b.silu ? 1 : 0) | (b.residual[0] ? 2 : 0) | (b.moments ? 4 : 0)) {
        case 0: return finish_all<false, false, false>(b, sums);
        case 1: return finish_all<true, false, false>(b, sums);
        case 2: return finish_all<false, true, false>(b, sums);
        case 3: return finish_all<true, true, false>(b, sums);
        case 4: return finish_all<false, false, true>(b, sums);
        case 5: return finish_all<true, false, true>(b, sums);
        case 6: return finish_all<false, true, true>(b, sums);
        default: return finish_all<true, true, true>(b, sums);
    }
}

template <bool Silu>
ADVRAD_AMX inline void normalise_as(const Bf16* in, std::size_t pixels, std::size_t channels, const float* scale,
                                    const float* shift, Bf16* out) {
    for (std::size_t c = 0; c < channels; c += kLanes) {
        const std::size_t left = channels - c;
        const __mmask16 mask = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
        const __m512 a = _mm512_maskz_loadu_ps(mask, scale + c), b = _mm512_maskz_loadu_ps(mask, shift + c);
        const Bf16* from = in + c;
        Bf16* to = out + c;
        for (std::size_t p = 0; p < pixels; ++p, from += channels, to += channels) {
            __m512 y = _mm512_fmadd_ps(load(from, mask), a, b);
            if (Silu) y = silu(y);
            _mm256_mask_storeu_epi16(to, mask, rounded(y));
        }
    }
}

ADVRAD_AMX void normalise(const Bf16* in, std::size_t pixels, std::size_t channels, const float* scale, const float* shift,
                          bool activate, Bf16* out) {
    if (activate)
        normalise_as<true>(in, pixels, channels, scale, shift, out);
    else
        normalise_as<false>(in, pixels, channels, scale, shift, out);
}

ADVRAD_AMX void softmax(float* in, std::size_t count, std::size_t padded, Bf16* out) {
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __mmask16 mask = count - i >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << (count - i)) - 1);
        top = _mm512_mask_max_ps(top, mask, top, _mm512_maskz_loadu_ps(mask, in + i));
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __mmask16 mask = count - i >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, in + i), largest);
        const __m512 e = exp2_approximate(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
        sum = _mm512_mask_add_ps(sum, mask, sum, e);
        _mm512_mask_storeu_ps(in + i, mask, e);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (std::size_t i = 0; i < padded; i += kLanes) {
        const __mmask16 mask = i >= count ? 0 : count - i >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << (count - i)) - 1);
        _mm256_storeu_si256((__m256i*)(out + i), rounded(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, in + i), factor)));
    }
}

ADVRAD_AMX void fold(const float* in, std::size_t count, std::size_t patch, Bf16* out, std::size_t stride) {
    std::size_t i = 0;
    if (patch == 4)
        for (; i + 16 <= count; i += 16, out += 4 * stride) {
            const __m256i y = rounded(_mm512_loadu_ps(in + i));
            const __m128i low = _mm256_castsi256_si128(y), high = _mm256_extracti128_si256(y, 1);
            _mm_storel_epi64((__m128i*)out, low);
            _mm_storel_epi64((__m128i*)(out + stride), _mm_unpackhi_epi64(low, low));
            _mm_storel_epi64((__m128i*)(out + 2 * stride), high);
            _mm_storel_epi64((__m128i*)(out + 3 * stride), _mm_unpackhi_epi64(high, high));
        }
    for (std::size_t j = 0; i < count; ++i, ++j) out[j / patch * stride + j % patch] = to_bf16(in[i]);
}

bool usable() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kStates = 0x600E6;  // SSE, AVX, AVX-512, tile configuration and data
    if ((low & kStates) != kStates) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, kAmx = 1u << 22 | 1u << 24;
    if ((b & kAvx512) != kAvx512 || (d & kAmx) != kAmx) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;  // AVX512_BF16
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Kernels* amx_kernels() {
    static const Kernels kernels{"amx", begin, end, block, normalise, softmax, fold};
    static const bool works = usable();
    return works ? &kernels : nullptr;
}

}  // namespace advrad::engine

#else

namespace advrad::engine {

const Kernels* amx_kernels() { return nullptr; }

}  // namespace advrad::engine

#endif
