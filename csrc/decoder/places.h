// Which positions of which sequences the rows of a launch are.
#pragma once

#include <cstdint>

namespace biomedgpt {

struct RowPlace {
    uint16_t* cache;   // of its sequence: halves [2 * layers, kv_heads, capacity, head_size]
    int32_t position;  // of the row, from 0
    int32_t token;     // for rows that begin with a token
};

// Where a layer's keys and values lie in a cache.
struct CacheShape {
    int32_t kv_heads;
    int32_t head_size;
    int32_t capacity;
    int32_t layer;
};

}  // namespace biomedgpt
