// NEON: fused multiply-add, which files for any processor are compiled without.
#include <arm_neon.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Fp32 {
    using Sum = float32x4_t;
    using Operand = float32x4_t;
    static constexpr int64_t kProducts = 4;
    static Sum zero() { return vdupq_n_f32(opaque(0.0f)); }
    static Operand ones() { return vdupq_n_f32(opaque(1.0f)); }
    static Sum add(Sum sum, Operand a, Operand b) { return vfmaq_f32(sum, a, b); }
    static double total(Sum sum) { return vaddvq_f32(sum); }
};

}  // namespace

extern const ArithmeticLoop kFp32Neon = loop_of<Fp32>("neon", "fp32");

}  // namespace biomedgpt
