// What one instruction set contributes to splice. The blocking and the threads around it are shared, in splice.cpp;
// what most paths do alike is in splice_kernel.h.
//
// The product is computed transposed: the lanes of a vector are feature rows, and weights, which are read once from
// memory as they lie there, are broadcast. Feature rows are packed into panels beforehand; weight rows are converted
// one tile at a time, just before they are used. Both are made of 32-bit words: a float, or a pair of bfloat16.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "splice/splice.h"

namespace biomedgpt {

// Rows of words lie this far apart in a thread's workspace. Not a power of two: rows at the same distance modulo 4 KiB
// would share one set of the L1 cache. Whole cache lines, and room for a last block of words.
constexpr int64_t kWordStride = kMaxSpliceWidth + 16;
constexpr int64_t kMaxLanes = 32;
constexpr int64_t kMaxTileRows = 32;
// Rows of words that are packed together, at most; those of a tile's results are a multiple of it.
constexpr int64_t kMaxGroup = 16;

struct FeatureTile;

// How many feature rows (lanes) and weight rows a tile has. A path has a wide shape, which loads less per product, and
// a narrow one, which wastes fewer lanes on small molecules.
struct TileShape {
    int64_t lanes;
    int64_t rows;

    // tile[row * lanes + lane] = sum over i < words of panel[i * lanes + lane] * weights[row * kWordStride + i], where
    // a product of words that are pairs is the sum of two products.
    void (*multiply)(const float* panel, const float* weights, int64_t words, float* tile);

    // Adds the bias and writes the results of `tile` that belong to existing rows and columns, transposed.
    void (*finish)(const float* tile, const FeatureTile& at);
};

// Where the results of a tile go: out[lane * out_stride + row] for lane < lanes and row < rows.
struct FeatureTile {
    void* out;
    DType out_dtype;
    int64_t out_stride;
    const float* bias;
    int64_t lanes;
    int64_t rows;
};

struct SplicePath {
    const char* name;
    bool operands_16bit;
    int64_t group;        // feature rows that are packed together; divides the lanes of both shapes
    int64_t values;       // numbers in a word
    int64_t words_step;   // word counts are padded with zeros to multiples of this
    TileShape shapes[2];  // wide, narrow

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
#if defined(BIOMEDGPT_HAVE_NEON_BF16)
extern const SplicePath kSpliceNeonBf16;
#endif

}  // namespace biomedgpt
