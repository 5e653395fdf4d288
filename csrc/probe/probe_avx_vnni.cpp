// AVX-VNNI: dot products of four bytes on 256 bits.
#include <immintrin.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Int8 {
    using Sum = __m256i;
    using Operand = __m256i;
    static constexpr int64_t kProducts = 32;
    static Sum zero() { return _mm256_set1_epi32(opaque(0)); }
    static Operand ones() { return _mm256_set1_epi8(opaque(char{1})); }
    static Sum add(Sum sum, Operand a, Operand b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
    static double total(Sum sum) {
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
        return sum_of(lanes);
    }
};

}  // namespace

extern const ArithmeticLoop kInt8AvxVnni = loop_of<Int8>("avx_vnni", "int8");

}  // namespace biomedgpt
