// An array argument, whichever library made it: numpy, the buffer protocol or DLPack. Used in place, never copied or
// cast.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "common/dtype.h"
#include "python/dlpack.h"

namespace biomedgpt::python {

namespace py = pybind11;

// "list", "numpy.int64": what an error calls an object that is no array.
std::string type_name(py::handle value);

// An argument's name, put together only where an error shows it: most calls are one per token.
struct ArgName {
    const char* field;
    int64_t segment = -1;

    std::string text() const;
};

// What an error says about an argument of the wrong kind, dtype, rank or layout.
struct Expected {
    int rank;  // 1 or 2
    const char* text;
};

// Where the arrays of a call have to be.
struct Place {
    bool cuda = false;
    int64_t stream = 0;             // a cudaStream_t as a number; exporters make it wait for what fills their arrays
    std::optional<int32_t> device;  // that of the CUDA arrays seen so far: all have to be on one

    std::string text() const;
};

// Keeps what it views alive; made and destroyed with the GIL held.
class Array {
  public:
    // Throws ArgumentError for anything but an array of that rank, in that place, of an element type that kernels know.
    Array(py::handle value, const ArgName& name, const Expected& expected, Place& place);

    void* data() const { return data_; }
    DType dtype() const { return dtype_; }
    bool writeable() const { return writeable_; }
    int64_t shape(int axis) const { return shape_[axis]; }
    int64_t size() const { return expected_->rank == 1 ? shape_[0] : shape_[0] * shape_[1]; }
    int64_t stride(int axis) const { return strides_[axis]; }  // in bytes

    // Whether elements that are neighbours along an axis are neighbours in memory. Any stride is allowed on an axis of
    // length one and on every axis of an empty array.
    bool adjacent(int axis) const;
    bool contiguous() const;

    // Throws the ArgumentError that shows dtype and shape, followed by `what` is wrong with them.
    [[noreturn]] void refuse(const std::string& what = "") const;

  private:
    struct Release {
        void operator()(Py_buffer* buffer) const;
        void operator()(dlpack::ManagedTensor* managed) const;
        void operator()(dlpack::ManagedTensorVersioned* managed) const;
    };

    void take_numpy(py::handle value);
    void take_buffer(py::handle value);
    void take_dlpack(py::handle value, Place& place);
    void take_tensor(const dlpack::Tensor& tensor, Place& place);
    void require_place(const dlpack::Device& device, Place& place) const;
    template <typename DTypeName, typename Int>
    void take_elements(std::optional<DType> dtype, const DTypeName& dtype_name, int64_t rank, const Int* shape);
    template <typename Call>
    auto ask_exporter(py::handle value, const Call& call) const;

    ArgName name_;
    const Expected* expected_;
    void* data_ = nullptr;
    DType dtype_ = DType::f32;
    bool writeable_ = false;
    int64_t shape_[2] = {};
    int64_t strides_[2] = {};
    // One of these holds the memory.
    py::object array_;
    std::unique_ptr<Py_buffer, Release> buffer_;  // never moved: its pointers may lead into itself
    std::unique_ptr<dlpack::ManagedTensor, Release> managed_;
    std::unique_ptr<dlpack::ManagedTensorVersioned, Release> versioned_;
};

}  // namespace biomedgpt::python
