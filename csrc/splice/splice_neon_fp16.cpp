// splice with NEON's widening multiply-add of float16: products are exact and sums float32. Packed operands take half
// the room, and float16 weights lose nothing. For cores without BFDOT, such as the Cortex-A78AE of Jetson Orin.
#include "splice/splice_neon.h"

namespace biomedgpt {
namespace {

struct NeonFp16 : Neon {
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) {
        const float16x8_t lanes = vreinterpretq_f16_f32(panel), word = vreinterpretq_f16_f32(weight);
        // The first numbers of four lanes, then the second ones; the same for every row, so done once for all of them.
        sum = vfmlalq_laneq_low_f16(sum, vuzp1q_f16(lanes, lanes), word, 0);
        return vfmlalq_laneq_low_f16(sum, vuzp2q_f16(lanes, lanes), word, 1);
    }
    static Vec pairs_of(Vec first, Vec second) {
        return vreinterpretq_f32_f16(vcombine_f16(vcvt_f16_f32(within(first)), vcvt_f16_f32(within(second))));
    }
    // The largest finite float16 rather than infinity, but infinity where there was one; NaN passes.
    static Vec within(Vec values) {
        const Vec largest = vdupq_n_f32(65504.0f);
        const Vec clamped = vmaxq_f32(vminq_f32(values, largest), vnegq_f32(largest));
        return vbslq_f32(vceqq_f32(vabsq_f32(values), vdupq_n_f32(__builtin_inff())), values, clamped);
    }
};

}  // namespace

extern const SplicePath kSpliceNeonFp16 =
    path_of_pairs<NeonFp16>("neon_fp16", 1, tile_shape<NeonFp16, 2, 12>(), tile_shape<NeonFp16, 1, 24>());

}  // namespace biomedgpt
