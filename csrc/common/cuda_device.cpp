#include "common/cuda_device.h"

#if defined(BIOMEDGPT_HAVE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace biomedgpt {

#if defined(BIOMEDGPT_HAVE_CUDA)
bool cuda_compiled() noexcept {
    return true;
}

int cuda_device_count() noexcept {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // clears the sticky "no driver" code, so that a later call does not report it as its own
        return 0;
    }
    return count;
}
#else
bool cuda_compiled() noexcept {
    return false;
}

int cuda_device_count() noexcept {
    return 0;
}
#endif

}  // namespace biomedgpt
