// Symmetric quantization of float32 to eight bits, in arithmetic that gives the same bits on every processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace biomedgpt {

// values[i] = x[i] / *scale to nearest, ties to even, -127 to 127, where *scale is the largest magnitude / 127; returns
// the sum of the values. Values are zeros where that magnitude is below 2^-119, *scale being 0 then, and where it is
// not finite, *scale being NaN. `static` for the reason that half.h gives.
static inline int32_t quantize_bytes(const float* __restrict x, int64_t count, int8_t* __restrict values,
                                     float* scale) {
    constexpr int32_t kInfinity = 0x7f800000;
    constexpr float kSmallest = 0x1p-119f;   // what is divided by it, and it by 127, stays a normal number
    constexpr float kToNearest = 0x1.8p23f;  // a sum with it is rounded to an integer, its last bits
    // Magnitudes are compared as integers, which have the same order and, beyond infinity, NaNs.
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, sizeof magnitude);
    if (largest >= kInfinity || magnitude < kSmallest) {
        for (int64_t i = 0; i < count; ++i) values[i] = 0;
        *scale = largest >= kInfinity ? __builtin_nanf("") : 0.0f;
        return 0;
    }
    const float inverse = 127.0f / magnitude;
    int32_t origin;
    std::memcpy(&origin, &kToNearest, sizeof origin);
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float shifted = x[i] * inverse + kToNearest;
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits -= origin;
        sum += bits;
        values[i] = static_cast<int8_t>(bits);
    }
    *scale = magnitude / 127.0f;
    return sum;
}

}  // namespace biomedgpt
