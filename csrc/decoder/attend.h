// Attention of a token's few rows over the KV cache, split by positions so that a whole GPU works on one sequence
// (Dao et al. 2023, "Flash-Decoding").
//
// A block has one head of one row, and one split. Each of its lanes reads sixteen bytes of a key and of a value; as
// many lanes as a row of them has keep a softmax of their own, with sums that are rescaled when a larger score comes
// (Milakov and Gimelshein 2018). These are joined in shared memory, and those of the splits by the block that is the
// last one of its head to arrive: always in the same order, so that the same operands give the same bits.
#pragma once

#include "decoder/cache.h"
#include "decoder/order.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

struct AttendParams {
    const uint16_t* queries = nullptr;  // halves [rows, heads * head_size], rotated
    uint16_t* out = nullptr;            // [rows, out_pitch], in the order of products
    int out_pitch = 0;
    CacheShape cache = {};
    const RowPlace* places = nullptr;
    int heads = 0;
    int heads_per_kv = 1;
    int splits = 0;
    float scale = 0;              // of scores, times log2(e)
    float* partial = nullptr;     // [rows, heads, splits, head_size + 2]; not of a single split, nor is what follows
    uint32_t* arrived = nullptr;  // [rows, heads], zeros before and after
};

// What is left of a softmax and its weighted sum: of `kept` times exp2(most).
struct Kept {
    float most;
    float total;
};

// The factor of something kept with `most` when it is joined with others of which `highest` is the most. Nothing was
// kept of no position.
BIOMEDGPT_DEVICE float factor(float most, float highest) {
    return most == -INFINITY ? 0.0f : simt::exp2_of(most - highest);
}

template <int kHeadSize>
struct Attend {
    using Params = AttendParams;

