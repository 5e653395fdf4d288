// int4 with AVX-VNNI, the dot product of bytes on processors without AVX-512.
#include "int4/int4_avx256.h"

namespace biomedgpt {
namespace {

struct AvxVnni : Avx256 {
    static Partial start(Ints sum) { return sum; }
    static Partial dot(Partial sum, Quads weights, Quads x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
    static Ints finish(Ints, Partial sum) { return sum; }
};

}  // namespace

extern const Int4Path kInt4AvxVnni = int4_path<AvxVnni>("avx_vnni");

}  // namespace biomedgpt
