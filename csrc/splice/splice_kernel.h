// The parts of a splice path that are alike for every instruction set, as templates over a description of it.
//
// A file that implements a path is compiled with that instruction set's flags, so nothing it uses may have external
// linkage that other files share (standard containers and algorithms, inline functions of headers): the linker might
// keep its copy for everyone. Hence the unnamed namespace, in a header on purpose.
//
// An `Isa` has
//   Vec, kLanes            a vector of 32-bit words, and how many
//   zero(), load(p), broadcast(p), store(p, v), add(a, b), scale(a, b)
//   multiply_add(sum, panel, weight)       sum + panel * weight, on words
//   transpose(from, stride, to, to_stride)      kLanes x kLanes words
//   widen_half(p), widen_byte(p), store_half(p, v)
//   load_some(p, n), store_some(p, v, n), store_half_some(p, v, n)      n of kLanes elements, and no other memory
//   pairs_of(a, b)         two vectors of numbers as one of words, where words are pairs
#pragma once

#include <cstring>

#include "common/half.h"
#include "common/unroll.h"
#include "splice/splice_path.h"

namespace biomedgpt {
namespace {

// Sums over at most this many words, then over blocks of them: rounding errors stay small however wide the features.
constexpr int64_t kSumWords = 512;

constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

constexpr int64_t round_up_to(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

template <class Isa>
void widen(const void* source, DType dtype, int64_t count, float scale, float* destination) {
    const auto* floats = static_cast<const float*>(source);
    const auto* halves = static_cast<const uint16_t*>(source);
    const auto* bytes = static_cast<const int8_t*>(source);
    const typename Isa::Vec factor = Isa::broadcast(&scale);
    int64_t i = 0;
    // One loop per type: a branch inside would cost more than the conversion.
    if (dtype == DType::f32) {
        for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
            Isa::store(destination + i, Isa::scale(Isa::load(floats + i), factor));
        }
        for (; i < count; ++i) destination[i] = floats[i] * scale;
    } else if (dtype == DType::f16) {
        for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
            Isa::store(destination + i, Isa::scale(Isa::widen_half(halves + i), factor));
        }
        if (i < count) {
            uint16_t rest[Isa::kLanes] = {};
            std::memcpy(rest, halves + i, static_cast<size_t>(count - i) * sizeof *rest);
            Isa::store_some(destination + i, Isa::scale(Isa::widen_half(rest), factor), count - i);
        }
    } else {
        for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
            Isa::store(destination + i, Isa::scale(Isa::widen_byte(bytes + i), factor));
        }
        for (; i < count; ++i) destination[i] = static_cast<float>(bytes[i]) * scale;
    }
}

template <class Isa>
void narrow(const float* source, int64_t count, uint16_t* destination) {
    int64_t i = 0;
    for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::store_half(destination + i, Isa::load(source + i));
    for (; i < count; ++i) destination[i] = float_to_half(source[i]);
}

// What an instruction set without masks does for the end of a row.
template <class Isa>
typename Isa::Vec load_some_of(const float* from, int64_t count) {
    float all[Isa::kLanes] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = from[i];
    return Isa::load(all);
}

