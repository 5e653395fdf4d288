// IEEE binary16 to binary32 without F16C.
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

}  // namespace biomedgpt
