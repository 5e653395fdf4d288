// How rows of halves lie that a product reads, and which words of a record a lane takes.
//
// mma.m16n8k16 gives lane 4 g + t rows g and g + 8 of A, column g of B, and columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of
// A, which are rows of B. Which rows and columns of a matrix stand there is free, as long as both operands agree. So
// they are taken as records have them (csrc/int4): from each 32 columns of a panel, lane 4 g + t reads the sixteen
// bytes with the eight columns 8 t, ... of the four rows 4 g, ..., a coalesced 512 bytes for a warp, and masks them. Of
// the eight columns of a word, `w & 0x000f000f` are columns 0 and 2, `w >> 4 & ...` 4 and 6, `w >> 8` 1 and 3, `w >>
// 12` 5 and 7: halves that are multiplied by them lie in that order, eight by eight.
#pragma once

#include "simt/simt.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

constexpr int kOctet = 8;

// Where column `column` of a row stands.
BIOMEDGPT_ANYWHERE int place_of(int column) {
    return column / kOctet * kOctet + column % 2 * 4 + column % kOctet / 2;
}

// Eight columns as they stand there.
BIOMEDGPT_DEVICE Quad ordered_halves(const float (&values)[kOctet]) {
    return {{simt::half_pair(values[0], values[2]), simt::half_pair(values[4], values[6]),
             simt::half_pair(values[1], values[3]), simt::half_pair(values[5], values[7])}};
}

BIOMEDGPT_DEVICE void load_octet(const float* from, float (&values)[kOctet]) {
    const Quad low = reinterpret_cast<const Quad*>(from)[0], high = reinterpret_cast<const Quad*>(from)[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[i] = simt::bits_float(low.words[i]);
        values[i + 4] = simt::bits_float(high.words[i]);
    }
}

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
