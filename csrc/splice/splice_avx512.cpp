// splice with AVX-512, in float32.
#include "splice/splice_avx512.h"

namespace biomedgpt {

// 27 or 28 sums, and of the 32 registers some for the panel and one for a broadcast word, which the narrow shape takes
// from memory.
extern const SplicePath kSpliceAvx512 = path_of_floats<Avx512>(
    "avx512", tile_shape<Avx512, 3, 9>(), tile_shape<Avx512, 2, 14>(11), tile_shape<Avx512, 1, 28>(14));

}  // namespace biomedgpt
