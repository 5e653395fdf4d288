// A linear layer of a decoder: rows of halves times a matrix of four or eight bits in groups, on tensor cores.
//
// A matrix lies as the bundle has it, in records (csrc/int4/int4.h): 32 rows of a group, values and then scales, one
// stream without gaps, that is read once. Each warp of a block takes every n-th group of a panel, through a ring of its
// own in shared memory that asynchronous copies fill a few records ahead; no warp waits for another before the end. The
// matrix is operand A, since then eight rows of x cost what one does, and a lane finds its part of both operands in
// sixteen bytes of each (see order.h). Sums over a group are float32 of exact products, and are scaled and added in
// float32; those of a block's warps in the order of the warps. The same kernel multiplies a token's few rows (Tiles 1)
// and a prompt's many: then a block has 8 * Tiles of them.
//
// What comes before and behind is part of the kernel, where that spares a launch and a way through memory: RMSNorm of
// x; bias, rotation (RoPE) and the place in the KV cache; SiLU of the gate times up; the sum with the residual stream.
#pragma once

#include "decoder/cache.h"
#include "decoder/norm.h"
#include "decoder/order.h"
#include "decoder/places.h"
#include "simt/simt.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

constexpr int kPanel = 32;
constexpr int kMaxRows = 8;  // that a product takes at once for what one costs
constexpr float kLog2E = 1.44269504088896341f;

enum class Input { halves, normed };
enum class Output { logits, residual, qkv, gated };

struct Rope {
    const float* cos = nullptr;  // [positions, head_size / 2], and so is sin
    const float* sin = nullptr;
};

struct ProductParams {
    const uint8_t* records = nullptr;  // [panels, groups, bytes]; for Output::gated, gate and up by turns
    const float* bias = nullptr;       // [rows], or null
    int rows = 0;                      // N: of the matrix; for Output::gated of one of the two
    int group = 0;                     // columns that share a scale
    int groups = 0;
    int count = 0;  // rows of x

    const uint16_t* x = nullptr;  // Input::halves: [count, pitch], zeros beyond K
    int pitch = 0;
    NormSource normed;  // Input::normed, of at most 8 rows

    float* sums = nullptr;    // Output::logits: written; Output::residual: added to; [count, rows]
    uint16_t* out = nullptr;  // Output::gated: [count, out_pitch], in the order of products; Output::qkv: queries
    int out_pitch = 0;        // in halves
    CacheShape cache = {};    // Output::qkv, and so are all below
    int head_bits = 0;        // head_size is 2 to that
    Rope rope;
    const RowPlace* places = nullptr;
    int heads = 0;
};

// kGroup: of columns; 0 where p.group says how many, 64 or 32. kWarps: of a block.
template <int kBits, int kGroup, int kTiles, Input kInput, Output kOutput, int kWarps = kBits == 4 ? 8 : 4>
struct Product {
    using Params = ProductParams;

    static constexpr int kThreads = kWarps * kWarpSize;
    // Of the L1, a token's kernels want the part that is shared; a prompt's read x many times.
    static constexpr bool kSharedFirst = kTiles == 1;
    // Of a multiprocessor, at least: what registers must allow.
    static constexpr int kBlocks = kTiles == 1 && kWarps <= 8 ? 3 : 1;
    static constexpr int kPanels = kOutput == Output::qkv || kOutput == Output::gated ? 2 : 1;  // of a block
    static constexpr int kSlices = kWarps / kPanels;                                            // of a panel
    static constexpr int kColumns = kTiles * 8;                                                 // rows of x
    static constexpr int kSteps = (kGroup != 0 ? kGroup : 64) / 32;                             // of a record, at most
    static constexpr int kStages = kGroup != 0 ? 3 : 6;                                         // of a ring
    static constexpr int kMostBytes = kPanel * ((kGroup != 0 ? kGroup : 64) * kBits / 8 + 2);   // of a record
    static constexpr int kRingBytes = kStages * kMostBytes;
    static constexpr int kSumBytes = kPanel * kColumns * 4;
    static constexpr int kWarpBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;

