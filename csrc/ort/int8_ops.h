// The int8 operators of domain "biomedgpt", for ONNX Runtime's CPU execution provider.
//
// Int8Linear        y = x W^T + b
// Int8LinearGelu    y = gelu(x W^T + b)
// Int8LinearAdd     y = x W^T + b + residual
//
// Inputs: x float32 [..., K]; records uint8 [panels, bytes of a record] as int8/int8.h has them, an initializer that
// nothing overrides; of Int8LinearAdd, residual float32 [..., N]. Attributes: K and N, ints, the widths. Output: y
// float32 [..., N].
#pragma once

#include "ort/ort_abi.h"

namespace biomedgpt::ort {

enum class Int8After { nothing, gelu, add };

struct Int8Op : CustomOp {
    const Api* api;
    const char* name;
    Int8After after;
};

// `api` must live as long as the operator is used.
Int8Op int8_op(const Api& api, const char* name, Int8After after);

}  // namespace biomedgpt::ort
