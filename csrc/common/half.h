// IEEE binary16 to binary32 and back without F16C.
#pragma once

#include <cstdint>
#include <cstring>

namespace biomedgpt {

// `static`, not only `inline`: with external linkage the linker keeps one copy for all files, and that copy may be the
// one compiled with -mavx2, which faults on a machine that was dispatched to the portable path.
static inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    uint32_t bits;
    if (magnitude < 0x0400u) {
        // Subnormal halves are normal floats: this stays exact where the process flushes subnormal floats to zero.
        const float value = static_cast<float>(magnitude) * 0x1p-24f;
        std::memcpy(&bits, &value, sizeof bits);
    } else if (magnitude >= 0x7c00u) {
        bits = 0x7f800000u | magnitude << 13;
    } else {
        bits = (magnitude << 13) + ((127u - 15u) << 23);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; what is too large becomes infinity, a NaN stays one.
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u) {
        // Subnormal halves are multiples of 2^-24: adding 0.5, whose last bit is that, rounds to one of them.
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &shifted, sizeof rounded);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - ((127u - 15u) << 23) + 0x0fffu + odd) >> 13));
}

}  // namespace biomedgpt
