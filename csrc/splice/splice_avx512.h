// What the paths on AVX-512 registers share. For files that are compiled for it (see splice_kernel.h).
#pragma once

#include <immintrin.h>

#include "splice/splice_kernel.h"

namespace biomedgpt {
namespace {

struct Avx512 {
    using Vec = __m512;
    static constexpr int64_t kLanes = 16;

    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec load(const float* from) { return _mm512_loadu_ps(from); }
    static Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
    static void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec scale(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) { return _mm512_fmadd_ps(panel, weight, sum); }
    static Vec widen_half(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Vec widen_byte(const int8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    static void store_half(uint16_t* to, Vec a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Vec load_some(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
    static void store_some(float* to, Vec a, int64_t count) { _mm512_mask_storeu_ps(to, first(count), a); }
    static void store_half_some(uint16_t* to, Vec a, int64_t count) {
        _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }

    static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
        __m512 rows[16], pairs[16];
        for (int i = 0; i < 16; ++i) rows[i] = load(from + i * stride);
        for (int i = 0; i < 16; i += 2) {
            pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {  // columns of four rows, in each quarter of the registers
            rows[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
            rows[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
            rows[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
            rows[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
        }
        for (int i = 0; i < 16; i += 8) {  // of eight rows: even quarters, then odd ones
            for (int j = i; j < i + 4; ++j) {
                pairs[j] = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0x88);
                pairs[j + 4] = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0xdd);
            }
        }
        for (int j = 0; j < 8; ++j) {
            store(to + j * to_stride, _mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0x88));
            store(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0xdd));
        }
    }
};

}  // namespace
}  // namespace biomedgpt
