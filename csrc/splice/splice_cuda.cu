// splice on a CUDA device: one kernel for a whole prompt, whose blocks look up in a plan what they write.
//
// Status: compiled for compute capability 7.5 to 12.0, but not yet run on a device, so tile sizes are reasoned and not
// measured. The test runner compares it with double precision where it finds a device, and says that it skips where it
// does not.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "splice/splice_cuda.h"
#include "splice/splice_cuda_plan.h"

namespace biomedgpt {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 4;  // at the 128 registers a thread that this allows, the compiler spills none
constexpr int kOctet = 8;               // elements that a thread moves at a time
constexpr int kStep = 32;               // columns of both operands that are in shared memory at a time
constexpr int kOctetsPerStep = kStep / kOctet;
constexpr int kSlots = kPlanTile * kOctetsPerStep / kThreads;  // octets of each operand that a thread brings per step
constexpr int kSlotRows = kPlanTile / kSlots;
constexpr int kInFlight = 4;  // octets that a lane asks for before it uses the first: hides the latency of memory

static_assert(kPlanTokenRows == kWarps, "a warp fills one row from the table");
static_assert(kThreads / kOctetsPerStep == kSlotRows);

struct Launch {
    const PlanPart* parts;
    int32_t part_count;
    int32_t hidden;
    const int32_t* ids;
    PlanMatrix table;
    const float* scales;
    PlanMatrix out;
};

// How a feature x enters the product: ((x - shift) - mean) * rstd * scale. Without a norm that is x * scale.
//
// `shift` is the row's first element, so `mean` is that of small differences even where the row's mean is a thousand
// times its deviation: no element is further from the mean than sqrt(width) deviations, hence float32 suffices. (Double
// would do as well, at 1/64 of the speed on consumer GPUs, in every block that shares the row.)
//
// `scale` is a power of two, so neither it nor `restore`, its inverse on the sums, rounds anything.
struct RowScale {
    float shift;
    float mean;
    float rstd;
    float scale;
    float restore;
};

// Rows of an operand tile are 16 bytes longer than their values: eight lanes that read 16 bytes of eight rows at the
// same time then meet in no bank. A row of sums is padded for the same reason.
constexpr int kExactPitch = kStep + 4;
constexpr int kHalfPitch = kStep + 8;
constexpr int kSumPitch = kPlanTile + 4;

struct alignas(32) Workspace {  // as wmma wants what it reads and writes
    union {
        float exact[2][kPlanTile * kExactPitch];  // features, weights
        __half half_width[2][kPlanTile * kHalfPitch];
        float sums[kPlanTile * kSumPitch];
    };
    RowScale scales[kPlanTile];
};

__device__ int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarp;
}

__device__ int warp_index() {
    return static_cast<int>(threadIdx.x) / kWarp;
}

// Eight neighbouring elements as they lie in memory, in 8, 4 or 2 words. Not converted when loaded: the conversion
// would wait for the load, which is to go on behind the arithmetic of the step before.
struct Octet {
    uint32_t words[kOctet];
};

__device__ void load_whole(const char* at, int element_bytes, Octet& octet) {
    if (element_bytes == 1) {
        const uint2 values = __ldg(reinterpret_cast<const uint2*>(at));
        octet.words[0] = values.x, octet.words[1] = values.y;
        return;
    }
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(at));
    octet.words[0] = low.x, octet.words[1] = low.y, octet.words[2] = low.z, octet.words[3] = low.w;
    if (element_bytes == 2) return;
    const uint4 high = __ldg(reinterpret_cast<const uint4*>(at) + 1);
    octet.words[4] = high.x, octet.words[5] = high.y, octet.words[6] = high.z, octet.words[7] = high.w;
}

// The first `count` elements, by loads of one element; the rest stays zero. Loops over an octet are unrolled
// throughout: indices known at compile time keep it in registers.
__device__ void load_part(const char* at, int element_bytes, int count, Octet& octet) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
        if (i >= count) continue;
        if (element_bytes == 4) {
            octet.words[i] = __ldg(reinterpret_cast<const uint32_t*>(at) + i);
        } else if (element_bytes == 2) {
            octet.words[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(at) + i)} << i % 2 * 16;
        } else {
            octet.words[i / 4] |= uint32_t{__ldg(reinterpret_cast<const uint8_t*>(at) + i)} << i % 4 * 8;
        }
    }
}

