// SMMLA: products of 2 x 8 and 8 x 2 bytes on 128 bits.
#include <arm_neon.h>

#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

struct Int8 {
    using Sum = int32x4_t;
    using Operand = int8x16_t;
    static constexpr int64_t kProducts = 32;
    static Sum zero() { return vdupq_n_s32(opaque(0)); }
    static Operand ones() { return vdupq_n_s8(opaque(int8_t{1})); }
    static Sum add(Sum sum, Operand a, Operand b) { return vmmlaq_s32(sum, a, b); }
    static double total(Sum sum) { return vaddvq_s32(sum); }
};

}  // namespace

extern const ArithmeticLoop kInt8NeonI8mm = loop_of<Int8>("neon_i8mm", "int8");

}  // namespace biomedgpt
