// int8 with AVX2 and FMA.
#include "int8/int8_avx256.h"

namespace biomedgpt {
namespace {

// maddubs adds products of unsigned and signed bytes in pairs, to 16 bits, and would saturate. It cannot here, where
// the signs of activations go over to the weights: a pair is at most 2 * 127 * 127.
static_assert(2 * kInt8Largest * kInt8Largest <= 32767);

struct Avx2 : Avx256 {
    static constexpr bool kPlus128 = false;
    struct Quad {
        __m256i values, magnitudes;
    };

    static Weights load(const int8_t* from) { return load_bytes(from); }
    static Quad broadcast(const int8_t* from) {
        const __m256i values = broadcast_quad(from);
        return {values, _mm256_abs_epi8(values)};
    }
    static Ints dot(Ints sums, Weights weights, Quad quad) {
        const __m256i pairs = _mm256_maddubs_epi16(quad.magnitudes, _mm256_sign_epi8(weights, quad.values));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace

extern const Int8Path kInt8LinearAvx2 = int8_path<Avx2>("avx2");

}  // namespace biomedgpt