// Zeros stand for columns beyond the matrix.
__device__ Octet load_octet(const PlanMatrix& matrix, int64_t row, int column) {
    Octet octet = {};
    const int count = matrix.width - column;
    if (count <= 0) return octet;
    const char* at = static_cast<const char*>(matrix.data) + row * matrix.row_bytes +
                     static_cast<int64_t>(column) * matrix.element_bytes;
    if (matrix.aligned && count >= kOctet) {
        load_whole(at, matrix.element_bytes, octet);
    } else {
        load_part(at, matrix.element_bytes, count, octet);
    }
    return octet;
}

__device__ void widen(const Octet& octet, DType dtype, float (&values)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
        if (dtype == DType::f32) {
            values[i] = __uint_as_float(octet.words[i]);
        } else if (dtype == DType::f16) {
            values[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(octet.words[i / 2] >> i % 2 * 16)));
        } else {
            values[i] = static_cast<float>(static_cast<int8_t>(octet.words[i / 4] >> i % 4 * 8));
        }
    }
}

__device__ uint32_t half_pair(float low, float high) {
    return uint32_t{__half_as_ushort(__float2half_rn(low))} | uint32_t{__half_as_ushort(__float2half_rn(high))} << 16;
}

__device__ uint4 float_bits(const float* values) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
}

// Eight values to an address that is a multiple of 16 bytes.
__device__ void store_whole(float* to, const float (&values)[kOctet]) {
    reinterpret_cast<uint4*>(to)[0] = float_bits(values);
    reinterpret_cast<uint4*>(to)[1] = float_bits(values + 4);
}

__device__ void store_whole(__half* to, const float (&values)[kOctet]) {
    *reinterpret_cast<uint4*>(to) = {half_pair(values[0], values[1]), half_pair(values[2], values[3]),
                                     half_pair(values[4], values[5]), half_pair(values[6], values[7])};
}

__device__ void store_one(const PlanMatrix& out, int64_t row, int column, float value) {
    char* at = static_cast<char*>(const_cast<void*>(out.data)) + row * out.row_bytes;
    if (out.dtype == DType::f32) {
        reinterpret_cast<float*>(at)[column] = value;
    } else {
        reinterpret_cast<__half*>(at)[column] = __float2half_rn(value);
    }
}

__device__ void store_octet(const PlanMatrix& out, int64_t row, int column, const float (&values)[kOctet]) {
    if (!out.aligned || column + kOctet > out.width) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            if (column + i < out.width) store_one(out, row, column + i, values[i]);
        }
        return;
    }
    char* at = static_cast<char*>(const_cast<void*>(out.data)) + row * out.row_bytes;
    if (out.dtype == DType::f32) {
        store_whole(reinterpret_cast<float*>(at) + column, values);
    } else {
        store_whole(reinterpret_cast<__half*>(at) + column, values);
    }
}

__device__ void write_tokens(const Launch& launch, const PlanPart& part, const PlanTile& tile) {
    if (warp_index() >= tile.rows) return;
    const int64_t row = tile.row + warp_index();
    const int32_t id = launch.ids[part.first_id + row];
    const float scale = launch.scales == nullptr ? 1.0f : launch.scales[id];
    constexpr int kStride = kWarp * kOctet;
    for (int start = lane_index() * kOctet; start < launch.hidden; start += kInFlight * kStride) {
        Octet octets[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) octets[i] = load_octet(launch.table, id, start + i * kStride);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            float values[kOctet];
            widen(octets[i], launch.table.dtype, values);
            for (float& value : values) value *= scale;
            store_octet(launch.out, part.row + row, start + i * kStride, values);
        }
    }
}

__device__ float warp_sum(float value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// fmaxf passes over a NaN. That is meant: whatever its scale, a NaN stays one.
__device__ float warp_max(float value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    }
    return value;
}

