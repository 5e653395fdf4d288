// splice with AVX-512's dot products of bfloat16 pairs: sums stay float32, subnormal operands count as zero.
#include "splice/splice_avx512_bf16.h"

namespace biomedgpt {

extern const SplicePath kSpliceAvx512Bf16 =
    path_of_pairs<Avx512Bf16>("avx512_bf16", 1, tile_shape<Avx512Bf16, 2, 14>(), tile_shape<Avx512Bf16, 1, 28>());

}  // namespace biomedgpt
