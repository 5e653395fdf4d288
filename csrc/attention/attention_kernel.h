// The loops of attention, as templates over an instruction set and an element type of the cache. In an unnamed
// namespace, and without standard containers and algorithms, for the reason that splice_kernel.h gives.
//
// An `Isa` has
//   kLanes                 floats in a vector, a divisor of 16
//   kRows                  rows that are summed at once
//   kRowBlocks, kBlocks    blocks of the cache whose scores are summed at once, for kRows rows and for a single one
//   kRowVectors, kVectors  vectors of a row of y, likewise
//   Floats
//   zero(), set(float), load(p), store(p, f), fma(f, g, h), load_halves(p), load_bytes(p), store_halves(p, f)
//   max(f, g)              f > g ? f : g
#pragma once

#include <cstring>

#include "attention/attention_path.h"
#include "common/exponential.h"
#include "common/half.h"
#include "common/quantize.h"
#include "common/unroll.h"

namespace biomedgpt {
namespace {

// Positions whose scores are computed before sums are rescaled. Counted from 0, so that it is the same for every row.
constexpr int64_t kTile = 128, kTileBlocks = kTile / kKvBlock;
// Sums over positions that go on side by side, whatever the length of a vector.
constexpr int64_t kSums = 16;

constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <class Isa>
struct F32 {
    static constexpr int64_t kBytes = 4;
    static constexpr bool kScaled = false;
    static typename Isa::Floats load(const uint8_t* from) { return Isa::load(reinterpret_cast<const float*>(from)); }
};

template <class Isa>
struct F16 {
    static constexpr int64_t kBytes = 2;
    static constexpr bool kScaled = false;
    static typename Isa::Floats load(const uint8_t* from) { return Isa::load_halves(from); }
};

template <class Isa>
struct I8 {
    static constexpr int64_t kBytes = 1;
    static constexpr bool kScaled = true;
    static typename Isa::Floats load(const uint8_t* from) { return Isa::load_bytes(from); }
};

// A row's way through the cache.
struct Row {
    alignas(64) float query[kMaxHeadSize];
    alignas(64) float scores[kTile];  // later the weights of values
    alignas(64) float sums[kMaxHeadSize];
    alignas(64) float weights[kSums];  // added up
    float largest;
};

// One head vector, rotated: its first half is the real parts, its second the imaginary ones.
inline void rotate(const float* __restrict from, const float* __restrict cos, const float* __restrict sin, int64_t size,
                   float factor, float* __restrict to) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
        to[i] = (from[i] * cos[i] - from[half + i] * sin[i]) * factor;
        to[half + i] = (from[half + i] * cos[i] + from[i] * sin[i]) * factor;
    }
}

// Elements of one head vector as the cache has them, `step` elements apart; returns their scale.
template <class Element>
float put(const Element* from, int64_t count, int64_t step, uint8_t* to) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * step * int64_t{sizeof *from}, from + i, sizeof *from);
    return 1.0f;
}

template <class Isa>
float put_vector(const KvShape& shape, const float* from, int64_t step, uint8_t* to) {
    const int64_t size = shape.head_size;
    if (shape.format == KvFormat::f32) return put(from, size, step, to);
    if (shape.format == KvFormat::f16) {
        uint16_t halves[kMaxHeadSize];
        for (int64_t i = 0; i < size; i += Isa::kLanes) Isa::store_halves(halves + i, Isa::load(from + i));
        return put(halves, size, step, to);
    }
    int8_t bytes[kMaxHeadSize];
    float scale;
    quantize_bytes(from, size, bytes, &scale);
    put(bytes, size, step, to);
    return scale;
}

inline void put_scale(const KvShape& shape, uint8_t* block, int64_t position, float scale) {
    if (shape.scale_bytes() == 0) return;
    uint8_t* scales = block + shape.block_bytes() - shape.scale_bytes();
    std::memcpy(scales + position * int64_t{sizeof scale}, &scale, sizeof scale);
}

template <class Isa>
void append(const AttentionHead& head, const AttentionRows& rows, const float* keys, const float* values) {
    const KvShape& shape = head.shape;
    const int64_t size = shape.head_size, element = shape.element_bytes(), half = size / 2;
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t position = (rows.first + i) % kKvBlock;
        const int64_t offset = (rows.first + i) / kKvBlock * shape.block_bytes();
        float key[kMaxHeadSize];
        rotate(keys + i * rows.stride, rows.cos + i * half, rows.sin + i * half, size, 1.0f, key);
        uint8_t* block = head.keys + offset;
        put_scale(shape, block, position, put_vector<Isa>(shape, key, kKvBlock, block + position * element));
        block = head.values + offset;
        const float* value = values + i * rows.stride;
        put_scale(shape, block, position, put_vector<Isa>(shape, value, 1, block + position * size * element));
    }
}

