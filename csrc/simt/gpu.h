// A GPU, or its emulation: memory, a stream of work, and graphs of work.
#pragma once

#include "simt/simt.h"

#if defined(__CUDACC__)
#include "simt/gpu_cuda.h"
#else
#include "simt/gpu_host.h"
#endif

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

// Memory of a GPU, as a member of what uses it.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(Gpu& gpu, size_t count, const std::string& what)
        : data_(static_cast<T*>(gpu.allocate(count * sizeof(T), what))), count_(count) {}
    Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
        other.data_ = nullptr;
        other.count_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~Buffer() {
        if (data_ != nullptr) Gpu::release(data_);
    }

    T* get() const { return data_; }
    size_t count() const { return count_; }
    size_t bytes() const { return count_ * sizeof(T); }

  private:
    T* data_ = nullptr;
    size_t count_ = 0;
};

// Memory of the host that the GPU reads and writes by itself.
template <class T>
class Pinned {
  public:
    Pinned() = default;
    Pinned(Gpu& gpu, size_t count) : data_(static_cast<T*>(gpu.allocate_pinned(count * sizeof(T)))) {}
    Pinned(Pinned&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Pinned& operator=(Pinned&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Pinned() {
        if (data_ != nullptr) Gpu::release_pinned(data_);
    }

    T* get() const { return data_; }

  private:
    T* data_ = nullptr;
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
