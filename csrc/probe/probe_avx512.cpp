// AVX-512: fused multiply-add.
#include <immintrin.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Fp32 {
    using Sum = __m512;
    using Operand = __m512;
    static constexpr int64_t kProducts = 16;
    static Sum zero() { return _mm512_set1_ps(opaque(0.0f)); }
    static Operand ones() { return _mm512_set1_ps(opaque(1.0f)); }
    static Sum add(Sum sum, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sum); }
    static double total(Sum sum) {
        alignas(64) float lanes[16];
        _mm512_store_ps(lanes, sum);
        return sum_of(lanes);
    }
};

}  // namespace

extern const ArithmeticLoop kFp32Avx512 = loop_of<Fp32>("avx512", "fp32");

}  // namespace biomedgpt