// Calls visit(r, x) for this lane's share of the elements x of rows `first` + r, r < kInFlight; those from `rows` on
// are not there.
template <typename Visit>
__device__ void visit_rows(const PlanMatrix& features, int64_t first, int rows, Visit visit) {
    for (int column = lane_index() * kOctet; column < features.width; column += kWarp * kOctet) {
        Octet octets[kInFlight];
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) octets[r] = r < rows ? load_octet(features, first + r, column) : Octet{};
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
            float values[kOctet];
            widen(octets[r], features.dtype, values);
#pragma unroll
            for (int i = 0; i < kOctet; ++i) {
                if (column + i < features.width) visit(r, values[i]);
            }
        }
    }
}

// Powers of two that bring `largest` into [2^14, 2^15), and back: half's finite range is used to the top, so elements
// lose bits to its subnormals only from 2^-28 of the row's largest on. Below 2^-112 the scale stays at 2^126, for its
// inverse is to be a normal float; what is lost there float32 itself cannot hold.
__device__ void scale_to_half(float largest, RowScale& row) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 0xff);  // biased by 127; 255 of Inf and NaN
    const int scale = min(127 + 14 - (exponent - 127), 253);
    row.scale = __uint_as_float(static_cast<uint32_t>(scale) << 23);
    row.restore = __uint_as_float(static_cast<uint32_t>(254 - scale) << 23);
}

// Rows `first` + r, r < `rows`, of one warp, into scales[r].
__device__ void scale_rows(const PlanPart& part, int64_t first, int rows, RowScale* scales) {
    const auto width = static_cast<float>(part.features.width);
    RowScale row[kInFlight];
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) row[r] = {0.0f, 0.0f, 1.0f, 1.0f, 1.0f};
    if (part.normalised) {
        float sums[kInFlight] = {};
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
            float start[kOctet] = {};
            if (r < rows) widen(load_octet(part.features, first + r, 0), part.features.dtype, start);
            row[r].shift = start[0];
        }
        visit_rows(part.features, first, rows, [&](int r, float x) { sums[r] += x - row[r].shift; });
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) row[r].mean = warp_sum(sums[r]) / width;
    }
    float squares[kInFlight] = {};
    float largest[kInFlight] = {};
    visit_rows(part.features, first, rows, [&](int r, float x) {
        const float centred = (x - row[r].shift) - row[r].mean;
        squares[r] += centred * centred;
        largest[r] = fmaxf(largest[r], fabsf(centred));
    });
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) {
        const float variance = warp_sum(squares[r]) / width;
        const float magnitude = warp_max(largest[r]);
        // Where squares overflow, beyond deviations of 1e19, a NaN tells; 1 / sqrt(infinity) would say 0.
        if (part.normalised) row[r].rstd = variance <= FLT_MAX ? 1.0f / sqrtf(variance + part.eps) : NAN;
        if (part.kind == PartKind::half_width) scale_to_half(magnitude * row[r].rstd, row[r]);
        if (r < rows && lane_index() == 0) scales[r] = row[r];
    }
}

// All rows of the tile. Blocks that share rows each do this anew: a wait for one another could not be had in one
// launch.
__device__ void scale_rows(const PlanPart& part, const PlanTile& tile, RowScale* scales) {
    if (part.kind == PartKind::exact && !part.normalised) {
        if (static_cast<int>(threadIdx.x) < kPlanTile) scales[threadIdx.x] = {0.0f, 0.0f, 1.0f, 1.0f, 1.0f};
        return;
    }
    for (int row = warp_index() * kInFlight; row < tile.rows; row += kWarps * kInFlight) {
        scale_rows(part, tile.row + row, min(kInFlight, tile.rows - row), scales + row);
    }
}

// What this thread brings of one step: for each slot, an octet of a row of features and one of a row of weights.
struct Step {
    Octet features[kSlots];
    Octet weight[kSlots];
};

__device__ int slot_row(int slot) {
    return static_cast<int>(threadIdx.x) / kOctetsPerStep + slot * kSlotRows;
}

__device__ int slot_column() {
    return static_cast<int>(threadIdx.x) % kOctetsPerStep * kOctet;
}

__device__ void load_step(const PlanPart& part, const PlanTile& tile, int k, Step& step) {
    const int column = k + slot_column();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
        const int row = slot_row(slot);
        step.features[slot] = row < tile.rows ? load_octet(part.features, tile.row + row, column) : Octet{};
        step.weight[slot] = row < tile.columns ? load_octet(part.weight, tile.column + row, column) : Octet{};
    }
}

