// What one instruction set contributes to attention. Heads, threads and blocks of rows around it are shared, in
// attention.cpp; the loops, which all paths have in common, are in attention_kernel.h.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace biomedgpt {

// Rows that attend in one pass over the cache, at most: so many of their queries, or of their scores, stay in the L1
// cache beside a part of a tile.
constexpr int64_t kAttentionRows = 32;

// Some rows of one query head, or of one head of keys and values.
struct AttentionRows {
    int64_t first = 0;  // position of the first one
    int64_t count = 0;
    const float* cos = nullptr;  // of the first one, and so is sin
    const float* sin = nullptr;
    int64_t stride = 0;  // floats from a row of qkv to the next
};

// The cache of one head.
struct AttentionHead {
    KvShape shape;  // of all
    uint8_t* keys = nullptr;
    uint8_t* values = nullptr;

    BIOMEDGPT_INLINE int64_t bytes() const {
        return shape.blocks * shape.block_bytes();
    }  // of either, up to those of the next head
};

struct AttentionPath {
    const char* name;

    // Appends rows to a head's cache: keys [count, stride], which are rotated on the way, and values likewise.
    void (*append)(const AttentionHead& head, const AttentionRows& rows, const float* keys, const float* values);

    // y [count, y_stride] of at most kAttentionRows rows of queries [count, stride], whose keys and values, and those
    // of all positions before them, are in the cache.
    void (*attend)(const AttentionHead& head, const AttentionRows& rows, const float* queries, float* y,
                   int64_t y_stride);
};

extern const AttentionPath kAttentionPortable;
#if defined(BIOMEDGPT_HAVE_ATTENTION_AVX2)
extern const AttentionPath kAttentionAvx2;
#endif
#if defined(BIOMEDGPT_HAVE_ATTENTION_AVX512)
extern const AttentionPath kAttentionAvx512;
#endif
#if defined(BIOMEDGPT_HAVE_ATTENTION_NEON)
extern const AttentionPath kAttentionNeon;
#endif

}  // namespace biomedgpt
