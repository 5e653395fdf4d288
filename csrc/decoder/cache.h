// Rows of the KV cache.
#pragma once

#include "decoder/places.h"
#include "simt/simt.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

constexpr int kKeys = 0, kValues = 1;

// Of keys or values of a head: halves [capacity, head_size].
BIOMEDGPT_DEVICE uint16_t* head_rows(const CacheShape& shape, uint16_t* cache, int side, int head) {
    const int64_t rows = (int64_t{shape.layer} * 2 + side) * shape.kv_heads + head;
    return cache + rows * shape.capacity * shape.head_size;
}

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
