// RMSNorm (Zhang and Sennrich 2019) of rows of float32 to halves in the order of products.
#pragma once

#include "decoder/order.h"
#include "decoder/reduce.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

struct NormSource {
    const float* rows = nullptr;      // [.., columns]
    const float* gain = nullptr;      // [columns]
    const int32_t* picked = nullptr;  // which rows; null for all in turn
    int columns = 0;                  // a multiple of 8
    float epsilon = 0;
};

// Octets of a row that a thread keeps: with 256 threads, a row of 4,096.
constexpr int kHeld = 2;

BIOMEDGPT_DEVICE void write_normed(float (&values)[kOctet], const float (&gains)[kOctet], float scale, uint16_t* to) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] *= scale * gains[i];
    *reinterpret_cast<Quad*>(to) = ordered_halves(values);
}

// Row `row` of those that are picked, by all threads of a block; columns from `source.columns` to `width` become 0.
// `scratch` has a float for each warp.
BIOMEDGPT_DEVICE void normalise(const NormSource& source, int row, uint16_t* out, int width, float* scratch,
                                int warps) {
    const int64_t index = source.picked == nullptr ? row : source.picked[row];
    const float* from = source.rows + index * source.columns;
    const int threads = warps * kWarpSize, octets = source.columns / kOctet;
    // What each thread has first stays in registers, and all of it is asked for at once: a block waits for memory once.
    float held[kHeld][kOctet] = {}, gains[kHeld][kOctet] = {}, squares = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int i = simt::thread() + j * threads;
        if (i >= octets) continue;
        load_octet(from + i * kOctet, held[j]);
        load_octet(source.gain + i * kOctet, gains[j]);
    }
#pragma unroll
    for (const auto& values : held) {
#pragma unroll
        for (const float value : values) squares += value * value;
    }
    for (int i = simt::thread() + kHeld * threads; i < octets; i += threads) {
        float values[kOctet];
        load_octet(from + i * kOctet, values);
#pragma unroll
        for (const float value : values) squares += value * value;
    }
    squares = block_sum(squares, scratch, warps);
    const float scale = simt::inverse_sqrt(squares / static_cast<float>(source.columns) + source.epsilon);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const int i = simt::thread() + j * threads;
        if (i < width / kOctet) write_normed(held[j], gains[j], scale, out + i * kOctet);
    }
    for (int i = simt::thread() + kHeld * threads; i < width / kOctet; i += threads) {
        float values[kOctet] = {}, gain[kOctet] = {};
        if (i < octets) {
            load_octet(from + i * kOctet, values);
            load_octet(source.gain + i * kOctet, gain);
        }
        write_normed(values, gain, scale, out + i * kOctet);
    }
}

struct NormParams {
    NormSource source;
    uint16_t* out = nullptr;  // [rows, pitch]
    int pitch = 0;
};

// A block for each row.
struct Norm {
    using Params = NormParams;
    static constexpr int kThreads = 256, kBlocks = 4;
    static constexpr bool kSharedFirst = true;
    static constexpr size_t kShared = kThreads / kWarpSize * sizeof(float);

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        simt::let_next_start();
        simt::wait_for_inputs();
        auto* scratch = reinterpret_cast<float*>(simt::shared());
        const int row = simt::block_x();
        normalise(p.source, row, p.out + int64_t{row} * p.pitch, p.pitch, scratch, kThreads / kWarpSize);
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
