// int4 with AVX2, FMA and F16C.
#include "int4/int4_avx256.h"

namespace biomedgpt {
namespace {

// maddubs adds products of unsigned and signed bytes in pairs, to 16 bits, and would saturate. It cannot here: a pair
// is at most 2 * 15 * 127 = 3810, and of 32 columns, eight pairs are added to one sum, at most 30480.
static_assert(kStepColumns / 4 * 2 * 15 * 127 <= 32767);

struct Avx2 : Avx256 {
    static Partial start(Ints) { return _mm256_setzero_si256(); }
    static Partial dot(Partial sum, Quads weights, Quads x) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
    }
    static Ints finish(Ints sum, Partial pairs) { return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
};

}  // namespace

extern const Int4Path kInt4Avx2 = int4_path<Avx2>("avx2");

}  // namespace biomedgpt