    // Rows of normed x are so many halves apart that eight lanes, of two rows, meet in no bank.
    BIOMEDGPT_DEVICE static int pitch_of(int width) { return width % 64 == 0 ? width + 32 : width; }

    // Of a launch. (Host code asks, too.)
    static constexpr size_t shared_bytes(int width, int count) {
        const size_t ring = size_t{kWarps} * kWarpBytes;
        if (kInput == Input::halves) return ring;
        const int pitch = width % 64 == 0 ? width + 32 : width;
        return ring + static_cast<size_t>(count) * static_cast<size_t>(pitch) * 2 + kWarps * sizeof(float);
    }

    // Blocks for all panels of a matrix; for Output::gated, of one of the two.
    static constexpr int units_of(int panels) {
        return kOutput == Output::gated ? panels : (panels + kPanels - 1) / kPanels;
    }

    // The panel that is the `turn`-th of a block's.
    BIOMEDGPT_DEVICE static int panel_of(const Params& p, int unit, int turn) {
        const int bits = p.head_bits - 6;  // 2 to that are the panels of half a head
        if (kOutput != Output::qkv || bits < 0) return unit * kPanels + turn;
        // Both halves of a head, whose elements are rotated in pairs.
        return (unit >> bits << (bits + 1)) + (unit & ((1 << bits) - 1)) + (turn << bits);
    }

    // A warp's records, on their way through its ring.
    struct Stream {
        const uint8_t* next;  // what this lane brings of a record
        int64_t step;         // from a record to the next of this warp
        int left;
        int values;  // bytes of a record, scales apart
        char* to;    // where this lane brings it in the first stage
        int stage = 0;

        BIOMEDGPT_DEVICE Stream(const uint8_t* records, int64_t step, int count, int bytes, char* ring)
            : next(records + simt::lane() * 16), step(step), left(count), values(bytes - 2 * kPanel) {
            // So that lanes 4 g + t, which read the g-th 16 bytes of row t of 128, meet in no bank.
            to = ring + (simt::lane() ^ simt::lane() / 8 * 2) * 16;
        }

        // Begins to copy a record, if there is one left; a group of copies either way.
        BIOMEDGPT_DEVICE void start() {
            if (left > 0) {
                char* at = to + stage * (values + 2 * kPanel);
#pragma unroll
                for (int i = 0; i < (kGroup != 0 ? kGroup * kBits * 4 : values); i += kWarpSize * 16) {
                    simt::copy_async(at + i, next + i);
                }
                // Scales, which stay in their order: the first four lanes are not swizzled.
                if (simt::lane() < 2 * kPanel / 16) simt::copy_async(at + values, next + values);
                next += step;
                --left;
            }
            simt::commit_copies();
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
    };

    // Of four blocks of 128 bytes, what this lane multiplies.
    BIOMEDGPT_DEVICE static Quad words_of(const char* blocks) {
        const int group = simt::lane() / 4, quarter = simt::lane() % 4;
        return *reinterpret_cast<const Quad*>(blocks + quarter * 128 + (group ^ quarter * 2) * 16);
    }

    using Sums = float[kTiles][2][4];

