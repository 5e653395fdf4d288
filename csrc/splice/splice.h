// splice: text embeddings and projected encoder features, written into one prompt buffer.
//
// out[row + i] = table[ids[i]]                                  for a token segment
// out[row + i] = weight * normalised(features[i]) + bias        for a feature segment
//
// `normalised` is (x - mean) / sqrt(variance + eps) where layer_norm_eps is given (the norm's own gain and shift are
// folded into weight and bias beforehand) and x itself otherwise. Sums are float32. A NaN in a feature row makes that
// output row NaN and no other.
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
    int64_t row = 0;              // first row of out it writes
    Matrix features;              // [count, in], float32 or float16; rows may be further apart than `in`
    Matrix weight;                // [hidden, in], float32 or float16, contiguous
    const float* bias = nullptr;  // [hidden]
    int64_t bias_count = 0;
    std::optional<double> layer_norm_eps;
};

using Segment = std::variant<TokenSegment, FeatureSegment>;

struct SpliceArgs {
    float* out = nullptr;  // [rows, hidden], contiguous
    int64_t rows = 0;
    int64_t hidden = 0;
    EmbeddingTable table;
    std::vector<Segment> segments;  // in any order; together they cover every row of out exactly once
};

// Throws ArgumentError for anything the kernels do not check again. Reads ids, no other data.
void check_splice(const SpliceArgs& args);

// Checks, then fills args.out. The result is the same, bit for bit, for every thread count. `path` is "auto" or one of
// splice_paths().
void splice(const SpliceArgs& args, int threads = 1, std::string_view path = "auto");

// The instruction-set paths this machine can run, best first.
std::vector<std::string> splice_paths();

}  // namespace biomedgpt
