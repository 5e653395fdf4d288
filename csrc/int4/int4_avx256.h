// What the paths on AVX registers share, all but the dot product. For files that are compiled for AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "int4/int4_kernel.h"

namespace biomedgpt {
namespace {

struct Avx256 {
    // Half a panel and four rows: eight sums in 16 registers, with four vectors of weights.
    static constexpr int kLanes = 8, kPass = 2, kTileRows = 4, kUnpackedTileRows = 4;
    using Floats = __m256;
    using Ints = __m256i;
    using Quads = __m256i;
    using Partial = __m256i;

    static Quads load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Quads low(Quads quads) { return _mm256_and_si256(quads, _mm256_set1_epi8(15)); }
    static Quads high(Quads quads) { return low(_mm256_srli_epi16(quads, 4)); }
    static Quads broadcast(const int8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static Ints set(int32_t value) { return _mm256_set1_epi32(value); }
    static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Floats set(float value) { return _mm256_set1_ps(value); }
    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
    static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Floats load_halves(const uint8_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Floats scale(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace biomedgpt