__device__ void store_weights(const Octet& octet, DType dtype, float* to) {
    float values[kOctet];
    widen(octet, dtype, values);
    store_whole(to, values);
}

__device__ void store_weights(const Octet& octet, DType, __half* to) {
    *reinterpret_cast<uint4*>(to) = {octet.words[0], octet.words[1], octet.words[2], octet.words[3]};
}

template <typename Element>
__device__ void store_step(const PlanPart& part, const PlanTile& tile, int k, const Step& step, const RowScale* scales,
                           Element* features, Element* weight, int pitch) {
    const int column = k + slot_column();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
        const int row = slot_row(slot);
        store_weights(step.weight[slot], part.weight.dtype, weight + row * pitch + slot_column());
        float values[kOctet];
        widen(step.features[slot], part.features.dtype, values);
        RowScale by = {};  // of rows that are not there: makes zeros of them
        if (row < tile.rows) by = scales[row];
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
            const float scaled = ((values[i] - by.shift) - by.mean) * by.rstd * by.scale;
            // Zeros of the padding are set after the scaling: -mean * scale may be infinite, and the weight's zero
            // makes a NaN of that.
            values[i] = column + i < part.features.width ? scaled : 0.0f;
        }
        store_whole(features + row * pitch + slot_column(), values);
    }
}

__device__ float bias_of(const PlanPart& part, const PlanTile& tile, int column) {
    return column < tile.columns ? __ldg(part.bias + tile.column + column) : 0.0f;
}

__device__ void write_sum(const Launch& launch, const PlanPart& part, const PlanTile& tile, int row, int column,
                          float value) {
    if (row < tile.rows && column < tile.columns) {
        store_one(launch.out, part.row + tile.row + row, tile.column + column, value);
    }
}

// float32: 8 x 4 sums per thread, rows and columns interleaved over the threads, so that the lanes which read a row of
// features share it and those which write a row of out are neighbours.
struct Exact {
    static constexpr int kPitch = kExactPitch;
    static constexpr int kColumnThreads = 16, kRowThreads = kThreads / kColumnThreads;
    static constexpr int kRows = kPlanTile / kRowThreads, kColumns = kPlanTile / kColumnThreads;

    float sums[kRows][kColumns] = {};

    static __device__ float* tile(Workspace& workspace, int operand) { return workspace.exact[operand]; }
    static __device__ int row(int i) { return static_cast<int>(threadIdx.x) / kColumnThreads + i * kRowThreads; }
    static __device__ int column(int j) { return static_cast<int>(threadIdx.x) % kColumnThreads + j * kColumnThreads; }

    __device__ void multiply(const float* features, const float* weight) {
#pragma unroll 1  // 128 multiply-adds each; unrolled, it spills registers
        for (int k = 0; k < kStep; k += 4) {
            float4 w[kColumns];
#pragma unroll
            for (int j = 0; j < kColumns; ++j) w[j] = *reinterpret_cast<const float4*>(weight + column(j) * kPitch + k);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float4 x = *reinterpret_cast<const float4*>(features + row(i) * kPitch + k);
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    sums[i][j] += x.x * w[j].x;
                    sums[i][j] += x.y * w[j].y;
                    sums[i][j] += x.z * w[j].z;
                    sums[i][j] += x.w * w[j].w;
                }
            }
        }
    }

    __device__ void write(const Launch& launch, const PlanPart& part, const PlanTile& tile, Workspace&) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const float bias = bias_of(part, tile, column(j));
#pragma unroll
            for (int i = 0; i < kRows; ++i) write_sum(launch, part, tile, row(i), column(j), sums[i][j] + bias);
        }
    }
};

// Tensor cores through wmma, whose 16 x 16 x 16 product of halves, summed in float32, every one from Turing on has. A
// warp has a quarter of the tile, 2 x 2 products, so that each operand it loads is used twice.
struct HalfWidth {
    static constexpr int kPitch = kHalfPitch;
    static constexpr int kEdge = 16;
    static constexpr int kProducts = kPlanTile / 2 / kEdge;

    wmma::fragment<wmma::accumulator, kEdge, kEdge, kEdge, float> sums[kProducts][kProducts];

