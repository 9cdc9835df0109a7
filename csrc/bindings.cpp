// advrad_fast._native: checks every argument, releases the GIL, works on NumPy's memory in place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "native.hpp"

namespace py = pybind11;

namespace {

constexpr std::uint64_t kMaxSide = 4096;      // as advrad_fast.config.MAX_SIDE
constexpr std::uint64_t kMaxFilter = 255;     // as advrad_fast.config.ScoreConfig
constexpr std::uint64_t kMaxDraws = 1 << 20;
constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 34;  // four words to each of the counter's 2^32 values

[[noreturn]] void refuse(const char* name, const std::string& wanted, const std::string& got) {
    throw py::value_error(std::string(name) + ": expected " + wanted + ", got " + got);
}

std::string shown(py::handle value) {
    std::string text = py::repr(value);
    if (text.size() > 200) text = text.substr(0, 200) + "...";
    return text;
}

std::uint64_t integer(const char* name, py::handle value, std::uint64_t low, std::uint64_t high) {
    const auto fail = [&] {
        refuse(name, "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]", shown(value));
    };
    if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) fail();
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) {
        PyErr_Clear();
        fail();
    }
    const unsigned long long result = PyLong_AsUnsignedLongLong(number.ptr());
    if (PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
        PyErr_Clear();
        fail();
    }
    if (result < low || result > high) fail();
    return result;
}

float real(const char* name, py::handle value, double low = -static_cast<double>(FLT_MAX)) {
    const bool number = !PyBool_Check(value.ptr()) && !py::isinstance<py::array>(value) &&
                        (PyIndex_Check(value.ptr()) || py::hasattr(value, "__float__"));
    double result = number ? PyFloat_AsDouble(value.ptr()) : NAN;
    if (PyErr_Occurred()) {  // __float__ failed, or an integer was too large
        PyErr_Clear();
        result = NAN;
    }
    if (!(result >= low && result <= static_cast<double>(FLT_MAX)))
        refuse(name, low < 0 ? "a finite fp32 number" : "a finite fp32 number, 0 or above", shown(value));
    return static_cast<float>(result);
}

// A C-contiguous array of T; -1 in `shape` stands for any size above 0.
template <typename T>
py::array_t<T> array(const char* name, py::handle value, const std::vector<py::ssize_t>& shape, bool writable) {
    std::string wanted = std::string(writable ? "a writable " : "a ") + "C-contiguous " +
                         std::string(py::str(py::dtype::of<T>())) + " array of shape (";
    for (std::size_t i = 0; i < shape.size(); ++i)
        wanted += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
    wanted += ")";
    if (!py::isinstance<py::array>(value)) refuse(name, wanted, std::string(py::str(py::type::handle_of(value))));
    const auto any = py::reinterpret_borrow<py::array>(value);
    bool fits = py::isinstance<py::array_t<T, 0>>(value) && any.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t i = 0; fits && i < shape.size(); ++i)
        fits = shape[i] < 0 ? any.shape(static_cast<py::ssize_t>(i)) > 0 : any.shape(static_cast<py::ssize_t>(i)) == shape[i];
    constexpr int contiguous = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    fits = fits && (any.flags() & contiguous) == contiguous;
    if (!fits || (writable && !any.writeable()))
        refuse(name, wanted,
               std::string(py::str(any.dtype())) + " of shape " + std::string(py::str(any.attr("shape"))) + ", strides " +
                   std::string(py::str(any.attr("strides"))) + (any.writeable() ? "" : ", read-only"));
    return py::reinterpret_borrow<py::array_t<T>>(value);
}

// The kernels assume that what they write is nobody's input.
void apart(const char* name, const py::array& out, std::initializer_list<const py::array*> others) {
    const char *begin = static_cast<const char*>(out.data()), *end = begin + out.nbytes();
    for (const py::array* other : others) {
        const char *from = static_cast<const char*>(other->data()), *to = from + other->nbytes();
        if (from < end && begin < to) refuse(name, "memory of its own", "an array that overlaps another argument");
    }
}

advrad::Shape frame_shape(const py::array& images, std::uint64_t draws, unsigned multiple) {
    const auto size = [&](int axis) { return static_cast<std::uint64_t>(images.shape(axis)); };
    const auto side = [&](int axis) { return size(axis) <= kMaxSide && size(axis) % multiple == 0; };
    if (!side(1) || !side(2) || (size(3) != 1 && size(3) != 3))
        refuse("images",
               "(N, H, W, C) with C of 1 or 3 and sides of at most " + std::to_string(kMaxSide) +
                   (multiple > 1 ? " that are multiples of " + std::to_string(multiple) : ""),
               py::str(images.attr("shape")));
    return {size(0), size(1), size(2), size(3), draws};
}

py::ssize_t signed_size(std::size_t value) { return static_cast<py::ssize_t>(value); }