template <class Isa>
void store_some_of(float* to, typename Isa::Vec values, int64_t count) {
    if (count == Isa::kLanes) return Isa::store(to, values);
    float all[Isa::kLanes];
    Isa::store(all, values);
    for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

template <class Isa>
void store_half_some_of(uint16_t* to, typename Isa::Vec values, int64_t count) {
    if (count == Isa::kLanes) return Isa::store_half(to, values);
    uint16_t all[Isa::kLanes];
    Isa::store_half(all, values);
    for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// Normalises before the product, not after: rstd * (W x - mean * rowsum(W)) cancels where the mean is large. In double
// for the same reason. Eight sums each: a compiler may not reorder a sum, but it can put eight of them in registers.
template <class Isa>
void normalise(float* row, int64_t width, double eps) {
    constexpr int64_t kSums = 8;
    const auto total = [row, width](double centre, bool squared) {
        double sums[kSums] = {};
        for (int64_t i = 0; i < width; i += kSums) {
            const int64_t count = smaller(kSums, width - i);
            for (int64_t j = 0; j < count; ++j) {
                const double value = row[i + j] - centre;
                sums[j] += squared ? value * value : value;
            }
        }
        return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    };
    const double mean = total(0, false) / static_cast<double>(width);
    const double rstd = 1.0 / __builtin_sqrt(total(mean, true) / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i) row[i] = static_cast<float>((row[i] - mean) * rstd);
}

// For paths whose words are floats.
template <class Isa>
void pack_row_of_floats(const void* source, DType dtype, int64_t count, int64_t words, float* destination) {
    if (source != destination) widen<Isa>(source, dtype, count, 1.0f, destination);
    for (int64_t i = count; i < words; ++i) destination[i] = 0.0f;
}

// For paths whose words are pairs of 16-bit numbers: Isa::pairs_of makes one vector of words of two vectors of numbers.
// In place, too: words are written behind where numbers are read.
template <class Isa>
void pack_row_of_pairs(const void* source, DType dtype, int64_t count, int64_t words, float* destination) {
    constexpr int64_t kLanes = Isa::kLanes;
    const auto* floats = static_cast<const float*>(source);
    const auto* halves = static_cast<const uint16_t*>(source);
    int64_t i = 0;
    if (dtype == DType::f32) {
        for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
            Isa::store(destination + i / 2, Isa::pairs_of(Isa::load(floats + i), Isa::load(floats + i + kLanes)));
        }
    } else {
        for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
            Isa::store(destination + i / 2,
                       Isa::pairs_of(Isa::widen_half(halves + i), Isa::widen_half(halves + i + kLanes)));
        }
    }
    if (i < count) {
        if (dtype == DType::f32) {
            float rest[2 * kLanes] = {};
            std::memcpy(rest, floats + i, static_cast<size_t>(count - i) * sizeof *rest);
            Isa::store(destination + i / 2, Isa::pairs_of(Isa::load(rest), Isa::load(rest + kLanes)));
        } else {
            uint16_t rest[2 * kLanes] = {};
            std::memcpy(rest, halves + i, static_cast<size_t>(count - i) * sizeof *rest);
            Isa::store(destination + i / 2, Isa::pairs_of(Isa::widen_half(rest), Isa::widen_half(rest + kLanes)));
        }
        i += 2 * kLanes;
    }
    for (i /= 2; i < words; ++i) destination[i] = 0.0f;
}

template <class Isa>
void pack_panel(const float* rows, int64_t words, int64_t lanes, float* panel) {
    for (int64_t i = 0; i < words; i += Isa::kLanes) Isa::transpose(rows + i, kWordStride, panel + i * lanes, lanes);
}

// For a stride that is known when this is compiled, one pointer serves all rows. Otherwise one serves three, for an
// address can add one or two strides: a pointer for each row would take more registers than there are.
template <class Isa, int kVectors, int kRows, int kRowsPerPointer>
__attribute__((always_inline)) inline void multiply_rows(const float* panel, const float* broadcast, int64_t stride,
                                                         int64_t words, float* tile) {
    constexpr int64_t kLanes = kVectors * Isa::kLanes;
    static_assert(kLanes <= kMaxLanes && kRows <= kMaxTileRows);
    using Vec = typename Isa::Vec;
    const float* from[(kRows + kRowsPerPointer - 1) / kRowsPerPointer];
    for (const float*& pointer : from) pointer = broadcast + (&pointer - from) * kRowsPerPointer * stride;
    for (int64_t start = 0; start < words; start += kSumWords) {
        const int64_t end = smaller(words, start + kSumWords);
        Vec sums[kRows][kVectors];
        BIOMEDGPT_UNROLL
        for (auto& row : sums) {
            for (Vec& sum : row) sum = Isa::zero();
        }
        for (int64_t i = start; i < end; ++i) {
            Vec column[kVectors];
            for (int v = 0; v < kVectors; ++v) column[v] = Isa::load(panel + i * kLanes + v * Isa::kLanes);
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const Vec word = Isa::broadcast(from[r / kRowsPerPointer] + r % kRowsPerPointer * stride);
                for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::multiply_add(sums[r][v], column[v], word);
            }
            BIOMEDGPT_UNROLL
            for (const float*& pointer : from) ++pointer;
        }
        BIOMEDGPT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) {
                float* total = tile + r * kLanes + v * Isa::kLanes;
                Isa::store(total, start == 0 ? sums[r][v] : Isa::add(Isa::load(total), sums[r][v]));
            }
        }
    }
}

