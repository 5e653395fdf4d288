// What one instruction set contributes to int4. The blocking and the threads around it are shared, in int4.cpp; what
// most paths do alike is in int4_kernel.h.
#pragma once

#include <cstdint>

#include "int4/int4.h"

namespace biomedgpt {

// Activation rows that are multiplied before the weights are read again, at most.
constexpr int64_t kInt4RowBlock = 256;
// A path may read values of this many rows at once, existing or not.
constexpr int64_t kInt4RowStep = 32;
// Columns of a panel that are unpacked together: 16 KiB, a part of the L1 cache.
constexpr int64_t kInt4BlockColumns = 512;

// Quantized rows as paths read them, each from the beginning of a cache line on.
struct Int4Rows {
    int8_t* values;
    int64_t stride;
    float* scales;        // [rows, groups]
    int32_t* zero_terms;  // [rows, groups]
    int64_t groups;
};

// A product of some rows and one panel over some groups, added to totals.
struct Int4Tile {
    const uint8_t* records;   // those of the groups
    const uint8_t* unpacked;  // their values, one byte each: [group * groups / 4, 32 rows, 4 columns]
    int64_t group;
    int64_t groups;
    // Bytes from the records to those that are wanted next and fetched meanwhile, which may be beyond the end of all.
    int64_t ahead;
    Int4Rows rows;  // from the first row and group on
    float* totals;  // [rows, 32]
    bool fresh;     // totals are not read but taken for zero

    BIOMEDGPT_INLINE int64_t record_bytes() const { return kInt4PanelRows * (group / 2 + 2); }
};

// A product of a few rows and some panels that follow one another.
struct Int4Panels {
    const uint8_t* records;
    int64_t count;
    Int4Shape shape;  // of the matrix that they belong to
    Int4Rows rows;
    float* totals;  // [count, rows, 32]
};

struct Int4Path {
    const char* name;
    int64_t tile_rows;           // that multiply takes, at most
    int64_t unpacked_tile_rows;  // that multiply_unpacked takes, at most
    int64_t unpacked_from;       // rows from which on it pays to unpack values once for all of them

    // One row of float32 [columns], padded with zeros to whole groups.
    void (*quantize)(const float* x, int64_t columns, int64_t group, const Int4Rows& row);

    void (*multiply)(const Int4Tile& tile, int64_t rows);
    void (*unpack)(const uint8_t* records, int64_t group, int64_t groups, uint8_t* unpacked);
    void (*multiply_unpacked)(const Int4Tile& tile, int64_t rows);

    // gate[i] = silu(gate[i]) * up[i]
    void (*silu_multiply)(float* gate, const float* up, int64_t count);

    // The first `columns` of totals [rows, 32] to y [rows, stride].
    void (*write)(const float* totals, int64_t rows, int64_t columns, float* y, int64_t stride);

    // What some paths have instead of `multiply` for so many rows.
    int64_t panels_from = 1, panels_to = 0;
    void (*multiply_panels)(const Int4Panels& panels, int64_t rows) = nullptr;

    bool has_panels(int64_t rows) const { return panels_from <= rows && rows <= panels_to; }
};

extern const Int4Path kInt4Portable;
#if defined(BIOMEDGPT_HAVE_INT4_AVX2)
extern const Int4Path kInt4Avx2;
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AVX_VNNI)
extern const Int4Path kInt4AvxVnni;
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AVX512_VNNI)
extern const Int4Path kInt4Avx512Vnni;
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AMX)
extern const Int4Path kInt4Amx;
#endif
#if defined(BIOMEDGPT_HAVE_INT4_NEON_DOTPROD)
extern const Int4Path kInt4NeonDotprod;
#endif
#if defined(BIOMEDGPT_HAVE_INT4_NEON_I8MM)
extern const Int4Path kInt4NeonI8mm;
#endif

}  // namespace biomedgpt
