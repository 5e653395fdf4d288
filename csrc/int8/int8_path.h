// What one instruction set contributes to int8. The blocking and the threads around it are shared, in int8.cpp; what
// most paths do alike is in int8_kernel.h.
#pragma once

#include <cstdint>

#include "int8/int8.h"

namespace biomedgpt {

// Activation rows that are multiplied before the weights are read again, at most.
constexpr int64_t kInt8RowBlock = 512;
// A path may read values and write totals of this many rows at once, existing or not.
constexpr int64_t kInt8RowStep = 32;
// Columns of a panel that all rows pass over at once: 16 KiB, a part of the L1 cache.
constexpr int64_t kInt8BlockColumns = 512;

// Quantized rows as paths read them.
struct Int8Rows {
    int8_t* values;
    int64_t stride;
    float* scales;
    int32_t* zero_terms;  // -128 times the sum of a row's values, for paths that add 128 to weights
};

// A product of some rows and some columns of one panel, added to totals.
struct Int8Tile {
    const int8_t* weights;  // [columns / 4, 32 rows, 4 columns]
    const int8_t* next;     // what comes after them, as many; to be hinted at, for it may not exist
    int64_t columns;        // a multiple of 64
    Int8Rows rows;          // from the first row and column on
    int32_t* totals;        // [rows, 32]
    bool fresh;             // totals are not read but taken for zero
};

// What becomes of the totals of a panel.
struct Int8Finish {
    const int32_t* totals;    // [rows, 32]
    const float* row_scales;  // [rows]
    const float* scales;      // [32]
    const float* biases;      // [32]
    bool gelu;
    const float* residual;  // from the panel's first column on, or null
    float* y;               // likewise
    int64_t stride;         // of both
    int64_t columns;        // of y that the panel has, at most 32
};

struct Int8Path {
    const char* name;
    int64_t tile_rows;  // that multiply takes, at most

    // One row of float32 [columns] to values [padded]. The scale, then the zero term.
    void (*quantize)(const float* x, int64_t columns, int64_t padded, int8_t* values, float* scale, int32_t* zero_term);
    void (*multiply)(const Int8Tile& tile, int64_t rows);
    void (*finish)(const Int8Finish& of, int64_t rows);
};

extern const Int8Path kInt8LinearPortable;
#if defined(BIOMEDGPT_HAVE_INT8_AVX2)
extern const Int8Path kInt8LinearAvx2;
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AVX_VNNI)
extern const Int8Path kInt8LinearAvxVnni;
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AVX512_VNNI)
extern const Int8Path kInt8LinearAvx512Vnni;
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AMX)
extern const Int8Path kInt8LinearAmx;
#endif
#if defined(BIOMEDGPT_HAVE_INT8_NEON_DOTPROD)
extern const Int8Path kInt8LinearNeonDotprod;
#endif
#if defined(BIOMEDGPT_HAVE_INT8_NEON_I8MM)
extern const Int8Path kInt8LinearNeonI8mm;
#endif

}  // namespace biomedgpt
