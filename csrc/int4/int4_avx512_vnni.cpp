// int4 with AVX-512 VNNI: one instruction multiplies 64 unsigned by 64 signed bytes and adds them to 16 sums.
#include "int4/int4_avx512.h"

namespace biomedgpt {

extern const Int4Path kInt4Avx512Vnni = int4_path<Avx512Vnni>("avx512_vnni");

}  // namespace biomedgpt
