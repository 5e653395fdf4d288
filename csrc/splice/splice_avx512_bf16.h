// AVX-512 with words that are pairs of bfloat16. For files that are compiled for it (see splice_kernel.h).
#pragma once

#include "splice/splice_avx512.h"

namespace biomedgpt {
namespace {

struct Avx512Bf16 : Avx512 {
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) {
        __m512bh panel_pairs, weight_pairs;
        std::memcpy(&panel_pairs, &panel, sizeof panel);
        std::memcpy(&weight_pairs, &weight, sizeof weight);
        return _mm512_dpbf16_ps(sum, panel_pairs, weight_pairs);
    }
    // Rounded to nearest, ties to even.
    static Vec pairs_of(Vec first, Vec second) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(second, first);
        Vec words;
        std::memcpy(&words, &pairs, sizeof words);
        return words;
    }
};

}  // namespace
}  // namespace biomedgpt