inline const float* scales_of(const KvShape& shape, const uint8_t* block) {
    return reinterpret_cast<const float*>(block + shape.block_bytes() - shape.scale_bytes());
}

// A tile of positions, and what rows see of it.
struct Tile {
    KvShape shape;
    const uint8_t* keys;
    const uint8_t* values;
    int64_t ahead;       // bytes to the next head's cache for a single row, 0 for several
    int64_t seen_first;  // positions from its beginning up to the first row's own; may be none, or more than it has

    int64_t seen(int64_t row) const { return smaller(kTile, seen_first + row); }
};

// A single row passes over the cache as fast as it is read. While it attends to one head, the next head's cache, which
// may be beyond the end of all, is fetched into the L2 cache. `offset` is counted from the beginning of a block.
template <int kRows>
void fetch_ahead(const uint8_t* from, int64_t ahead, int64_t offset) {
    constexpr int64_t kCacheLine = 64;
    constexpr int kIntoL2 = 2;
    if (kRows > 1 || offset % kCacheLine != 0) return;
    const auto address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead + offset);
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, kIntoL2);
}

// scores = queries times keys, for kBlocks blocks of the cache and kRows rows.
template <class Isa, template <class> class Format, int kRows, int kBlocks>
__attribute__((always_inline)) inline void score(const Tile& tile, const uint8_t* keys, Row* rows, int64_t first) {
    constexpr int kVectors = kKvBlock / Isa::kLanes;
    constexpr int64_t kBytes = Format<Isa>::kBytes;
    const int64_t block_bytes = tile.shape.block_bytes(), size = tile.shape.head_size;
    typename Isa::Floats sums[kRows][kBlocks][kVectors];
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kVectors; ++v) sums[r][b][v] = Isa::zero();
        }
    }
    for (int64_t i = 0; i < size; ++i) {
        typename Isa::Floats elements[kBlocks][kVectors];
        BIOMEDGPT_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                const int64_t offset = (i * kKvBlock + v * Isa::kLanes) * kBytes;
                elements[b][v] = Format<Isa>::load(keys + b * block_bytes + offset);
                fetch_ahead<kRows>(keys + b * block_bytes, tile.ahead, offset);
            }
        }
        BIOMEDGPT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const typename Isa::Floats query = Isa::set(rows[r].query[i]);
            BIOMEDGPT_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    sums[r][b][v] = Isa::fma(query, elements[b][v], sums[r][b][v]);
                }
            }
        }
    }
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                Isa::store(rows[r].scores + first + b * kKvBlock + v * Isa::kLanes, sums[r][b][v]);
            }
        }
    }
}

template <int kValue>
struct Count {
    static constexpr int value = kValue;
};

// Calls work(Count<n>, row) for the rows from <= row < to, n at a time: as many as registers have room for, then fewer.
template <class Isa, class Work>
void in_groups(int64_t from, int64_t to, const Work& work) {
    for (; to - from >= Isa::kRows; from += Isa::kRows) work(Count<Isa::kRows>(), from);
    if constexpr (Isa::kRows > 4) {
        for (; to - from >= 4; from += 4) work(Count<4>(), from);
    }
    if constexpr (Isa::kRows > 2) {
        for (; to - from >= 2; from += 2) work(Count<2>(), from);
    }
    for (; from < to; ++from) work(Count<1>(), from);
}

template <class Isa, template <class> class Format, int kBlocks>
void score_blocks(const Tile& tile, int64_t block, int64_t from, int64_t to, Row* rows) {
    const uint8_t* keys = tile.keys + block * tile.shape.block_bytes();
    in_groups<Isa>(from, to, [&](auto count, int64_t row) {
        constexpr int kRows = decltype(count)::value;
        if (block * kKvBlock >= tile.seen(row + kRows - 1)) return;
        score<Isa, Format, kRows, kBlocks>(tile, keys, rows + row, block * kKvBlock);
    });
}

