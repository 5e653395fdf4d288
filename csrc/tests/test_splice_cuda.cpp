#include <cuda_runtime_api.h>

#include <cstdio>
#include <stdexcept>

#include "common/cuda_device.h"
#include "runner.h"
#include "splice/splice_cuda.h"
#include "splice_example.h"

using namespace biomedgpt;
using biomedgpt::testing::SpliceExample;

namespace {

void require(cudaError_t code) {
    if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

class DeviceFloats {
  public:
    explicit DeviceFloats(const std::vector<float>& values) : bytes_(values.size() * sizeof(float)) {
        require(cudaMalloc(&data_, bytes_));
        require(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice));
    }
    ~DeviceFloats() { cudaFree(data_); }
    DeviceFloats(const DeviceFloats&) = delete;
    DeviceFloats& operator=(const DeviceFloats&) = delete;

    float* data() const { return static_cast<float*>(data_); }
    void copy_to(std::vector<float>& values) const {
        require(cudaMemcpy(values.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    }

  private:
    void* data_ = nullptr;
    size_t bytes_;
};

}  // namespace

TEST(cuda_agrees_with_double) {
    if (cuda_device_count() == 0) {
        std::printf("skipped: cuda_agrees_with_double (no CUDA device)\n");
        return;
    }
    const SpliceExample example;
    std::vector<float> out(static_cast<size_t>(example.rows() * SpliceExample::kHidden), NAN);
    SpliceArgs args = example.args(out);
    const DeviceFloats table(example.table), features(example.features), weight(example.weight), bias(example.bias);
    const DeviceFloats result(out);
    args.out = result.data();
    args.table.rows.data = table.data();
    auto& segment = std::get<FeatureSegment>(args.segments[1]);
    segment.features.data = features.data();
    segment.weight.data = weight.data();
    segment.bias = bias.data();
    cudaStream_t stream = nullptr;
    require(cudaStreamCreate(&stream));
    splice_cuda(args, stream);
    require(cudaStreamSynchronize(stream));
    require(cudaStreamDestroy(stream));
    result.copy_to(out);
    CHECK(example.largest_error(out) < testing::kExampleTolerance);
}
