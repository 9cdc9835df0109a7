// Checks of Python arguments: what doesn't fit is a ValueError that names the argument, what was expected and what came.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

namespace advrad {

namespace py = pybind11;

constexpr std::uint64_t kMaxSide = 4096;     // as advrad_fast.config.MAX_SIDE
constexpr std::uint64_t kMaxThreads = 1024;  // as advrad_fast.backends.base.MAX_THREADS

[[noreturn]] inline void refuse(const char* name, const std::string& wanted, const std::string& got) {
    throw py::value_error(std::string(name) + ": expected " + wanted + ", got " + got);
}

inline std::string shown(py::handle value) {
    std::string text = py::repr(value);
    if (text.size() > 200) text = text.substr(0, 200) + "...";
    return text;
}

inline std::uint64_t integer(const char* name, py::handle value, std::uint64_t low, std::uint64_t high) {
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

inline float real(const char* name, py::handle value, double low = -static_cast<double>(FLT_MAX)) {
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

// A C-contiguous array of T; in `shape`, -1 stands for any size above 0 and -2 for any size.
template <typename T>
py::array_t<T> array(const char* name, py::handle value, const std::vector<py::ssize_t>& shape, bool writable) {
    const auto wanted = [&] {
        std::string text = std::string(writable ? "a writable " : "a ") + "C-contiguous " +
                           std::string(py::str(py::dtype::of<T>())) + " array of shape (";
        for (std::size_t i = 0; i < shape.size(); ++i)
            text += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
        return text + ")";
    };
    if (!py::isinstance<py::array>(value)) refuse(name, wanted(), std::string(py::str(py::type::handle_of(value))));
    const auto any = py::reinterpret_borrow<py::array>(value);
    bool fits = py::isinstance<py::array_t<T, 0>>(value) && any.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t i = 0; fits && i < shape.size(); ++i)
        fits = shape[i] < 0 ? any.shape(static_cast<py::ssize_t>(i)) >= shape[i] + 2
                            : any.shape(static_cast<py::ssize_t>(i)) == shape[i];
    constexpr int contiguous = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    fits = fits && (any.flags() & contiguous) == contiguous;
    if (!fits || (writable && !any.writeable()))
        refuse(name, wanted(),
               std::string(py::str(any.dtype())) + " of shape " + std::string(py::str(any.attr("shape"))) + ", strides " +
                   std::string(py::str(any.attr("strides"))) + (any.writeable() ? "" : ", read-only"));
    return py::reinterpret_borrow<py::array_t<T>>(value);
}

// Native-endian float16, which C++17 has no type for.
inline bool half(const py::array& any) { return any.dtype().equal(py::dtype("e")); }

}  // namespace advrad