    static constexpr int kThreads = 128, kBlocks = 4, kWarps = kThreads / kWarpSize;
    static constexpr bool kSharedFirst = true;
    static constexpr int kLanes = kHeadSize / kOctet;     // of a position
    static constexpr int kTogether = kWarpSize / kLanes;  // positions that a warp has at once
    static constexpr int kGroups = kWarps * kTogether;    // lanes with a softmax of their own
    static constexpr int kLeast = 64;                     // positions of a split
    static constexpr int kAtOnce = 4;                     // positions that a lane has on their way
    static constexpr int kKeptFloats = kHeadSize + 2;     // sums, most, total
    static constexpr size_t kShared = (size_t{kGroups} * kKeptFloats + 1) * sizeof(float);
    static_assert(kHeadSize <= kThreads, "a thread joins an element of all groups");

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        simt::let_next_start();
        simt::wait_for_inputs();
        const int head = simt::block_x(), split = simt::block_y(), row = simt::block_z();
        const RowPlace place = p.places[row];
        const int length = place.position + 1, worth = (length + kLeast - 1) / kLeast;
        // A launch has as many splits as long contexts want; of a short one, few are worth joining.
        const int splits = worth < p.splits ? worth : p.splits;
        if (split >= splits) return;
        const int each = (length + splits - 1) / splits;
        const int begin = split * each, end = begin + each < length ? begin + each : length;
        auto* kept = reinterpret_cast<float*>(simt::shared());
        attend(p, place, head, row, begin, end, kept);
        simt::sync_block();
        const int64_t index = int64_t{row} * p.heads + head;
        if (splits == 1) {
            write(p, row, head, kept, kGroups);
            return;
        }
        float* partial = p.partial + index * p.splits * kKeptFloats;
        join(kept, kGroups, partial + split * kKeptFloats);
        if (!last_to_arrive(p, index, splits, reinterpret_cast<uint32_t*>(kept + kGroups * kKeptFloats))) return;
        write(p, row, head, partial, splits);
    }

    // Positions `begin` to `end`; each group of lanes leaves what it kept of its own.
    BIOMEDGPT_DEVICE static void attend(const Params& p, const RowPlace& place, int head, int row, int begin, int end,
                                        float* kept) {
        const int part = simt::lane() % kLanes * kOctet, group = simt::warp() * kTogether + simt::lane() / kLanes;
        const int kv_head = head / p.heads_per_kv;
        const uint16_t* keys = head_rows(p.cache, place.cache, kKeys, kv_head);
        const uint16_t* values = head_rows(p.cache, place.cache, kValues, kv_head);
        float query[kOctet], sums[kOctet] = {};
        widen(*reinterpret_cast<const Quad*>(p.queries + (int64_t{row} * p.heads + head) * kHeadSize + part), query);
        Kept own = {-INFINITY, 0};
        // Several positions at once, all of whose memory is asked for before any of it is used.
        for (int base = begin + simt::warp() * kTogether; base < end; base += kAtOnce * kGroups) {
            Quad key[kAtOnce], value[kAtOnce];
            float scores[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int position = base + i * kGroups + simt::lane() / kLanes;
                const int64_t at = int64_t{position < end ? position : end - 1} * kHeadSize + part;
                key[i] = *reinterpret_cast<const Quad*>(keys + at);
                value[i] = *reinterpret_cast<const Quad*>(values + at);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int position = base + i * kGroups + simt::lane() / kLanes;
                scores[i] = score_of(query, key[i]) * p.scale;
                if (position >= end) scores[i] = -INFINITY;
            }
            add(scores, value, own, sums);
        }
        float* to = kept + group * kKeptFloats;
#pragma unroll
        for (int i = 0; i < kOctet; ++i) to[part + i] = sums[i];
        if (part == 0) to[kHeadSize] = own.most, to[kHeadSize + 1] = own.total;
    }

    BIOMEDGPT_DEVICE static void widen(const Quad& from, float (&to)[kOctet]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[2 * i] = simt::low_half(from.words[i]);
            to[2 * i + 1] = simt::high_half(from.words[i]);
        }
    }

    // Over the lanes that share a position.
    BIOMEDGPT_DEVICE static float score_of(const float (&query)[kOctet], const Quad& from) {
        float key[kOctet], score = 0;
        widen(from, key);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) score += query[i] * key[i];
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) score += simt::shuffle_xor(score, mask);
        return score;
    }

    BIOMEDGPT_DEVICE static void add(const float (&scores)[kAtOnce], const Quad (&values)[kAtOnce], Kept& own,
                                     float (&sums)[kOctet]) {
        float most = own.most;
#pragma unroll
        for (const float score : scores) most = score > most ? score : most;
        const float before = factor(own.most, most);
        own = {most, own.total * before};
#pragma unroll
        for (float& sum : sums) sum *= before;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float weight = factor(scores[i], most);
            float value[kOctet];
            widen(values[i], value);
            own.total += weight;
#pragma unroll
            for (int j = 0; j < kOctet; ++j) sums[j] += weight * value[j];
        }
    }

    // Element `thread` of what `count` kept, joined.
    BIOMEDGPT_DEVICE static float joined(const float* kept, int count, Kept& all) {
        all = {-INFINITY, 0};
        for (int i = 0; i < count; ++i) {
            const float most = kept[i * kKeptFloats + kHeadSize];
            if (most > all.most) all.most = most;
        }
        float sum = 0;
        for (int i = 0; i < count; ++i) {
            const float* one = kept + i * kKeptFloats;
            const float weight = factor(one[kHeadSize], all.most);
            all.total += weight * one[kHeadSize + 1];
            sum += weight * one[simt::thread()];
        }
        return sum;
    }

    BIOMEDGPT_DEVICE static void join(const float* kept, int count, float* to) {
        if (simt::thread() >= kHeadSize) return;
        Kept all;
        to[simt::thread()] = joined(kept, count, all);
        if (simt::thread() == 0) to[kHeadSize] = all.most, to[kHeadSize + 1] = all.total;
    }

    BIOMEDGPT_DEVICE static void write(const Params& p, int row, int head, const float* kept, int count) {
        if (simt::thread() >= kHeadSize) return;
        Kept all;
        const float sum = joined(kept, count, all);
        p.out[int64_t{row} * p.out_pitch + place_of(head * kHeadSize + simt::thread())] =
            simt::half_bits(sum / all.total);
    }

    // Whether the other splits of a head have left what they kept; true for one block of them.
    BIOMEDGPT_DEVICE static bool last_to_arrive(const Params& p, int64_t index, int splits, uint32_t* shown) {
        simt::sync_block();
        if (simt::thread() == 0) {
            simt::fence();  // what this block kept, before its arrival
            *shown = simt::fetch_add(p.arrived + index, 1);
            simt::fence();  // and what the others kept, behind theirs
        }
        simt::sync_block();
        if (*shown + 1 != static_cast<uint32_t>(splits)) return false;
        if (simt::thread() == 0) p.arrived[index] = 0;
        return true;
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
