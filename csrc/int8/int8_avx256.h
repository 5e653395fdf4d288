// What the paths on AVX registers share, all but the dot product. For files that are compiled for AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

struct Avx256 {
    // Half a panel and four rows: eight sums in 16 registers, with two vectors of weights.
    static constexpr int kLanes = 8, kPass = 2, kTileRows = 4;
    using Ints = __m256i;
    using Weights = __m256i;

    static __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static __m256i broadcast_quad(const int8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static Ints set(int32_t value) { return _mm256_set1_epi32(value); }
    static Ints load_sums(const int32_t* from) { return load_bytes(from); }
    static void store_sums(int32_t* to, Ints sums) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums); }
};

}  // namespace
}  // namespace biomedgpt
