#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace biomedgpt {
namespace {

CpuFeatures detect() {
    CpuFeatures found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // The builtin also asks XGETBV whether the operating system saves the wide registers; CPUID alone does not say.
    found.avx2 = __builtin_cpu_supports("avx2");
    found.fma = __builtin_cpu_supports("fma");
    found.avx512f = __builtin_cpu_supports("avx512f");
    // GCC before 11 has no "f16c" in the builtin. F16C works on AVX registers, so AVX2 above settles the system's part.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    found.f16c = found.avx2 && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
#elif defined(__aarch64__)
    found.neon = true;  // part of the base architecture
#endif
    return found;
}

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace biomedgpt
