// Sums and maxima over warps and blocks, in one order.
#pragma once

#include "simt/simt.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

BIOMEDGPT_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
    return value;
}

// Over `warps` warps; `scratch` has a float for each, and may be used again by all at once.
BIOMEDGPT_DEVICE float block_sum(float value, float* scratch, int warps) {
    value = warp_sum(value);
    if (simt::lane() == 0) scratch[simt::warp()] = value;
    simt::sync_block();
    float sum = 0;
    for (int i = 0; i < warps; ++i) sum += scratch[i];
    simt::sync_block();
    return sum;
}

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
