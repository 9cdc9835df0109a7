// The fused operation `reconstruction_error`: network outputs to anomaly maps and scores (Algorithm 4).
// Plain form: advrad_fast/reference/score.py.
//
// Strips of eight rows: at a strip, the noise is drawn again, the reconstruction's difference is formed and pooled to the
// four scales, and the squares are added up, all in the first-level cache.  Then each row is filtered along x, and the
// whole map along y.
#include <algorithm>
#include <cmath>
#include <memory>

#include "native.hpp"

namespace advrad {

namespace {

constexpr std::size_t kStrip = 8;  // the coarsest scale's pixels are 8 x 8

// Not std::vector: these are written before they are read.
std::unique_ptr<float[]> buffer(std::size_t count) { return std::unique_ptr<float[]>(new float[count]); }

ADVRAD_INLINE void halve(const float* ADVRAD_RESTRICT in, std::size_t rows, std::size_t width, float* ADVRAD_RESTRICT out) {
    for (std::size_t y = 0; y < rows / 2; ++y) {
        const float *upper = in + 2 * y * width, *lower = upper + width;
        for (std::size_t x = 0; x < width / 2; ++x)
            out[y * (width / 2) + x] = 0.25f * ((upper[2 * x] + upper[2 * x + 1]) + (lower[2 * x] + lower[2 * x + 1]));
    }
}

ADVRAD_INLINE void add_squares(const float* ADVRAD_RESTRICT in, std::size_t count, float weight, float* ADVRAD_RESTRICT sum) {
    for (std::size_t i = 0; i < count; ++i) sum[i] += weight * (in[i] * in[i]);
}

ADVRAD_INLINE void add_doubled(const float* ADVRAD_RESTRICT coarse, std::size_t rows, std::size_t width,
                               float* ADVRAD_RESTRICT fine) {
    for (std::size_t y = 0; y < rows; ++y) {
        const float* from = coarse + (y / 2) * (width / 2);
        float* to = fine + y * width;
        for (std::size_t x = 0; x < width / 2; ++x) {
            to[2 * x] += from[x];
            to[2 * x + 1] += from[x];
        }
    }
}

ADVRAD_INLINE void add(const float* a, const float* b, std::size_t count, float* ADVRAD_RESTRICT out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

ADVRAD_INLINE void accumulate(const float* ADVRAD_RESTRICT in, std::size_t count, float* ADVRAD_RESTRICT sum) {
    for (std::size_t i = 0; i < count; ++i) sum[i] += in[i];
}

}  // namespace

// Everything for one strip, at the four scales: differences of one channel, and the sum of weighted squares.
struct Strip {
    explicit Strip(std::size_t width) : eps(buffer(kStrip * width)) {
        for (std::size_t level = 0, count = kStrip * width; level < 4; ++level, count /= 4) {
            difference[level] = buffer(count);
            sum[level] = buffer(count);
        }
    }
    std::unique_ptr<float[]> eps, difference[4], sum[4];
};

// Adds one channel of one draw to the strip's sums.
ADVRAD_CLONES
void add_channel(const std::uint8_t* pixels, std::size_t channels, std::size_t channel, std::size_t width, const float* outputs,
                 const ErrorSettings& settings, Strip& strip) {
    const ErrorSettings s = settings;
    const std::size_t count = kStrip * width;
    float* ADVRAD_RESTRICT d = strip.difference[0].get();
    const float* ADVRAD_RESTRICT eps = strip.eps.get();
    const float* ADVRAD_RESTRICT o = outputs;
    load_channel(pixels, channels, channel, count, d);
    for (std::size_t i = 0; i < count; ++i) {
        const float x = d[i];
        d[i] = x - (s.skip * (s.signal * x + s.noise * eps[i]) + s.out * o[i]);
    }
    for (std::size_t level = 0; level < 4; ++level) {
        const std::size_t rows = kStrip >> level, columns = width >> level;
        if (level > 0) halve(strip.difference[level - 1].get(), 2 * rows, 2 * columns, strip.difference[level].get());
        // A weight of 0 is not skipped: 0 * NaN must stay NaN.
        add_squares(strip.difference[level].get(), rows * columns, s.weights[level], strip.sum[level].get());
    }
}

// Gathers the four scales' sums in the finest: nearest upsampling, from coarse to fine.
ADVRAD_CLONES
void gather_scales(std::size_t width, Strip& strip) {
    for (std::size_t level = 3; level > 0; --level)
        add_doubled(strip.sum[level].get(), kStrip >> (level - 1), width >> (level - 1), strip.sum[level - 1].get());
}

// Sums over windows of `size` (odd) items, an item being `stride` neighbouring floats: out[i] = sum of a[i .. i + size),
// for n items in and n - size + 1 out.  Sums of 1, 2, 4, ... items are made by doubling, and those that make up `size`
// are added: log2(size) steps, pairwise accuracy, and no subtraction that would smear an infinity or lose small values
// beside large ones as running sums do.  Uses and overwrites `a` and `b` (n items each).
ADVRAD_CLONES
void window_sums(float* a, float* b, std::size_t n, std::size_t stride, std::size_t size, float* out) {
    const std::size_t windows = (n - size + 1) * stride;
    std::copy_n(a, windows, out);
    std::size_t done = 1;
    for (std::size_t step = 1; 2 * step <= size; step *= 2) {
        add(a, a + step * stride, (n - 2 * step + 1) * stride, b);
        std::swap(a, b);  // a[i] is now the sum of 2 * step items
        if (size & (2 * step)) {
            accumulate(a + done * stride, windows, out);
            done += 2 * step;
        }
    }
}

// One row of the anomaly map; `best` keeps each column's maximum, or NaN once there was one.
ADVRAD_CLONES
void finish_row(const float* ADVRAD_RESTRICT sums, std::size_t width, float row_scale, const float* ADVRAD_RESTRICT column_scale,
                const float* ADVRAD_RESTRICT mu, const float* ADVRAD_RESTRICT inverse_spread, float* ADVRAD_RESTRICT map,
                float* ADVRAD_RESTRICT best) {
    for (std::size_t x = 0; x < width; ++x) {
        const float value = std::fabs(sums[x] * (row_scale * column_scale[x]) - mu[x]) * inverse_spread[x];
        map[x] = value;
        // std::max would drop a NaN, and a fault would pass for a good part.
        best[x] = ((value > best[x]) | (value != value)) ? value : best[x];
    }
}

void reconstruction_error(const std::uint8_t* images, const float* outputs, const Shape& shape, std::uint64_t seed,
                          const ErrorSettings& settings, const float* mu, const float* inverse_spread, float* maps,
                          float* scores) {
    const std::size_t height = shape.height, width = shape.width, plane = shape.plane();
    const std::size_t size = settings.filter_size, reach = size / 2;
    ErrorSettings s = settings;
    for (float& weight : s.weights) weight /= static_cast<float>(shape.channels * shape.draws);

    Strip strip(width);
    const auto row = buffer(width + 2 * reach), spare_row = buffer(width + 2 * reach);
    const auto rows = buffer((height + 2 * reach) * width), spare_rows = buffer((height + 2 * reach) * width);
    const auto sums = buffer(plane), map_row = buffer(width), best = buffer(width), column_scale = buffer(width);
    // One over the part of a window of `size` around `i` that lies inside [0, length).
    const auto share = [reach](std::size_t i, std::size_t length) {
        return 1.0f / static_cast<float>(std::min(length, i + reach + 1) - (i > reach ? i - reach : 0));
    };
    for (std::size_t x = 0; x < width; ++x) column_scale[x] = share(x, width);

    for (std::size_t n = 0; n < shape.images; ++n) {
        const std::uint8_t* image = images + n * shape.image();
        for (std::size_t y = 0; y < height; y += kStrip) {
            for (std::size_t level = 0; level < 4; ++level)
                std::fill_n(strip.sum[level].get(), (kStrip >> level) * (width >> level), 0.0f);
            for (std::size_t draw = 0; draw < shape.draws; ++draw) {
                const Stream stream{seed, static_cast<std::uint32_t>(draw), 0};
                for (std::size_t channel = 0; channel < shape.channels; ++channel) {
                    const std::size_t element = channel * plane + y * width;
                    normals(stream, static_cast<std::uint32_t>(element / 4), kStrip * width / 4, strip.eps.get());
                    add_channel(image + y * width * shape.channels, shape.channels, channel, width,
                                outputs + (n * shape.draws + draw) * shape.image() + element, s, strip);
                }
            }
            gather_scales(width, strip);
            for (std::size_t i = 0; i < kStrip; ++i) {
                std::fill_n(row.get(), reach, 0.0f);
                std::copy_n(strip.sum[0].get() + i * width, width, row.get() + reach);
                std::fill_n(row.get() + reach + width, reach, 0.0f);
                window_sums(row.get(), spare_row.get(), width + 2 * reach, 1, size, rows.get() + (reach + y + i) * width);
            }
        }
        std::fill_n(rows.get(), reach * width, 0.0f);
        std::fill_n(rows.get() + (reach + height) * width, reach * width, 0.0f);
        window_sums(rows.get(), spare_rows.get(), height + 2 * reach, width, size, sums.get());

        std::fill_n(best.get(), width, -INFINITY);
        for (std::size_t y = 0; y < height; ++y)
            finish_row(sums.get() + y * width, width, share(y, height), column_scale.get(), mu + y * width,
                       inverse_spread + y * width, maps ? maps + n * plane + y * width : map_row.get(), best.get());
        float score = best[0];
        for (std::size_t x = 1; x < width; ++x) score = (best[x] > score || best[x] != best[x]) ? best[x] : score;
        scores[n] = score;
    }
}

}  // namespace advrad
