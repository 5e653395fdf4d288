// What one instruction set contributes to splice. The blocking and the threads around it are shared, in splice.cpp;
// what most paths do alike is in splice_kernel.h.
//
// A tile of the product is computed from panels, whose lanes are the rows of one operand, and from rows of the other
// one, which are broadcast. Both are made of 32-bit words: a float, or a pair of bfloat16.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "splice/splice.h"

namespace biomedgpt {

// Rows of words lie this far apart in a thread's workspace. Not a power of two: rows at the same distance modulo 4 KiB
// would share one set of the L1 cache. Whole cache lines, and room for a last block of words.
constexpr int64_t kWordStride = kMaxSpliceWidth + 16;
constexpr int64_t kMaxLanes = 48;
constexpr int64_t kMaxTileRows = 32;
// Rows of words that are packed together, at most.
constexpr int64_t kMaxGroup = 16;

struct OutTile;

// How many rows a tile takes from panels (lanes), and how many are broadcast. Wide shapes load less per product, narrow
// ones waste fewer lanes on small molecules.
struct TileShape {
    int64_t lanes;
    int64_t rows;
    int64_t tenths;  // of the time that the path's fastest shape takes per product (measured)

    // tile[row * lanes + lane] = sum over i < words of panel[i * lanes + lane] * broadcast[row * stride + i], where a
    // product of words that are pairs is the sum of two products. The sum does not depend on which operand is which.
    // The stride is kWordStride, or given, which words that are pairs have no use for: rows lie so in the workspace.
    void (*multiply)(const float* panel, const float* broadcast, int64_t words, float* tile);
    void (*multiply_strided)(const float* panel, const float* broadcast, int64_t stride, int64_t words, float* tile);

    // Add the bias of the column and write what belongs to existing rows and columns of out. The columns are the lanes
    // of the tile, or its rows.
    void (*write)(const float* tile, const OutTile& at);
    void (*write_transposed)(const float* tile, const OutTile& at);
};

// Where the results of a tile go: `rows` times `columns` of them, from `out` and `bias` on.
struct OutTile {
    void* out;
    DType dtype;
    int64_t stride;
    const float* bias;
    int64_t rows;
    int64_t columns;
};

struct SplicePath {
    const char* name;
    bool operands_16bit;
    int64_t group;       // feature rows that are packed together; divides the lanes of every shape
    int64_t values;      // numbers in a word
    int64_t words_step;  // word counts are padded with zeros to multiples of this
    int shape_count;
    TileShape shapes[3];  // of equally good ones, the first is taken

    // destination[i] = source[i] * scale, for float32, float16 and int8.
    void (*widen)(const void* source, DType dtype, int64_t count, float scale, float* destination);

    // destination[i] = source[i] rounded to float16, to nearest, ties to even.
    void (*narrow)(const float* source, int64_t count, uint16_t* destination);

    // row[i] = (row[i] - mean) / sqrt(variance + eps).
    void (*normalise)(float* row, int64_t width, double eps);

    // Words of `count` float32 or float16 values, zeros up to `words`; source and destination may be the same.
    void (*pack_row)(const void* source, DType dtype, int64_t count, int64_t words, float* destination);

    // panel[i * lanes + g] = rows[g * kWordStride + i] for g < group and i < words, which is a multiple of kMaxGroup
    // when it is rounded up: rows and panel have room for that.
    void (*pack_panel)(const float* rows, int64_t words, int64_t lanes, float* panel);
};

extern const SplicePath kSplicePortable;
#if defined(BIOMEDGPT_HAVE_AVX2)
extern const SplicePath kSpliceAvx2;
#endif
#if defined(BIOMEDGPT_HAVE_AVX512)
extern const SplicePath kSpliceAvx512;
#endif
#if defined(BIOMEDGPT_HAVE_AVX512_BF16)
extern const SplicePath kSpliceAvx512Bf16;
#endif
#if defined(BIOMEDGPT_HAVE_AMX)
extern const SplicePath kSpliceAmxBf16;
#endif
#if defined(BIOMEDGPT_HAVE_NEON)
extern const SplicePath kSpliceNeon;
#endif
#if defined(BIOMEDGPT_HAVE_NEON_FP16)
extern const SplicePath kSpliceNeonFp16;
#endif
#if defined(BIOMEDGPT_HAVE_NEON_BF16)
extern const SplicePath kSpliceNeonBf16;
#endif

}  // namespace biomedgpt
