#include "python/arguments.h"

#include <string>

#include "common/error.h"

namespace biomedgpt::python {

// True and False, which are ints to Python, are more likely to be a mistake than a number here.
int64_t int_of(py::handle value, const ArgName& name) {
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) {
        throw ArgumentError(name.text(), type_name(value), "an int");
    }
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) throw ArgumentError(name.text(), "a number beyond 64 bits", "a smaller one");
    return number;
}

double float_of(py::handle value, const ArgName& name) {
    if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) {
        throw ArgumentError(name.text(), type_name(value), "a float");
    }
    return static_cast<double>(int_of(value, name));
}

bool bool_of(py::handle value, const ArgName& name) {
    if (!PyBool_Check(value.ptr())) throw ArgumentError(name.text(), type_name(value), "a bool");
    return value.is(py::handle(Py_True));
}

std::string_view text_of(py::handle value, const ArgName& name) {
    if (!PyUnicode_Check(value.ptr())) throw ArgumentError(name.text(), type_name(value), "a str");
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
    if (text == nullptr) {
        PyErr_Clear();
        throw ArgumentError(name.text(), "a str that UTF-8 cannot encode", "a name");
    }
    return {text, static_cast<size_t>(size)};
}

void require_contiguous(const Array& vector) {
    if (!vector.contiguous()) vector.refuse(" with a stride of " + std::to_string(vector.stride(0)) + " bytes");
}

namespace {

// Texts may hold bytes of other libraries, such as the names of their capsules, or be cut within a character.
py::object decoded(std::string_view text) {
    return py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

void set_error(const char* type_name, const std::exception& error, const py::object& seen) {
    const py::object type = py::module_::import("biomedgpt_edge.errors").attr(type_name);
    PyErr_SetObject(type.ptr(), type(decoded(error.what()), py::arg("seen") = seen).ptr());
}

}  // namespace

void translate_error(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const ArgumentError& error) {
        set_error("KernelArgumentError", error, decoded(error.given()));
    } catch (const biomedgpt::DeviceError& error) {
        set_error("PlatformError", error, py::none());
    }
}

}  // namespace biomedgpt::python
