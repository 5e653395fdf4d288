// Tests that are compiled twice: for the emulation of a GPU, and for one, where there is one.
#pragma once

#include <cstdio>
#include <vector>

#include "common/cuda_device.h"
#include "runner.h"
#include "simt/gpu.h"

#if defined(__CUDACC__)
#define GPU_TEST(name)                                            \
    static void gpu_test_##name();                                \
    TEST(name##_on_the_gpu) {                                     \
        if (biomedgpt::cuda_device_count() > 0) {                 \
            gpu_test_##name();                                    \
        } else {                                                  \
            std::printf("skipped: " #name " (no CUDA device)\n"); \
        }                                                         \
    }                                                             \
    static void gpu_test_##name()
#else
#define GPU_TEST(name) TEST(name)
#endif

namespace biomedgpt::testing {

inline namespace BIOMEDGPT_SIMT {

// Numbers in the memory of a GPU.
template <class T>
class OnGpu {
  public:
    OnGpu(Gpu& gpu, const std::vector<T>& values) : gpu_(gpu), buffer_(gpu, values.size(), "a test") {
        gpu.copy(buffer_.get(), values.data(), buffer_.bytes());
        gpu.wait();
    }

    T* get() const { return buffer_.get(); }

    std::vector<T> back() const {
        std::vector<T> values(buffer_.count());
        gpu_.copy(values.data(), buffer_.get(), buffer_.bytes());
        gpu_.wait();
        return values;
    }

  private:
    Gpu& gpu_;
    Buffer<T> buffer_;
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt::testing