    // 32 columns of four bits.
    BIOMEDGPT_DEVICE static void add_int4(const char* blocks, const Quad (&x)[kTiles], Sums& sums) {
        const Quad words = words_of(blocks);
        uint32_t a[4][4];  // by word: columns 0 and 2, 4 and 6, 1 and 3, 5 and 7
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = words.words[i], high = low >> 8;
            // As the last bits of a half, a value v is 1024 + v, and four bits further up 1024 + 16 v: less 1032 the
            // one, a sixteenth less 72 the other are v - 8.
            a[i][0] = simt::half_pair_sub(simt::and_or<0x000f000fu, 0x64006400u>(low), 0x64086408u);
            a[i][1] = simt::half_pair_fma(simt::and_or<0x00f000f0u, 0x64006400u>(low), 0x2c002c00u, 0xd480d480u);
            a[i][2] = simt::half_pair_sub(simt::and_or<0x000f000fu, 0x64006400u>(high), 0x64086408u);
            a[i][3] = simt::half_pair_fma(simt::and_or<0x00f000f0u, 0x64006400u>(high), 0x2c002c00u, 0xd480d480u);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint32_t b[2] = {x[tile].words[2 * half], x[tile].words[2 * half + 1]};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    simt::mma(sums[tile][i],
                              {a[2 * i][2 * half], a[2 * i + 1][2 * half], a[2 * i][2 * half + 1],
                               a[2 * i + 1][2 * half + 1]},
                              b);
                }
            }
        }
    }

    // 16 columns of eight bits, of which x has the octets.
    BIOMEDGPT_DEVICE static void add_int8(const char* blocks, const Pair (&x)[kTiles], Sums& sums) {
        const Quad words = words_of(blocks);
        uint32_t a[4][2];  // by word: columns 0 and 2, 1 and 3
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i][0] = simt::half_pair_sub(simt::pick_bytes(words.words[i], 0x64646464u, 0x4240u), 0x64806480u);
            a[i][1] = simt::half_pair_sub(simt::pick_bytes(words.words[i], 0x64646464u, 0x4341u), 0x64806480u);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint32_t b[2] = {x[tile].words[0], x[tile].words[1]};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                simt::mma(sums[tile][i], {a[2 * i][0], a[2 * i + 1][0], a[2 * i][1], a[2 * i + 1][1]}, b);
            }
        }
    }

    // Where this lane reads x: in the rows that stand in column lane / 4 of the tiles. Rows that are not there are the
    // last one again, since a column of a product is nobody else's business, and nobody writes it.
    struct Rows {
        const uint16_t* at[kTiles];

        BIOMEDGPT_DEVICE void octets(int column, Quad (&x)[kTiles]) const {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) x[tile] = *reinterpret_cast<const Quad*>(at[tile] + column);
        }

        // Of eight bits, half an octet: the even columns in its first words, the odd ones in its last.
        BIOMEDGPT_DEVICE void pairs(int column, Pair (&x)[kTiles]) const {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const auto* words = reinterpret_cast<const uint32_t*>(at[tile] + column);
                x[tile] = {{words[0], words[2]}};
            }
        }

        BIOMEDGPT_DEVICE void advance(int columns) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) at[tile] += columns;
        }
    };

    // Of `count` rows that begin at `x`, those from `first` on.
    BIOMEDGPT_DEVICE static Rows rows_of(const uint16_t* x, int pitch, int first, int count) {
        const int quarter = simt::lane() % 4;
        // Of 32 columns, eight; of eight bits, four of sixteen.
        const int own = kBits == 4 ? quarter * kOctet : quarter / 2 * kOctet + quarter % 2 * 2;
        Rows rows;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const int row = first + tile * 8 + simt::lane() / 4;
            rows.at[tile] = x + int64_t{row < count ? row : count - 1} * pitch + own;
        }
        return rows;
    }

    // A record, whose columns of x begin where `rows` are. What is asked of memory is asked before anything is waited
    // for: of one tile all, of several the next 32 columns.
    BIOMEDGPT_DEVICE static void add_record(const char* record, int group, const Rows& rows, Sums& sums) {
        Sums partial = {};
        if constexpr (kBits == 8) {
            simt::wait_copies<kStages - 1>();
            simt::sync_warp();
            for (int i = 0; i < group; i += 16) {
                Pair x[kTiles];
                rows.pairs(i, x);
                add_int8(record + i / 4 * 128, x, partial);
            }
        } else if constexpr (kTiles == 1 && kGroup != 0) {
            Quad x[kGroup / 32][kTiles];
#pragma unroll
            for (int i = 0; i < kGroup / 32; ++i) rows.octets(i * 32, x[i]);
            simt::wait_copies<kStages - 1>();
            simt::sync_warp();
#pragma unroll
            for (int i = 0; i < kGroup / 32; ++i) add_int4(record + i * 512, x[i], partial);
        } else {
            Quad x[2][kTiles];
            rows.octets(0, x[0]);
            simt::wait_copies<kStages - 1>();
            simt::sync_warp();
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                if (i * 32 >= group) break;
                if ((i + 1) * 32 < group) rows.octets((i + 1) * 32, x[(i + 1) % 2]);
                add_int4(record + i * 512, x[i % 2], partial);
            }
        }
        add_scaled(record + group * kBits * kPanel / 8, partial, sums);
    }

    // By the scales of the four rows of the panel that this lane has.
    BIOMEDGPT_DEVICE static void add_scaled(const char* of_record, const Sums& partial, Sums& sums) {
        const Pair scales = reinterpret_cast<const Pair*>(of_record)[simt::lane() / 4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float first = simt::low_half(scales.words[i]), second = simt::high_half(scales.words[i]);
                sums[tile][i][0] += first * partial[tile][i][0];
                sums[tile][i][1] += first * partial[tile][i][1];
                sums[tile][i][2] += second * partial[tile][i][2];
                sums[tile][i][3] += second * partial[tile][i][3];
            }
        }
    }

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        const int warp = simt::warp(), turn = warp % kPanels, slice = warp / kPanels;
        const int group = kGroup != 0 ? kGroup : p.group;
        const int bytes = kPanel * (group * kBits / 8 + 2);
        const int first = simt::block_x() * kColumns, panel = panel_of(p, simt::block_y(), turn);
        char* ring = simt::shared() + warp * kWarpBytes;
        const bool exists = panel < panels_of(p);
        const int records = exists ? (p.groups - slice + kSlices - 1) / kSlices : 0;
        Stream stream(p.records + (int64_t{panel} * p.groups + slice) * bytes, int64_t{kSlices} * bytes, records, bytes,
                      ring);
