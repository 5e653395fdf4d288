// What the paths on NEON registers share. For files of aarch64 builds (see splice_kernel.h).
#pragma once

#include <arm_neon.h>

#include "splice/splice_kernel.h"

namespace biomedgpt {
namespace {

struct Neon {
    using Vec = float32x4_t;
    static constexpr int64_t kLanes = 4;

    static Vec zero() { return vdupq_n_f32(0.0f); }
    static Vec load(const float* from) { return vld1q_f32(from); }
    static Vec broadcast(const float* from) { return vld1q_dup_f32(from); }
    static void store(float* to, Vec a) { vst1q_f32(to, a); }
    static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
    static Vec scale(Vec a, Vec b) { return vmulq_f32(a, b); }
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) { return vfmaq_f32(sum, panel, weight); }
    // Conversions between float16 and float32 are in every aarch64 processor.
    static Vec widen_half(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
    static Vec widen_byte(const int8_t* from) {
        int32_t four;
        std::memcpy(&four, from, sizeof four);
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
    static void store_half(uint16_t* to, Vec a) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    static Vec load_some(const float* from, int64_t count) { return load_some_of<Neon>(from, count); }
    static void store_some(float* to, Vec a, int64_t count) { store_some_of<Neon>(to, a, count); }
    static void store_half_some(uint16_t* to, Vec a, int64_t count) { store_half_some_of<Neon>(to, a, count); }

    static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
        const float32x4x2_t upper = vtrnq_f32(load(from), load(from + stride));
        const float32x4x2_t lower = vtrnq_f32(load(from + 2 * stride), load(from + 3 * stride));
        for (int i = 0; i < 2; ++i) {
            store(to + i * to_stride, vcombine_f32(vget_low_f32(upper.val[i]), vget_low_f32(lower.val[i])));
            store(to + (i + 2) * to_stride, vcombine_f32(vget_high_f32(upper.val[i]), vget_high_f32(lower.val[i])));
        }
    }
};

}  // namespace
}  // namespace biomedgpt
