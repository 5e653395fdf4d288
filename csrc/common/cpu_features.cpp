#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace biomedgpt {
namespace {

#if defined(__x86_64__)
// Linux gives a process the 8 KiB of tile state only when asked, and before any thread uses a tile.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    Leaf(unsigned number, unsigned part) { __get_cpuid_count(number, part, &eax, &ebx, &ecx, &edx); }
};
#endif

CpuFeatures detect() {
    CpuFeatures found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // The builtin also asks XGETBV whether the operating system saves the wide registers; CPUID alone does not say.
    found.avx2 = __builtin_cpu_supports("avx2");
    found.fma = __builtin_cpu_supports("fma");
    found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    // The builtin does not know these in every compiler. F16C works on AVX registers and BF16 on AVX-512's, so what is
    // above settles the system's part; tiles have a permission of their own.
    found.f16c = found.avx2 && (Leaf(1, 0).ecx & bit_F16C) != 0;
    found.avx512_bf16 = found.avx512 && (Leaf(7, 1).eax & 1u << 5) != 0;
    found.avx_vnni = found.avx2 && (Leaf(7, 1).eax & 1u << 4) != 0;
    found.avx512_vnni = found.avx512 && (Leaf(7, 0).ecx & 1u << 11) != 0;
    constexpr unsigned kTilesAndBf16 = 1u << 24 | 1u << 22;
    found.amx = (Leaf(7, 0).edx & kTilesAndBf16) == kTilesAndBf16;
    constexpr unsigned kTilesAndInt8 = 1u << 24 | 1u << 25;
    const bool amx_int8 = (Leaf(7, 0).edx & kTilesAndInt8) == kTilesAndInt8;
    const bool granted = found.avx512 && (found.amx || amx_int8) && tiles_granted();
    found.amx_bf16 = found.avx512_bf16 && found.amx && granted;
    found.amx_int8 = amx_int8 && granted;
#elif defined(__aarch64__)
    found.neon = true;  // part of the base architecture
#if defined(__linux__)
    found.neon_dotprod = (getauxval(AT_HWCAP) & 1ul << 20) != 0;  // HWCAP_ASIMDDP
    found.neon_fp16 = (getauxval(AT_HWCAP) & 1ul << 23) != 0;     // HWCAP_ASIMDFHM
    found.neon_bf16 = (getauxval(AT_HWCAP2) & 1ul << 14) != 0;    // HWCAP2_BF16
    found.neon_i8mm = (getauxval(AT_HWCAP2) & 1ul << 13) != 0;    // HWCAP2_I8MM
#endif
#endif
    return found;
}

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace biomedgpt
