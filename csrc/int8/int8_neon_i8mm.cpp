// int8 with SMMLA of Armv8.6: one instruction multiplies two rows of eight signed bytes by two others, and adds to four
// sums.
#include <arm_neon.h>

#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

// Eight activation and eight weight rows: 16 sums in 32 registers, with four vectors of each.
constexpr int64_t kTileRows = 8;
constexpr int64_t kWeightRows = 8;
constexpr int64_t kColumns = 2 * kQuad;
constexpr int kPairs = kTileRows / 2, kWeightPairs = kWeightRows / 2;
constexpr int64_t kVectorBytes = 16;
static_assert(kInt8RowStep % kTileRows == 0 && kInt8ColumnStep % kColumns == 0);

using Sums2x2 = int32x4_t[kPairs][kWeightPairs];  // of pair i and pair j: x0 w0, x0 w1, x1 w0, x1 w1

// Of eight weight rows and eight columns, a row of a pair after the other.
inline void load_weights(const int8_t* quads, int8x16_t (&weights)[kWeightPairs]) {
    BIOMEDGPT_UNROLL
    for (int j = 0; j < kWeightPairs; j += 2) {
        const int8_t* from = quads + j / 2 * kVectorBytes;
        const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(from));
        const int32x4_t high = vreinterpretq_s32_s8(vld1q_s8(from + kQuadBytes));
        weights[j] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
        weights[j + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
}

inline void add_products(const int8_t* x, int64_t stride, const int8_t* weights, int64_t columns, Sums2x2& sums) {
    for (int64_t column = 0; column < columns; column += kColumns) {
        int8x16_t of_columns[kWeightPairs];
        load_weights(weights + column * kInt8PanelRows, of_columns);
        BIOMEDGPT_UNROLL
        for (int i = 0; i < kPairs; ++i) {
            const int8_t* first = x + 2 * i * stride + column;
            const int8x16_t pair = vcombine_s8(vld1_s8(first), vld1_s8(first + stride));
            BIOMEDGPT_UNROLL
            for (int j = 0; j < kWeightPairs; ++j) sums[i][j] = vmmlaq_s32(sums[i][j], pair, of_columns[j]);
        }
    }
}

// Between rows of totals and squares of two by two.
inline void load_totals(const int32_t* totals, Sums2x2& sums) {
    for (int i = 0; i < kPairs; ++i) {
        const int32_t* row = totals + 2 * i * kInt8PanelRows;
        for (int j = 0; j < kWeightPairs; ++j) {
            sums[i][j] = vcombine_s32(vld1_s32(row + 2 * j), vld1_s32(row + kInt8PanelRows + 2 * j));
        }
    }
}

inline void store_totals(const Sums2x2& sums, int32_t* totals) {
    for (int i = 0; i < kPairs; ++i) {
        int32_t* row = totals + 2 * i * kInt8PanelRows;
        for (int j = 0; j < kWeightPairs; ++j) {
            vst1_s32(row + 2 * j, vget_low_s32(sums[i][j]));
            vst1_s32(row + kInt8PanelRows + 2 * j, vget_high_s32(sums[i][j]));
        }
    }
}

// Rows that do not exist are multiplied, too.
void multiply_pairs(const Int8Tile& tile, int64_t) {
    for (int64_t first = 0; first < kInt8PanelRows; first += kWeightRows) {
        Sums2x2 sums = {};
        if (!tile.fresh) load_totals(tile.totals + first, sums);
        add_products(tile.rows.values, tile.rows.stride, tile.weights + first * kQuad, tile.columns, sums);
        store_totals(sums, tile.totals + first);
    }
}

}  // namespace

extern const Int8Path kInt8LinearNeonI8mm = {"neon_i8mm", kTileRows, quantize, multiply_pairs, finish};

}  // namespace biomedgpt