// Scores of rows from <= row < to. A few blocks stay in the L1 cache while all rows pass over them.
template <class Isa, template <class> class Format>
void score_tile(const Tile& tile, int64_t from, int64_t to, Row* rows) {
    const int64_t blocks = (tile.seen(to - 1) + kKvBlock - 1) / kKvBlock;
    int64_t block = 0;
    if (to - from == 1) {
        for (; block + Isa::kBlocks <= blocks; block += Isa::kBlocks) {
            const uint8_t* keys = tile.keys + block * tile.shape.block_bytes();
            score<Isa, Format, 1, Isa::kBlocks>(tile, keys, rows + from, block * kKvBlock);
        }
    }
    for (; block + Isa::kRowBlocks <= blocks; block += Isa::kRowBlocks) {
        score_blocks<Isa, Format, Isa::kRowBlocks>(tile, block, from, to, rows);
    }
    for (; block < blocks; ++block) score_blocks<Isa, Format, 1>(tile, block, from, to, rows);
}

inline void scale_scores(const KvShape& shape, const uint8_t* blocks, int64_t count, Row& row) {
    for (int64_t first = 0; first < count; first += kKvBlock) {
        const float* scales = scales_of(shape, blocks + first / kKvBlock * shape.block_bytes());
        for (int64_t i = 0; i < kKvBlock; ++i) row.scores[first + i] *= scales[i];
    }
}

// Of `largest` and `count` scores, a multiple of kSums. What is no number is never the largest.
template <class Isa>
float largest_of(const float* scores, int64_t count, float largest) {
    constexpr int kVectors = kSums / Isa::kLanes;
    typename Isa::Floats most[kVectors];
    BIOMEDGPT_UNROLL
    for (int v = 0; v < kVectors; ++v) most[v] = Isa::set(largest);
    for (int64_t i = 0; i < count; i += kSums) {
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) most[v] = Isa::max(Isa::load(scores + i + v * Isa::kLanes), most[v]);
    }
    float lanes[kSums];
    for (int v = 0; v < kVectors; ++v) Isa::store(lanes + v * Isa::kLanes, most[v]);
    for (int64_t i = 0; i < kSums; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

// Makes weights of the first `count` scores, and brings the row's sums to what is the largest score now.
template <class Isa>
void weigh(Row& row, int64_t count, int64_t size) {
    const int64_t whole = (count + kSums - 1) / kSums * kSums;
    for (int64_t i = count; i < whole; ++i) row.scores[i] = -__builtin_inff();
    const float largest = largest_of<Isa>(row.scores, whole, row.largest);
    if (largest > row.largest) {
        const float shrunk = exponential(row.largest - largest);
        for (int64_t i = 0; i < size; ++i) row.sums[i] *= shrunk;
        for (int64_t i = 0; i < kSums; ++i) row.weights[i] *= shrunk;
        row.largest = largest;
    }
    for (int64_t first = 0; first < whole; first += kSums) {
        float* scores = row.scores + first;
        for (int64_t i = 0; i < kSums; ++i) {
            const float distance = scores[i] - largest;
            const float weight = exponential(distance);
            scores[i] = distance == distance ? weight : distance;  // a NaN stays one
        }
        const int64_t left = count - first;
        if (left < kSums) {
            for (int64_t i = left; i < kSums; ++i) scores[i] = 0.0f;
        }
        for (int64_t i = 0; i < kSums; ++i) row.weights[i] += scores[i];
    }
}

// sums += weights times values, over positions from <= i < to of a tile.
template <class Isa, template <class> class Format, int kRows, int kVectors>
__attribute__((always_inline)) inline void add_vectors(const Tile& tile, int64_t from, int64_t to, Row* rows,
                                                       int64_t element) {
    constexpr int64_t kBytes = Format<Isa>::kBytes;
    const int64_t block_bytes = tile.shape.block_bytes(), size = tile.shape.head_size;
    typename Isa::Floats sums[kRows][kVectors];
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::load(rows[r].sums + element + v * Isa::kLanes);
    }
    for (int64_t i = from; i < to; ++i) {
        const uint8_t* block = tile.values + i / kKvBlock * block_bytes;
        const int64_t position = (i % kKvBlock * size + element) * kBytes;
        typename Isa::Floats elements[kVectors];
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            const int64_t offset = position + v * Isa::kLanes * kBytes;
            elements[v] = Format<Isa>::load(block + offset);
            fetch_ahead<kRows>(block, tile.ahead, offset);
        }
        BIOMEDGPT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const typename Isa::Floats weight = Isa::set(rows[r].scores[i]);
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::fma(weight, elements[v], sums[r][v]);
        }
    }
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) Isa::store(rows[r].sums + element + v * Isa::kLanes, sums[r][v]);
    }
}

