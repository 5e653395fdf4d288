// Attention of a prompt's rows over the KV cache on tensor cores, a tile of positions at a time (Dao et al. 2022).
//
// A block has 64 rows of a head, each warp 16 of them. Scores of 64 positions stand in registers, where mma leaves them
// as it wants the weights of the values; keys and values come through shared memory.
#pragma once

#include "decoder/attend.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

struct AttendPromptParams {
    const uint16_t* queries = nullptr;  // halves [rows, heads * head_size], rotated
    uint16_t* out = nullptr;            // [rows, out_pitch], in the order of products
    int out_pitch = 0;
    int rows = 0;
    CacheShape cache = {};
    const RowPlace* places = nullptr;  // of one sequence, positions one after the other; keys and values are there
    int heads = 0;
    float scale = 0;  // of scores, times log2(e)
};

template <int kHeadSize>
struct AttendPrompt {
    using Params = AttendPromptParams;

    static constexpr int kThreads = 128, kBlocks = 2, kRows = 64, kPositions = 64;
    static constexpr bool kSharedFirst = true;
    static constexpr int kPitch = kHeadSize + 8;  // halves: eight rows of sixteen bytes meet in no bank
    static constexpr size_t kShared = size_t{2} * kPositions * kPitch * sizeof(uint16_t);
    static constexpr int kSteps = kHeadSize / 16;       // of a score: columns that are multiplied at a time
    static constexpr int kScoreTiles = kPositions / 8;  // eight positions each
    static constexpr int kOutTiles = kHeadSize / 8;

    // Of a lane: rows lane / 4 and that plus 8 of its warp's.
    struct State {
        uint32_t queries[kSteps][4];
        float out[kOutTiles][4] = {};
        float most[2] = {-INFINITY, -INFINITY};
        float total[2] = {};
    };

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        simt::let_next_start();
        simt::wait_for_inputs();
        const int head = simt::block_y(), first = simt::block_x() * kRows;
        const int own = first + simt::warp() * 16 + simt::lane() / 4;
        const RowPlace start = p.places[0];
        const int rows = p.rows - first < kRows ? p.rows - first : kRows;
        const int end = start.position + first + rows;  // positions that the block's last row looks at
        const int kv_head = head / (p.heads / p.cache.kv_heads);
        auto* keys = reinterpret_cast<uint16_t*>(simt::shared());
        uint16_t* values = keys + kPositions * kPitch;
        State state;
        load_queries(p, head, own, state);
        for (int base = 0; base < end; base += kPositions) {
            load(head_rows(p.cache, start.cache, kKeys, kv_head), base, end, keys);
            load(head_rows(p.cache, start.cache, kValues, kv_head), base, end, values);
            simt::commit_copies();
            simt::wait_copies<0>();
            simt::sync_block();
            add(state, keys, values, start.position + own - base, p.scale);
            simt::sync_block();  // before the next tile takes their place
        }
        write(p, head, own, state);
    }

    BIOMEDGPT_DEVICE static void load_queries(const Params& p, int head, int own, State& state) {
        const int quarter = simt::lane() % 4;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = own + i % 2 * 8, column = step * 16 + i / 2 * 8 + quarter * 2;
                const uint16_t* from = p.queries + (int64_t{row} * p.heads + head) * kHeadSize + column;
                state.queries[step][i] = row < p.rows ? *reinterpret_cast<const uint32_t*>(from) : 0;
            }
        }
    }

    // Positions from `base`; zeros from `end` on, since what the cache holds there may be no number.
    BIOMEDGPT_DEVICE static void load(const uint16_t* from, int base, int end, uint16_t* to) {
        for (int i = simt::thread(); i < kPositions * (kHeadSize / kOctet); i += kThreads) {
            const int position = i / (kHeadSize / kOctet), part = i % (kHeadSize / kOctet) * kOctet;
            simt::copy_async(to + position * kPitch + part, from + int64_t{base + position} * kHeadSize + part,
                             base + position < end);
        }
    }

    // A tile; `last` is the position in it up to which this lane's first row looks.
    BIOMEDGPT_DEVICE static void add(State& state, const uint16_t* keys, const uint16_t* values, int last,
                                     float scale) {
        const int group = simt::lane() / 4, quarter = simt::lane() % 4;
        float scores[kScoreTiles][4] = {};
#pragma unroll
        for (int tile = 0; tile < kScoreTiles; ++tile) {
            const uint16_t* key = keys + (tile * 8 + group) * kPitch + quarter * 2;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                simt::mma(scores[tile], state.queries[step],
                          {*reinterpret_cast<const uint32_t*>(key + step * 16),
                           *reinterpret_cast<const uint32_t*>(key + step * 16 + 8)});
            }
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) weigh(state, scores, side, last + side * 8, scale);
        add_values(state, scores, values);
    }

    // Scores of this lane's first or second row become weights.
    BIOMEDGPT_DEVICE static void weigh(State& state, float (&scores)[kScoreTiles][4], int side, int last, float scale) {
        const int quarter = simt::lane() % 4;
        float most = state.most[side];
#pragma unroll
        for (int tile = 0; tile < kScoreTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& score = scores[tile][side * 2 + i];
                score = tile * 8 + quarter * 2 + i <= last ? score * scale : -INFINITY;
                if (score > most) most = score;
            }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            const float other = simt::shuffle_xor(most, mask);
            if (other > most) most = other;
        }
        const float before = factor(state.most[side], most);
        float total = 0;
#pragma unroll
        for (int tile = 0; tile < kScoreTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& score = scores[tile][side * 2 + i];
                score = factor(score, most);
                total += score;
            }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) total += simt::shuffle_xor(total, mask);
        state.most[side] = most;
        state.total[side] = state.total[side] * before + total;
#pragma unroll
        for (int tile = 0; tile < kOutTiles; ++tile) {
            state.out[tile][side * 2] *= before;
            state.out[tile][side * 2 + 1] *= before;
        }
    }

    BIOMEDGPT_DEVICE static void add_values(State& state, const float (&weights)[kScoreTiles][4],
                                            const uint16_t* values) {
        const int row = simt::lane() % 16, column = simt::lane() / 16 * 8;
#pragma unroll
        for (int step = 0; step < kPositions / 16; ++step) {
            const auto& low = weights[2 * step];
            const auto& high = weights[2 * step + 1];
            const uint32_t a[4] = {simt::half_pair(low[0], low[1]), simt::half_pair(low[2], low[3]),
                                   simt::half_pair(high[0], high[1]), simt::half_pair(high[2], high[3])};
#pragma unroll
            for (int tile = 0; tile < kOutTiles; tile += 2) {
                uint32_t b[4];
                simt::load_transposed(b, values + (step * 16 + row) * kPitch + tile * 8 + column);
                simt::mma(state.out[tile], a, {b[0], b[1]});
                simt::mma(state.out[tile + 1], a, {b[2], b[3]});
            }
        }
    }

    BIOMEDGPT_DEVICE static void write(const Params& p, int head, int own, const State& state) {
        const int quarter = simt::lane() % 4;
#pragma unroll
        for (int tile = 0; tile < kOutTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = own + i / 2 * 8, column = head * kHeadSize + tile * 8 + quarter * 2 + i % 2;
                if (row >= p.rows) continue;
                p.out[int64_t{row} * p.out_pitch + place_of(column)] =
                    simt::half_bits(state.out[tile][i] / state.total[i / 2]);
            }
        }
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
