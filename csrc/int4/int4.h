// int4: a linear layer with four-bit weights and activations that are quantized to eight bits on the way.
//
// y[m, n] = sum over groups g of xscale[m, g] * wscale[n, g] * (sum over columns k of g of xq[m, k] * (w[n, k] - 8))
//
// Weights are four-bit numbers 0 to 15 that stand for -8 to 7, with a float16 scale per row and group of 128, 64 or 32
// columns. Activations are quantized per row and group, symmetrically, to -127 to 127 with a float32 scale. The inner
// sums are integers and exact. The outer one is float32 and the same on every path: in the order of the groups, from 0,
//     y = fma(float(integer) * float(wscale), xscale, y),
// so that the same operands give the same bits for any number of rows, any other rows beside them, any number of
// threads and any path. (They do not where a process lets its processor flush subnormal numbers to zero.)
//
// Layout. Weights are read from memory once per token, and that is what a token's time goes into. So they lie in the
// order in which they are used, as one stream without gaps: records [panels, groups], one record after another, where a
// panel is 32 rows. A record holds what 32 rows need of one group, values and scales side by side, in whole cache
// lines:
//   - 16 * group bytes of values, in blocks of 128 bytes for 8 columns k, k + 1, ... k + 7. Byte 4 * r + j of a block,
//     where j < 4, holds column k + j of row r in its low four bits and column k + j + 4 in the high ones;
//   - 64 bytes, the float16 scales of the 32 rows.
// Any 64, 32 or 16 bytes of a block, masked or shifted once, are then operands of an instruction that adds dot products
// of four bytes to 32-bit sums, for 16, 8 or 4 rows; and 16 such vectors are a tile of a processor that has tiles.
//
// Rows beyond N in the last panel have the value 8 and scale 0. Columns beyond K in the last group are multiplied by 0.
// Records begin at an address that is a multiple of 64. A file should hold a matrix at a multiple of 4096 bytes, where
// it can be mapped. For int4_gate_up, a gate and an up projection are interleaved by panels: gate 0, up 0, gate 1, ...
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/inline.h"
#include "common/parallel_for.h"

namespace biomedgpt {

constexpr int64_t kInt4PanelRows = 32;
constexpr int64_t kInt4RecordAlignment = 64;
constexpr int kInt4ZeroPoint = 8;
// Of rows and columns: what keeps products of sizes within 64 bits.
constexpr int64_t kMaxInt4Size = int64_t{1} << 24;

struct Int4Shape {
    int64_t rows = 0;     // N, the width of what comes out
    int64_t columns = 0;  // K, the width of what goes in
    int64_t group = 0;    // columns that share a scale: 128, 64 or 32

    BIOMEDGPT_INLINE int64_t panels() const { return (rows + kInt4PanelRows - 1) / kInt4PanelRows; }
    BIOMEDGPT_INLINE int64_t groups() const { return (columns + group - 1) / group; }
    BIOMEDGPT_INLINE int64_t record_bytes() const { return kInt4PanelRows * (group / 2 + 2); }
    BIOMEDGPT_INLINE int64_t panel_bytes() const { return groups() * record_bytes(); }
    BIOMEDGPT_INLINE int64_t bytes() const { return panels() * panel_bytes(); }
};

// The layout of ONNX Runtime's MatMulNBits, with the one zero point 8.
struct Int4Blocks {
    const uint8_t* values = nullptr;   // [N, groups, group / 2], the even one of two columns in the low four bits
    const uint16_t* scales = nullptr;  // float16 [N, groups]
};

// Throws ArgumentError for a shape that no weights have.
void check_int4_shape(const Int4Shape& shape);

// From blocks to records [shape.bytes()], at any address, and back: what is not padding comes back bit for bit.
void int4_pack(const Int4Shape& shape, const Int4Blocks& blocks, uint8_t* records, const ParallelFor& parallel = {});
void int4_unpack(const Int4Shape& shape, const uint8_t* records, uint8_t* values, uint16_t* scales,
                 const ParallelFor& parallel = {});

struct Int4Weights {
    Int4Shape shape;  // for int4_gate_up that of one of the two
    const uint8_t* records = nullptr;
    int64_t bytes = 0;  // shape.bytes(), for int4_gate_up twice that
};

struct Int4Args {
    const float* x = nullptr;  // [rows, K], contiguous
    float* y = nullptr;        // [rows, N], contiguous; apart from x and the records
    int64_t rows = 0;
    Int4Weights weights;
};

struct Int4Options {
    ParallelFor parallel;
    std::string_view path = "auto";  // or one of int4_paths()
};

// y = x W^T. Checks, then writes; throws ArgumentError. A thread allocates when a call needs a larger workspace than
// all calls before it, and otherwise nothing. A row of x with an infinity or a NaN makes the row of y NaN and no other.
void int4_linear(const Int4Args& args, const Int4Options& options = {});

// y = silu(x Wg^T) * (x Wu^T), where silu(v) = v / (1 + exp(-v)) is off by at most 2^-21 of itself and 2^-125 of v.
void int4_gate_up(const Int4Args& args, const Int4Options& options = {});

struct Int4Activations {
    int8_t* values = nullptr;  // [rows, groups * group], -127 to 127, zero beyond K
    // [rows, groups]: the largest magnitude / 127, but 0 where that magnitude is below 2^-119 and NaN where it is not
    // finite; values are zeros then.
    float* scales = nullptr;
    int32_t* zero_terms = nullptr;  // [rows, groups]: -8 times the sum of the values, since weights are stored plus 8
};

// How the ops quantize x float32 [rows, shape.columns]: values to nearest, ties to even.
void int4_quantize(const float* x, int64_t rows, const Int4Shape& shape, const Int4Activations& activations,
                   std::string_view path = "auto");

// The instruction-set paths this machine can run, best first; "auto" takes the first. All give the same bits.
std::vector<const char*> int4_paths();

}  // namespace biomedgpt
