// advrad_fast._native.Network: builds the engine's plan from Python's arguments.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../arguments.hpp"
#include "network.hpp"
#include "plan.hpp"

namespace py = pybind11;

namespace advrad::engine {

namespace {

constexpr std::uint64_t kMaxTensors = 1 << 20, kMaxBatch = 65536;

const Kernels& kernels_named(const std::string& name) {
    if (name == "portable") return portable_kernels();
    if (name != "amx") refuse("kernels", "amx or portable", name);
    const Kernels* kernels = amx_kernels();
    if (kernels == nullptr) refuse("kernels", "a processor with AMX and AVX-512 bf16", "amx");
    return *kernels;
}

std::vector<float> vector(const char* name, py::handle value) {
    const auto given = array<float>(name, value, {-2}, false);
    return {given.data(), given.data() + given.size()};
}

// (tensor, kernel, stride, top, left, normalised)
Source source_of(py::handle value) {
    if (!py::isinstance<py::tuple>(value) || py::len(value) != 6)
        refuse("phases", "sources of (tensor, kernel, stride, top, left, normalised)", shown(value));
    const auto fields = py::reinterpret_borrow<py::tuple>(value);
    const auto kernel = array<float>("kernel", fields[1], {-1, -1, -1, -1}, false);
    Source source;
    source.tensor = integer("tensor", fields[0], 0, kMaxTensors);
    source.weight.assign(kernel.data(), kernel.data() + kernel.size());
    source.height = static_cast<std::size_t>(kernel.shape(2)), source.width = static_cast<std::size_t>(kernel.shape(3));
    source.stride = integer("stride", fields[2], 1, 2);
    source.top = fields[3].cast<std::ptrdiff_t>(), source.left = fields[4].cast<std::ptrdiff_t>();
    source.normalised = fields[5].cast<bool>();
    return source;
}

struct PyNetwork {
    PyNetwork(py::handle batch, py::handle channels, py::handle height, py::handle width, py::handle patch, py::handle threads,
              const std::string& kernels_)
        : kernels(&kernels_named(kernels_)),
          shape{static_cast<py::ssize_t>(integer("batch", batch, 1, kMaxBatch)),
                static_cast<py::ssize_t>(integer("channels", channels, 1, 4096)),
                static_cast<py::ssize_t>(integer("height", height, 1, kMaxSide)),
                static_cast<py::ssize_t>(integer("width", width, 1, kMaxSide))},
          network(size(0), size(1), size(2), size(3), integer("patch", patch, 1, kMaxSide),
                  integer("threads", threads, 1, kMaxThreads), *kernels) {}

    std::size_t size(std::size_t axis) const { return static_cast<std::size_t>(shape[axis]); }

    void convolution(py::handle out, py::handle bias, const py::list& phases, bool silu, std::optional<std::size_t> residual,
                     const py::object& norm) {
        Convolution convolution;
        convolution.bias = vector("bias", bias);
        for (const py::handle phase : phases) {
            std::vector<Source> sources;
            for (const py::handle source : phase) sources.push_back(source_of(source));
            convolution.phases.push_back(std::move(sources));
        }
        convolution.silu = silu;
        if (!out.is_none()) convolution.out = static_cast<std::ptrdiff_t>(integer("out", out, 0, kMaxTensors));
        if (residual) convolution.residual = static_cast<std::ptrdiff_t>(*residual);
        if (!norm.is_none()) {
            const auto fields = norm.cast<py::tuple>();
            convolution.norm.gain = vector("gain", fields[0]);
            convolution.norm.shift = vector("shift", fields[1]);
            convolution.norm.groups = integer("groups", fields[2], 1, 4096);
            convolution.norm.silu = fields[3].cast<bool>();
        }
        network.convolution(std::move(convolution));
    }

