// splice in plain C++: the path of every machine without a better one.
#include <cstddef>

#include "common/half.h"
#include "splice/splice_path.h"

namespace biomedgpt {
namespace {

void widen(const void* source, DType dtype, int64_t count, float scale, float* destination) {
    if (dtype == DType::f32) {
        const auto* values = static_cast<const float*>(source);
        for (int64_t i = 0; i < count; ++i) destination[i] = values[i] * scale;
    } else if (dtype == DType::f16) {
        const auto* values = static_cast<const uint16_t*>(source);
        for (int64_t i = 0; i < count; ++i) destination[i] = half_to_float(values[i]) * scale;
    } else {
        const auto* values = static_cast<const int8_t*>(source);
        for (int64_t i = 0; i < count; ++i) destination[i] = static_cast<float>(values[i]) * scale;
    }
}

void dot_tile(const float* features, int64_t feature_stride, const float* weight, int64_t weight_stride, int64_t width,
              float (*tile)[kTileColumns]) {
    // Four partial sums per output: a compiler may not reorder a float sum, but it can put four of them in one
    // register.
    constexpr int64_t kLanes = 4;
    static_assert(kWidthStep % kLanes == 0);
    float sums[kTileRows][kTileColumns][kLanes] = {};
    for (int64_t k = 0; k < width; k += kLanes) {
        for (int64_t r = 0; r < kTileRows; ++r) {
            for (int64_t c = 0; c < kTileColumns; ++c) {
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    sums[r][c][lane] += features[r * feature_stride + k + lane] * weight[c * weight_stride + k + lane];
                }
            }
        }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
        for (int64_t c = 0; c < kTileColumns; ++c) {
            const float* lanes = sums[r][c];
            tile[r][c] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
        }
    }
}

}  // namespace

const SplicePath kSplicePortable = {"portable", widen, dot_tile};

}  // namespace biomedgpt
