// The int4 operators of domain "biomedgpt", for ONNX Runtime's CPU execution provider.
//
// Int4Linear    y = x W^T
// Int4GateUp    y = silu(x Wg^T) * (x Wu^T)
//
// Inputs: x float32 [..., K]; records uint8 [panels, groups, bytes of a record] as int4/int4.h has them, an initializer
// that nothing overrides, of ceil(N / 32) panels, or twice as many for Int4GateUp. The size of a record says the group.
// Attributes: K and N, ints, the widths. Output: y float32 [..., N].
#pragma once

#include "ort/ort_abi.h"

namespace biomedgpt::ort {

struct Int4Op : CustomOp {
    const Api* api;
    const char* name;
    int64_t matrices;  // 1, or 2 for gate and up
};

// `api` must live as long as the operator is used.
Int4Op int4_op(const Api& api, const char* name, int64_t matrices);

}  // namespace biomedgpt::ort
