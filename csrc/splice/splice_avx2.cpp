// splice with AVX2, FMA and F16C.
#include <immintrin.h>

#include "splice/splice_kernel.h"

namespace biomedgpt {
namespace {

struct Avx2 {
    using Vec = __m256;
    static constexpr int64_t kLanes = 8;

    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec load(const float* from) { return _mm256_loadu_ps(from); }
    static Vec broadcast(const float* from) { return _mm256_broadcast_ss(from); }
    static void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec scale(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) { return _mm256_fmadd_ps(panel, weight, sum); }
    static Vec widen_half(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Vec widen_byte(const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static void store_half(uint16_t* to, Vec a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static __m256i first(int64_t count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    }
    static Vec load_some(const float* from, int64_t count) { return _mm256_maskload_ps(from, first(count)); }
    static void store_some(float* to, Vec a, int64_t count) { _mm256_maskstore_ps(to, first(count), a); }
    static void store_half_some(uint16_t* to, Vec a, int64_t count) { store_half_some_of<Avx2>(to, a, count); }

    static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
        __m256 rows[8], pairs[8];
        for (int i = 0; i < 8; ++i) rows[i] = load(from + i * stride);
        for (int i = 0; i < 8; i += 2) {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {  // columns of four rows, in each half of the registers
            rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
            rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
            rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
            rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            store(to + i * to_stride, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20));
            store(to + (i + 4) * to_stride, _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
        }
    }
};

}  // namespace

// Twelve sums hide the latency of FMA (4 cycles, two per cycle), and leave room for their operands in 16 registers.
extern const SplicePath kSpliceAvx2 = path_of_floats<Avx2>("avx2", tile_shape<Avx2, 2, 6>(), tile_shape<Avx2, 1, 12>());

}  // namespace biomedgpt
