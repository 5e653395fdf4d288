// splice with NEON, in float32.
#include "splice/splice_neon.h"

namespace biomedgpt {

// 24 sums, and of the 32 registers two for the panel and some for weights.
extern const SplicePath kSpliceNeon =
    path_of_floats<Neon>("neon", tile_shape<Neon, 2, 12>(), tile_shape<Neon, 1, 24>());

}  // namespace biomedgpt
