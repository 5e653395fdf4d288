// int8 with AVX-512 VNNI: one instruction multiplies 64 unsigned by 64 signed bytes and adds them to 16 sums.
#include <immintrin.h>

#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

struct Avx512Vnni {
    // 24 sums in 32 registers, with two vectors of weights and a constant; activations are operands in memory.
    static constexpr int kLanes = 16, kPass = 2, kTileRows = 12;
    static constexpr bool kPlus128 = true;
    using Ints = __m512i;
    using Weights = __m512i;
    using Quad = __m512i;

    static Weights load(const int8_t* from) {
        return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
    }
    static Quad broadcast(const int8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static Ints dot(Ints sums, Weights weights, Quad quad) { return _mm512_dpbusd_epi32(sums, weights, quad); }
    static Ints set(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints load_sums(const int32_t* from) { return _mm512_loadu_si512(from); }
    static void store_sums(int32_t* to, Ints sums) { _mm512_storeu_si512(to, sums); }
};

}  // namespace

extern const Int8Path kInt8LinearAvx512Vnni = int8_path<Avx512Vnni>("avx512_vnni");

}  // namespace biomedgpt
