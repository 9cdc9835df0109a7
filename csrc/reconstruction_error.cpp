// The fused operation `reconstruction_error`: network outputs to anomaly maps and scores (Algorithm 4).
// Plain form: advrad_fast/reference/score.py.
//
// Strips of eight rows: the difference of image and reconstruction is formed and pooled to the four scales, the squares are
// added up, and the rows are filtered along x, all in the first-level cache.  Then tiles of columns are filtered along y and
// finished.  The noise comes from the network's inputs, which are still in memory: that is faster than drawing it again.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "native.hpp"
#include "threads.hpp"

namespace advrad {

namespace {

constexpr std::size_t kStrip = 8;  // the coarsest scale's pixels are 8 x 8
constexpr std::size_t kTile = 64;  // columns
constexpr std::size_t kLevels = 4;

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

// Two rows at the finest scale: their weighted squares to `sum`, their sum to `both`.
template <bool Image, bool Inputs>
ADVRAD_INLINE void add_row_pair(const std::uint8_t* x, const float* in, const float* o, std::size_t width,
                                const ErrorSettings& settings, float* sum, float* both) {
    const float input = settings.input, output = settings.output, weight = settings.weights[0];
    const auto difference = [&](std::size_t i) {
        float d = Image ? static_cast<float>(x[i]) * kPixelScale - 1.0f : 0.0f;
        if (Inputs) d += input * in[i];
        return d + output * o[i];
    };
    ADVRAD_INDEPENDENT
    for (std::size_t i = 0; i < width; ++i) {
        const float upper = difference(i), lower = difference(i + width);
        sum[i] += weight * (upper * upper);
        sum[i + width] += weight * (lower * lower);
        both[i] = upper + lower;
    }
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

// What a thread needs for one strip: its pixels by channel, differences of one channel at the coarser scales, sums of weighted
// squares at all four, rows.
struct Strip {
    Strip(std::size_t width, std::size_t reach)
        : pixels(new std::uint8_t[3 * kStrip * width]),
          both(buffer(width)),
          row(buffer(width + 2 * reach)),
          spare_row(buffer(width + 2 * reach)) {
        for (std::size_t level = 0, count = kStrip * width; level < kLevels; ++level, count /= 4) {
            if (level > 0) difference[level] = buffer(count);
            sum[level] = buffer(count);
        }
    }
    std::unique_ptr<std::uint8_t[]> pixels;
    std::unique_ptr<float[]> both, row, spare_row, difference[kLevels], sum[kLevels];
};

// Interleaved channels to one after the other.
ADVRAD_CLONES
void split_channels(const std::uint8_t* ADVRAD_RESTRICT in, std::size_t count, std::uint8_t* ADVRAD_RESTRICT out) {
    for (std::size_t i = 0; i < count; ++i) {
        out[i] = in[3 * i];
        out[i + count] = in[3 * i + 1];
        out[i + 2 * count] = in[3 * i + 2];
    }
}

// Adds one channel of one draw to the strip's sums at the first `levels` scales.
ADVRAD_CLONES
void add_channel(const std::uint8_t* pixels, std::size_t width, const float* inputs, const float* outputs,
                 const ErrorSettings& settings, std::size_t levels, Strip& strip) {
    const ErrorSettings s = settings;
    float* ADVRAD_RESTRICT both = strip.both.get();
    for (std::size_t y = 0; y < kStrip; y += 2) {
        const std::size_t at = y * width;
        float* sum = strip.sum[0].get() + at;
        if (pixels == nullptr)
            add_row_pair<false, true>(nullptr, inputs + at, outputs + at, width, s, sum, both);
        else if (inputs == nullptr)
            add_row_pair<true, false>(pixels + at, nullptr, outputs + at, width, s, sum, both);
        else
            add_row_pair<true, true>(pixels + at, inputs + at, outputs + at, width, s, sum, both);
        if (levels > 1) {
            float* ADVRAD_RESTRICT half = strip.difference[1].get() + y / 2 * (width / 2);
            for (std::size_t x = 0; x < width / 2; ++x) half[x] = 0.25f * (both[2 * x] + both[2 * x + 1]);
        }
    }
    for (std::size_t level = 1; level < levels; ++level) {
        const std::size_t rows = kStrip >> level, columns = width >> level;
        if (level > 1) halve(strip.difference[level - 1].get(), 2 * rows, 2 * columns, strip.difference[level].get());
        add_squares(strip.difference[level].get(), rows * columns, s.weights[level], strip.sum[level].get());
    }
}

// Gathers the four scales' sums in the finest: nearest upsampling, from coarse to fine.
ADVRAD_CLONES
void gather_scales(std::size_t width, std::size_t levels, Strip& strip) {
    for (std::size_t level = levels - 1; level > 0; --level)
        add_doubled(strip.sum[level].get(), kStrip >> (level - 1), width >> (level - 1), strip.sum[level - 1].get());
}

// Sums over windows of `size` (odd) numbers: out[i] = sum of a[i .. i + size), for n numbers in and n - size + 1 out.  Sums
// of 1, 2, 4, ... numbers are made by doubling, and those that make up `size` are added: log2(size) steps, and no
// subtraction that would smear an infinity or lose small values beside large ones.  Uses and overwrites `a` and `b`.
ADVRAD_CLONES
void window_sums(float* a, float* b, std::size_t n, std::size_t size, float* out) {
    const std::size_t windows = n - size + 1;
    std::copy_n(a, windows, out);
    std::size_t done = 1;
    for (std::size_t step = 1; 2 * step <= size; step *= 2) {
        add(a, a + step, n - 2 * step + 1, b);
        std::swap(a, b);  // a[i] is now the sum of 2 * step numbers
        if (size & (2 * step)) {
            accumulate(a + done, windows, out);
            done += 2 * step;
        }
    }
}

ADVRAD_CLONES
void add_rows(const float* a, const float* b, std::size_t count, float* ADVRAD_RESTRICT out) { add(a, b, count, out); }

ADVRAD_CLONES
void add_row(const float* ADVRAD_RESTRICT in, std::size_t count, float* ADVRAD_RESTRICT sum) { accumulate(in, count, sum); }

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

namespace {

// The larger one, or NaN if there is one.
float larger(float a, float b) { return (b > a || b != b) ? b : a; }

class Operation {
   public:
    Operation(const std::uint8_t* images, const float* inputs, const float* outputs, const Shape& shape,
              const ErrorSettings& settings, const float* mu, const float* inverse_spread)
        : images_(images), inputs_(inputs), outputs_(outputs), shape_(shape), settings_(settings), mu_(mu),
          inverse_spread_(inverse_spread), reach_(settings.filter_size / 2), column_scale_(buffer(shape.width)) {
        // The finest scale is always added up: 0 * NaN is NaN, and a fault must show.  Coarser ones are if they count.
        for (std::size_t level = 0; level < kLevels; ++level) {
            if (settings_.weights[level] != 0.0f) levels_ = level + 1;
            settings_.weights[level] /= static_cast<float>(shape.channels * shape.draws);
        }
        for (std::size_t x = 0; x < shape.width; ++x) column_scale_[x] = share(x, shape.width);
    }

    void run(float* maps, float* scores) const {
        const std::size_t results = shape_.images * shape_.groups;
        const std::size_t threads = std::min(settings_.threads, std::max(results, std::max(shape_.height / kStrip, tiles())));
        const auto map_of = [&](std::size_t i) { return maps == nullptr ? nullptr : maps + i * shape_.plane(); };
        // Kept by the calling thread from one call to the next: the system takes longer to hand out fresh memory than we to fill it.
        thread_local std::vector<Space> kept;
        if (!kept.empty() && !kept[0].fits(*this)) kept.clear();
        while (kept.size() < threads) kept.emplace_back(*this);
        const Space* own = kept.data();
        if (results < threads) {  // all threads on each result
            for (std::size_t i = 0; i < results; ++i) scores[i] = result(i, own, threads, map_of(i));
        } else {
            parallel(results, threads, [&](std::size_t i, std::size_t slot) { scores[i] = result(i, &own[slot], 1, map_of(i)); });
        }
    }

   private:
    // A thread's memory: a strip, and the first one's rows for a whole map with the filter's margins above and below.
    struct Space {
        explicit Space(const Operation& o)
            : height(o.shape_.height), width(o.shape_.width), size(o.settings_.filter_size),
              strip(new Strip(o.shape_.width, o.reach_)),
              rows(buffer((o.shape_.height + 2 * o.reach_) * o.shape_.width)),
              suffix(buffer(o.settings_.filter_size * kTile)) {}
        bool fits(const Operation& o) const {
            return height == o.shape_.height && width == o.shape_.width && size == o.settings_.filter_size;
        }
        std::size_t height, width, size;
        std::unique_ptr<Strip> strip;
        std::unique_ptr<float[]> rows, suffix;
    };

    std::size_t tiles() const { return (shape_.width + kTile - 1) / kTile; }

    float result(std::size_t index, const Space* spaces, std::size_t threads, float* map) const {
        const std::size_t height = shape_.height, width = shape_.width;
        float* rows = spaces[0].rows.get();
        std::fill_n(rows, reach_ * width, 0.0f);
        std::fill_n(rows + (reach_ + height) * width, reach_ * width, 0.0f);
        parallel(height / kStrip, threads, [&](std::size_t strip, std::size_t slot) {
            filtered_strip(index, strip * kStrip, *spaces[slot].strip, rows + (reach_ + strip * kStrip) * width);
        });
        std::vector<float> best(tiles());
        parallel(tiles(), threads, [&](std::size_t tile, std::size_t slot) {
            best[tile] = finish_tile(rows, tile * kTile, spaces[slot].suffix.get(), map);
        });
        float score = best[0];
        for (const float b : best) score = larger(score, b);
        return score;
    }

    // Eight rows of the error map, filtered along x.
    void filtered_strip(std::size_t index, std::size_t y, Strip& strip, float* rows) const {
        const std::size_t width = shape_.width;
        const std::uint8_t* pixels = nullptr;
        if (images_ != nullptr) {
            pixels = images_ + index / shape_.groups * shape_.image() + y * width * shape_.channels;
            if (shape_.channels == 3) {
                split_channels(pixels, kStrip * width, strip.pixels.get());
                pixels = strip.pixels.get();
            }
        }
        for (std::size_t level = 0; level < levels_; ++level)
            std::fill_n(strip.sum[level].get(), (kStrip >> level) * (width >> level), 0.0f);
        for (std::size_t draw = 0; draw < shape_.draws; ++draw) {
            for (std::size_t channel = 0; channel < shape_.channels; ++channel) {
                const std::size_t element =
                    (index * shape_.draws + draw) * shape_.image() + channel * shape_.plane() + y * width;
                add_channel(pixels == nullptr ? nullptr : pixels + channel * kStrip * width, width,
                            inputs_ == nullptr ? nullptr : inputs_ + element, outputs_ + element, settings_, levels_, strip);
            }
        }
        gather_scales(width, levels_, strip);
        for (std::size_t i = 0; i < kStrip; ++i) {
            std::fill_n(strip.row.get(), reach_, 0.0f);
            std::copy_n(strip.sum[0].get() + i * width, width, strip.row.get() + reach_);
            std::fill_n(strip.row.get() + reach_ + width, reach_, 0.0f);
            window_sums(strip.row.get(), strip.spare_row.get(), width + 2 * reach_, settings_.filter_size, rows + i * width);
        }
    }

    // Filters a tile of columns along y, finishes it and returns its maximum.  Windows are cut at multiples of their size (van
    // Herk): what a window has before the cut is a sum from the end of a block, what it has after it a sum from the
    // start of one; so three additions do for any size, and no subtraction.
    float finish_tile(const float* rows, std::size_t x, float* suffix, float* map) const {
        const std::size_t height = shape_.height, width = shape_.width, size = settings_.filter_size;
        const std::size_t columns = std::min(kTile, width - x);
        float prefix[kTile], sums[kTile], best[kTile], map_row[kTile];
        std::fill_n(best, kTile, -INFINITY);
        rows += x;
        for (std::size_t begin = 0; begin < height; begin += size) {
            std::copy_n(rows + (begin + size - 1) * width, columns, suffix + (size - 1) * kTile);
            for (std::size_t j = size - 1; j-- > 0;)
                add_rows(rows + (begin + j) * width, suffix + (j + 1) * kTile, columns, suffix + j * kTile);
            std::fill_n(prefix, columns, 0.0f);
            for (std::size_t j = 0; j < size && begin + j < height; ++j) {
                const std::size_t y = begin + j;
                if (j > 0) add_row(rows + (y + size - 1) * width, columns, prefix);
                add_rows(suffix + j * kTile, prefix, columns, sums);
                finish_row(sums, columns, share(y, height), column_scale_.get() + x, mu_ + y * width + x,
                           inverse_spread_ + y * width + x, map == nullptr ? map_row : map + y * width + x, best);
            }
        }
        float result = best[0];
        for (std::size_t i = 1; i < columns; ++i) result = larger(result, best[i]);
        return result;
    }

    // One over the part of a window around `i` that lies inside [0, length).
    float share(std::size_t i, std::size_t length) const {
        return 1.0f / static_cast<float>(std::min(length, i + reach_ + 1) - (i > reach_ ? i - reach_ : 0));
    }

    const std::uint8_t* images_;
    const float *inputs_, *outputs_;
    const Shape shape_;
    ErrorSettings settings_;
    std::size_t levels_ = 1;
    const float *mu_, *inverse_spread_;
    const std::size_t reach_;
    const std::unique_ptr<float[]> column_scale_;
};

}  // namespace

void reconstruction_error(const std::uint8_t* images, const float* inputs, const float* outputs, const Shape& shape,
                          const ErrorSettings& settings, const float* mu, const float* inverse_spread, float* maps,
                          float* scores) {
    Operation(images, inputs, outputs, shape, settings, mu, inverse_spread).run(maps, scores);
}

}  // namespace advrad
