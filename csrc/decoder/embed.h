// Rows of the embedding table, to float32.
#pragma once

#include "decoder/places.h"
#include "simt/simt.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

struct EmbedParams {
    const void* table = nullptr;    // [vocabulary, columns]: float32, halves, or int8
    const float* scales = nullptr;  // of int8, for each row
    int element_bytes = 0;
    const RowPlace* places = nullptr;
    float* out = nullptr;  // [rows, columns]
    int columns = 0;
};

// A block for each row.
struct Embed {
    using Params = EmbedParams;
    static constexpr int kThreads = 256, kBlocks = 4;
    static constexpr bool kSharedFirst = true;

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        simt::let_next_start();
        simt::wait_for_inputs();
        const int row = simt::block_x();
        const int64_t token = p.places[row].token;
        for (int i = simt::thread(); i < p.columns; i += kThreads) {
            const int64_t from = token * p.columns + i;
            float value;
            if (p.element_bytes == 4) {
                value = static_cast<const float*>(p.table)[from];
            } else if (p.element_bytes == 2) {
                value = simt::half_value(static_cast<const uint16_t*>(p.table)[from]);
            } else {
                value = static_cast<float>(static_cast<const int8_t*>(p.table)[from]) * p.scales[token];
            }
            p.out[int64_t{row} * p.columns + i] = value;
        }
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
