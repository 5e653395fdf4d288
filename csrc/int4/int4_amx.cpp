// int4 with AMX for many rows: one instruction multiplies 16 rows of 64 bytes by 64 times 16, and adds to 256 sums. Few
// rows are as with AVX-512 VNNI, for they would leave tiles empty.
#include "common/amx.h"
#include "int4/int4_avx512.h"

namespace biomedgpt {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kPanelStride = kInt4PanelRows * int64_t{sizeof(int32_t)};
static_assert(kInt4RowStep == 2 * kTileRows && kInt4PanelRows == 2 * kTileRows && kPanelStride == kQuadBytes);

// Tiles 0 to 3 are sums, 4 and 5 rows of activations, 6 and 7 the two halves of a panel's rows, four columns each a
// row.
inline TileConfig tiles_of(int64_t columns) {
    TileConfig config;
    config.set(0, 3, kTileRows, kTileBytes);
    config.set(4, 5, kTileRows, columns);
    config.set(6, 7, columns / 4, kTileBytes);
    return config;
}

// Signed values, so that no term is left for their zero point.
inline void unpack_signed(const uint8_t* records, int64_t group, int64_t groups, uint8_t* unpacked) {
    unpack(records, group, groups, unpacked);
    for (int64_t i = 0; i < groups * group * kInt4PanelRows; ++i) {
        unpacked[i] = static_cast<uint8_t>(unpacked[i] - kInt4ZeroPoint);
    }
}

// sums[row, i] of one group; `more` than 16 rows or not.
inline void multiply_group(const int8_t* x, int64_t stride, const uint8_t* values, int64_t group, int64_t columns,
                           bool more, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t column = 0; column < group; column += columns) {
        const uint8_t* quads = values + column * kInt4PanelRows;
        _tile_loadd(6, quads, kQuadBytes);
        _tile_loadd(7, quads + kTileBytes, kQuadBytes);
        _tile_loadd(4, x + column, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (more) {
            _tile_loadd(5, x + kTileRows * stride + column, stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, kPanelStride);
    _tile_stored(1, sums + kTileRows, kPanelStride);
    if (more) {
        _tile_stored(2, sums + kTileRows * kInt4PanelRows, kPanelStride);
        _tile_stored(3, sums + kTileRows * kInt4PanelRows + kTileRows, kPanelStride);
    }
}

inline void add_to_totals(const int32_t* sums, const uint8_t* scales, const float* row_scales, int64_t groups,
                          int64_t rows, bool fresh, float* totals) {
    using Isa = Avx512Vnni;
    for (int64_t v = 0; v < kInt4PanelRows; v += Isa::kLanes) {
        const Isa::Floats scale = Isa::load_halves(scales + 2 * v);
        for (int64_t row = 0; row < rows; ++row) {
            const Isa::Floats product =
                Isa::scale(Isa::to_floats(_mm512_load_si512(sums + row * kInt4PanelRows + v)), scale);
            float* total = totals + row * kInt4PanelRows + v;
            const Isa::Floats before = fresh ? Isa::zero() : Isa::load(total);
            Isa::store(total, Isa::fma(product, Isa::set(row_scales[row * groups]), before));
        }
    }
}

void multiply_tiles(const Int4Tile& tile, int64_t rows) {
    const int64_t columns = tile.group < kTileBytes ? tile.group : kTileBytes;
    const int64_t record_bytes = tile.record_bytes();
    configure_tiles(tiles_of(columns));
    for (int64_t row = 0; row < rows; row += kInt4RowStep) {
        const int64_t count = rows - row < kInt4RowStep ? rows - row : kInt4RowStep;
        for (int64_t g = 0; g < tile.groups; ++g) {
            alignas(64) int32_t sums[kInt4RowStep * kInt4PanelRows];
            multiply_group(tile.rows.values + row * tile.rows.stride + g * tile.group, tile.rows.stride,
                           tile.unpacked + g * tile.group * kInt4PanelRows, tile.group, columns, count > kTileRows,
                           sums);
            add_to_totals(sums, tile.records + (g + 1) * record_bytes - kScaleBytes,
                          tile.rows.scales + row * tile.rows.groups + g, tile.rows.groups, count, tile.fresh && g == 0,
                          tile.totals + row * kInt4PanelRows);
        }
    }
    _tile_release();  // tiles in use make every switch between threads save 8 KiB more
}

}  // namespace

extern const Int4Path kInt4Amx = {"amx_int8",    Avx512Vnni::kTileRows,
                                  kInt4RowBlock, kTileRows,
                                  quantize,      multiply_up_to<Avx512Vnni, false, Avx512Vnni::kTileRows>,
                                  unpack_signed, multiply_tiles,
                                  silu_multiply};

}  // namespace biomedgpt
