// AMX: six of the eight tiles are sums of 16 x 16, two are operands of 16 x 64 bytes. Tiles have numbers, not types, so
// this loop is written out.
#include <immintrin.h>

#include <cstring>

#include "common/amx.h"
#include "probe/probe_loop.h"

namespace biomedgpt {
namespace {

constexpr int kTileSums = 6, kTiles = 8, kRows = 16, kRowBytes = 64;

// The compiler's tile intrinsics do not say which memory they read and write.
void memory_is_used(const void* memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

double run(int64_t steps) {
    TileConfig config;
    config.set(0, kTiles - 1, kRows, kRowBytes);
    alignas(64) uint8_t ones[kRows * kRowBytes];
    std::memset(ones, 1, sizeof ones);
    memory_is_used(ones);
    configure_tiles(config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_loadd(6, ones, kRowBytes);
    _tile_loadd(7, ones, kRowBytes);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_dpbusd(0, 6, 7);
        _tile_dpbusd(1, 6, 7);
        _tile_dpbusd(2, 6, 7);
        _tile_dpbusd(3, 6, 7);
        _tile_dpbusd(4, 6, 7);
        _tile_dpbusd(5, 6, 7);
    }
    alignas(64) int32_t sums[kTileSums][kRows * kRows] = {};
    memory_is_used(sums);
    _tile_stored(0, sums[0], kRowBytes);
    _tile_stored(1, sums[1], kRowBytes);
    _tile_stored(2, sums[2], kRowBytes);
    _tile_stored(3, sums[3], kRowBytes);
    _tile_stored(4, sums[4], kRowBytes);
    _tile_stored(5, sums[5], kRowBytes);
    memory_is_used(sums);
    _tile_release();
    double total = 0;
    for (const auto& tile : sums) total += sum_of(tile);
    return total;
}

}  // namespace

extern const ArithmeticLoop kInt8Amx = {"amx_int8", "int8", int64_t{2} * kTileSums * kRows * kRows * kRowBytes, &run};

}  // namespace biomedgpt
