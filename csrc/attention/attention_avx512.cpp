// attention with AVX-512.
#include <immintrin.h>

#include "attention/attention_kernel.h"

namespace biomedgpt {
namespace {

struct Avx512 {
    // 16 sums in 32 registers; queries and weights are operands in memory.
    static constexpr int kLanes = 16, kRows = 8, kRowBlocks = 2, kBlocks = 8, kRowVectors = 2, kVectors = 8;
    using Floats = __m512;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats set(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats load_halves(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats load_bytes(const uint8_t* from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static void store_halves(uint16_t* to, Floats values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

}  // namespace

extern const AttentionPath kAttentionAvx512 = attention_path<Avx512>("avx512");

}  // namespace biomedgpt