template <class Isa, template <class> class Format, int kVectors>
void add_elements(const Tile& tile, int64_t element, int64_t from, int64_t to, Row* rows) {
    in_groups<Isa>(from, to, [&](auto count, int64_t row) {
        constexpr int kRows = decltype(count)::value;
        // What a row does not attend to is not even multiplied by 0, for it may be no number.
        const int64_t common = tile.seen(row);
        add_vectors<Isa, Format, kRows, kVectors>(tile, 0, common, rows + row, element);
        for (int64_t r = row + 1; r < row + kRows; ++r) {
            add_vectors<Isa, Format, 1, kVectors>(tile, common, tile.seen(r), rows + r, element);
        }
    });
}

// Some elements of the values stay in the L1 cache while all rows pass over them.
template <class Isa, template <class> class Format>
void add_values(const Tile& tile, int64_t from, int64_t to, Row* rows) {
    const int64_t size = tile.shape.head_size;
    int64_t element = 0;
    if (to - from == 1) {
        constexpr int64_t kStep = Isa::kVectors * Isa::kLanes;
        for (; element + kStep <= size; element += kStep) {
            const int64_t seen = tile.seen(from);
            add_vectors<Isa, Format, 1, Isa::kVectors>(tile, 0, seen, rows + from, element);
        }
    }
    constexpr int64_t kStep = Isa::kRowVectors * Isa::kLanes;
    for (; element + kStep <= size; element += kStep) {
        add_elements<Isa, Format, Isa::kRowVectors>(tile, element, from, to, rows);
    }
    for (; element < size; element += Isa::kLanes) add_elements<Isa, Format, 1>(tile, element, from, to, rows);
}

template <class Isa, template <class> class Format>
void attend_tile(const Tile& tile, int64_t from, int64_t to, Row* rows) {
    score_tile<Isa, Format>(tile, from, to, rows);
    for (int64_t r = from; r < to; ++r) {
        const int64_t seen = tile.seen(r);
        if (Format<Isa>::kScaled) scale_scores(tile.shape, tile.keys, seen, rows[r]);
        weigh<Isa>(rows[r], seen, tile.shape.head_size);
        if (Format<Isa>::kScaled) scale_scores(tile.shape, tile.values, seen, rows[r]);
    }
    add_values<Isa, Format>(tile, from, to, rows);
}

template <class Isa>
void begin(const AttentionRows& rows, const float* queries, int64_t size, Row* all) {
    const int64_t half = size / 2;
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    for (int64_t r = 0; r < rows.count; ++r) {
        Row& row = all[r];
        rotate(queries + r * rows.stride, rows.cos + r * half, rows.sin + r * half, size, factor, row.query);
        std::memset(row.sums, 0, sizeof row.sums);
        std::memset(row.weights, 0, sizeof row.weights);
        row.largest = -__builtin_inff();
    }
}

inline void finish(const Row& row, int64_t size, float* y) {
    float weights[kSums];
    std::memcpy(weights, row.weights, sizeof weights);
    for (int64_t step = kSums / 2; step > 0; step /= 2) {
        for (int64_t i = 0; i < step; ++i) weights[i] += weights[step + i];
    }
    for (int64_t i = 0; i < size; ++i) y[i] = row.sums[i] / weights[0];
}

template <class Isa, template <class> class Format>
void attend_all(const AttentionHead& head, int64_t first, int64_t count, Row* rows) {
    for (int64_t start = 0; start < first + count; start += kTile) {
        const int64_t offset = start / kKvBlock * head.shape.block_bytes();
        const int64_t ahead = count == 1 ? head.bytes() : 0;
        const Tile tile{head.shape, head.keys + offset, head.values + offset, ahead, first + 1 - start};
        attend_tile<Isa, Format>(tile, start > first ? start - first : 0, count, rows);
    }
}

template <class Isa>
void attend(const AttentionHead& head, const AttentionRows& rows, const float* queries, float* y, int64_t y_stride) {
    const int64_t size = head.shape.head_size;
    Row all[kAttentionRows];
    begin<Isa>(rows, queries, size, all);
    switch (head.shape.format) {
        case KvFormat::f32:
            attend_all<Isa, F32>(head, rows.first, rows.count, all);
            break;
        case KvFormat::f16:
            attend_all<Isa, F16>(head, rows.first, rows.count, all);
            break;
        case KvFormat::i8:
            attend_all<Isa, I8>(head, rows.first, rows.count, all);
            break;
    }
    for (int64_t r = 0; r < rows.count; ++r) finish(all[r], size, y + r * y_stride);
}

template <class Isa>
constexpr AttentionPath attention_path(const char* name) {
    return {name, append<Isa>, attend<Isa>};
}

}  // namespace
}  // namespace biomedgpt
