// Questions about CUDA that can be asked in every build.
#pragma once

namespace biomedgpt {

// Whether this build contains the CUDA kernels.
bool cuda_compiled() noexcept;

// Usable CUDA devices; 0 where there is no driver or no device, or in a build without CUDA.
int cuda_device_count() noexcept;

}  // namespace biomedgpt