void noise(py::handle images_, py::handle draws_, py::handle seed_, py::handle signal_, py::handle noise_,
           py::handle input_scale_, py::handle out_) {
    const auto images = array<std::uint8_t>("images", images_, {-1, -1, -1, -1}, false);
    const advrad::Shape shape = frame_shape(images, integer("draws", draws_, 1, kMaxDraws), 1);
    const std::uint64_t seed = integer("seed", seed_, 0, UINT64_MAX);
    const float signal = real("signal", signal_), noise = real("noise", noise_), input_scale = real("input_scale", input_scale_);
    auto out = array<float>("out", out_,
                            {signed_size(shape.images * shape.draws), signed_size(shape.channels), signed_size(shape.height),
                             signed_size(shape.width)},
                            true);
    apart("out", out, {&images});
    const std::uint8_t* from = images.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    advrad::noise(from, shape, seed, signal, noise, input_scale, to);
}

void reconstruction_error(py::handle images_, py::handle outputs_, py::handle draws_, py::handle seed_, py::handle signal_,
                          py::handle noise_, py::handle skip_, py::handle out_coeff_, py::handle scale_weights_,
                          py::handle filter_size_, py::handle mu_, py::handle inverse_spread_, py::handle maps_,
                          py::handle scores_) {
    const auto images = array<std::uint8_t>("images", images_, {-1, -1, -1, -1}, false);
    const advrad::Shape shape = frame_shape(images, integer("draws", draws_, 1, kMaxDraws), 8);
    const py::ssize_t count = signed_size(shape.images), height = signed_size(shape.height), width = signed_size(shape.width);
    const py::ssize_t rows = signed_size(shape.images * shape.draws), channels = signed_size(shape.channels);
    const auto outputs = array<float>("outputs", outputs_, {rows, channels, height, width}, false);
    const std::uint64_t seed = integer("seed", seed_, 0, UINT64_MAX);
    advrad::ErrorSettings settings;
    settings.signal = real("signal", signal_);
    settings.noise = real("noise", noise_);
    settings.skip = real("skip", skip_);
    settings.out = real("out_coeff", out_coeff_);
    if (!(py::isinstance<py::tuple>(scale_weights_) || py::isinstance<py::list>(scale_weights_)) || py::len(scale_weights_) != 4)
        refuse("scale_weights", "a tuple of 4 numbers", shown(scale_weights_));
    const auto weights = py::tuple(py::reinterpret_borrow<py::object>(scale_weights_));
    for (std::size_t i = 0; i < 4; ++i) settings.weights[i] = real("scale_weights", weights[i], 0.0);
    settings.filter_size = integer("filter_size", filter_size_, 1, kMaxFilter);
    if (settings.filter_size % 2 == 0) refuse("filter_size", "an odd number", shown(filter_size_));
    const auto mu = array<float>("mu", mu_, {height, width}, false);
    const auto inverse_spread = array<float>("inverse_spread", inverse_spread_, {height, width}, false);
    auto scores = array<float>("scores", scores_, {count}, true);
    apart("scores", scores, {&images, &outputs, &mu, &inverse_spread});
    float* map_data = nullptr;
    if (!maps_.is_none()) {
        auto maps = array<float>("maps", maps_, {count, height, width}, true);
        apart("maps", maps, {&images, &outputs, &mu, &inverse_spread, &scores});
        map_data = maps.mutable_data();
    }
    const std::uint8_t* image_data = images.data();
    const float *output_data = outputs.data(), *mu_data = mu.data(), *spread_data = inverse_spread.data();
    float* score_data = scores.mutable_data();
    py::gil_scoped_release release;
    advrad::reconstruction_error(image_data, output_data, shape, seed, settings, mu_data, spread_data, map_data, score_data);
}

// The stream's first `count` values, through a whole number of groups.
template <typename T, typename Fill>
py::array_t<T> stream_values(Fill fill, py::handle count_, py::handle seed_, py::handle draw_, py::handle image_id_) {
    const std::size_t count = integer("count", count_, 0, kMaxCount);
    const advrad::Stream stream{integer("seed", seed_, 0, UINT64_MAX),
                                static_cast<std::uint32_t>(integer("draw", draw_, 0, UINT32_MAX)),
                                static_cast<std::uint32_t>(integer("image_id", image_id_, 0, UINT32_MAX))};
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
    m.def("noise", &noise, "images"_a, "draws"_a, "seed"_a, "signal"_a, "noise"_a, "input_scale"_a, "out"_a);
    m.def("reconstruction_error", &reconstruction_error, "images"_a, "outputs"_a, "draws"_a, "seed"_a, "signal"_a, "noise"_a,
          "skip"_a, "out_coeff"_a, "scale_weights"_a, "filter_size"_a, "mu"_a, "inverse_spread"_a, "maps"_a, "scores"_a);
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
}
