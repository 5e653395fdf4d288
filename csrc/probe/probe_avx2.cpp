// AVX2: fused multiply-add, and bytes through 16 bits, since there is no dot product of bytes into 32.
#include <immintrin.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Fp32 {
    using Sum = __m256;
    using Operand = __m256;
    static constexpr int64_t kProducts = 8;
    static Sum zero() { return _mm256_set1_ps(opaque(0.0f)); }
    static Operand ones() { return _mm256_set1_ps(opaque(1.0f)); }
    static Sum add(Sum sum, Operand a, Operand b) { return _mm256_fmadd_ps(a, b, sum); }
    static double total(Sum sum) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, sum);
        return sum_of(lanes);
    }
};

struct Int8 {
    using Sum = __m256i;
    using Operand = __m256i;
    static constexpr int64_t kProducts = 32;
    static Sum zero() { return _mm256_set1_epi32(opaque(0)); }
    static Operand ones() { return _mm256_set1_epi8(opaque(char{1})); }
    static Sum add(Sum sum, Operand a, Operand b) {
        __asm__ volatile("" : "+x"(a));  // or the products, which never change, are moved out of the loop
        const __m256i pairs = _mm256_maddubs_epi16(a, b);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static double total(Sum sum) {
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
        return sum_of(lanes);
    }
};

}  // namespace

extern const ArithmeticLoop kFp32Avx2 = loop_of<Fp32>("avx2", "fp32");
extern const ArithmeticLoop kInt8Avx2 = loop_of<Int8>("avx2", "int8");

}  // namespace biomedgpt
