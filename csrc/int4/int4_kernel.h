// The parts of an int4 path that are alike for every instruction set, as templates over a description of it. In an
// unnamed namespace, and without standard containers and algorithms, for the reason that splice_kernel.h gives.
//
// An `Isa` has
//   kLanes                         weight rows in a vector, 4, 8, 16 or 32
//   kPass                          vectors of a panel that are summed at once
//   kTileRows, kUnpackedTileRows   activation rows, of packed and of unpacked values
//   Floats, Ints                   vectors of kLanes numbers of 32 bits
//   Quads                          a vector of kLanes times four bytes, four columns of as many rows
//   Partial                        a vector of sums over 32 columns at most
//   load(p), low(q), high(q)       Quads, and the low and high halves of their bytes
//   broadcast(p)                   four bytes of an activation row, kLanes times
//   start(i), dot(p, w, a), finish(i, p)      Partial sums, started with Ints or added to them afterwards
//   set(int32), add(i, j), set(float), zero(), load(p), store(p, f), to_floats(i), load_halves(p), scale(f, g), fma(f,
//   g, h)
#pragma once

#include <cstring>

#include "common/exponential.h"
#include "common/half.h"
#include "common/quantize.h"
#include "common/unroll.h"
#include "int4/int4_path.h"

namespace biomedgpt {
namespace {

constexpr int64_t kBlockColumns = 8;                 // of a block of a record
constexpr int64_t kQuadBytes = 4 * kInt4PanelRows;   // four columns of a panel, one byte each
constexpr int64_t kStepColumns = 32;                 // what every group is a multiple of
constexpr int64_t kScaleBytes = 2 * kInt4PanelRows;  // of a record
constexpr int64_t kCacheLine = 64;
constexpr int64_t kMaxGroup = 128;

// `distance` ahead of what is read, which may be beyond the end of a matrix: it is only hinted at.
inline void prefetch(const uint8_t* from, int64_t distance, int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(distance);
    for (int64_t i = 0; i < bytes; i += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<uintptr_t>(i)));
    }
}

template <class Isa, int kRows>
struct Sums {
    // Few sums in a chain each would wait for one another's latency: low and high halves then have chains of their own.
    static constexpr int kChains = kRows * Isa::kPass < 8 ? 2 : 1;
    typename Isa::Ints of[kChains][kRows][Isa::kPass];
};

// Adds the products of one group and `kPass` vectors of a panel, `values` of which begin at the first one.
template <class Isa, int kRows, bool kUnpacked>
__attribute__((always_inline)) inline void add_group(const uint8_t* values, int64_t ahead, const int8_t* x,
                                                     int64_t stride, int64_t group, Sums<Isa, kRows>& sums) {
    constexpr int kChains = Sums<Isa, kRows>::kChains, kPass = Isa::kPass;
    constexpr int64_t kVectorBytes = 4 * Isa::kLanes;
    for (int64_t column = 0; column < group; column += kStepColumns) {
        typename Isa::Partial partial[kChains][kRows][kPass];
        BIOMEDGPT_UNROLL
        for (int c = 0; c < kChains; ++c) {
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kPass; ++v) partial[c][r][v] = Isa::start(sums.of[c][r][v]);
            }
        }
        BIOMEDGPT_UNROLL
        for (int64_t block = 0; block < kStepColumns / kBlockColumns; ++block) {
            typename Isa::Quads low[kPass], high[kPass];
            if (!kUnpacked) prefetch(values, ahead, kPass * kVectorBytes);
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kPass; ++v) {
                const typename Isa::Quads quads = Isa::load(values + v * kVectorBytes);
                low[v] = kUnpacked ? quads : Isa::low(quads);
                high[v] = kUnpacked ? Isa::load(values + kQuadBytes + v * kVectorBytes) : Isa::high(quads);
            }
            values += kUnpacked ? 2 * kQuadBytes : kQuadBytes;
            const int8_t* of_block = x + column + block * kBlockColumns;
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const typename Isa::Quads first = Isa::broadcast(of_block + r * stride);
                const typename Isa::Quads second = Isa::broadcast(of_block + r * stride + 4);
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kPass; ++v) {
                    partial[0][r][v] = Isa::dot(partial[0][r][v], low[v], first);
                    partial[kChains - 1][r][v] = Isa::dot(partial[kChains - 1][r][v], high[v], second);
                }
            }
        }
        BIOMEDGPT_UNROLL
        for (int c = 0; c < kChains; ++c) {
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kPass; ++v) sums.of[c][r][v] = Isa::finish(sums.of[c][r][v], partial[c][r][v]);
            }
        }
    }
}

