// Arguments of a binding as the kernel library's types, and its errors as Python's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <string_view>

#include "python/array.h"

namespace biomedgpt::python {

int64_t int_of(py::handle value, const ArgName& name);
double float_of(py::handle value, const ArgName& name);
bool bool_of(py::handle value, const ArgName& name);
// Valid as long as `value` is.
std::string_view text_of(py::handle value, const ArgName& name);

// Throws ArgumentError for an array whose elements are not neighbours.
void require_contiguous(const Array& vector);

// An array of one type, contiguous and, where it is filled, writeable.
enum class Use { read, filled };

class TypedArray {
  public:
    TypedArray(py::handle value, const char* name, const Expected& expected, DType dtype, Use use)
        : array_(value, {name}, expected, place_) {
        if (array_.dtype() != dtype) array_.refuse();
        if (!array_.contiguous()) array_.refuse(", not contiguous");
        if (use == Use::filled && !array_.writeable()) array_.refuse(", read-only");
        if (reinterpret_cast<uintptr_t>(array_.data()) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
            array_.refuse(", misaligned");
        }
    }

    template <typename Element>
    Element* data() const {
        return static_cast<Element*>(array_.data());
    }
    int64_t rows() const { return array_.shape(0); }
    int64_t columns() const { return array_.shape(1); }
    void require(int64_t rows, int64_t columns) const {
        if (this->rows() == rows && this->columns() == columns) return;
        array_.refuse(" where [" + std::to_string(rows) + ", " + std::to_string(columns) + "] is needed");
    }
    void require(int64_t count) const {
        if (rows() != count) array_.refuse(" where [" + std::to_string(count) + "] is needed");
    }

  private:
    Place place_;
    Array array_;
};

// ArgumentError and DeviceError as errors of biomedgpt_edge.
void translate_error(std::exception_ptr thrown);

}  // namespace biomedgpt::python
