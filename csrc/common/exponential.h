// exp for float32, in arithmetic that gives the same bits on every processor and that compilers make vectors of.
#pragma once

#include <cstdint>
#include <cstring>

namespace biomedgpt {

// Arguments beyond +-87 count as that; a NaN gives something. By Cody and Waite: x = n log 2 + r with log 2 in two
// parts, and a minimax polynomial of degree 6 for e^r (coefficients of Cephes' expf). `static` for the reason that
// half.h gives.
static inline float exponential(float x) {
    constexpr float kToNearest = 0x1.8p23f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float shifted = __builtin_fmaf(x, 0x1.715476p0f, kToNearest);
    const float n = shifted - kToNearest;
    float r = __builtin_fmaf(n, -0x1.63p-1f, x);
    r = __builtin_fmaf(n, 0x1.bd0106p-13f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    int32_t power;
    std::memcpy(&power, &shifted, sizeof power);
    int32_t bits;
    std::memcpy(&bits, &p, sizeof bits);
    // The last bits of `shifted` are n; added to the exponent they multiply by 2^n.
    bits = static_cast<int32_t>(static_cast<uint32_t>(bits) + (static_cast<uint32_t>(power) << 23));
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

}  // namespace biomedgpt
