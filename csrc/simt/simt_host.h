// simt.h for any C++ compiler: one block after the other, each of its threads a fiber that runs until it has to wait.
//
// Meant to find faults: threads run in an order that changes from barrier to barrier, shared memory holds NaNs at
// first, asynchronous copies arrive at once or no sooner than they must, writes behind shared memory are found, and a
// barrier that some threads do not reach is an error. Not seen: that shuffles order no memory on a GPU.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>

#include "common/half.h"
#include "simt/simt.h"

namespace biomedgpt {
inline namespace on_host {
namespace simt {

// A thread of the block that runs.
struct Place {
    int thread = 0;
    int x = 0, y = 0, z = 0;
};

const Place& place();

struct Grid {
    int x = 1, y = 1, z = 1;
};

// Runs `kernel` in every thread of every block. Throws std::logic_error where threads wait for each other forever.
void run_grid(const Grid& grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

void sync_block();
void sync_warp();
char* shared();

// What the lanes of a warp show each other: twelve words of each, which stay until the next exchange but one.
constexpr int kExchanged = 12;
struct Shown {
    uint32_t lanes[kWarpSize][kExchanged];

    const uint32_t (&operator[](int lane) const)[kExchanged] { return lanes[lane]; }
};
const Shown& exchange(const uint32_t (&words)[kExchanged]);

// Throws std::logic_error for anything but 16 bytes of shared memory, at a multiple of that.
void require_row(uintptr_t address);

void copy_async(void* to, const void* from, bool there = true);
void commit_copies();
void wait_for_copies(int but);

inline int thread() {
    return place().thread;
}

inline int lane() {
    return place().thread % kWarpSize;
}

inline int warp() {
    return place().thread / kWarpSize;
}

inline int block_x() {
    return place().x;
}

inline int block_y() {
    return place().y;
}

inline int block_z() {
    return place().z;
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float shuffle_xor(float value, int mask) {
    const Shown& shown = exchange({float_bits(value)});
    return bits_float(shown[lane() ^ mask][0]);
}

inline int shuffle_xor(int value, int mask) {
    const Shown& shown = exchange({static_cast<uint32_t>(value)});
    return static_cast<int>(shown[lane() ^ mask][0]);
}

inline float low_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair));
}

inline float high_half(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair >> 16));
}

inline uint16_t half_bits(float value) {
    return float_to_half(value);
}

inline float half_value(uint16_t bits) {
    return half_to_float(bits);
}

inline uint32_t half_pair(float low, float high) {
    return uint32_t{float_to_half(low)} | uint32_t{float_to_half(high)} << 16;
}

// Where a lane's fragments of mma.m16n8k16 lie. A [16, 16]: registers 0 to 3 hold rows lane / 4 and that plus 8,
// columns 2 * (lane % 4) and the next, then the same plus 8. B [16, 8]: rows as those columns, column lane / 4. Lanes
// show them as floats: each half is read by many.
inline float of_a(const Shown& shown, int row, int column) {
    return bits_float(shown[row % 8 * 4 + column % 8 / 2][(row / 8 + column / 8 * 2) * 2 + column % 2]);
}

inline float of_b(const Shown& shown, int row, int column) {
    return bits_float(shown[column * 4 + row % 8 / 2][8 + row / 8 * 2 + row % 2]);
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t words[kExchanged];
    for (int i = 0; i < 6; ++i) {
        const uint32_t pair = i < 4 ? a[i] : b[i - 4];
        words[2 * i] = float_bits(low_half(pair));
        words[2 * i + 1] = float_bits(high_half(pair));
    }
    const Shown& shown = exchange(words);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) sum += of_a(shown, row, k) * of_b(shown, k, column);
        c[i] = sum;
    }
}

// Four matrices of 8 x 8 halves, whose rows the lanes point at, eight lanes for each.
inline void load_transposed(uint32_t (&to)[4], const void* row) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    require_row(address);
    const Shown& shown = exchange({static_cast<uint32_t>(address), static_cast<uint32_t>(uint64_t{address} >> 32)});
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const auto& from = shown[matrix * 8 + lane() % 4 * 2 + i];
            const auto at = static_cast<uintptr_t>(uint64_t{from[0]} | uint64_t{from[1]} << 32);
            std::memcpy(pair + i, reinterpret_cast<const char*>(at) + lane() / 4 * sizeof(uint16_t), sizeof *pair);
        }
        to[matrix] = uint32_t{pair[0]} | uint32_t{pair[1]} << 16;
    }
}

template <int N>
void wait_copies() {
    wait_for_copies(N);
}

inline void wait_for_inputs() {}

inline void let_next_start() {}

inline uint32_t fetch_add(uint32_t* counter, uint32_t value) {
    const uint32_t before = *counter;
    *counter += value;
    return before;
}

inline void fence() {}

template <uint32_t kMask, uint32_t kBits>
uint32_t and_or(uint32_t value) {
    return (value & kMask) | kBits;
}

inline uint32_t half_pair_sub(uint32_t a, uint32_t b) {
    return half_pair(low_half(a) - low_half(b), high_half(a) - high_half(b));
}

// Of halves, float32 holds products and these sums of them without rounding.
inline uint32_t half_pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    return half_pair(low_half(a) * low_half(b) + low_half(c), high_half(a) * high_half(b) + high_half(c));
}

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        picked |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return picked;
}

inline float exp2_of(float value) {
    return std::exp2(value);
}

inline float inverse_sqrt(float value) {
    return 1.0f / std::sqrt(value);
}

}  // namespace simt
}  // namespace on_host
}  // namespace biomedgpt
