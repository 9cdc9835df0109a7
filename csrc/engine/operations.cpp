// One part of one operation, by one thread.
#include <algorithm>
#include <cmath>

#include "plan.hpp"

namespace advrad::engine {

namespace {

constexpr std::size_t kBlock = 2 * kLanes;

// The tiles of a few rows, one after the other.
struct Tiles {
    std::size_t first_row, width, across, count;
    Tiles(std::size_t begin, std::size_t end, std::size_t width_)
        : first_row(begin), width(width_), across((width_ + kPixels - 1) / kPixels), count((end - begin) * across) {}
    struct Tile {
        std::size_t y, x, valid;
    };
    // The tile after the last stands for none: the last again, of which nothing counts.
    Tile operator[](std::size_t i) const {
        const std::size_t at = std::min(i, count - 1), x = at % across * kPixels;
        return {first_row + at / across, x, i < count ? std::min(kPixels, width - x) : 0};
    }
};

// Scale and shift of every normalised channel, from the moments that the writers of the tensors left.
void affine(const Task& task, const Operation& op, std::size_t image, float* scale, float* shift) {
    const std::size_t channels = op.norm.gain.size(), size = channels / op.norm.groups;
    double sum = 0, squares = 0, count = 0;
    std::size_t channel = 0;
    for (const Reader& reader : op.readers) {
        if (!reader.normalised) continue;
        const Tensor& tensor = task.plan.tensors[reader.tensor];
        const std::size_t padded = (tensor.channels + kBlock - 1) / kBlock * kBlock;
        const float* moments = task.workspace.moments.data() + tensor.moments + image * tensor.chunks * 2 * padded;
        for (std::size_t c = 0; c < tensor.channels; ++c, ++channel) {
            for (std::size_t chunk = 0; chunk < tensor.chunks; ++chunk) {
                sum += moments[chunk * 2 * padded + c];
                squares += moments[chunk * 2 * padded + padded + c];
            }
            count += static_cast<double>(tensor.height * tensor.width);
            if ((channel + 1) % size != 0) continue;
            const double mean = sum / count, variance = std::max(0.0, squares / count - mean * mean);
            const double factor = 1.0 / std::sqrt(variance + static_cast<double>(op.norm.epsilon));
            for (std::size_t i = channel + 1 - size; i <= channel; ++i) {
                scale[i] = static_cast<float>(op.norm.gain[i] * factor);
                shift[i] = static_cast<float>(op.norm.shift[i] - mean * op.norm.gain[i] * factor);
            }
            sum = squares = count = 0;
        }
    }
}

// The rows that grid rows [begin, end) read of a normalised tensor; `kept` of them are the last of the rows before.
void normalise_rows(const Task& task, const Operation& op, const Reader& reader, std::size_t image, std::size_t begin,
                    std::size_t end, std::size_t kept_from, bool keep, const float* scale, const float* shift) {
    const Tensor& tensor = task.plan.tensors[reader.tensor];
    const std::size_t pitch = tensor.pitch(), channels = tensor.channels;
    Bf16* scratch = task.scratch + reader.scratch;
    const Bf16* from = task.workspace.activations.data() + tensor.memory + image * tensor.image();
    const std::size_t first = begin * reader.stride, count = (end - begin - 1) * reader.stride + 3;
    std::size_t row = 0;
    if (keep && reader.halo) {
        std::memmove(scratch, scratch + kept_from * pitch, 2 * pitch * sizeof(Bf16));
        row = 2;
    }
    for (; row < count; ++row) {
        Bf16* to = scratch + row * pitch;
        const std::size_t padded = first + row;
        if (padded == 0 || padded > tensor.height) {
            std::memset(to, 0, pitch * sizeof(Bf16));
            continue;
        }
        if (!reader.halo && row % reader.stride != 1 % reader.stride) continue;
        std::memset(to, 0, channels * sizeof(Bf16));
        task.plan.kernels->normalise(from + padded * pitch + channels, tensor.width, channels, scale + reader.channel,
                                     shift + reader.channel, op.norm.silu, to + channels);
        std::memset(to + pitch - channels, 0, channels * sizeof(Bf16));
    }
}

// Sums of the last convolution to their places in the output.
void unfold(const Task& task, const Operation& op, std::size_t image, std::size_t first, std::size_t channels,
            const Tiles::Tile& tile, const float* sums) {
    const Plan& plan = task.plan;
    const std::size_t patch = plan.patch;
    float* out = task.out + image * plan.channels * plan.height * plan.width + (tile.y * plan.width + tile.x) * patch;
    if (patch == 4) {  // 32 is a multiple: a block holds whole groups
        for (std::size_t k = 0; k < channels; k += 4)
            for (std::size_t m = 0; m < tile.valid; ++m)
                std::memcpy(out + op.unfold[first + k] + m * 4, sums + m * kBlock + k, 4 * sizeof(float));
        return;
    }
    for (std::size_t k = 0; k < channels; ++k)
        for (std::size_t m = 0; m < tile.valid; ++m) out[static_cast<std::size_t>(op.unfold[first + k]) + m * patch] = sums[m * kBlock + k];
}

// `count` inputs of one channel from `pixel` on, made of the frame and its noise.
void make(const Plan& plan, const Noised& noised, std::size_t image, std::size_t channel, std::size_t pixel, std::size_t count,
          float* x) {
    float drawn[kNoiseBlock + 8];
    const std::size_t plane = plan.height * plan.width;
    for (std::size_t done = 0; done < count; done += kNoiseBlock) {
        const std::size_t some = std::min(kNoiseBlock, count - done), element = channel * plane + pixel + done;
        const float* eps = drawn + element % 4;
        if (noised.settings.normals != nullptr)
            eps = noised.settings.normals + image * plan.channels * plane + element;
        else
            normals({noised.seed, noised.settings.first_draw + static_cast<std::uint32_t>(image), 0, 0},
                    static_cast<std::uint32_t>(element / 4), (element % 4 + some + 3) / 4, drawn);
        noised_pixels(noised.image + (pixel + done) * plan.channels, plan.channels, channel, some, eps, noised.settings, x + done);
    }
}

}  // namespace

void fold(const Task& task, const Operation& op, std::size_t image, std::size_t part) noexcept {
    const Plan& plan = task.plan;
    const Tensor& out = plan.tensors[0];
    const std::size_t patch = plan.patch;
    const Rows rows = rows_of(op, part);
    Bf16* to = task.workspace.activations.data() + out.memory + image * out.image();
    for (std::size_t y = rows.begin; y < rows.end; ++y)
        for (std::size_t c = 0; c < plan.channels; ++c)
            for (std::size_t i = 0; i < patch; ++i) {
                const std::size_t pixel = (y * patch + i) * plan.width;
                const float* x = task.floats;
                if (task.x)
                    x = task.x + (image * plan.channels + c) * plan.height * plan.width + pixel;
                else
                    make(plan, *task.noised, image, c, pixel, plan.width, task.floats);
                plan.kernels->fold(x, plan.width, patch, to + (y + 1) * out.pitch() + out.channels + (c * patch + i) * patch,
                                   out.channels);
            }
}

void convolve(const Task& task, const Operation& op, std::size_t image, std::size_t part) noexcept {
    const Plan& plan = task.plan;
    Workspace& workspace = task.workspace;
    const Rows rows = rows_of(op, part);
    const bool output = op.out == kNone;
    const Tensor* out = output ? nullptr : &plan.tensors[static_cast<std::size_t>(op.out)];
    const Tensor* residual = op.residual == kNone ? nullptr : &plan.tensors[static_cast<std::size_t>(op.residual)];
    const std::size_t step = op.phases.size() == 4 ? 2 : 1, padded = (op.channels + kBlock - 1) / kBlock * kBlock;
    float *scale = task.floats, *shift = task.floats + op.norm.gain.size();
    if (op.norm.groups) affine(task, op, image, scale, shift);
    float* moments = nullptr;
    if (out && out->measured) {
        moments = workspace.moments.data() + out->moments + (image * out->chunks + part) * 2 * padded;
        std::fill(moments, moments + 2 * padded, 0.0f);
    }
    alignas(64) float sums[2 * kPixels * kBlock];
    float measured[2 * kBlock];
    Run runs[8];

    for (std::size_t begin = rows.begin; begin < rows.end; begin += op.rows) {
        const std::size_t end = std::min(begin + op.rows, rows.end);
        for (const Reader& reader : op.readers)
            if (reader.normalised)
                normalise_rows(task, op, reader, image, begin, end, op.rows, begin > rows.begin && reader.stride == 1, scale, shift);
        const Tiles tiles(begin, end, op.width);
        for (std::size_t p = 0; p < op.phases.size(); ++p) {
            const Phase& phase = op.phases[p];
            const Bf16* weights = phase.weights.data();
            std::size_t steps = 0;
            for (std::size_t r = 0; r < phase.parts.size(); ++r) {
                runs[r].offsets = phase.parts[r].offsets.data();
                runs[r].steps = phase.parts[r].offsets.size();
                const Reader& reader = op.readers[phase.parts[r].reader];
                runs[r].stride = reader.stride * plan.tensors[reader.tensor].channels * sizeof(Bf16);
                steps += runs[r].steps;
            }
            for (std::size_t first = 0; first < op.channels; first += kBlock) {
                Block block{};
                block.runs = runs;
                block.run_count = phase.parts.size();
                block.weights = weights;
                block.channels = std::min(kBlock, op.channels - first);
                block.columns = block.channels > kLanes ? 2 : 1;
                weights += steps * block.columns * kWeightTile;
                block.bias = op.bias.data() + first;
                block.silu = op.silu;
                if (output) block.raw = sums;
                if (moments) {
                    std::fill(measured, measured + 2 * kBlock, 0.0f);
                    block.moments = measured;
                }
                for (std::size_t t = 0; t < tiles.count; t += 2) {
                    Tiles::Tile pair[2] = {tiles[t], tiles[t + 1]};
                    for (std::size_t i = 0; i < 2; ++i) {
                        const Tiles::Tile& tile = pair[i];
                        for (std::size_t r = 0; r < phase.parts.size(); ++r) {
                            const Reader& reader = op.readers[phase.parts[r].reader];
                            const Tensor& tensor = plan.tensors[reader.tensor];
                            const Bf16* row = reader.normalised
                                                  ? task.scratch + reader.scratch + (tile.y - begin) * reader.stride * tensor.pitch()
                                                  : workspace.activations.data() + tensor.memory + image * tensor.image() +
                                                        tile.y * reader.stride * tensor.pitch();
                            runs[r].pixels[i] = row + tile.x * reader.stride * tensor.channels;
                        }
                        block.valid[i] = tile.valid;
                        if (residual)
                            block.residual[i] = workspace.activations.data() + residual->memory + image * residual->image() +
                                                (tile.y + 1) * residual->pitch() + (tile.x + 1) * residual->channels + first;
                        if (out)
                            block.out[i] = workspace.activations.data() + out->memory + image * out->image() +
                                           (tile.y * step + p / 2 + 1) * out->pitch() +
                                           (tile.x * step + p % 2 + 1) * out->channels + first;
                    }
                    if (residual) block.residual_stride = residual->channels;
                    if (out) block.out_stride = step * out->channels;
                    plan.kernels->block(block);
                    if (output)
                        for (std::size_t i = 0; i < 2; ++i)
                            unfold(task, op, image, first, block.channels, pair[i], sums + i * kPixels * kBlock);
                }
                if (moments)
                    for (std::size_t c = 0; c < kBlock; ++c) {
                        moments[first + c] += measured[c];
                        moments[padded + first + c] += measured[kBlock + c];
                    }
            }
        }
    }
}

void pack(const Task& task, const Operation& op, std::size_t image, std::size_t part) noexcept {
    const Plan& plan = task.plan;
    const Tensor& tensor = plan.tensors[op.from];
    const std::size_t channels = tensor.channels / 3, depth = channels / op.heads, positions = tensor.height * tensor.width;
    const std::size_t blocks = (positions + kBlock - 1) / kBlock, steps = (depth + kDepth - 1) / kDepth;
    const Bf16* from = task.workspace.activations.data() + tensor.memory + image * tensor.image();
    const Rows units = rows_of(op, part);
    for (std::size_t unit = units.begin; unit < units.end; ++unit) {
        const std::size_t head = unit / blocks, block = unit % blocks, index = image * op.heads + head;
        Bf16* keys = task.workspace.packed.data() + op.keys + (index * blocks + block) * steps * 2 * kWeightTile;
        Bf16* values = task.workspace.packed.data() + op.values + index * blocks * kBlock * ((depth + kBlock - 1) / kBlock * kBlock);
        std::fill(keys, keys + steps * 2 * kWeightTile, Bf16{0});
        for (std::size_t i = 0; i < kBlock; ++i) {
            const std::size_t position = block * kBlock + i;
            const bool real = position < positions;
            const Bf16* pixel = from + (position / tensor.width + 1) * tensor.pitch() + (position % tensor.width + 1) * tensor.channels;
            for (std::size_t k = 0; real && k < depth; ++k)  // positions are the lanes, channels the products
                keys[(k / kDepth * 2 + i / kLanes) * kWeightTile + k % kDepth / 2 * kBlock + i % kLanes * 2 + k % 2] =
                    pixel[channels + head * depth + k];
            for (std::size_t k = 0; k < depth; ++k) {  // channels are the lanes, positions the products
                const std::size_t first = k / kBlock * kBlock, columns = depth - first > kLanes ? 2 : 1;
                values[first * blocks * kBlock + (block * columns + k % kBlock / kLanes) * kWeightTile + i / 2 * kBlock +
                       k % kLanes * 2 + i % 2] = real ? pixel[2 * channels + head * depth + k] : Bf16{0};
            }
        }
    }
}

void attend(const Task& task, const Operation& op, std::size_t image, std::size_t part) noexcept {
    const Plan& plan = task.plan;
    const Tensor &tensor = plan.tensors[op.from], &target = plan.tensors[static_cast<std::size_t>(op.out)];
    const std::size_t depth = target.channels / op.heads, positions = tensor.height * tensor.width;
    const std::size_t blocks = (positions + kBlock - 1) / kBlock, padded = blocks * kBlock;
    const std::size_t steps = (depth + kDepth - 1) / kDepth;
    const Tiles tiles(0, tensor.height, tensor.width);
    const std::size_t pairs = (tiles.count + 1) / 2;
    float *scores = task.floats, *sums = task.floats + 2 * kPixels * padded;
    Bf16* shares = task.scratch;
    const std::int32_t* offsets = op.offsets.data();
    const Rows units = rows_of(op, part);
    for (std::size_t unit = units.begin; unit < units.end; ++unit) {
        const std::size_t head = unit / pairs, t = unit % pairs * 2, index = image * op.heads + head;
        const Tiles::Tile pair[2] = {tiles[t], tiles[t + 1]};
        const auto place = [&](const Tensor& of, const Tiles::Tile& tile) {
            return task.workspace.activations.data() + of.memory + image * of.image() + (tile.y + 1) * of.pitch() +
                   (tile.x + 1) * of.channels + head * depth;
        };
        Run run{{place(tensor, pair[0]), place(tensor, pair[1])}, tensor.channels * sizeof(Bf16), offsets, steps};
        Block block{};
        block.runs = &run;
        block.run_count = 1;
        block.columns = 2;
        block.channels = kBlock;
        for (std::size_t i = 0; i < 2; ++i) block.valid[i] = pair[i].valid;
        block.raw = sums;
        for (std::size_t b = 0; b < blocks; ++b) {
            block.weights = task.workspace.packed.data() + op.keys + (index * blocks + b) * steps * 2 * kWeightTile;
            plan.kernels->block(block);
            for (std::size_t m = 0; m < 2 * kPixels; ++m)
                std::memcpy(scores + m * padded + b * kBlock, sums + m * kBlock, kBlock * sizeof(float));
        }
        for (std::size_t i = 0; i < 2; ++i)
            for (std::size_t m = 0; m < pair[i].valid; ++m) {
                const std::size_t row = (i * kPixels + m) * padded;
                plan.kernels->softmax(scores + row, positions, padded, shares + row);
            }
        run = {{shares, shares + kPixels * padded}, padded * sizeof(Bf16), offsets, blocks};
        block.raw = nullptr;
        block.out_stride = target.channels;
        const Bf16* values = task.workspace.packed.data() + op.values + index * padded * ((depth + kBlock - 1) / kBlock * kBlock);
        for (std::size_t first = 0; first < depth; first += kBlock) {
            block.channels = std::min(kBlock, depth - first);
            block.columns = block.channels > kLanes ? 2 : 1;
            block.weights = values + first * padded;
            for (std::size_t i = 0; i < 2; ++i) block.out[i] = place(target, pair[i]) + first;
            plan.kernels->block(block);
        }
    }
}

}  // namespace advrad::engine
