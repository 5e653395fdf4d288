// Records of a matrix of eight bits in groups, as the head may be (ONNX Runtime's MatMulNBits with bits = 8).
//
// Like those of four bits (csrc/int4/int4.h): [panels, groups], a record has 32 rows of a group. It holds 32 * group
// bytes of values, in blocks of 128 bytes for 4 columns k, ... k + 3, where byte 4 * r + j is column k + j of row r,
// plus 128; then 64 bytes, the float16 scales of the 32 rows. Rows beyond N have the value 128 and scale 0.
#pragma once

#include <cstdint>

namespace biomedgpt {

int64_t int8_head_bytes(int64_t rows, int64_t columns, int64_t group);

// From values [rows, groups * group], which are 128 for zero, and float16 scales [rows, groups].
void int8_head_pack(int64_t rows, int64_t columns, int64_t group, const uint8_t* values, const uint16_t* scales,
                    uint8_t* records);

}  // namespace biomedgpt
