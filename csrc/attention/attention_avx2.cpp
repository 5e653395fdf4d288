// attention with AVX2, FMA and F16C.
#include <immintrin.h>

#include "attention/attention_kernel.h"

namespace biomedgpt {
namespace {

struct Avx2 {
    // Eight sums in 16 registers.
    static constexpr int kLanes = 8, kRows = 4, kRowBlocks = 1, kBlocks = 4, kRowVectors = 2, kVectors = 8;
    using Floats = __m256;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats set(float value) { return _mm256_set1_ps(value); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats load_halves(const uint8_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Floats load_bytes(const uint8_t* from) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    static void store_halves(uint16_t* to, Floats values) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace

extern const AttentionPath kAttentionAvx2 = attention_path<Avx2>("avx2");

}  // namespace biomedgpt