#pragma unroll
        for (int i = 0; i + 1 < kStages; ++i) stream.start();
        // Weights are nobody's output: they are on their way before the kernel ahead has ended.
        simt::let_next_start();
        simt::wait_for_inputs();
        Rows rows = input(p, first, group);
        rows.advance(slice * group);
        Sums sums = {};
        int stage = 0;
        for (int i = 0; i < records; ++i) {
            stream.start();
            add_record(ring + stage * bytes, group, rows, sums);
            rows.advance(kSlices * group);
            simt::sync_warp();  // the stage is filled anew by the next turn
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        simt::wait_copies<0>();
        simt::sync_warp();
        show(sums, reinterpret_cast<float*>(ring));
        simt::sync_block();
        for (int i = warp; i < kColumns && first + i < p.count; i += kWarps) finish(p, first, i);
    }

    BIOMEDGPT_DEVICE static int panels_of(const Params& p) {
        return (p.rows + kPanel - 1) / kPanel * (kOutput == Output::gated ? 2 : 1);
    }

    // Normed by this block first, where that is asked for.
    BIOMEDGPT_DEVICE static Rows input(const Params& p, int first, int group) {
        if (kInput == Input::halves) return rows_of(p.x, p.pitch, first, p.count);
        const int width = p.groups * group, pitch = pitch_of(width);
        auto* normed = reinterpret_cast<uint16_t*>(simt::shared() + kWarps * kWarpBytes);
        auto* scratch = reinterpret_cast<float*>(normed + p.count * pitch);
        for (int row = 0; row < p.count; ++row) {
            normalise(p.normed, row, normed + row * pitch, width, scratch, kWarps);
        }
        simt::sync_block();
        return rows_of(normed, pitch, 0, p.count);
    }

    // A warp's sums as [rows of x, 32].
    BIOMEDGPT_DEVICE static void show(const Sums& sums, float* to) {
        const int group = simt::lane() / 4, quarter = simt::lane() % 4;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const auto& found = sums[tile];
                const Quad four = {{simt::float_bits(found[0][i]), simt::float_bits(found[0][2 + i]),
                                    simt::float_bits(found[1][i]), simt::float_bits(found[1][2 + i])}};
                *reinterpret_cast<Quad*>(to + (tile * 8 + quarter * 2 + i) * kPanel + group * 4) = four;
            }
        }
    }

    // Row `index` of the block's: a warp has it, each lane a row of the panels.
    BIOMEDGPT_DEVICE static void finish(const Params& p, int first, int index) {
        float sums[kPanels];
        int rows[kPanels];
#pragma unroll
        for (int turn = 0; turn < kPanels; ++turn) {
            rows[turn] = panel_of(p, simt::block_y(), turn) * kPanel + simt::lane();
            sums[turn] = 0;
            for (int slice = 0; slice < kSlices; ++slice) {
                const char* of_warp = simt::shared() + (slice * kPanels + turn) * kWarpBytes;
                sums[turn] += reinterpret_cast<const float*>(of_warp)[index * kPanel + simt::lane()];
            }
            const bool biased = kOutput != Output::gated && p.bias != nullptr && rows[turn] < p.rows;
            if (biased) sums[turn] += p.bias[rows[turn]];
        }
        const int64_t row = first + index;
        if (kOutput == Output::logits) {
            if (rows[0] < p.rows) p.sums[row * p.rows + rows[0]] = sums[0];
        } else if (kOutput == Output::residual) {
            if (rows[0] < p.rows) p.sums[row * p.rows + rows[0]] += sums[0];
        } else if (kOutput == Output::gated) {
            const int column = simt::block_y() * kPanel + simt::lane();
            const float gate = sums[0], up = sums[kPanels - 1];
            const float gated = gate / (1.0f + simt::exp2_of(-gate * kLog2E)) * up;
            if (column < p.rows) p.out[row * p.out_pitch + place_of(column)] = simt::half_bits(gated);
        } else {
            rotate(p, p.places[row].position, rows, sums);
#pragma unroll
            for (int turn = 0; turn < kPanels; ++turn) keep(p, row, rows[turn], sums[turn]);
        }
    }

    // RoPE (Su et al. 2021) of queries and keys: element d of a head's first half with d of its second. Which product
    // is rounded is said here: a compiler would choose, for one row and for several otherwise, and bits would differ.
    BIOMEDGPT_DEVICE static void rotate(const Params& p, int position, const int (&rows)[kPanels],
                                        float (&sums)[kPanels]) {
        const int half = p.cache.head_size / 2, rotated = (p.heads + p.cache.kv_heads) * p.cache.head_size;
        if (half >= kPanel) {
            const int64_t angle = int64_t{position} * half + (rows[0] & (p.cache.head_size - 1));
            if (rows[0] >= rotated) return;
            const float cos = p.rope.cos[angle], sin = p.rope.sin[angle], first = sums[0], second = sums[kPanels - 1];
            sums[0] = fmaf(first, cos, -second * sin);
            sums[kPanels - 1] = fmaf(second, cos, first * sin);
            return;
        }
#pragma unroll
        for (int turn = 0; turn < kPanels; ++turn) {
            const float other = simt::shuffle_xor(sums[turn], half);
            const int element = rows[turn] & (p.cache.head_size - 1);
            if (rows[turn] >= rotated) continue;
            const int64_t angle = int64_t{position} * half + (element & (half - 1));
            const float cos = p.rope.cos[angle], sin = p.rope.sin[angle];
            sums[turn] = fmaf(sums[turn], cos, element < half ? -other * sin : other * sin);
        }
    }

    // A query where attention looks for it, a key or value in the cache.
    BIOMEDGPT_DEVICE static void keep(const Params& p, int64_t row, int column, float value) {
        if (column >= p.rows) return;
        const int size = p.cache.head_size, head = (column >> p.head_bits) - p.heads, element = column & (size - 1);
        if (head < 0) {
            p.out[row * p.out_pitch + column] = simt::half_bits(value);
            return;
        }
        const RowPlace place = p.places[row];
        const int side = head < p.cache.kv_heads ? kKeys : kValues;
        uint16_t* rows = head_rows(p.cache, place.cache, side, head - side * p.cache.kv_heads);
        rows[int64_t{place.position} * size + element] = simt::half_bits(value);
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
