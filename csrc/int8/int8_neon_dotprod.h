// What the paths on SDOT share. For files that are compiled for it (see splice_kernel.h).
#pragma once

#include <arm_neon.h>

#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

struct NeonDotprod {
    // Half a panel and four rows: 16 sums in 32 registers, with four vectors of weights.
    static constexpr int kLanes = 4, kPass = 4, kTileRows = 4;
    static constexpr bool kPlus128 = false;
    using Ints = int32x4_t;
    using Weights = int8x16_t;
    using Quad = int8x16_t;

    static Weights load(const int8_t* from) { return vld1q_s8(from); }
    static Quad broadcast(const int8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return vreinterpretq_s8_s32(vdupq_n_s32(quad));
    }
    static Ints dot(Ints sums, Weights weights, Quad quad) { return vdotq_s32(sums, weights, quad); }
    static Ints set(int32_t value) { return vdupq_n_s32(value); }
    static Ints load_sums(const int32_t* from) { return vld1q_s32(from); }
    static void store_sums(int32_t* to, Ints sums) { vst1q_s32(to, sums); }
};

}  // namespace
}  // namespace biomedgpt
