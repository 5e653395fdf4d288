// What this machine's processor and operating system can execute, asked once.
#pragma once

namespace biomedgpt {

struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512f = false;
    bool neon = false;
};

const CpuFeatures& cpu_features();

}  // namespace biomedgpt