template <class Isa, int kVectors, int kRows>
void multiply(const float* panel, const float* broadcast, int64_t words, float* tile) {
    multiply_rows<Isa, kVectors, kRows, kRows>(panel, broadcast, kWordStride, words, tile);
}

template <class Isa, int kVectors, int kRows>
void multiply_strided(const float* panel, const float* broadcast, int64_t stride, int64_t words, float* tile) {
    multiply_rows<Isa, kVectors, kRows, 3>(panel, broadcast, stride, words, tile);
}

// `count` results of one row of out, at most a vector.
template <class Isa>
void write_some(const float* sums, typename Isa::Vec bias, const OutTile& at, int64_t index, int64_t count) {
    const typename Isa::Vec sum = Isa::add(Isa::load(sums), bias);
    if (at.dtype == DType::f32) {
        Isa::store_some(static_cast<float*>(at.out) + index, sum, count);
    } else {
        Isa::store_half_some(static_cast<uint16_t*>(at.out) + index, sum, count);
    }
}

template <class Isa, int kTileLanes>
void write(const float* tile, const OutTile& at) {
    for (int64_t column = 0; column < at.columns; column += Isa::kLanes) {
        const int64_t count = smaller(Isa::kLanes, at.columns - column);
        const typename Isa::Vec bias = Isa::load_some(at.bias + column, count);
        for (int64_t row = 0; row < at.rows; ++row) {
            write_some<Isa>(tile + row * kTileLanes + column, bias, at, row * at.stride + column, count);
        }
    }
}

template <class Isa, int kTileLanes>
void write_transposed(const float* tile, const OutTile& at) {
    alignas(64) float block[Isa::kLanes * Isa::kLanes];
    for (int64_t column = 0; column < at.columns; column += Isa::kLanes) {
        const int64_t count = smaller(Isa::kLanes, at.columns - column);
        const typename Isa::Vec bias = Isa::load_some(at.bias + column, count);
        for (int64_t row = 0; row < at.rows; row += Isa::kLanes) {
            const int64_t rows = smaller(Isa::kLanes, at.rows - row);
            Isa::transpose(tile + column * kTileLanes + row, kTileLanes, block, Isa::kLanes);
            for (int64_t i = 0; i < rows; ++i) {
                write_some<Isa>(block + i * Isa::kLanes, bias, at, (row + i) * at.stride + column, count);
            }
        }
    }
}

template <class Isa, int kVectors, int kRows>
constexpr TileShape tile_shape(int64_t tenths = 10) {
    constexpr int kLanes = kVectors * Isa::kLanes;
    return {kLanes,
            kRows,
            tenths,
            multiply<Isa, kVectors, kRows>,
            multiply_strided<Isa, kVectors, kRows>,
            write<Isa, kLanes>,
            write_transposed<Isa, kLanes>};
}

// A path whose words are floats.
template <class Isa, class... Shapes>
constexpr SplicePath path_of_floats(const char* name, Shapes... shapes) {
    return {name,
            false,
            Isa::kLanes,
            1,
            1,
            sizeof...(shapes),
            {shapes...},
            widen<Isa>,
            narrow<Isa>,
            normalise<Isa>,
            pack_row_of_floats<Isa>,
            pack_panel<Isa>};
}

// The same with words that are pairs of 16-bit numbers, padded to multiples of `words_step`.
template <class Isa, class... Shapes>
constexpr SplicePath path_of_pairs(const char* name, int64_t words_step, Shapes... shapes) {
    return {name,
            true,
            Isa::kLanes,
            2,
            words_step,
            sizeof...(shapes),
            {shapes...},
            widen<Isa>,
            narrow<Isa>,
            normalise<Isa>,
            pack_row_of_pairs<Isa>,
            pack_panel<Isa>};
}

}  // namespace
}  // namespace biomedgpt
