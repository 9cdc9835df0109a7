// The engine's inner data: what network.cpp plans and operations.cpp carries out.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "network.hpp"

namespace advrad::engine {

// An activation: (batch, height + 2, width + 2, channels) with a border of zeros, so that no tap needs a test.
struct Tensor {
    std::size_t height, width, channels;
    std::size_t memory = 0;  // first value in the workspace
    bool measured = false;   // a norm reads it: its moments are taken where it is written
    std::size_t moments = 0, chunks = 0;  // first value in the workspace, and parts an image
    std::size_t pitch() const { return (width + 2) * channels; }
    std::size_t image() const { return (height + 2) * pitch(); }
};

// A source as the tiles read it.
struct Reader {
    std::size_t tensor, stride;
    bool normalised;
    std::size_t scratch = 0;  // its first value in a thread's scratch, and its first channel among the normalised
    std::size_t channel = 0;
    bool halo = false;  // reads neighbours
};

struct Part {
    std::size_t reader;
    std::vector<std::int32_t> offsets;
};

struct Phase {
    std::vector<Part> parts;
    std::vector<Bf16> weights;  // by blocks of 32 channels, parts and steps
};

enum class Kind { fold, convolution, pack, attend };

struct Operation {
    Kind kind;
    std::size_t height = 0, width = 0;  // of the grid that is walked: the output's, or half of it with four phases
    std::size_t chunks = 1;             // parts an image
    std::size_t first_chunk = 0;        // in the workspace's list
    // convolution
    std::vector<Reader> readers;
    std::vector<Phase> phases;
    std::vector<float> bias;  // padded to 32
    Norm norm;
    bool silu = false;
    std::ptrdiff_t residual = kNone, out = kNone;
    std::size_t channels = 0;  // out
    std::size_t rows = 0;      // at a time
    std::vector<std::int32_t> unfold;
    // attention
    std::size_t from = 0, heads = 1;
    std::size_t keys = 0, values = 0;  // first values in the workspace's packed tiles
    std::vector<std::int32_t> offsets;  // of as many steps as either product takes
};

class Plan {
   public:
    std::size_t batch, channels, height, width, patch, threads;
    const Kernels* kernels;
    std::vector<Tensor> tensors;
    std::vector<Operation> operations;
    std::size_t memory = 0, moments = 0, packed = 0, chunks = 0;
    std::size_t scratch = 0, scratch_floats = 0;  // values a thread: bf16, fp32
    bool finished = false;
};

// 64-byte aligned, zeros.
template <typename T>
class Buffer {
   public:
    explicit Buffer(std::size_t count) : count_(count), data_(static_cast<T*>(operator new(bytes(), kAlign))) {
        std::memset(static_cast<void*>(data_), 0, bytes());
    }
    ~Buffer() { operator delete(data_, kAlign); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() const { return data_; }

   private:
    static constexpr std::align_val_t kAlign{64};
    std::size_t bytes() const { return count_ * sizeof(T) + 64; }
    std::size_t count_;
    T* data_;
};

struct Claim {
    std::atomic<bool> taken{false};
};

class Workspace {
   public:
    explicit Workspace(const Plan& plan)
        : owner(&plan), activations(plan.memory), moments(plan.moments), packed(plan.packed), scratch(plan.scratch * plan.threads),
          scratch_floats(plan.scratch_floats * plan.threads), claims(plan.chunks), done(plan.operations.size()) {}
    const Plan* owner;
    Buffer<Bf16> activations;
    Buffer<float> moments;
    Buffer<Bf16> packed;
    Buffer<Bf16> scratch;
    Buffer<float> scratch_floats;
    std::vector<Claim> claims;
    std::vector<std::atomic<std::size_t>> done;  // chunks finished, for each operation
};

// What one thread works with.
struct Task {
    const Plan& plan;
    Workspace& workspace;
    const float* x;  // null: `noised`
    const Noised* noised;
    float* out;
    Bf16* scratch;
    float* floats;
};

// One chunk (of image `image`, the `part`th of the operation's); whoever throws here would leave the others waiting ...
void fold(const Task& task, const Operation& operation, std::size_t image, std::size_t part) noexcept;
void convolve(const Task& task, const Operation& operation, std::size_t image, std::size_t part) noexcept;
void pack(const Task& task, const Operation& operation, std::size_t image, std::size_t part) noexcept;
void attend(const Task& task, const Operation& operation, std::size_t image, std::size_t part) noexcept;

// ... covers these rows.
struct Rows {
    std::size_t begin, end;
};
inline Rows rows_of(const Operation& operation, std::size_t part) {
    return {operation.height * part / operation.chunks, operation.height * (part + 1) / operation.chunks};
}

}  // namespace advrad::engine