    static __device__ __half* tile(Workspace& workspace, int operand) { return workspace.half_width[operand]; }
    static __device__ int row(int i) { return (warp_index() / 2 * kProducts + i) * kEdge; }
    static __device__ int column(int j) { return (warp_index() % 2 * kProducts + j) * kEdge; }

    __device__ HalfWidth() {
        for (auto& line : sums) {
            for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
        }
    }

    __device__ void multiply(const __half* features, const __half* weight) {
#pragma unroll
        for (int k = 0; k < kStep; k += kEdge) {
            wmma::fragment<wmma::matrix_a, kEdge, kEdge, kEdge, __half, wmma::row_major> x[kProducts];
            // [column, k] by rows is [k, column] by columns: the weight matrix needs no transposition.
            wmma::fragment<wmma::matrix_b, kEdge, kEdge, kEdge, __half, wmma::col_major> w[kProducts];
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                wmma::load_matrix_sync(x[i], features + row(i) * kPitch + k, kPitch);
                wmma::load_matrix_sync(w[i], weight + column(i) * kPitch + k, kPitch);
            }
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
#pragma unroll
                for (int j = 0; j < kProducts; ++j) wmma::mma_sync(sums[i][j], x[i], w[j], sums[i][j]);
            }
        }
    }

    // Through shared memory: which thread has which element of a fragment is not specified.
    __device__ void write(const Launch& launch, const PlanPart& part, const PlanTile& tile, Workspace& workspace) {
        __syncthreads();  // the sums overwrite operands that other warps may still read
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
#pragma unroll
            for (int j = 0; j < kProducts; ++j) {
                wmma::store_matrix_sync(workspace.sums + row(i) * kSumPitch + column(j), sums[i][j], kSumPitch,
                                        wmma::mem_row_major);
            }
        }
        __syncthreads();
        const int column = static_cast<int>(threadIdx.x) % kPlanTile;
        const float bias = bias_of(part, tile, column);
        for (int row = static_cast<int>(threadIdx.x) / kPlanTile; row < tile.rows; row += kThreads / kPlanTile) {
            const float sum = workspace.sums[row * kSumPitch + column] * workspace.scales[row].restore;
            write_sum(launch, part, tile, row, column, sum + bias);
        }
    }
};

template <typename Arithmetic>
__device__ void project(const Launch& launch, const PlanPart& part, const PlanTile& tile, Workspace& workspace) {
    auto* features = Arithmetic::tile(workspace, 0);
    auto* weight = Arithmetic::tile(workspace, 1);
    scale_rows(part, tile, workspace.scales);
    Arithmetic arithmetic;
    Step step;
    load_step(part, tile, 0, step);
    for (int k = 0; k < part.features.width; k += kStep) {
        __syncthreads();  // the scales are there, and nobody reads the tiles of the step before any more
        store_step(part, tile, k, step, workspace.scales, features, weight, Arithmetic::kPitch);
        __syncthreads();
        if (k + kStep < part.features.width) load_step(part, tile, k + kStep, step);
        arithmetic.multiply(features, weight);
    }
    arithmetic.write(launch, part, tile, workspace);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) run_plan(Launch launch) {
    __shared__ Workspace workspace;
    __shared__ PlanPart part;  // not in registers: it would take thirty from each thread
    const auto block = static_cast<int>(blockIdx.x);
    if (threadIdx.x == 0) part = launch.parts[find_part(launch.parts, launch.part_count, block)];
    __syncthreads();
    const PlanTile tile = tile_of(part, block, launch.hidden);
    if (part.kind == PartKind::tokens) {
        write_tokens(launch, part, tile);
    } else if (part.kind == PartKind::exact) {
        project<Exact>(launch, part, tile, workspace);
    } else {
        project<HalfWidth>(launch, part, tile, workspace);
    }
}

void check(cudaError_t code, const char* call) {
    if (code != cudaSuccess) throw DeviceError(std::string(call) + ": " + cudaGetErrorString(code));
}

// Whether the current device has memory in stream order; virtual ones may have none.
bool has_memory_pools() {
    int device = 0, supported = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&supported, cudaDevAttrMemoryPoolsSupported, device), "cudaDeviceGetAttribute");
    return supported != 0;
}

