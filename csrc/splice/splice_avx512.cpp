// splice with AVX-512, in float32.
#include "splice/splice_avx512.h"

namespace biomedgpt {

// 28 sums, and of the 32 registers two for the panel and one for a weight; the narrow shape takes weights from memory.
extern const SplicePath kSpliceAvx512 = path_of_floats<Avx512, 14, 28>("avx512");

}  // namespace biomedgpt
