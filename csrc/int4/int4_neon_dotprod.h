// What the paths on SDOT share. For files that are compiled for it (see splice_kernel.h).
#pragma once

#include <arm_neon.h>

#include "int4/int4_kernel.h"

namespace biomedgpt {
namespace {

struct NeonDotprod {
    // Half a panel and four rows: 16 sums in 32 registers, with eight vectors of weights.
    static constexpr int kLanes = 4, kPass = 4, kTileRows = 4, kUnpackedTileRows = 4;
    using Floats = float32x4_t;
    using Ints = int32x4_t;
    using Quads = uint8x16_t;
    using Partial = int32x4_t;

    static Quads load(const uint8_t* from) { return vld1q_u8(from); }
    static Quads low(Quads quads) { return vandq_u8(quads, vdupq_n_u8(15)); }
    static Quads high(Quads quads) { return vshrq_n_u8(quads, 4); }
    static Quads broadcast(const int8_t* from) {
        uint32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return vreinterpretq_u8_u32(vdupq_n_u32(quad));
    }
    static Partial start(Ints sum) { return sum; }
    static Partial dot(Partial sum, Quads weights, Quads x) {
        return vdotq_s32(sum, vreinterpretq_s8_u8(weights), vreinterpretq_s8_u8(x));
    }
    static Ints finish(Ints, Partial sum) { return sum; }
    static Ints set(int32_t value) { return vdupq_n_s32(value); }
    static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
    static Floats set(float value) { return vdupq_n_f32(value); }
    static Floats zero() { return vdupq_n_f32(0); }
    static Floats load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Floats values) { vst1q_f32(to, values); }
    static Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
    static Floats load_halves(const uint8_t* from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
    static Floats scale(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
};

}  // namespace
}  // namespace biomedgpt
