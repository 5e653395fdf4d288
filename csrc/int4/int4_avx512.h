// What the paths on AVX-512 registers share. For files that are compiled for it (see splice_kernel.h).
#pragma once

#include <immintrin.h>

#include "int4/int4_kernel.h"

namespace biomedgpt {
namespace {

struct Avx512Vnni {
    // 16 or 28 sums in 32 registers, beside what weights and constants need; activations are operands in memory.
    static constexpr int kLanes = 16, kPass = 2, kTileRows = 8, kUnpackedTileRows = 12;
    using Floats = __m512;
    using Ints = __m512i;
    using Quads = __m512i;
    using Partial = __m512i;

    static Quads load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Quads low(Quads quads) { return _mm512_and_si512(quads, _mm512_set1_epi8(15)); }
    static Quads high(Quads quads) { return low(_mm512_srli_epi16(quads, 4)); }
    static Quads broadcast(const int8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static Partial start(Ints sum) { return sum; }
    static Partial dot(Partial sum, Quads weights, Quads x) { return _mm512_dpbusd_epi32(sum, weights, x); }
    static Ints finish(Ints, Partial sum) { return sum; }
    static Ints set(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Floats set(float value) { return _mm512_set1_ps(value); }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats load_halves(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats scale(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace biomedgpt
