// int4 with SMMLA of Armv8.6 for many rows: one instruction multiplies two rows of eight signed bytes by two others,
// and adds to four sums. Few rows are as with SDOT.
#include "int4/int4_neon_dotprod.h"

namespace biomedgpt {
namespace {

// Eight activation and eight weight rows: 16 sums in 32 registers, with four vectors of each.
constexpr int64_t kTileRows = 8;
constexpr int64_t kWeightRows = 8;
constexpr int kPairs = kTileRows / 2, kWeightPairs = kWeightRows / 2;
constexpr int64_t kPairBytes = 2 * kBlockColumns;
static_assert(kInt4RowStep % kTileRows == 0);

using Sums2x2 = int32x4_t[kPairs][kWeightPairs];  // of pair i and pair j: x0 w0, x0 w1, x1 w0, x1 w1

// Signed values [group * groups / 8, 32 rows, 8 columns], so that no term is left for their zero point.
inline void unpack_pairs(const uint8_t* records, int64_t group, int64_t groups, uint8_t* unpacked) {
    const uint8x16_t zero_point = vdupq_n_u8(kInt4ZeroPoint);
    const int64_t ahead = kInt4PanelRows * group / 2 + kScaleBytes;  // the next record
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t block = 0; block < group / kBlockColumns; ++block) {
            prefetch(records, ahead, kQuadBytes);
            for (int64_t i = 0; i < kQuadBytes; i += kPairBytes) {
                const uint8x16_t quads = NeonDotprod::load(records + i);
                const uint32x4_t low = vreinterpretq_u32_u8(vsubq_u8(NeonDotprod::low(quads), zero_point));
                const uint32x4_t high = vreinterpretq_u32_u8(vsubq_u8(NeonDotprod::high(quads), zero_point));
                vst1q_u8(unpacked + 2 * i, vreinterpretq_u8_u32(vzip1q_u32(low, high)));
                vst1q_u8(unpacked + 2 * i + kPairBytes, vreinterpretq_u8_u32(vzip2q_u32(low, high)));
            }
            records += kQuadBytes;
            unpacked += 2 * kQuadBytes;
        }
        records += kScaleBytes;
    }
}

inline void multiply_group(const int8_t* x, int64_t stride, const uint8_t* values, int64_t group, Sums2x2& sums) {
    for (auto& of_pair : sums) {
        for (int32x4_t& sum : of_pair) sum = vdupq_n_s32(0);
    }
    for (int64_t column = 0; column < group; column += kBlockColumns) {
        int8x16_t weights[kWeightPairs];
        BIOMEDGPT_UNROLL
        for (int j = 0; j < kWeightPairs; ++j) {
            weights[j] = vreinterpretq_s8_u8(vld1q_u8(values + column * kInt4PanelRows + j * kPairBytes));
        }
        BIOMEDGPT_UNROLL
        for (int i = 0; i < kPairs; ++i) {
            const int8_t* first = x + 2 * i * stride + column;
            const int8x16_t pair = vcombine_s8(vld1_s8(first), vld1_s8(first + stride));
            BIOMEDGPT_UNROLL
            for (int j = 0; j < kWeightPairs; ++j) sums[i][j] = vmmlaq_s32(sums[i][j], pair, weights[j]);
        }
    }
}

// Four weight rows of one activation row.
inline int32x4_t row_of(int32x4_t two, int32x4_t next_two, bool second) {
    return second ? vcombine_s32(vget_high_s32(two), vget_high_s32(next_two))
                  : vcombine_s32(vget_low_s32(two), vget_low_s32(next_two));
}

// `scales` and `totals` begin at the first of the weight rows.
inline void add_to_totals(const Sums2x2& sums, const uint8_t* scales, const float* row_scales, int64_t groups,
                          int64_t rows, bool fresh, float* totals) {
    using Isa = NeonDotprod;
    for (int j = 0; j < kWeightPairs; j += 2) {
        const Isa::Floats scale = Isa::load_halves(scales + 2 * 2 * j);
        for (int64_t row = 0; row < rows; ++row) {
            const int32x4_t sum = row_of(sums[row / 2][j], sums[row / 2][j + 1], row % 2 != 0);
            const Isa::Floats product = Isa::scale(Isa::to_floats(sum), scale);
            float* total = totals + row * kInt4PanelRows + 2 * j;
            const Isa::Floats before = fresh ? Isa::zero() : Isa::load(total);
            Isa::store(total, Isa::fma(product, Isa::set(row_scales[row * groups]), before));
        }
    }
}

void multiply_pairs(const Int4Tile& tile, int64_t rows) {
    const int64_t record_bytes = tile.record_bytes();
    for (int64_t g = 0; g < tile.groups; ++g) {
        const int8_t* x = tile.rows.values + g * tile.group;
        const uint8_t* values = tile.unpacked + g * tile.group * kInt4PanelRows;
        const uint8_t* scales = tile.records + (g + 1) * record_bytes - kScaleBytes;
        for (int64_t first = 0; first < kInt4PanelRows; first += kWeightRows) {
            Sums2x2 sums;
            multiply_group(x, tile.rows.stride, values + first * kBlockColumns, tile.group, sums);
            add_to_totals(sums, scales + 2 * first, tile.rows.scales + g, tile.rows.groups, rows, tile.fresh && g == 0,
                          tile.totals + first);
        }
    }
}

}  // namespace

extern const Int4Path kInt4NeonI8mm = {"neon_i8mm",   NeonDotprod::kTileRows,
                                       kTileRows,     16,
                                       quantize,      multiply_up_to<NeonDotprod, false, NeonDotprod::kTileRows>,
                                       unpack_pairs,  multiply_pairs,
                                       silu_multiply, write};

}  // namespace biomedgpt
