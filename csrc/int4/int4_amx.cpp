// int4 with AMX: one instruction multiplies up to 16 rows of 64 bytes by 64 times 16, and adds to 16 sums of each.
// Fewer than four are as with AVX-512 VNNI: unpacking for tiles would take longer than the products.
#include "common/amx.h"
#include "int4/int4_avx512.h"

namespace biomedgpt {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row
// Fewer are multiplied as fast without tiles.
constexpr int64_t kFromRows = 4;
constexpr int64_t kPanelStride = kInt4PanelRows * int64_t{sizeof(int32_t)};
static_assert(kInt4RowStep == 2 * kTileRows && kInt4PanelRows == 2 * kTileRows && kPanelStride == kQuadBytes);

// Tiles take signed values, so that no term is left for their zero point. Tiles 0 to 3 are sums, 4 and 5 rows of
// activations, 6 and 7 the two halves of a panel's rows, four columns each a row.
inline TileConfig tiles_of(int64_t columns) {
    TileConfig config;
    config.set(0, 3, kTileRows, kTileBytes);
    config.set(4, 5, kTileRows, columns);
    config.set(6, 7, columns / 4, kTileBytes);
    return config;
}

// The same for few rows, which tiles 0 and 1 are the sums of and 4 is a part of.
inline TileConfig tiles_of_few(int64_t rows, int64_t columns) {
    TileConfig config;
    config.set(0, 1, rows, kTileBytes);
    config.set(4, 4, rows, columns);
    config.set(6, 7, columns / 4, kTileBytes);
    return config;
}

// What comes after the records of a tile is fetched in as many parts as there are products, for the memory's sake.
class Fetch {
  public:
    Fetch(const Int4Tile& tile, int64_t parts)
        : from_(tile.records),
          ahead_(tile.ahead),
          bytes_(tile.groups * tile.record_bytes()),
          part_((bytes_ / parts + kCacheLine) / kCacheLine * kCacheLine) {}

    void part(int64_t index) const {
        const int64_t first = index * part_;
        if (first < bytes_) prefetch(from_, ahead_ + first, part_);
    }

  private:
    const uint8_t* from_;
    int64_t ahead_, bytes_, part_;
};

// Many rows are written past the caches: their lines lie a whole row of y apart, and reading each before it is
// overwritten took a tenth of the time.
void write_past_caches(const float* totals, int64_t rows, int64_t columns, float* y, int64_t stride) {
    constexpr int64_t kFloats = kCacheLine / int64_t{sizeof *y};
    const bool whole =
        columns == kInt4PanelRows && stride % kFloats == 0 && reinterpret_cast<uintptr_t>(y) % kCacheLine == 0;
    if (rows < kInt4RowStep || !whole) return write(totals, rows, columns, y, stride);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < kInt4PanelRows; i += kFloats) {
            _mm512_stream_ps(y + row * stride + i, _mm512_load_ps(totals + row * kInt4PanelRows + i));
        }
    }
    _mm_sfence();  // such stores may come after those by which other threads learn of the end
}

// The product of some rows and a panel over one group. Its sums are exact.
struct Product {
    const int8_t* x;
    int64_t stride;
    const uint8_t* values;
    int64_t columns;  // of a tile: the group, or half of it
    int64_t rows;     // 1 to 32
    int32_t* sums;    // [32, 32]
};

// What is to be done with sums: they are added to totals, with the scales of their rows and of the weights.
struct Addition {
    const int32_t* sums;
    const uint8_t* scales;
    const float* row_scales;
    int64_t groups;
    int64_t rows;  // as many as of the product; 0 where nothing is left to do
    bool fresh;
    float* totals;
};

// Where a tile of sums belongs.
inline int32_t* part_of(const Product& product, int tile) {
    return product.sums + tile / 2 * kTileRows * kInt4PanelRows + tile % 2 * kTileRows;
}

