// Tiles: how many rows they have and how long these are. For files that are compiled for AMX, hence the unnamed
// namespace (see splice_kernel.h).
#pragma once

#include <cstdint>

namespace biomedgpt {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // Tiles first to last.
    void set(int first, int last, int64_t their_rows, int64_t their_row_bytes) {
        for (int i = first; i <= last; ++i) {
            rows[i] = static_cast<uint8_t>(their_rows);
            row_bytes[i] = static_cast<uint16_t>(their_row_bytes);
        }
    }
};
static_assert(sizeof(TileConfig) == 64);

// _tile_loadconfig of GCC 12 says that it reads 8 of these 64 bytes, so that what was written to the others may be
// gone.
inline void configure_tiles(const TileConfig& config) {
    __asm__ volatile("ldtilecfg\t%0" : : "m"(config));
}

// Between what is written and tiles that are loaded from it: _tile_loadd of GCC does not say that it reads memory.
inline void written_for_tiles() {
    __asm__ volatile("" : : : "memory");
}

}  // namespace
}  // namespace biomedgpt
