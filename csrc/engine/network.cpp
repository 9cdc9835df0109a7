#include "network.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "../threads.hpp"
#include "plan.hpp"

namespace advrad::engine {

namespace {

constexpr std::size_t kBlock = 2 * kLanes;  // output channels at a time
// Values that a thread works on at a time, within its second-level cache.
constexpr std::size_t kNormalised = 192 * 1024, kRaw = 512 * 1024;

std::size_t up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// Rows of (channels out, height, width * channels in), the last padded to whole steps: taps side by side are one run of memory.
std::size_t steps_of(const Source& source, const Tensor& tensor) { return up(source.width * tensor.channels, kDepth) / kDepth; }

void pack_weights(const std::vector<Source>& sources, const std::vector<Tensor>& tensors, std::size_t channels, std::vector<Bf16>& to) {
    for (std::size_t first = 0; first < channels; first += kBlock) {
        const std::size_t columns = channels - first > kLanes ? 2 : 1;
        for (const Source& source : sources) {
            const std::size_t inner = tensors[source.tensor].channels, row = source.width * inner;
            for (std::size_t i = 0; i < source.height; ++i)
                for (std::size_t step = 0; step < steps_of(source, tensors[source.tensor]); ++step) {
                    const std::size_t at = to.size();
                    to.resize(at + columns * kWeightTile);
                    for (std::size_t lane = 0; lane < columns * kLanes && first + lane < channels; ++lane)
                        for (std::size_t k = 0; k < kDepth && step * kDepth + k < row; ++k) {
                            const std::size_t j = (step * kDepth + k) / inner, c = (step * kDepth + k) % inner;
                            const float w = source.weight[(((first + lane) * inner + c) * source.height + i) * source.width + j];
                            to[at + lane / kLanes * kWeightTile + k / 2 * kBlock + lane % kLanes * 2 + k % 2] = to_bf16(w);
                        }
                }
        }
    }
}

void work(const Plan& plan, Workspace& workspace, const float* x, const Noised* noised, float* out, std::size_t slot,
          double* seconds) {
    const Task task{plan, workspace, x, noised, out, workspace.scratch.data() + slot * plan.scratch,
                    workspace.scratch_floats.data() + slot * plan.scratch_floats};
    plan.kernels->begin();
    using Clock = std::chrono::steady_clock;
    Clock::time_point before = seconds ? Clock::now() : Clock::time_point();
    for (std::size_t o = 0; o < plan.operations.size(); ++o) {
        const Operation& operation = plan.operations[o];
        const std::size_t chunks = plan.batch * operation.chunks;
        // Every thread begins with the same part of each operation, which it finds in its own cache, and then helps the others.
        const std::size_t start = chunks * slot / plan.threads;
        for (std::size_t i = 0; i < chunks; ++i) {
            const std::size_t chunk = (start + i) % chunks;
            if (workspace.claims[operation.first_chunk + chunk].taken.exchange(true, std::memory_order_relaxed)) continue;
            const std::size_t image = chunk / operation.chunks, part = chunk % operation.chunks;
            switch (operation.kind) {
                case Kind::fold: fold(task, operation, image, part); break;
                case Kind::convolution: convolve(task, operation, image, part); break;
                case Kind::pack: pack(task, operation, image, part); break;
                case Kind::attend: attend(task, operation, image, part); break;
            }
            workspace.done[o].fetch_add(1, std::memory_order_release);
        }
        // Whoever has claimed a chunk is at work on it, so this ends however many threads there are.
        for (std::size_t spins = 0; workspace.done[o].load(std::memory_order_acquire) < chunks; ++spins) {
            pause_briefly();
            if (spins > 4096) std::this_thread::yield();
        }
        if (seconds && slot == 0) {
            const Clock::time_point now = Clock::now();
            seconds[o] = std::chrono::duration<double>(now - before).count();
            before = now;
        }
    }
    plan.kernels->end();
}

}  // namespace

Network::Network(std::size_t batch, std::size_t channels, std::size_t height, std::size_t width, std::size_t patch,
                 std::size_t threads, const Kernels& kernels)
    : plan_(new Plan) {
    plan_->batch = batch, plan_->channels = channels, plan_->height = height, plan_->width = width;
    plan_->patch = patch, plan_->threads = threads, plan_->kernels = &kernels;
    require(batch && channels && height && width && patch && threads, "sizes must be above 0");
    require(height % patch == 0 && width % patch == 0, "patch must divide the height and the width");
    Operation fold;
    fold.kind = Kind::fold;
    fold.height = height / patch;
    fold.width = width / patch;
    fold.out = static_cast<std::ptrdiff_t>(tensor(height / patch, width / patch, channels * patch * patch));
    plan_->operations.push_back(fold);
    plan_->scratch_floats = width;
}

Network::~Network() = default;

std::size_t Network::tensor(std::size_t height, std::size_t width, std::size_t channels) {
    require(height && width && channels, "sizes must be above 0");
    Tensor tensor;
    tensor.height = height, tensor.width = width, tensor.channels = channels;
    plan_->tensors.push_back(tensor);
    return plan_->tensors.size() - 1;
}

void Network::convolution(Convolution given) {
    require(!plan_->finished, "the network is finished");
    Plan& plan = *plan_;
    Operation op;
    op.kind = Kind::convolution;
    const std::size_t phases = given.phases.size();
    require(phases == 1 || phases == 4, "a convolution has one phase or four");
    const auto known = [&](std::ptrdiff_t id) { return id == kNone || static_cast<std::size_t>(id) < plan.tensors.size(); };
    require(known(given.out) && known(given.residual), "an unknown tensor");
    if (given.out == kNone) {
        require(phases == 1 && given.residual == kNone && !given.silu, "the output takes sums as they are");
        op.height = plan.height / plan.patch, op.width = plan.width / plan.patch;
        op.channels = plan.channels * plan.patch * plan.patch;
        for (std::size_t k = 0; k < op.channels; ++k) {
            const std::size_t c = k / (plan.patch * plan.patch), i = k / plan.patch % plan.patch, j = k % plan.patch;
            op.unfold.push_back(static_cast<std::int32_t>((c * plan.height + i) * plan.width + j));
        }
    } else {
        const Tensor& out = plan.tensors[static_cast<std::size_t>(given.out)];
        const std::size_t step = phases == 4 ? 2 : 1;
        require(out.height % step == 0 && out.width % step == 0, "four phases need even sizes");
        op.height = out.height / step, op.width = out.width / step, op.channels = out.channels;
    }
    if (given.residual != kNone) {
        const Tensor& residual = plan.tensors[static_cast<std::size_t>(given.residual)];
        require(phases == 1 && residual.height == op.height && residual.width == op.width && residual.channels == op.channels,
                "the residual has the output's shape");
    }
    require(given.bias.size() == op.channels, "one bias for each output channel");
    op.bias = given.bias;
    op.bias.resize(up(op.channels, kBlock));
    op.norm = given.norm, op.silu = given.silu, op.residual = given.residual, op.out = given.out;

    std::size_t normalised_channels = 0;
    for (const auto& sources : given.phases) {
        require(!sources.empty(), "a phase has sources");
        Phase phase;
        for (const Source& source : sources) {
            require(source.tensor < plan.tensors.size(), "an unknown tensor");
            const Tensor& tensor = plan.tensors[source.tensor];
            require(source.stride == 1 || source.stride == 2, "the stride is 1 or 2");
            require(tensor.height == op.height * source.stride && tensor.width == op.width * source.stride,
                    "a source has the output's size, times the stride");
            require(source.height && source.width && (source.top == -1 || source.top == 0) && (source.left == -1 || source.left == 0) &&
                        source.top + static_cast<std::ptrdiff_t>(source.height) <= 2 &&
                        source.left + static_cast<std::ptrdiff_t>(source.width) <= 2,
                    "a kernel reaches one pixel at most");
            require(source.weight.size() == op.channels * tensor.channels * source.height * source.width,
                    "a kernel is (channels out, channels in, height, width)");
            Reader reader{source.tensor, source.stride, source.normalised};
            auto place = std::find_if(op.readers.begin(), op.readers.end(), [&](const Reader& r) {
                return r.tensor == reader.tensor && r.stride == reader.stride && r.normalised == reader.normalised;
            });
            if (place == op.readers.end()) {
                if (source.normalised) {
                    reader.channel = normalised_channels;
                    normalised_channels += tensor.channels;
                    plan.tensors[source.tensor].measured = true;
                }
                place = op.readers.insert(op.readers.end(), reader);
            }
            place->halo = place->halo || source.height > 1 || source.width > 1;
            Part part;
            part.reader = static_cast<std::size_t>(place - op.readers.begin());
            for (std::size_t i = 0; i < source.height; ++i)
                for (std::size_t step = 0; step < steps_of(source, tensor); ++step)
                    part.offsets.push_back(static_cast<std::int32_t>(
                        (i + static_cast<std::size_t>(source.top + 1)) * tensor.pitch() +
                        static_cast<std::size_t>(source.left + 1) * tensor.channels + step * kDepth));
            phase.parts.push_back(part);
        }
        pack_weights(sources, plan.tensors, op.channels, phase.weights);
        op.phases.push_back(std::move(phase));
    }
    require(given.norm.gain.size() == normalised_channels && given.norm.shift.size() == normalised_channels &&
                (normalised_channels == 0) == (given.norm.groups == 0) &&
                (given.norm.groups == 0 || normalised_channels % given.norm.groups == 0),
            "a norm has a gain and a shift for every channel, in groups");

    // Rows at a time, and the room for them.
    std::size_t normalised = 0, raw = 0;
    for (const Reader& reader : op.readers)
        (reader.normalised ? normalised : raw) += reader.stride * plan.tensors[reader.tensor].pitch();
    op.rows = std::max<std::size_t>(1, normalised ? kNormalised / normalised : kRaw / raw);
    op.rows = std::min(op.rows, op.height);
    std::size_t scratch = 0;
    for (Reader& reader : op.readers) {
        if (!reader.normalised) continue;
        const Tensor& tensor = plan.tensors[reader.tensor];
        reader.scratch = scratch;
        // A tile reads 16 pixels and whole steps, wherever the row ends.
        scratch += up((op.rows * reader.stride + 3) * tensor.pitch() + (2 * kPixels + 4) * tensor.channels + 2 * kDepth, kDepth);
    }
    plan.scratch = std::max(plan.scratch, scratch);
    plan.scratch_floats = std::max(plan.scratch_floats, 2 * normalised_channels);
    plan.operations.push_back(std::move(op));
}

void Network::attention(std::size_t from, std::size_t out, std::size_t heads) {
    require(!plan_->finished, "the network is finished");
    Plan& plan = *plan_;
    require(from < plan.tensors.size() && out < plan.tensors.size() && heads > 0, "an unknown tensor");
    const Tensor &source = plan.tensors[from], &target = plan.tensors[out];
    require(source.height == target.height && source.width == target.width && source.channels == 3 * target.channels &&
                target.channels % heads == 0,
            "queries, keys and values have the output's shape");
    const std::size_t depth = target.channels / heads, positions = source.height * source.width;
    const std::size_t padded = up(positions, kBlock);
    Operation pack;
    pack.kind = Kind::pack;
    pack.from = from, pack.out = static_cast<std::ptrdiff_t>(out), pack.heads = heads;
    pack.height = heads * (padded / kBlock);
    for (std::size_t i = 0; i < std::max(up(depth, kDepth) / kDepth, padded / kBlock); ++i)
        pack.offsets.push_back(static_cast<std::int32_t>(i * kDepth));
    pack.keys = plan.packed;
    plan.packed += plan.batch * heads * padded * up(depth, kDepth);
    pack.values = plan.packed;
    plan.packed += plan.batch * heads * padded * up(depth, kBlock);
    Operation attend = pack;
    attend.kind = Kind::attend;
    attend.height = heads * ((source.height * (up(source.width, kPixels) / kPixels) + 1) / 2);
    attend.width = source.width;
    plan.scratch = std::max(plan.scratch, 2 * kPixels * padded + 2 * kDepth);
    plan.scratch_floats = std::max(plan.scratch_floats, 2 * kPixels * (padded + kBlock));
    plan.operations.push_back(pack);
    plan.operations.push_back(attend);
}

void Network::finish() {
    Plan& plan = *plan_;
    require(!plan.finished && plan.operations.back().out == kNone, "the last operation writes the output");
    plan.finished = true;
    const std::size_t wanted = plan.threads > 1 ? 2 * plan.threads : 1;
    std::vector<std::size_t> last(plan.tensors.size(), 0);
    for (std::size_t o = 0; o < plan.operations.size(); ++o) {
        Operation& op = plan.operations[o];
        op.chunks = std::min(op.height, (wanted + plan.batch - 1) / plan.batch);
        op.first_chunk = plan.chunks;
        plan.chunks += plan.batch * op.chunks;
        for (const Reader& reader : op.readers) last[reader.tensor] = o;
        if (op.residual != kNone) last[static_cast<std::size_t>(op.residual)] = o;
        if (op.kind == Kind::pack || op.kind == Kind::attend) last[op.from] = o;
        if (op.kind == Kind::convolution && op.out != kNone) {
            Tensor& out = plan.tensors[static_cast<std::size_t>(op.out)];
            if (out.measured) {
                out.chunks = op.chunks;
                out.moments = plan.moments;
                plan.moments += plan.batch * op.chunks * 2 * up(out.channels, kBlock);
            }
        }
    }
    for (const Tensor& tensor : plan.tensors) require(!tensor.measured || tensor.chunks, "a norm reads what a convolution wrote");
    // Memory goes from a tensor that is read no more to the next of the same shape, whose border is zero already.
    std::multimap<std::tuple<std::size_t, std::size_t, std::size_t>, std::size_t> free;
    std::vector<bool> placed(plan.tensors.size(), false);
    for (std::size_t o = 0; o < plan.operations.size(); ++o) {
        const Operation& op = plan.operations[o];
        if (op.out != kNone && !placed[static_cast<std::size_t>(op.out)]) {
            const auto id = static_cast<std::size_t>(op.out);
            Tensor& tensor = plan.tensors[id];
            placed[id] = true;
            const auto at = free.find({tensor.height, tensor.width, tensor.channels});
            if (at != free.end()) {
                tensor.memory = at->second;
                free.erase(at);
            } else {
                tensor.memory = plan.memory;
                plan.memory += up(plan.batch * tensor.image() + (2 * kPixels + 4) * tensor.channels + 2 * kDepth, kDepth);
            }
        }
        for (std::size_t id = 0; id < plan.tensors.size(); ++id)
            if (placed[id] && last[id] == o) {
                const Tensor& tensor = plan.tensors[id];
                free.insert({{tensor.height, tensor.width, tensor.channels}, tensor.memory});
            }
    }
}

std::unique_ptr<Workspace> Network::workspace() const {
    require(plan_->finished, "the network is not finished");
    return std::make_unique<Workspace>(*plan_);
}

void Network::run(Workspace& workspace, const float* x, float* out) const { run(workspace, x, nullptr, out, nullptr); }

void Network::run(Workspace& workspace, const Noised& noised, float* out) const {
    run(workspace, nullptr, &noised, out, nullptr);
}

std::vector<double> Network::profile(Workspace& workspace, const float* x, float* out) const {
    std::vector<double> seconds(plan_->operations.size());
    run(workspace, x, nullptr, out, seconds.data());
    return seconds;
}

void Network::run(Workspace& workspace, const float* x, const Noised* noised, float* out, double* seconds) const {
    require(workspace.owner == plan_.get(), "the workspace is another network's");
    for (Claim& claim : workspace.claims) claim.taken.store(false, std::memory_order_relaxed);
    for (auto& done : workspace.done) done.store(0, std::memory_order_relaxed);
    const Plan& plan = *plan_;
    parallel(plan.threads, plan.threads,
             [&](std::size_t, std::size_t slot) { work(plan, workspace, x, noised, out, slot, seconds); });
}

}  // namespace advrad::engine
