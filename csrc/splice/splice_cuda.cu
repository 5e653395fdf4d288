// splice on a CUDA device: the straightforward form of each kernel, without tuning and without a measured speed.
//
// Status: compiled, but not yet run on a device. The test runner compares it with double precision where it finds one,
// and says that it skips where it does not.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "common/error.h"
#include "splice/splice_cuda.h"

namespace biomedgpt {
namespace {

constexpr int kTile = 16;                // a 16 x 16 block: one output per thread, operands of a step in shared memory
constexpr int kThreadsPerRow = 256;      // for kernels that give a block to each row
constexpr int64_t kMaxGridRows = 65535;  // the limit of gridDim.y

void check(cudaError_t code, const char* call) {
    if (code != cudaSuccess) throw DeviceError(std::string(call) + ": " + cudaGetErrorString(code));
}

// Device memory in stream order: freed when the work queued before the free is done.
class Scratch {
  public:
    Scratch(int64_t bytes, cudaStream_t stream) : stream_(stream) {
        check(cudaMallocAsync(&data_, static_cast<size_t>(bytes), stream), "cudaMallocAsync");
    }
    ~Scratch() { cudaFreeAsync(data_, stream_); }  // a failure here repeats that of an earlier call, already thrown
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

  private:
    void* data_ = nullptr;
    cudaStream_t stream_;
};

__device__ float load(const void* data, DType dtype, int64_t index) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[index];
    if (dtype == DType::f16) return __half2float(static_cast<const __half*>(data)[index]);
    return static_cast<float>(static_cast<const signed char*>(data)[index]);
}

__global__ void write_tokens(const void* ids, bool wide_ids, Matrix table, const float* scales, float* out) {
    const int64_t i = blockIdx.x;
    const int64_t id = wide_ids ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
    const float scale = scales == nullptr ? 1.0f : scales[id];
    for (int64_t c = threadIdx.x; c < table.columns; c += blockDim.x) {
        out[i * table.columns + c] = load(table.data, table.dtype, id * table.row_stride + c) * scale;
    }
}

// Sum of `value` over the block, for every thread of it.
__device__ double block_sum(double value) {
    __shared__ double partial[kThreadsPerRow];
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int half = kThreadsPerRow / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    const double sum = partial[0];
    __syncthreads();  // nobody may write the next sum's terms before all have read this one
    return sum;
}

// Two passes in double, as on the CPU; the product that follows is far more work even at the reduced double rate of
// consumer GPUs.
__global__ void normalise(Matrix features, double eps, float* rows) {
    const int64_t start = blockIdx.x * features.row_stride;
    const double width = static_cast<double>(features.columns);
    double sum = 0;
    for (int64_t k = threadIdx.x; k < features.columns; k += blockDim.x) {
        sum += load(features.data, features.dtype, start + k);
    }
    const double mean = block_sum(sum) / width;
    double squares = 0;
    for (int64_t k = threadIdx.x; k < features.columns; k += blockDim.x) {
        const double centred = load(features.data, features.dtype, start + k) - mean;
        squares += centred * centred;
    }
    const double rstd = 1.0 / sqrt(block_sum(squares) / width + eps);
    for (int64_t k = threadIdx.x; k < features.columns; k += blockDim.x) {
        const double centred = load(features.data, features.dtype, start + k) - mean;
        rows[blockIdx.x * features.columns + k] = static_cast<float>(centred * rstd);
    }
}

__global__ void project(Matrix features, Matrix weight, const float* bias, float* out) {
    __shared__ float feature_tile[kTile][kTile];
    __shared__ float weight_tile[kTile][kTile + 1];  // read down a column: the padding puts its rows in other banks
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.y;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
    const int64_t weight_row = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.y;
    float sum = 0;
    for (int64_t start = 0; start < features.columns; start += kTile) {
        const int64_t k = start + threadIdx.x;
        const bool inside = k < features.columns;
        feature_tile[threadIdx.y][threadIdx.x] =
            inside && row < features.rows ? load(features.data, features.dtype, row * features.row_stride + k) : 0.0f;
        weight_tile[threadIdx.y][threadIdx.x] = inside && weight_row < weight.rows
                                                    ? load(weight.data, weight.dtype, weight_row * weight.columns + k)
                                                    : 0.0f;
        __syncthreads();
        for (int step = 0; step < kTile; ++step) {
            sum += feature_tile[threadIdx.y][step] * weight_tile[threadIdx.x][step];
        }
        __syncthreads();
    }
    if (row < features.rows && column < weight.rows) out[row * weight.rows + column] = bias[column] + sum;
}

void write_segment(const TokenSegment& segment, const SpliceArgs& args, cudaStream_t stream) {
    if (segment.count == 0) return;
    const int64_t bytes = segment.count * size_of(segment.ids_dtype);
    const Scratch ids(bytes, stream);
    // From pageable memory: the driver has taken its copy of the ids when this returns.
    check(cudaMemcpyAsync(ids.data(), segment.ids, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
    write_tokens<<<static_cast<unsigned>(segment.count), kThreadsPerRow, 0, stream>>>(
        ids.data(), segment.ids_dtype == DType::i64, args.table.rows, args.table.scales,
        args.out + segment.row * args.hidden);
    check(cudaGetLastError(), "write_tokens");
}

void project_rows(const Matrix& features, const FeatureSegment& segment, const SpliceArgs& args, cudaStream_t stream) {
    const dim3 block(kTile, kTile);
    for (int64_t first = 0; first < features.rows; first += kMaxGridRows * kTile) {
        Matrix rows = features;
        rows.data = features.at(first, 0);
        rows.rows = std::min(kMaxGridRows * kTile, features.rows - first);
        const dim3 grid(static_cast<unsigned>((args.hidden + kTile - 1) / kTile),
                        static_cast<unsigned>((rows.rows + kTile - 1) / kTile));
        project<<<grid, block, 0, stream>>>(rows, segment.weight, segment.bias,
                                            args.out + (segment.row + first) * args.hidden);
        check(cudaGetLastError(), "project");
    }
}

void write_segment(const FeatureSegment& segment, const SpliceArgs& args, cudaStream_t stream) {
    const Matrix& features = segment.features;
    if (features.rows == 0) return;
    if (!segment.layer_norm_eps) return project_rows(features, segment, args, stream);
    const Scratch scratch(features.rows * features.columns * size_of(DType::f32), stream);
    auto* rows = static_cast<float*>(scratch.data());
    normalise<<<static_cast<unsigned>(features.rows), kThreadsPerRow, 0, stream>>>(features, *segment.layer_norm_eps,
                                                                                   rows);
    check(cudaGetLastError(), "normalise");
    project_rows({rows, DType::f32, features.rows, features.columns, features.columns}, segment, args, stream);
}

}  // namespace

void splice_cuda(const SpliceArgs& args, cudaStream_t stream) {
    check_splice(args);
    for (const Segment& segment : args.segments) {
        std::visit([&](const auto& typed) { write_segment(typed, args, stream); }, segment);
    }
}

}  // namespace biomedgpt