inline void load_rows(const Product& product, int64_t column) {
    _tile_loadd(4, product.x + column, product.stride);
}

inline void load_more_rows(const Product& product, int64_t column) {
    _tile_loadd(5, product.x + kTileRows * product.stride + column, product.stride);
}

inline void load_weights(const Product& product, int64_t column) {
    const uint8_t* quads = product.values + column * kInt4PanelRows;
    _tile_loadd(6, quads, kQuadBytes);
    _tile_loadd(7, quads + kTileBytes, kQuadBytes);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Those of a panel.
struct Scales {
    Avx512Vnni::Floats left, right;
};

inline Scales scales_of(const Addition& addition) {
    return {Avx512Vnni::load_halves(addition.scales),
            Avx512Vnni::load_halves(addition.scales + 2 * Avx512Vnni::kLanes)};
}

template <int64_t kCount>
__attribute__((always_inline)) inline void add_rows(const Addition& addition, Scales scales, int64_t first) {
    using Isa = Avx512Vnni;
    BIOMEDGPT_UNROLL
    for (int64_t row = first; row < first + kCount; ++row) {
        const Isa::Floats row_scale = Isa::set(addition.row_scales[row * addition.groups]);
        BIOMEDGPT_UNROLL
        for (int64_t v = 0; v < kInt4PanelRows; v += Isa::kLanes) {
            const __m512i sum = _mm512_load_si512(addition.sums + row * kInt4PanelRows + v);
            const Isa::Floats product = Isa::scale(Isa::to_floats(sum), v == 0 ? scales.left : scales.right);
            float* total = addition.totals + row * kInt4PanelRows + v;
            Isa::store(total, Isa::fma(product, row_scale, addition.fresh ? Isa::zero() : Isa::load(total)));
        }
    }
}

inline void add_all_rows(const Addition& addition) {
    if (addition.rows == 0) return;  // there are no scales to be read
    const Scales scales = scales_of(addition);
    for (int64_t row = 0; row < addition.rows; ++row) add_rows<1>(addition, scales, row);
}

// Any number of rows.
inline void multiply_rows_of(const Product& product, int64_t group) {
    const bool more = product.rows > kTileRows;
    clear_sums();
    for (int64_t column = 0; column < group; column += product.columns) {
        load_weights(product, column);
        load_rows(product, column);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (more) {
            load_more_rows(product, column);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, part_of(product, 0), kPanelStride);
    _tile_stored(1, part_of(product, 1), kPanelStride);
    if (more) {
        _tile_stored(2, part_of(product, 2), kPanelStride);
        _tile_stored(3, part_of(product, 3), kPanelStride);
    }
}

// A product of more than 16 rows, and between its instructions the addition of the one before, 32 rows of it: they go
// to different units, but one after the other neither would begin before the other one's end.
template <int kSteps>
inline void multiply_and_add(const Product& product, const Addition& addition) {
    constexpr int64_t kRows = kInt4RowStep / (4 * kSteps);
    const Scales scales = scales_of(addition);
    clear_sums();
    int64_t row = 0;
    BIOMEDGPT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        const int64_t column = step * product.columns;
        const bool last = step + 1 == kSteps;
        load_weights(product, column);
        load_rows(product, column);
        _tile_dpbssd(0, 4, 6);
        add_rows<kRows>(addition, scales, row);
        _tile_dpbssd(1, 4, 7);
        if (last) _tile_stored(0, part_of(product, 0), kPanelStride);
        add_rows<kRows>(addition, scales, row + kRows);
        load_more_rows(product, column);
        _tile_dpbssd(2, 5, 6);
        if (last) _tile_stored(1, part_of(product, 1), kPanelStride);
        add_rows<kRows>(addition, scales, row + 2 * kRows);
        _tile_dpbssd(3, 5, 7);
        if (last) _tile_stored(2, part_of(product, 2), kPanelStride);
        add_rows<kRows>(addition, scales, row + 3 * kRows);
        if (last) _tile_stored(3, part_of(product, 3), kPanelStride);
        row += 4 * kRows;
    }
}

// The two at once where both are whole.
inline void multiply_and_add(const Product& product, const Addition& addition, int64_t group) {
    if (product.rows <= kTileRows || addition.rows < kInt4RowStep) {
        add_all_rows(addition);
        multiply_rows_of(product, group);
    } else if (product.columns < group) {
        multiply_and_add<2>(product, addition);
    } else {
        multiply_and_add<1>(product, addition);
    }
}

void multiply_tiles(const Int4Tile& tile, int64_t rows) {
    const int64_t columns = tile.group < kTileBytes ? tile.group : kTileBytes;
    const int64_t record_bytes = tile.record_bytes(), stride = tile.rows.stride, groups = tile.rows.groups;
    const Fetch fetch(tile, (rows + kInt4RowStep - 1) / kInt4RowStep * tile.groups);
    alignas(64) int32_t sums[2][kInt4RowStep * kInt4PanelRows];
    Addition left{};
    int64_t step = 0;
    configure_tiles(tiles_of(columns));
    for (int64_t row = 0; row < rows; row += kInt4RowStep) {
        const int64_t count = rows - row < kInt4RowStep ? rows - row : kInt4RowStep;
        for (int64_t g = 0; g < tile.groups; ++g, ++step) {
            fetch.part(step);
            const Product product{tile.rows.values + row * stride + g * tile.group,
                                  stride,
                                  tile.unpacked + g * tile.group * kInt4PanelRows,
                                  columns,
                                  count,
                                  sums[step % 2]};
            multiply_and_add(product, left, tile.group);
            left = {product.sums,
                    tile.records + (g + 1) * record_bytes - kScaleBytes,
                    tile.rows.scales + row * groups + g,
                    groups,
                    count,
                    tile.fresh && g == 0,
                    tile.totals + row * kInt4PanelRows};
        }
    }
    add_all_rows(left);
    _tile_release();  // tiles in use make every switch between threads save 8 KiB more
}

// A record of panels that have turns: the first of each, then the second of each, and so on.
struct Turn {
    int64_t group, panel;
    const uint8_t* record;
    int64_t ahead;  // what is fetched meanwhile: the next record of the panel, or of the panel that comes after these
};

inline Turn turn_of(const Int4Panels& panels, int64_t group, int64_t panel) {
    const int64_t groups = panels.rows.groups, size = panels.shape.record_bytes();
    const bool last = group + 1 == groups;
    return {group, panel, panels.records + (panel * groups + group) * size,
            last ? (panels.count * groups - group) * size : size};
}

// Some columns of a record, as tiles take them: values [group / 4, 32, 4]. They are not made signed, so that sums lack
// their zero points' term.
inline void unpack_unsigned(const Turn& turn, int64_t first, int64_t columns, uint8_t* values) {
    using Isa = Avx512Vnni;
    for (int64_t column = first; column < first + columns; column += kBlockColumns) {
        const uint8_t* from = turn.record + column / kBlockColumns * kQuadBytes;
        uint8_t* to = values + column * kInt4PanelRows;
        prefetch(from, turn.ahead, kQuadBytes);
        BIOMEDGPT_UNROLL
        for (int64_t v = 0; v < kQuadBytes; v += kTileBytes) {
            const Isa::Quads quads = Isa::load(from + v);
            _mm512_store_si512(to + v, Isa::low(quads));
            _mm512_store_si512(to + kQuadBytes + v, Isa::high(quads));
        }
    }
}

// Adds some columns to tiles 0 and 1.
inline void multiply_unsigned(const Int4Panels& panels, const Turn& turn, int64_t column, const uint8_t* values) {
    const uint8_t* quads = values + column * kInt4PanelRows;
    _tile_loadd(4, panels.rows.values + turn.group * panels.shape.group + column, panels.rows.stride);
    _tile_loadd(6, quads, kQuadBytes);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, quads + kTileBytes, kQuadBytes);
    _tile_dpbsud(1, 4, 7);
}

