// A network of convolutions (and attention) in bf16, planned once and run many times: every sum over neighbours, normalisation,
// activation, residual and concatenation is one pass over the activations.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"

namespace advrad::engine {

// One input of a convolution: kernel tap (i, j) of output pixel (y, x) reads pixel (y * stride + top + i, x * stride + left + j).
struct Source {
    std::size_t tensor = 0;
    std::vector<float> weight;  // (channels out, channels in, height, width)
    std::size_t height = 1, width = 1, stride = 1;
    std::ptrdiff_t top = 0, left = 0;  // -1 or 0
    bool normalised = false;
};

// GroupNorm over the normalised sources' channels, which stand side by side, in one affine map with `gain` and `shift`.
struct Norm {
    std::vector<float> gain, shift;
    std::size_t groups = 0;  // 0: none
    bool silu = false;
    float epsilon = 1e-5f;
};

constexpr std::ptrdiff_t kNone = -1;

struct Convolution {
    // One phase: the plain convolution.  Four: of an output doubled in height and width the pixels (2y + i, 2x + j), i and j
    // being the phase's bits.  A phase adds up its sources.
    std::vector<std::vector<Source>> phases;
    std::vector<float> bias;
    Norm norm;
    bool silu = false;
    std::ptrdiff_t residual = kNone;
    std::ptrdiff_t out = kNone;  // kNone: the network's output, fp32
};

// Inputs that are made on the way in: image `n` of the batch has draw first_draw + n of the noise.
struct Noised {
    const std::uint8_t* image;  // height x width pixels, interleaved channels
    std::uint64_t seed;
    NoiseSettings settings;  // without lattice
};

class Plan;
class Workspace;

// Not copied and not changed once it is finished; any number of threads may run it, each with a workspace of its own.
class Network {
   public:
    // Input and output are fp32 (batch, channels, height, width), folded into patch^2 times the channels for tensor 0.
    Network(std::size_t batch, std::size_t channels, std::size_t height, std::size_t width, std::size_t patch, std::size_t threads,
            const Kernels& kernels);
    ~Network();

    std::size_t tensor(std::size_t height, std::size_t width, std::size_t channels);
    void convolution(Convolution convolution);
    // softmax(q k^T) v for each head: `from` holds the queries, keys and values of `heads` heads, in this order.
    void attention(std::size_t from, std::size_t out, std::size_t heads);
    void finish();

    std::unique_ptr<Workspace> workspace() const;
    void run(Workspace& workspace, const float* x, float* out) const;
    void run(Workspace& workspace, const Noised& noised, float* out) const;
    // The same as the first, and where the time goes: seconds of every operation, in the order in which they were added.  The
    // input's folding comes first, and an attention is two.
    std::vector<double> profile(Workspace& workspace, const float* x, float* out) const;

   private:
    void run(Workspace& workspace, const float* x, const Noised* noised, float* out, double* seconds) const;
    std::unique_ptr<Plan> plan_;
};

}  // namespace advrad::engine
