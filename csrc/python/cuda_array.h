// Rows in the memory of a decoder's GPU: what prompts are put together in, and what is read for that.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "common/dtype.h"
#include "decoder/decoder.h"

namespace biomedgpt::python {

// One or two dimensions, contiguous; views share the memory. What is done with it is put into the decoder's stream.
class CudaArray {
  public:
    // Throws ArgumentError for sizes that no array has, DeviceError where the GPU has not so much memory.
    CudaArray(std::shared_ptr<CudaDecoder> decoder, const pybind11::object& shape, const pybind11::object& dtype);

    CudaArray(const CudaArray&) = default;
    CudaArray& operator=(const CudaArray&) = delete;
    ~CudaArray();

    char* data() const { return data_; }
    DType dtype() const { return dtype_; }
    int rank() const { return rank_; }
    int64_t shape(int axis) const { return shape_[axis]; }
    int64_t bytes() const { return shape_[0] * shape_[1] * size_of(dtype_); }
    bool is_of(const CudaDecoder& decoder) const { return decoder_.get() == &decoder; }

    pybind11::tuple shape() const;
    CudaArray rows(const pybind11::slice& slice) const;
    void upload(const pybind11::object& from) const;
    void download(const pybind11::object& to) const;
    void copy_from(const CudaArray& from) const;
    pybind11::tuple device() const;
    pybind11::capsule exported(const pybind11::object& stream, const pybind11::object& device,
                               const pybind11::object& copy) const;

    // "float32 [3, 4096]"
    std::string text() const;

  private:
    // What DLPack's consumers hold.
    struct Export;

    std::shared_ptr<CudaDecoder> decoder_;  // whose stream has to be there when memory is freed
    std::shared_ptr<void> memory_;
    char* data_ = nullptr;
    DType dtype_ = DType::f32;
    int rank_ = 0;
    int64_t shape_[2] = {1, 1};
};

void bind_cuda_array(pybind11::module_& module);

}  // namespace biomedgpt::python
