// What this machine's processor and operating system can execute, asked once.
#pragma once

namespace biomedgpt {

struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512 = false;       // F, BW, DQ and VL: Skylake servers and later, Zen 4 and later
    bool avx512_bf16 = false;  // dot products of bfloat16 pairs
    bool avx_vnni = false;     // dot products of four bytes, on AVX registers
    bool avx512_vnni = false;  // the same on AVX-512's
    bool amx = false;          // tiles of bfloat16, whether or not the system lets a process use them
    bool amx_bf16 = false;     // tiles of bfloat16, granted to this process by the system
    bool amx_int8 = false;     // tiles of bytes, granted likewise
    bool neon = false;
    bool neon_fp16 = false;     // FMLAL
    bool neon_bf16 = false;     // BFDOT
    bool neon_dotprod = false;  // SDOT
    bool neon_i8mm = false;     // SMMLA
};

const CpuFeatures& cpu_features();

}  // namespace biomedgpt
