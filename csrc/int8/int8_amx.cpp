// int8 with AMX: one instruction multiplies 16 rows of 64 signed bytes by 64 times 16, and adds to 256 sums.
#include <immintrin.h>

#include "common/amx.h"
#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kTotalsStride = kInt8PanelRows * int64_t{sizeof(int32_t)};
static_assert(kInt8RowStep == 2 * kTileRows && kInt8PanelRows == 2 * kTileRows && kInt8ColumnStep == kTileBytes);

// The weights that come next, spread evenly over all steps: no step may wait for a memory that is busy.
struct Ahead {
    uintptr_t address;
    uintptr_t per_step;

    Ahead(const Int8Tile& tile, int64_t rows)
        : address(reinterpret_cast<uintptr_t>(tile.next)),
          per_step(static_cast<uintptr_t>(kTileBytes * kInt8PanelRows / ((rows + kInt8RowStep - 1) / kInt8RowStep))) {}

    void step() {
        constexpr int kIntoL2 = 2;
        for (uintptr_t i = 0; i <= per_step; i += kTileBytes) {
            __builtin_prefetch(reinterpret_cast<const void*>(address + i), 0, kIntoL2);
        }
        address += per_step;
    }
};

// 16 rows, or 32.
template <bool kMore>
inline void multiply_step(const Int8Tile& tile, int64_t row, Ahead& ahead) {
    int32_t* totals = tile.totals + row * kInt8PanelRows;
    int32_t* more_totals = totals + kTileRows * kInt8PanelRows;
    if (tile.fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (kMore) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, totals, kTotalsStride);
        _tile_loadd(1, totals + kTileRows, kTotalsStride);
        if (kMore) {
            _tile_loadd(2, more_totals, kTotalsStride);
            _tile_loadd(3, more_totals + kTileRows, kTotalsStride);
        }
    }
    const int64_t stride = tile.rows.stride;
    const int8_t* x = tile.rows.values + row * stride;
    const int8_t* weights = tile.weights;
    for (int64_t column = 0; column < tile.columns; column += kTileBytes, weights += kTileBytes * kInt8PanelRows) {
        _tile_loadd(6, weights, kQuadBytes);
        _tile_loadd(4, x + column, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, weights + kTileBytes, kQuadBytes);
        _tile_dpbssd(1, 4, 7);
        if (kMore) {
            _tile_loadd(5, x + kTileRows * stride + column, stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        ahead.step();
    }
    _tile_stored(0, totals, kTotalsStride);
    _tile_stored(1, totals + kTileRows, kTotalsStride);
    if (kMore) {
        _tile_stored(2, more_totals, kTotalsStride);
        _tile_stored(3, more_totals + kTileRows, kTotalsStride);
    }
}

void multiply_tiles(const Int8Tile& tile, int64_t rows) {
    // Tiles 0 to 3 are sums, 4 and 5 rows of activations, 6 and 7 the two halves of a panel's rows, four columns each a
    // row.
    TileConfig config;
    config.set(0, 7, kTileRows, kTileBytes);
    configure_tiles(config);
    Ahead ahead(tile, rows);
    for (int64_t row = 0; row < rows; row += kInt8RowStep) {
        if (rows - row > kTileRows) {
            multiply_step<true>(tile, row, ahead);
        } else {
            multiply_step<false>(tile, row, ahead);
        }
    }
    _tile_release();  // tiles in use make every switch between threads save 8 KiB more
}

}  // namespace

extern const Int8Path kInt8LinearAmx = {"amx_int8", kInt8RowBlock, quantize, multiply_tiles, finish};

}  // namespace biomedgpt