// Device memory, freed when the work queued before the free is done: in stream order where there is that, and
// otherwise with a wait.
class StreamMemory {
  public:
    StreamMemory(size_t bytes, cudaStream_t stream) : stream_(stream), pooled_(has_memory_pools()) {
        check(pooled_ ? cudaMallocAsync(&data_, bytes, stream) : cudaMalloc(&data_, bytes), "cudaMalloc");
    }
    ~StreamMemory() {
        if (data_ != nullptr) release(data_);  // another call has failed, and its error is on the way
    }
    StreamMemory(const StreamMemory&) = delete;
    StreamMemory& operator=(const StreamMemory&) = delete;

    char* data() const { return static_cast<char*>(data_); }
    void free() { check(release(std::exchange(data_, nullptr)), "cudaFree"); }

  private:
    cudaError_t release(void* data) const { return pooled_ ? cudaFreeAsync(data, stream_) : cudaFree(data); }

    void* data_ = nullptr;
    cudaStream_t stream_;
    bool pooled_;
};

// Pageable host memory that a stream copies from. CUDA's documentation says that cudaMemcpyAsync from such memory
// "might be synchronous" and that "the driver may synchronize with the stream and stage the copy". It names no moment
// from which the source may be freed, and a device that reads pageable memory itself has no need to stage anything. So
// the memory is freed by the stream.
class StreamSource {
  public:
    StreamSource(std::vector<char> bytes, cudaStream_t stream)
        : bytes_(std::make_unique<std::vector<char>>(std::move(bytes))), stream_(stream) {}
    ~StreamSource() {
        if (bytes_ != nullptr) cudaStreamSynchronize(stream_);  // another call has failed: a copy may be in flight
    }
    StreamSource(const StreamSource&) = delete;
    StreamSource& operator=(const StreamSource&) = delete;

    const std::vector<char>& bytes() const { return *bytes_; }
    void free() {
        const auto drop = [](void* bytes) { delete static_cast<std::vector<char>*>(bytes); };
        check(cudaLaunchHostFunc(stream_, drop, bytes_.get()), "cudaLaunchHostFunc");
        static_cast<void>(bytes_.release());
    }

  private:
    std::unique_ptr<std::vector<char>> bytes_;
    cudaStream_t stream_;
};

// The parts, then the ids, so that one copy brings both.
std::vector<char> bytes_of(const SplicePlan& plan) {
    const size_t part_bytes = plan.parts.size() * sizeof(PlanPart);
    const size_t id_bytes = plan.ids.size() * sizeof(int32_t);
    std::vector<char> bytes(part_bytes + id_bytes);
    std::memcpy(bytes.data(), plan.parts.data(), part_bytes);
    if (id_bytes > 0) std::memcpy(bytes.data() + part_bytes, plan.ids.data(), id_bytes);
    return bytes;
}

Launch launch_of(const SpliceArgs& args, const SplicePlan& plan, const char* plan_on_device) {
    Launch launch = {};
    launch.parts = reinterpret_cast<const PlanPart*>(plan_on_device);
    launch.part_count = static_cast<int32_t>(plan.parts.size());
    launch.hidden = static_cast<int32_t>(args.hidden);
    launch.ids = reinterpret_cast<const int32_t*>(plan_on_device + plan.parts.size() * sizeof(PlanPart));
    launch.table = plan_matrix(args.table.rows);
    launch.scales = args.table.scales;
    launch.out = plan_matrix({args.out, args.out_dtype, args.rows, args.hidden, args.hidden});
    return launch;
}

// A graph would run the copy and the host function again, after the latter has freed what the former reads.
void check_not_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    if (status != cudaStreamCaptureStatusNone) throw ArgumentError("stream", "one under capture", "one that runs");
}

}  // namespace

void splice_cuda(const SpliceArgs& args, bool allow_16bit, cudaStream_t stream) {
    check_splice(args);
    const SplicePlan plan = plan_splice(args, allow_16bit);
    if (plan.blocks == 0) return;
    check_not_captured(stream);

    StreamSource source(bytes_of(plan), stream);
    const size_t bytes = source.bytes().size();
    StreamMemory memory(bytes, stream);
    check(cudaMemcpyAsync(memory.data(), source.bytes().data(), bytes, cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, run_plan, launch_of(args, plan, memory.data())), "cudaLaunchKernelEx");
    memory.free();
    source.free();
}

}  // namespace biomedgpt