template <class Isa, int kRows, bool kUnpacked>
void multiply_rows(const Int4Tile& tile) {
    constexpr int kVectors = kInt4PanelRows / Isa::kLanes, kPass = Isa::kPass, kChains = Sums<Isa, kRows>::kChains;
    constexpr int64_t kVectorBytes = 4 * Isa::kLanes;
    static_assert(kVectors % kPass == 0);
    const Int4Rows& rows = tile.rows;
    typename Isa::Floats totals[kRows][kVectors];
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            totals[r][v] = tile.fresh ? Isa::zero() : Isa::load(tile.totals + r * kInt4PanelRows + v * Isa::kLanes);
        }
    }
    const int64_t record_bytes = tile.record_bytes();
    for (int64_t g = 0; g < tile.groups; ++g) {
        const uint8_t* record = tile.records + g * record_bytes;
        const uint8_t* values = kUnpacked ? tile.unpacked + g * tile.group * kInt4PanelRows : record;
        const uint8_t* scales = record + record_bytes - kScaleBytes;
        if (!kUnpacked) prefetch(scales, tile.ahead, kScaleBytes);
        BIOMEDGPT_UNROLL
        for (int first = 0; first < kVectors; first += kPass) {
            Sums<Isa, kRows> sums;
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kPass; ++v) {
                    sums.of[0][r][v] = Isa::set(rows.zero_terms[r * rows.groups + g]);
                    if (kChains > 1) sums.of[kChains - 1][r][v] = Isa::set(int32_t{0});
                }
            }
            add_group<Isa, kRows, kUnpacked>(values + first * kVectorBytes, tile.ahead, rows.values + g * tile.group,
                                             rows.stride, tile.group, sums);
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kPass; ++v) {
                const typename Isa::Floats scale = Isa::load_halves(scales + 2 * Isa::kLanes * (first + v));
                BIOMEDGPT_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    typename Isa::Ints sum = sums.of[0][r][v];
                    if (kChains > 1) sum = Isa::add(sum, sums.of[kChains - 1][r][v]);
                    const typename Isa::Floats product = Isa::scale(Isa::to_floats(sum), scale);
                    typename Isa::Floats& total = totals[r][first + v];
                    total = Isa::fma(product, Isa::set(rows.scales[r * rows.groups + g]), total);
                }
            }
        }
    }
    BIOMEDGPT_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BIOMEDGPT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            Isa::store(tile.totals + r * kInt4PanelRows + v * Isa::kLanes, totals[r][v]);
        }
    }
}

// Picks the instance for a number of rows, 1 to kRows.
template <class Isa, bool kUnpacked, int kRows>
void multiply_up_to(const Int4Tile& tile, int64_t rows) {
    if (rows == kRows) return multiply_rows<Isa, kRows, kUnpacked>(tile);
    if constexpr (kRows > 1) multiply_up_to<Isa, kUnpacked, kRows - 1>(tile, rows);
}

// The low halves of a block are one quad of columns, the high ones the next. Signed where a zero point is taken off.
template <int64_t kZeroPoint = 0>
void unpack(const uint8_t* records, int64_t group, int64_t groups, uint8_t* __restrict unpacked) {
    const int64_t ahead = kInt4PanelRows * group / 2 + kScaleBytes;  // the next record
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t block = 0; block < group / kBlockColumns; ++block) {
            prefetch(records, ahead, kQuadBytes);
            for (int64_t i = 0; i < kQuadBytes; ++i) {
                unpacked[i] = static_cast<uint8_t>((records[i] & 15) - kZeroPoint);
                unpacked[kQuadBytes + i] = static_cast<uint8_t>((records[i] >> 4) - kZeroPoint);
            }
            records += kQuadBytes;
            unpacked += 2 * kQuadBytes;
        }
        records += kScaleBytes;
    }
}

inline void quantize(const float* x, int64_t columns, int64_t group, const Int4Rows& row) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const int64_t first = g * group, rest = columns - first;
        float padded[kMaxGroup] = {};
        if (rest < group) std::memcpy(padded, x + first, static_cast<size_t>(rest) * sizeof *x);
        row.zero_terms[g] = -kInt4ZeroPoint * quantize_bytes(rest < group ? padded : x + first, group,
                                                             row.values + first, row.scales + g);
    }
}

inline void silu_multiply(float* __restrict gate, const float* __restrict up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

inline void write(const float* totals, int64_t rows, int64_t columns, float* y, int64_t stride) {
    const auto bytes = static_cast<size_t>(columns) * sizeof *y;
    for (int64_t row = 0; row < rows; ++row) std::memcpy(y + row * stride, totals + row * kInt4PanelRows, bytes);
}

template <class Isa>
constexpr Int4Path int4_path(const char* name) {
    return {name,
            Isa::kTileRows,
            Isa::kUnpackedTileRows,
            16,
            quantize,
            multiply_up_to<Isa, false, Isa::kTileRows>,
            unpack<>,
            multiply_up_to<Isa, true, Isa::kUnpackedTileRows>,
            silu_multiply,
            write};
}

}  // namespace
}  // namespace biomedgpt
