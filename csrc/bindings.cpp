// advrad_fast._native: checks every argument, releases the GIL, works on NumPy's memory in place.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "native.hpp"

namespace py = pybind11;

namespace advrad::engine {
void bind(py::module_& module);
}

namespace {

using advrad::array, advrad::half, advrad::integer, advrad::kMaxSide, advrad::kMaxThreads, advrad::real, advrad::refuse, advrad::shown;

constexpr std::uint64_t kMaxFilter = 255;     // as advrad_fast.config.ScoreConfig
constexpr std::uint64_t kMaxDraws = 1 << 20;
constexpr std::size_t kMaxThresholds = 2 * 32767;
constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 34;  // four words to each of the counter's 2^32 values

// The kernels assume that what they write is nobody's input.
void apart(const char* name, const py::array& out, std::initializer_list<const py::array*> others) {
    const char *begin = static_cast<const char*>(out.data()), *end = begin + out.nbytes();
    for (const py::array* other : others) {
        const char *from = static_cast<const char*>(other->data()), *to = from + other->nbytes();
        if (from < end && begin < to) refuse(name, "memory of its own", "an array that overlaps another argument");
    }
}

// The thresholds of lattice noise, checked once, and the table that settles most numbers at a glance.
struct LatticeTable {
    explicit LatticeTable(py::handle thresholds_) {
        const auto given = array<std::uint64_t>("thresholds", thresholds_, {-1}, false);
        thresholds.assign(given.data(), given.data() + given.size());
        const bool sorted = std::is_sorted(thresholds.begin(), thresholds.end());
        if (thresholds.size() % 2 != 0 || thresholds.size() > kMaxThresholds || !sorted || thresholds.back() >> 60 != 0)
            refuse("thresholds", "an even number, up to " + std::to_string(kMaxThresholds) + ", of sorted 60-bit integers",
                   shown(thresholds_));
        const auto below = [&](std::uint64_t u) {
            return static_cast<int>(std::upper_bound(thresholds.begin(), thresholds.end(), u) - thresholds.begin());
        };
        for (std::uint64_t i = 0; i < guide.size(); ++i) {
            const int low = below(i << 44), high = below(((i + 1) << 44) - 1);
            const int value = low - static_cast<int>(thresholds.size() / 2);
            guide[i] = low == high ? static_cast<std::int16_t>(value) : advrad::Lattice::kUnsettled;
        }
    }

    static advrad::Lattice of(py::handle lattice) {
        if (lattice.is_none()) return {};
        if (!py::isinstance<LatticeTable>(lattice)) refuse("lattice", "a Lattice or None", shown(lattice));
        const auto& table = lattice.cast<const LatticeTable&>();
        return {table.thresholds.data(), table.thresholds.size(), table.guide.data()};
    }

