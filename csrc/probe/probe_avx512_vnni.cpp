// AVX-512 VNNI: dot products of four bytes on 512 bits.
#include <immintrin.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Int8 {
    using Sum = __m512i;
    using Operand = __m512i;
    static constexpr int64_t kProducts = 64;
    static Sum zero() { return _mm512_set1_epi32(opaque(0)); }
    static Operand ones() { return _mm512_set1_epi8(opaque(char{1})); }
    static Sum add(Sum sum, Operand a, Operand b) { return _mm512_dpbusd_epi32(sum, a, b); }
    static double total(Sum sum) {
        alignas(64) int32_t lanes[16];
        _mm512_store_si512(lanes, sum);
        return sum_of(lanes);
    }
};

}  // namespace

extern const ArithmeticLoop kInt8Avx512Vnni = loop_of<Int8>("avx512_vnni", "int8");

}  // namespace biomedgpt
