// splice with AVX2, FMA and F16C.
#include <immintrin.h>

#include "splice/splice_path.h"

namespace biomedgpt {
namespace {

constexpr int64_t kLanes = 8;
static_assert(kWidthStep % kLanes == 0);

void widen_f32(const float* source, int64_t count, float scale, float* destination) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        _mm256_storeu_ps(destination + i, _mm256_mul_ps(_mm256_loadu_ps(source + i), factor));
    }
    for (; i < count; ++i) destination[i] = source[i] * scale;
}

void widen_f16(const uint16_t* source, int64_t count, float scale, float* destination) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm256_storeu_ps(destination + i, _mm256_mul_ps(_mm256_cvtph_ps(halves), factor));
    }
    for (; i < count; ++i) destination[i] = _cvtsh_ss(source[i]) * scale;
}

void widen_i8(const int8_t* source, int64_t count, float scale, float* destination) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + i));
        const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        _mm256_storeu_ps(destination + i, _mm256_mul_ps(values, factor));
    }
    for (; i < count; ++i) destination[i] = static_cast<float>(source[i]) * scale;
}

void widen(const void* source, DType dtype, int64_t count, float scale, float* destination) {
    if (dtype == DType::f32) {
        widen_f32(static_cast<const float*>(source), count, scale, destination);
    } else if (dtype == DType::f16) {
        widen_f16(static_cast<const uint16_t*>(source), count, scale, destination);
    } else {
        widen_i8(static_cast<const int8_t*>(source), count, scale, destination);
    }
}

float sum_lanes(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

void dot_tile(const float* features, int64_t feature_stride, const float* weight, int64_t weight_stride, int64_t width,
              float (*tile)[kTileColumns]) {
    // 12 independent sums hide the latency of FMA (4 cycles, two per cycle: 8 in flight), and each of the 7 loads of a
    // step feeds 3 or 4 of them, which is below the two loads per cycle that L1 delivers.
    __m256 sums[kTileRows][kTileColumns];
    for (auto& row : sums) {
        for (__m256& sum : row) sum = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < width; k += kLanes) {
        __m256 columns[kTileColumns];
        for (int64_t c = 0; c < kTileColumns; ++c) columns[c] = _mm256_loadu_ps(weight + c * weight_stride + k);
        for (int64_t r = 0; r < kTileRows; ++r) {
            const __m256 row = _mm256_loadu_ps(features + r * feature_stride + k);
            for (int64_t c = 0; c < kTileColumns; ++c) sums[r][c] = _mm256_fmadd_ps(row, columns[c], sums[r][c]);
        }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
        for (int64_t c = 0; c < kTileColumns; ++c) tile[r][c] = sum_lanes(sums[r][c]);
    }
}

}  // namespace

const SplicePath kSpliceAvx2 = {"avx2", widen, dot_tile};

}  // namespace biomedgpt
