// How activations become eight-bit numbers, the same on every path. For files that are compiled for one instruction
// set, hence the unnamed namespace (see splice_kernel.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace biomedgpt {
namespace {

// Numbers that share a scale: to nearest, ties to even, the largest magnitude to 127. The scale is 0 where that
// magnitude is below 2^-119 and NaN where it is not finite; values are zeros then. Returns the sum of the values.
// Magnitudes are compared as integers, which have the same order and, beyond infinity, NaNs.
inline int32_t quantize_row(const float* __restrict x, int64_t count, int8_t* __restrict values, float* scale) {
    constexpr int32_t kInfinity = 0x7f800000;
    constexpr float kSmallest = 0x1p-119f;   // what is divided by it, and it by 127, stays a normal number
    constexpr float kToNearest = 0x1.8p23f;  // a sum with it is rounded to an integer, its last bits
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
        std::memset(values, 0, static_cast<size_t>(count));
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

}  // namespace
}  // namespace biomedgpt
