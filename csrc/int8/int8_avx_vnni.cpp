// int8 with AVX-VNNI: one instruction multiplies 32 unsigned by 32 signed bytes and adds them to eight sums.
#include "int8/int8_avx256.h"

namespace biomedgpt {
namespace {

struct AvxVnni : Avx256 {
    static constexpr bool kPlus128 = true;
    using Quad = __m256i;

    static Weights load(const int8_t* from) { return _mm256_xor_si256(load_bytes(from), _mm256_set1_epi8(-128)); }
    static Quad broadcast(const int8_t* from) { return broadcast_quad(from); }
    static Ints dot(Ints sums, Weights weights, Quad quad) { return _mm256_dpbusd_avx_epi32(sums, weights, quad); }
};

}  // namespace

extern const Int8Path kInt8LinearAvxVnni = int8_path<AvxVnni>("avx_vnni");

}  // namespace biomedgpt
