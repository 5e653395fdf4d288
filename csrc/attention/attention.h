// attention: a layer's causal attention with rotary positions over a KV cache, for one sequence.
//
// Rows are positions first, first + 1, ... of the sequence. Queries and keys are rotated by their position (RoPE, a
// head's first half against its second); keys and values are appended to the cache; then row i attends to positions 0
// to first + i:
//     y[i, h] = sum over j of softmax_j(q[i, h] . k[j, h'] / sqrt(head_size)) v[j, h']
// where every heads / kv_heads heads h share one h' (grouped-query attention).
//
// Scores of 128 positions, counted from 0, are computed at a time, and rescaled sums kept of what came before (Milakov
// and Gimelshein 2018, Dao et al. 2022). All sums are float32, each in one order that depends on nothing but the
// position: a score over the elements of a head, an output over positions. So a row has the same bits for any number
// of rows in its call, any number of threads and any path. (It has not where a process lets its processor flush
// subnormal numbers to zero.) What is no number
// in a row reaches itself and later rows, and no earlier one.
//
// The KV cache of a layer is two arrays [kv_heads, blocks, bytes of a block], a block being 16 positions:
//   - keys [head_size, 16]: the same element of 16 positions side by side, which are 16 scores at once;
//   - values [16, head_size].
// Elements are float32, float16, or int8 with a float32 scale per position and head; the 16 scales stand at the end of
// a block. What lies beyond the last position is never used, whatever it is.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/inline.h"
#include "common/parallel_for.h"

namespace biomedgpt {

constexpr int64_t kKvBlock = 16;
// Of a head: it is a multiple of kHeadStep.
constexpr int64_t kMaxHeadSize = 256, kHeadStep = 16;
// Of positions, and of heads: what keeps products of sizes within 64 bits.
constexpr int64_t kMaxPositions = int64_t{1} << 24, kMaxHeads = int64_t{1} << 12;

enum class KvFormat { f32, f16, i8 };

struct KvShape {
    int64_t heads = 0;
    int64_t head_size = 0;
    int64_t blocks = 0;  // per head
    KvFormat format = KvFormat::f32;

    BIOMEDGPT_INLINE int64_t element_bytes() const {
        return format == KvFormat::f32 ? 4 : format == KvFormat::f16 ? 2 : 1;
    }
    BIOMEDGPT_INLINE int64_t scale_bytes() const {
        return format == KvFormat::i8 ? kKvBlock * int64_t{sizeof(float)} : 0;
    }
    BIOMEDGPT_INLINE int64_t block_bytes() const { return kKvBlock * head_size * element_bytes() + scale_bytes(); }
    BIOMEDGPT_INLINE int64_t positions() const { return blocks * kKvBlock; }
};

// The format whose blocks have so many bytes. Throws ArgumentError where none has.
KvFormat kv_format(int64_t head_size, int64_t block_bytes);

struct KvCache {
    KvShape shape;
    uint8_t* keys = nullptr;  // [heads, blocks, block_bytes], and so are values
    uint8_t* values = nullptr;
};

struct RopeTable {
    const float* cos = nullptr;  // [positions, head_size / 2], and so is sin
    const float* sin = nullptr;
    int64_t positions = 0;
};

struct AttentionArgs {
    const float* qkv = nullptr;  // [rows, (heads + 2 * cache.shape.heads) * head_size]: queries, keys, values
    float* y = nullptr;          // [rows, heads * head_size], apart from all else
    int64_t rows = 0;
    int64_t first = 0;  // positions that the cache holds
    int64_t heads = 0;  // of queries
    KvCache cache;
    RopeTable rope;
};

struct AttentionOptions {
    ParallelFor parallel;
    std::string_view path = "auto";  // or one of attention_paths()
};

// Checks, then writes; throws ArgumentError. Allocates nothing.
void causal_attention(const AttentionArgs& args, const AttentionOptions& options = {});

// The instruction-set paths this machine can run, best first; "auto" takes the first. All give the same bits.
std::vector<const char*> attention_paths();

}  // namespace biomedgpt
