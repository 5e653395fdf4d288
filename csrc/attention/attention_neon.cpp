// attention on aarch64, whose base architecture has all that it needs.
#include <arm_neon.h>

#include "attention/attention_kernel.h"

namespace biomedgpt {
namespace {

struct Neon {
    // 16 sums in 32 registers.
    static constexpr int kLanes = 4, kRows = 4, kRowBlocks = 1, kBlocks = 4, kRowVectors = 4, kVectors = 8;
    using Floats = float32x4_t;

    static Floats zero() { return vdupq_n_f32(0); }
    static Floats set(float value) { return vdupq_n_f32(value); }
    static Floats load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, Floats values) { vst1q_f32(to, values); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static Floats max(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static Floats load_halves(const uint8_t* from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
    static Floats load_bytes(const uint8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(quad)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    }
    static void store_halves(uint16_t* to, Floats values) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(values))); }
};

}  // namespace

extern const AttentionPath kAttentionNeon = attention_path<Neon>("neon");

}  // namespace biomedgpt
