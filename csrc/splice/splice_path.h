// What one instruction set contributes to splice: two inner loops. Everything around them is shared, in splice.cpp.
//
// A file that implements a path is compiled with that instruction set's flags, so it must not instantiate anything with
// external linkage that other files use too (standard containers, inline functions of headers): the linker might keep
// its copy for everyone.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace biomedgpt {

// A tile of 4 x 3 sums, their 3 + 1 operands: 16 vector registers, which is what AVX2 and SSE have.
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = 3;
// Both operands of dot_tile are padded with zeros to a multiple of this width, so no path needs a tail loop.
constexpr int64_t kWidthStep = 8;

struct SplicePath {
    const char* name;

    // destination[i] = source[i] * scale, for float32, float16 and int8.
    void (*widen)(const void* source, DType dtype, int64_t count, float scale, float* destination);

    // tile[r][c] = sum over k < width of features[r * feature_stride + k] * weight[c * weight_stride + k].
    void (*dot_tile)(const float* features, int64_t feature_stride, const float* weight, int64_t weight_stride,
                     int64_t width, float (*tile)[kTileColumns]);
};

extern const SplicePath kSplicePortable;
#if defined(BIOMEDGPT_HAVE_AVX2)
extern const SplicePath kSpliceAvx2;
#endif

}  // namespace biomedgpt
