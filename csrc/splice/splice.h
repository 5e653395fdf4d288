// splice: text embeddings and projected encoder features, written into one prompt buffer.
//
// out[row + i] = table[ids[i]]                                  for a token segment
// out[row + i] = weight * normalised(features[i]) + bias        for a feature segment
//
// `normalised` is (x - mean) / sqrt(variance + eps) where layer_norm_eps is given (the norm's own gain and shift are
// folded into weight and bias beforehand) and x itself otherwise. Sums are float32 whatever the dtypes, and what out
// cannot hold is rounded to nearest, ties to even. A NaN in a feature row makes that output row NaN and no other.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/dtype.h"

namespace biomedgpt {

struct EmbeddingTable {
    Matrix rows;                    // [vocab, hidden], float32, float16 or int8, contiguous
    const float* scales = nullptr;  // [vocab] for int8 (value = int8 * scale of its row), otherwise null
    int64_t scale_count = 0;
};

struct TokenSegment {
    int64_t row = 0;            // first row of out it writes
    const void* ids = nullptr;  // [count]
    DType ids_dtype = DType::i64;
    int64_t count = 0;
};

struct FeatureSegment {
    int64_t row = 0;  // first row of out it writes
    Matrix features;  // [count, in <= kMaxSpliceWidth], float32 or float16; rows may be further apart than `in`
    Matrix weight;    // [hidden, in], float32 or float16, contiguous
    const float* bias = nullptr;  // [hidden]
    int64_t bias_count = 0;
    std::optional<double> layer_norm_eps;
};

using Segment = std::variant<TokenSegment, FeatureSegment>;

// What a thread's workspace is sized for; the widest encoder in sight, ESM-2 15B, has 5120.
constexpr int64_t kMaxSpliceWidth = 8192;

struct SpliceArgs {
    void* out = nullptr;  // [rows, hidden], float32 or float16, contiguous
    DType out_dtype = DType::f32;
    int64_t rows = 0;
    int64_t hidden = 0;
    EmbeddingTable table;
    std::vector<Segment> segments;  // in any order; together they cover every row of out exactly once
};

// Throws ArgumentError for anything the kernels do not check again. Reads ids, no other data.
void check_splice(const SpliceArgs& args);

struct SpliceOptions {
    int threads = 1;  // upper bound; the result is the same, bit for bit, for every count
    // Whether operands of the products may be rounded to 16 bits (bfloat16 here, scaled float16 in splice_cuda). Sums
    // stay float32. A permission: machines without such instructions compute in float32.
    bool allow_16bit = false;
    std::string_view path = "auto";  // or the name of a SplicePathInfo that this permits
};

// Checks, then fills args.out. A thread allocates its workspace in its first call and nothing after that.
void splice(const SpliceArgs& args, const SpliceOptions& options = {});

struct SplicePathInfo {
    const char* name;
    bool operands_16bit;
};

// The instruction-set paths this machine can run, best first; "auto" takes the first that is permitted.
std::vector<SplicePathInfo> splice_paths();

}  // namespace biomedgpt
