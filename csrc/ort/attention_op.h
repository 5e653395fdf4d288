// The attention operator of domain "biomedgpt", for ONNX Runtime's CPU execution provider.
//
// CausalAttention: see attention/attention.h. Inputs: qkv float32 [1, T, (heads + 2 * kv_heads) * head_size]; past_key
// and past_value uint8 [kv_heads, blocks, bytes of a block], the KV cache, whose element type the size of a block says;
// seqlens_k int32 [1], positions after these T, minus 1 (as GroupQueryAttention has it); cos and sin float32
// [positions, head_size / 2]. Attributes: heads and kv_heads, ints. Outputs: y float32 [1, T, heads * head_size];
// present_key and present_value like past_*. Bound to the memory of past_*, they are appended to in place; otherwise
// the cache is copied first.
#pragma once

#include "ort/ort_abi.h"

namespace biomedgpt::ort {

struct AttentionOp : CustomOp {
    const Api* api;
};

// `api` must live as long as the operator is used.
AttentionOp attention_op(const Api& api);

}  // namespace biomedgpt::ort
