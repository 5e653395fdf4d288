// splice with AMX: a processor's tile unit multiplies 16 x 32 by 32 x 16 bfloat16 numbers in one instruction. Sums stay
// float32, subnormal operands count as zero.
#include "common/amx.h"
#include "splice/splice_avx512_bf16.h"

namespace biomedgpt {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and 32-bit words in each
constexpr int64_t kWord = sizeof(float);

// Tiles 0 to 3 are sums, 4 and 5 rows that are broadcast, as they lie, 6 and 7 panels, which have the layout that the
// instruction wants: pairs of numbers, one lane after another.
template <int kPanels>
void multiply_tiles(const float* panel, const float* broadcast, int64_t words, float* tile) {
    constexpr int64_t kLanes = kPanels * kTile;
    TileConfig config;
    config.set(0, 7, kTile, kTile * kWord);
    configure_tiles(config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < words; i += kTile) {
        _tile_loadd(4, broadcast + i, kWordStride * kWord);
        _tile_loadd(6, panel + i * kLanes, kLanes * kWord);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, broadcast + kTile * kWordStride + i, kWordStride * kWord);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (kPanels == 2) {
            _tile_loadd(7, panel + i * kLanes + kTile, kLanes * kWord);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, tile, kLanes * kWord);
    _tile_stored(1, tile + kTile * kLanes, kLanes * kWord);
    if constexpr (kPanels == 2) {
        _tile_stored(2, tile + kTile, kLanes * kWord);
        _tile_stored(3, tile + kTile * kLanes + kTile, kLanes * kWord);
    }
    _tile_release();  // tiles in use make every switch between threads save 8 KiB more
}

template <int kPanels>
constexpr TileShape amx_shape() {
    constexpr int kLanes = kPanels * kTile;
    return {kLanes,
            2 * kTile,
            10,
            multiply_tiles<kPanels>,
            nullptr,
            write<Avx512Bf16, kLanes>,
            write_transposed<Avx512Bf16, kLanes>};
}

}  // namespace

extern const SplicePath kSpliceAmxBf16 = path_of_pairs<Avx512Bf16>("amx_bf16", kTile, amx_shape<2>(), amx_shape<1>());

}  // namespace biomedgpt
