// splice with NEON's dot products of bfloat16 pairs: sums stay float32.
#include "splice/splice_neon.h"

namespace biomedgpt {
namespace {

struct NeonBf16 : Neon {
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) {
        return vbfdotq_f32(sum, vreinterpretq_bf16_f32(panel), vreinterpretq_bf16_f32(weight));
    }
    static Vec pairs_of(Vec first, Vec second) {
        return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
    }
};

}  // namespace

extern const SplicePath kSpliceNeonBf16 =
    path_of_pairs<NeonBf16>("neon_bf16", 1, tile_shape<NeonBf16, 2, 12>(), tile_shape<NeonBf16, 1, 24>());

}  // namespace biomedgpt