    void run(Workspace& workspace, py::handle x_, py::handle out_) const {
        const auto x = array<float>("x", x_, shape, false);
        auto out = array<float>("out", out_, shape, true);
        const float* from = x.data();
        float* to = out.mutable_data();
        py::gil_scoped_release release;
        network.run(workspace, from, to);
    }

    std::vector<double> profile(Workspace& workspace, py::handle x_, py::handle out_) const {
        const auto x = array<float>("x", x_, shape, false);
        auto out = array<float>("out", out_, shape, true);
        return network.profile(workspace, x.data(), out.mutable_data());
    }

    void run_noised(Workspace& workspace, py::handle image_, py::handle seed, py::handle signal, py::handle noise,
                    py::handle input_scale, py::handle normals_, py::handle out_, py::handle first_draw) const {
        if (shape[1] != 1 && shape[1] != 3) refuse("image", "a network of 1 or 3 channels", std::to_string(shape[1]));
        const auto image = array<std::uint8_t>("image", image_, {1, shape[2], shape[3], shape[1]}, false);
        Noised noised{image.data(), integer("seed", seed, 0, UINT64_MAX), {}};
        noised.settings.signal = real("signal", signal);
        noised.settings.noise = real("noise", noise);
        noised.settings.input_scale = real("input_scale", input_scale);
        noised.settings.first_draw = static_cast<std::uint32_t>(integer("first_draw", first_draw, 0, UINT32_MAX - size(0) + 1));
        py::array_t<float> normals;
        if (!normals_.is_none()) {
            normals = array<float>("normals", normals_, shape, false);
            noised.settings.normals = normals.data();
        }
        auto out = array<float>("out", out_, shape, true);
        float* to = out.mutable_data();
        py::gil_scoped_release release;
        network.run(workspace, noised, to);
    }

    const Kernels* kernels;
    std::vector<py::ssize_t> shape;
    Network network;
};

}  // namespace

void bind(py::module_& m) {
    using namespace py::literals;
    py::class_<Workspace>(m, "Workspace");
    py::class_<PyNetwork>(m, "Network")
        .def(py::init<py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, const std::string&>(), py::kw_only(),
             "batch"_a, "channels"_a, "height"_a, "width"_a, "patch"_a, "threads"_a, "kernels"_a)
        .def(
            "tensor",
            [](PyNetwork& self, py::handle height, py::handle width, py::handle channels) {
                return self.network.tensor(integer("height", height, 1, kMaxSide), integer("width", width, 1, kMaxSide),
                                           integer("channels", channels, 1, 1 << 16));
            },
            "height"_a, "width"_a, "channels"_a)
        .def("convolution", &PyNetwork::convolution, "out"_a, "bias"_a, "phases"_a, py::kw_only(), "silu"_a = false,
             "residual"_a = py::none(), "norm"_a = py::none())
        .def(
            "attention",
            [](PyNetwork& self, py::handle from, py::handle out, py::handle heads) {
                self.network.attention(integer("tensor", from, 0, kMaxTensors), integer("out", out, 0, kMaxTensors),
                                       integer("heads", heads, 1, 4096));
            },
            "tensor"_a, "out"_a, "heads"_a)
        .def("finish", [](PyNetwork& self) { self.network.finish(); })
        .def("workspace", [](const PyNetwork& self) { return self.network.workspace(); })
        .def("run", &PyNetwork::run, "workspace"_a, "x"_a, "out"_a)
        .def("profile", &PyNetwork::profile, "workspace"_a, "x"_a, "out"_a)
        .def("run_noised", &PyNetwork::run_noised, "workspace"_a, "image"_a, "seed"_a, "signal"_a, "noise"_a, "input_scale"_a,
             "normals"_a, "out"_a, py::kw_only(), "first_draw"_a = 0);
    m.def("engine_kernels", [] {
        std::vector<std::string> names;
        if (amx_kernels()) names.emplace_back("amx");
        names.emplace_back("portable");
        return names;
    });
}

}  // namespace advrad::engine