    std::vector<std::uint64_t> thresholds;
    std::vector<std::int16_t> guide = std::vector<std::int16_t>(1 << 16);
};

advrad::Shape frame_shape(const py::array& images) {
    const auto size = [&](int axis) { return static_cast<std::uint64_t>(images.shape(axis)); };
    if (size(1) > kMaxSide || size(2) > kMaxSide || (size(3) != 1 && size(3) != 3))
        refuse("images", "(N, H, W, C) with C of 1 or 3 and sides of at most " + std::to_string(kMaxSide),
               py::str(images.attr("shape")));
    advrad::Shape shape;
    shape.images = size(0), shape.height = size(1), shape.width = size(2), shape.channels = size(3);
    return shape;
}

py::ssize_t signed_size(std::size_t value) { return static_cast<py::ssize_t>(value); }

void noise(py::handle images_, py::handle draws_, py::handle seed_, py::handle signal_, py::handle noise_,
           py::handle input_scale_, py::handle out_, py::handle first_draw_, py::handle normals_, py::handle lattice_,
           bool channels_last, py::handle threads_) {
    const auto images = array<std::uint8_t>("images", images_, {-1, -1, -1, -1}, false);
    advrad::Shape shape = frame_shape(images);
    shape.draws = integer("draws", draws_, 1, kMaxDraws);
    const std::uint64_t seed = integer("seed", seed_, 0, UINT64_MAX);
    advrad::NoiseSettings settings;
    settings.first_draw = static_cast<std::uint32_t>(integer("first_draw", first_draw_, 0, UINT32_MAX - shape.draws + 1));
    settings.signal = real("signal", signal_);
    settings.noise = real("noise", noise_);
    settings.input_scale = real("input_scale", input_scale_);
    settings.lattice = LatticeTable::of(lattice_);
    settings.channels_last = channels_last;
    settings.threads = integer("threads", threads_, 1, kMaxThreads);
    const py::ssize_t height = signed_size(shape.height), width = signed_size(shape.width);
    const py::ssize_t rows = signed_size(shape.images * shape.draws), channels = signed_size(shape.channels);
    py::array normals;
    if (!normals_.is_none()) {
        if (!lattice_.is_none()) refuse("normals", "None beside a lattice", "an array");
        const auto given = array<float>("normals", normals_, {signed_size(shape.draws), channels, height, width}, false);
        settings.normals = given.data();
        normals = given;
    }
    std::vector<py::ssize_t> wanted = {rows, channels, height, width};
    if (channels_last) wanted = {rows, height, width, channels};
    py::array out;
    if (py::isinstance<py::array_t<std::uint16_t, 0>>(out_)) {
        settings.format = advrad::Format::bf16;
        out = array<std::uint16_t>("out", out_, wanted, true);
    } else if (py::isinstance<py::array>(out_) && half(py::reinterpret_borrow<py::array>(out_))) {
        settings.format = advrad::Format::fp16;
        const auto words = out_.attr("view")(py::dtype::of<std::uint16_t>());
        out = array<std::uint16_t>("out", words, wanted, true);
    } else {
        out = array<float>("out", out_, wanted, true);
    }
    apart("out", out, {&images, &normals});
    const std::uint8_t* from = images.data();
    void* to = out.mutable_data();
    py::gil_scoped_release release;
    advrad::noise(from, shape, seed, settings, to);
}

void reconstruction_error(py::handle images_, py::handle inputs_, py::handle outputs_, py::handle draws_,
                          py::handle input_coefficient_, py::handle output_coefficient_, py::handle scale_weights_,
                          py::handle filter_size_, py::handle mu_, py::handle inverse_spread_, py::handle maps_,
                          py::handle scores_, py::handle threads_) {
    const auto outputs = array<float>("outputs", outputs_, {-1, -1, -1, -1}, false);
    const auto size = [&](int axis) { return static_cast<std::uint64_t>(outputs.shape(axis)); };
    const auto side = [&](int axis) { return size(axis) <= kMaxSide && size(axis) % 8 == 0; };
    if (!side(2) || !side(3) || (size(1) != 1 && size(1) != 3))
        refuse("outputs", "(N, C, H, W) with C of 1 or 3 and sides that are multiples of 8, at most " + std::to_string(kMaxSide),
               py::str(outputs.attr("shape")));
    advrad::Shape shape;
    shape.channels = size(1), shape.height = size(2), shape.width = size(3);
    shape.draws = integer("draws", draws_, 1, kMaxDraws);
    if (size(0) % shape.draws != 0) refuse("draws", "a divisor of the " + std::to_string(size(0)) + " outputs", shown(draws_));
    const std::uint64_t results = size(0) / shape.draws;
    const py::ssize_t height = outputs.shape(2), width = outputs.shape(3);
    const std::uint8_t* image_data = nullptr;
    const float* input_data = nullptr;
    py::array images, inputs;
    if (!images_.is_none()) {
        const auto given = array<std::uint8_t>("images", images_, {-1, height, width, outputs.shape(1)}, false);
        shape.images = static_cast<std::size_t>(given.shape(0));
        if (results % shape.images != 0)
            refuse("images", "a number that divides the " + std::to_string(results) + " results", std::to_string(shape.images));
        image_data = given.data();
        images = given;
    } else {
        shape.images = 1;
    }
    shape.groups = results / shape.images;
    if (!inputs_.is_none()) {
        const auto given = array<float>("inputs", inputs_, {outputs.shape(0), outputs.shape(1), height, width}, false);
        input_data = given.data();
        inputs = given;
    } else if (images_.is_none()) {
        refuse("inputs", "an array where images is None", "None");
    }
    advrad::ErrorSettings settings;
    settings.input = real("input_coefficient", input_coefficient_);
    settings.output = real("output_coefficient", output_coefficient_);
    if (!(py::isinstance<py::tuple>(scale_weights_) || py::isinstance<py::list>(scale_weights_)) || py::len(scale_weights_) != 4)
        refuse("scale_weights", "a tuple of 4 numbers", shown(scale_weights_));
    const auto weights = py::tuple(py::reinterpret_borrow<py::object>(scale_weights_));
    for (std::size_t i = 0; i < 4; ++i) settings.weights[i] = real("scale_weights", weights[i], 0.0);
    settings.filter_size = integer("filter_size", filter_size_, 1, kMaxFilter);
    if (settings.filter_size % 2 == 0) refuse("filter_size", "an odd number", shown(filter_size_));
    settings.threads = integer("threads", threads_, 1, kMaxThreads);
    const auto mu = array<float>("mu", mu_, {height, width}, false);
    const auto inverse_spread = array<float>("inverse_spread", inverse_spread_, {height, width}, false);
    auto scores = array<float>("scores", scores_, {signed_size(results)}, true);
    apart("scores", scores, {&images, &inputs, &outputs, &mu, &inverse_spread});
    float* map_data = nullptr;
    if (!maps_.is_none()) {
        auto maps = array<float>("maps", maps_, {signed_size(results), height, width}, true);
        apart("maps", maps, {&images, &inputs, &outputs, &mu, &inverse_spread, &scores});
        map_data = maps.mutable_data();
    }
    const float *output_data = outputs.data(), *mu_data = mu.data(), *spread_data = inverse_spread.data();
    float* score_data = scores.mutable_data();
    py::gil_scoped_release release;
    advrad::reconstruction_error(image_data, input_data, output_data, shape, settings, mu_data, spread_data, map_data,
                                 score_data);
}

py::tuple votes(py::handle scores_, py::handle thresholds_, py::handle ranks_) {
    const auto scores = array<float>("scores", scores_, {-1, -1}, false);
    const auto thresholds = array<float>("thresholds", thresholds_, {-2}, false);
    const auto ranks = array<std::int64_t>("ranks", ranks_, {-2}, false);
    const py::ssize_t images = scores.shape(0), draws = scores.shape(1);
    if (std::any_of(thresholds.data(), thresholds.data() + thresholds.size(), [](float t) { return std::isnan(t); }))
        refuse("thresholds", "numbers", shown(thresholds));
    if (std::any_of(ranks.data(), ranks.data() + ranks.size(), [&](std::int64_t r) { return r < 0 || r >= draws; }))
        refuse("ranks", "integers in [0, " + std::to_string(draws - 1) + "]", shown(ranks));
    py::array_t<std::int64_t> counts({images, thresholds.size()});
    py::array_t<float> statistics({images, ranks.size()});
    const float *from = scores.data(), *threshold_data = thresholds.data();
    const std::int64_t* rank_data = ranks.data();
    std::int64_t* count_data = counts.mutable_data();
    float* statistic_data = statistics.mutable_data();
    {
        py::gil_scoped_release release;
        advrad::votes(from, static_cast<std::size_t>(images), static_cast<std::size_t>(draws), threshold_data,
                      static_cast<std::size_t>(thresholds.size()), rank_data, static_cast<std::size_t>(ranks.size()),
                      count_data, statistic_data);
    }
    return py::make_tuple(counts, statistics);
}

// The stream's first `count` values, through a whole number of groups.
template <typename T, typename Fill>
py::array_t<T> stream_values(Fill fill, py::handle count_, py::handle seed_, py::handle draw_, py::handle image_id_) {
    const std::size_t count = integer("count", count_, 0, kMaxCount);
    const advrad::Stream stream{integer("seed", seed_, 0, UINT64_MAX),
                                static_cast<std::uint32_t>(integer("draw", draw_, 0, UINT32_MAX)),
                                static_cast<std::uint32_t>(integer("image_id", image_id_, 0, UINT32_MAX)), 0};
    py::array_t<T> result(signed_size((count + 3) / 4 * 4));
    T* data = result.mutable_data();
    {
        py::gil_scoped_release release;
        fill(stream, 0, (count + 3) / 4, data);
    }
    return result[py::slice(0, signed_size(count), 1)].template cast<py::array_t<T>>();
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    using namespace py::literals;
    m.doc() = "The fused operations for CPUs in C++; see advrad_fast/_native.pyi.";
    py::class_<LatticeTable>(m, "Lattice").def(py::init<py::handle>(), "thresholds"_a);
    m.def("noise", &noise, "images"_a, "draws"_a, "seed"_a, "signal"_a, "noise"_a, "input_scale"_a, "out"_a, py::kw_only(),
          "first_draw"_a = 0, "normals"_a = py::none(), "lattice"_a = py::none(), "channels_last"_a = false, "threads"_a = 1);
    m.def("reconstruction_error", &reconstruction_error, "images"_a, "inputs"_a, "outputs"_a, "draws"_a, "input_coefficient"_a,
          "output_coefficient"_a, "scale_weights"_a, "filter_size"_a, "mu"_a, "inverse_spread"_a, "maps"_a, "scores"_a,
          py::kw_only(), "threads"_a = 1);
    m.def("votes", &votes, "scores"_a, "thresholds"_a, "ranks"_a);
    m.def(
        "integers",
        [](py::handle count, py::handle seed, py::handle draw, py::handle image_id) {
            return stream_values<std::uint32_t>(advrad::integers, count, seed, draw, image_id);
        },
        "count"_a, "seed"_a, "draw"_a = 0, "image_id"_a = 0);
    m.def(
        "normals",
        [](py::handle count, py::handle seed, py::handle draw, py::handle image_id) {
            return stream_values<float>(advrad::normals, count, seed, draw, image_id);
        },
        "count"_a, "seed"_a, "draw"_a = 0, "image_id"_a = 0);
    m.def(
        "lattice_noise",
        [](py::handle count, py::handle lattice_, py::handle seed, py::handle draw, py::handle image_id) {
            const advrad::Lattice lattice = LatticeTable::of(lattice_);
            if (lattice.thresholds == nullptr) refuse("lattice", "a Lattice", "None");
            const auto fill = [&](const advrad::Stream& stream, std::uint32_t first, std::size_t groups, std::int32_t* out) {
                advrad::lattice_noise(stream, first, groups, lattice, out);
            };
            return stream_values<std::int32_t>(fill, count, seed, draw, image_id);
        },
        "count"_a, "lattice"_a, "seed"_a, "draw"_a = 0, "image_id"_a = 0);
    advrad::engine::bind(m);
}
