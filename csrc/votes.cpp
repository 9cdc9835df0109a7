// The fused operation `votes`: smoothed scores to what a certificate counts.  Plain form: advrad_fast/reference/smoothing.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "native.hpp"

namespace advrad {

ADVRAD_CLONES
bool has_nan(const float* scores, std::size_t draws) {
    bool found = false;
    for (std::size_t i = 0; i < draws; ++i) found |= scores[i] != scores[i];
    return found;
}

void votes(const float* scores, std::size_t images, std::size_t draws, const float* thresholds, std::size_t threshold_count,
           const std::int64_t* ranks, std::size_t rank_count, std::int64_t* counts, float* statistics) {
    const std::unique_ptr<float[]> sorted(new float[draws]);
    for (std::size_t n = 0; n < images; ++n) {
        const float* row = scores + n * draws;
        std::int64_t* row_counts = counts + n * threshold_count;
        float* row_statistics = statistics + n * rank_count;
        if (has_nan(row, draws)) {
            std::fill_n(row_counts, threshold_count, std::int64_t{-1});
            std::fill_n(row_statistics, rank_count, std::numeric_limits<float>::quiet_NaN());
            continue;
        }
        std::copy_n(row, draws, sorted.get());
        std::sort(sorted.get(), sorted.get() + draws);
        for (std::size_t t = 0; t < threshold_count; ++t)
            row_counts[t] = sorted.get() + draws - std::upper_bound(sorted.get(), sorted.get() + draws, thresholds[t]);
        for (std::size_t r = 0; r < rank_count; ++r) row_statistics[r] = sorted[static_cast<std::size_t>(ranks[r])];
    }
}

}  // namespace advrad