// Sums [rows, 32] to totals, as others do it: first they are made exact, then scaled.
inline void add_unsigned(const Int4Panels& panels, const Turn& turn, int64_t rows, const int32_t* sums) {
    using Isa = Avx512Vnni;
    const uint8_t* scales = turn.record + panels.shape.record_bytes() - kScaleBytes;
    const Isa::Floats left = Isa::load_halves(scales), right = Isa::load_halves(scales + 2 * Isa::kLanes);
    float* totals = panels.totals + turn.panel * rows * kInt4PanelRows;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t number = row * panels.rows.groups + turn.group;
        const Isa::Ints zero_term = Isa::set(panels.rows.zero_terms[number]);
        const Isa::Floats row_scale = Isa::set(panels.rows.scales[number]);
        BIOMEDGPT_UNROLL
        for (int64_t v = 0; v < kInt4PanelRows; v += Isa::kLanes) {
            const Isa::Ints sum = Isa::add(_mm512_load_si512(sums + row * kInt4PanelRows + v), zero_term);
            const Isa::Floats product = Isa::scale(Isa::to_floats(sum), v == 0 ? left : right);
            float* total = totals + row * kInt4PanelRows + v;
            Isa::store(total, Isa::fma(product, row_scale, turn.group == 0 ? Isa::zero() : Isa::load(total)));
        }
    }
}

