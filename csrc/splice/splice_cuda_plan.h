// Which block of splice_cuda's one launch does what. Free of CUDA's headers, so that a machine without a device can
// test it; find_part and tile_of are the very functions the kernel calls.
#pragma once

#include <cstdint>
#include <vector>

#include "splice/splice.h"

#ifdef __CUDACC__
#define BIOMEDGPT_HOST_DEVICE __host__ __device__
#else
#define BIOMEDGPT_HOST_DEVICE
#endif

namespace biomedgpt {

constexpr int kPlanTile = 64;      // rows and columns of out that a block projects
constexpr int kPlanTokenRows = 4;  // rows of out that a block fills from the table

struct PlanMatrix {
    const void* data;
    int64_t row_bytes;  // from one row to the next
    int32_t width;
    int32_t element_bytes;
    DType dtype;
    bool aligned;  // every row begins where eight elements can be read by loads of 16 bytes (int8: of 8)
};

enum class PartKind : int32_t {
    tokens,
    exact,       // projection in float32
    half_width,  // projection of float16 operands, summed in float32
};

// One segment that is not empty, and the blocks that work on it.
struct PlanPart {
    PartKind kind;
    int32_t first_block;
    int64_t row;  // first row of out it writes
    int64_t rows;
    int64_t first_id;     // tokens only
    PlanMatrix features;  // this and all below: projections only
    PlanMatrix weight;
    const float* bias;
    float eps;
    bool normalised;
};

struct SplicePlan {
    std::vector<PlanPart> parts;  // by first_block
    std::vector<int32_t> ids;     // of all token segments
    int32_t blocks = 0;
};

// For arguments that check_splice accepts. Throws ArgumentError where they are too large for one launch.
SplicePlan plan_splice(const SpliceArgs& args, bool allow_16bit);

PlanMatrix plan_matrix(const Matrix& matrix);

// The part that a block works on: the last one that begins at or before it.
BIOMEDGPT_HOST_DEVICE inline int find_part(const PlanPart* parts, int count, int block) {
    int low = 0;
    int high = count - 1;
    while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (parts[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// What a block writes: rows counted from those of its part, columns of out.
struct PlanTile {
    int64_t row;
    int32_t rows;
    int32_t column;
    int32_t columns;
};

BIOMEDGPT_HOST_DEVICE inline int32_t at_most(int64_t count, int32_t limit) {
    return count < limit ? static_cast<int32_t>(count) : limit;
}

BIOMEDGPT_HOST_DEVICE inline PlanTile tile_of(const PlanPart& part, int block, int32_t hidden) {
    const int32_t index = block - part.first_block;
    if (part.kind == PartKind::tokens) {
        const int64_t row = static_cast<int64_t>(index) * kPlanTokenRows;
        return {row, at_most(part.rows - row, kPlanTokenRows), 0, hidden};
    }
    // Down the rows first: blocks that run at the same time then read the same weights, which come from memory once.
    // The features, far fewer, stay in L2.
    const auto row_tiles = static_cast<int32_t>((part.rows + kPlanTile - 1) / kPlanTile);
    const int64_t row = static_cast<int64_t>(index % row_tiles) * kPlanTile;
    const int32_t column = index / row_tiles * kPlanTile;
    return {row, at_most(part.rows - row, kPlanTile), column, at_most(hidden - column, kPlanTile)};
}

}  // namespace biomedgpt