// Up to 16 rows. While a record is unpacked, the one before is multiplied and the sums of the one before that are
// added: none waits for another, and the processor does them at once where their instructions alternate.
void multiply_panels(const Int4Panels& panels, int64_t rows) {
    const int64_t columns = panels.shape.group < kTileBytes ? panels.shape.group : kTileBytes;
    const int64_t records = panels.rows.groups * panels.count;
    alignas(64) uint8_t values[2][kMaxGroup * kInt4PanelRows];
    alignas(64) int32_t sums[2][kTileRows * kInt4PanelRows];
    Turn unpacked{}, multiplied{}, added{};
    int64_t group = 0, panel = 0;
    configure_tiles(tiles_of_few(rows, columns));
    for (int64_t step = 0; step < records + 2; ++step) {
        const bool unpacks = step < records, multiplies = step > 0 && step <= records;
        const int64_t now = step % 2, before = 1 - now;
        added = multiplied;
        multiplied = unpacked;
        if (step > 1) add_unsigned(panels, added, rows, sums[now]);
        if (unpacks) {
            unpacked = turn_of(panels, group, panel);
            prefetch(unpacked.record + panels.shape.record_bytes() - kScaleBytes, unpacked.ahead, kScaleBytes);
            if (++panel == panels.count) panel = 0, ++group;
        }
        if (multiplies) {
            _tile_zero(0);
            _tile_zero(1);
        }
        for (int64_t column = 0; column < panels.shape.group; column += columns) {
            if (multiplies) multiply_unsigned(panels, multiplied, column, values[before]);
            if (unpacks) unpack_unsigned(unpacked, column, columns, values[now]);
        }
        written_for_tiles();
        if (multiplies) {
            _tile_stored(0, sums[before], kPanelStride);
            _tile_stored(1, sums[before] + kTileRows, kPanelStride);
        }
    }
    _tile_release();
}

}  // namespace

extern const Int4Path kInt4Amx = {"amx_int8",
                                  Avx512Vnni::kTileRows,
                                  kInt4RowBlock,
                                  kTileRows,
                                  quantize,
                                  multiply_up_to<Avx512Vnni, false, Avx512Vnni::kTileRows>,
                                  unpack<kInt4ZeroPoint>,
                                  multiply_tiles,
                                  silu_multiply,
                                  write_past_caches,
                                  kFromRows,
                                  kTileRows,
                                  multiply_panels};

}  // namespace biomedgpt
