// Dispatch of int4, and the blocking and threads around a path's inner loops.
#include "int4/int4.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "common/cpu_features.h"
#include "common/paths.h"
#include "int4/int4_check.h"
#include "int4/int4_path.h"

namespace biomedgpt {
namespace {

// The paths of this build that the processor can run, best first.
PathList<Int4Path> usable_paths() {
    PathList<Int4Path> usable;
    const CpuFeatures& cpu = cpu_features();
    static_cast<void>(cpu);  // not read where a build has the portable path only
#if defined(BIOMEDGPT_HAVE_INT4_AMX)
    if (cpu.amx_int8 && cpu.avx512_vnni) usable.add(kInt4Amx);
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AVX512_VNNI)
    if (cpu.avx512_vnni) usable.add(kInt4Avx512Vnni);
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AVX_VNNI)
    if (cpu.avx_vnni && cpu.fma && cpu.f16c) usable.add(kInt4AvxVnni);
#endif
#if defined(BIOMEDGPT_HAVE_INT4_AVX2)
    if (cpu.avx2 && cpu.fma && cpu.f16c) usable.add(kInt4Avx2);
#endif
#if defined(BIOMEDGPT_HAVE_INT4_NEON_I8MM)
    if (cpu.neon_i8mm && cpu.neon_dotprod) usable.add(kInt4NeonI8mm);
#endif
#if defined(BIOMEDGPT_HAVE_INT4_NEON_DOTPROD)
    if (cpu.neon_dotprod) usable.add(kInt4NeonDotprod);
#endif
    usable.add(kInt4Portable);
    return usable;
}

const PathList<Int4Path>& paths() {
    static const PathList<Int4Path> usable = usable_paths();
    return usable;
}

int64_t round_up(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

// The calling thread's memory for quantized activations, which other threads read: kept, and made anew only where a
// call needs more.
class Workspace {
  public:
    Int4Rows rows_for(int64_t rows, const Int4Shape& shape) {
        const int64_t groups = shape.groups();
        // An odd number of cache lines: a tile is 16 rows, which would share sets of the L1 cache at a power of two.
        const int64_t stride = (round_up(groups * shape.group, kLine) / kLine | 1) * kLine;
        const int64_t values = round_up(rows, kInt4RowStep) * stride, numbers = rows * groups;
        char* bytes = at_least(values + 2 * numbers * int64_t{sizeof(float)});
        auto* scales = reinterpret_cast<float*>(bytes + values);
        return {reinterpret_cast<int8_t*>(bytes), stride, scales, reinterpret_cast<int32_t*>(scales + numbers), groups};
    }

  private:
    static constexpr int64_t kLine = 64;
    struct alignas(kLine) Line {
        char bytes[kLine];
    };

    // Zeros at first, so that no number of a row that does not exist is undefined.
    char* at_least(int64_t bytes) {
        const auto lines = static_cast<size_t>(round_up(bytes, kLine) / kLine);
        if (lines > lines_) {
            memory_.reset(new Line[lines]());
            lines_ = lines;
        }
        return memory_[0].bytes;
    }

    std::unique_ptr<Line[]> memory_;
    size_t lines_ = 0;
};

Workspace& workspace() {
    thread_local Workspace mine;
    return mine;
}

// Some rows of a call, quantized.
struct Block {
    const Int4Path& path;
    const Int4Weights& weights;
    Int4Rows rows;
    int64_t count;
    float* y;
};

Int4Rows part_of(const Int4Rows& rows, int64_t row, int64_t group, int64_t columns) {
    const int64_t number = row * rows.groups + group;
    return {rows.values + row * rows.stride + group * columns, rows.stride, rows.scales + number,
            rows.zero_terms + number, rows.groups};
}

// Panels whose records a thread reads in turn: a memory gives more to one that reads at four places than to one that
// reads at a single one.
constexpr int64_t kStreams = 4;

// Rows that all paths but the portable one multiply at once.
bool is_few(const Int4Path& path, int64_t rows) {
    constexpr int64_t kFewRows = 8;
    return rows <= std::min(path.tile_rows, kFewRows);
}

// All rows and a part of a panel, its groups from `group` on, which stays in the L1 cache meanwhile.
void multiply_part(const Block& block, int64_t group, Int4Tile tile) {
    const Int4Path& path = block.path;
    const bool unpacked = block.count >= path.unpacked_from;
    const int64_t tile_rows = unpacked ? path.unpacked_tile_rows : path.tile_rows;
    const auto multiply = unpacked ? path.multiply_unpacked : path.multiply;
    alignas(64) uint8_t values[kInt4BlockColumns * kInt4PanelRows];
    if (unpacked) path.unpack(tile.records, tile.group, tile.groups, values);
    tile.unpacked = values;
    float* totals = tile.totals;
    for (int64_t row = 0; row < block.count; row += tile_rows) {
        tile.rows = part_of(block.rows, row, group, tile.group);
        tile.totals = totals + row * kInt4PanelRows;
        multiply(tile, std::min(tile_rows, block.count - row));
    }
}

// totals[panel, row, i] = the product of a row and row i of a panel, for up to kStreams panels that follow one another
// and a few rows. What is fetched ahead is a record of the same panel: far enough for the memory's latency at its full
// rate, near enough to stay in the L1 cache. During a panel's last one, it is the first of the panel that comes after
// these, which this thread or another one takes next.
void multiply_few(const Block& block, const uint8_t* records, int64_t panels, float* totals) {
    const Int4Shape& shape = block.weights.shape;
    Int4Tile tile{};
    tile.group = shape.group;
    tile.groups = 1;
    for (int64_t group = 0; group < shape.groups(); ++group) {
        const bool last = group + 1 == shape.groups();
        tile.fresh = group == 0;
        tile.rows = part_of(block.rows, 0, group, shape.group);
        for (int64_t panel = 0; panel < panels; ++panel) {
            tile.records = records + panel * shape.panel_bytes() + group * shape.record_bytes();
            tile.ahead = last ? panels * shape.panel_bytes() - group * shape.record_bytes() : shape.record_bytes();
            tile.totals = totals + panel * block.count * kInt4PanelRows;
            block.path.multiply(tile, block.count);
        }
    }
}

// The same for many rows, by parts of panels: the rows of a part stay in the L2 cache until all panels have had them.
// What is fetched ahead is the next part.
void multiply_many(const Block& block, const uint8_t* records, int64_t panels, float* totals) {
    const Int4Shape& shape = block.weights.shape;
    const int64_t step = kInt4BlockColumns / shape.group;
    Int4Tile tile{};
    tile.group = shape.group;
    for (int64_t group = 0; group < shape.groups(); group += step) {
        const bool last = group + step >= shape.groups();
        tile.groups = std::min(step, shape.groups() - group);
        tile.fresh = group == 0;
        const int64_t turn = last ? panels * shape.panel_bytes() : (group + step) * shape.record_bytes();
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t here = panel * shape.panel_bytes() + group * shape.record_bytes();
            tile.records = records + here;
            tile.ahead = panel + 1 == panels ? turn - here : shape.panel_bytes();
            tile.totals = totals + panel * block.count * kInt4PanelRows;
            multiply_part(block, group, tile);
        }
    }
}

// Up to kStreams panels that follow one another.
void multiply_panels(const Block& block, const uint8_t* records, int64_t panels, float* totals) {
    const Int4Path& path = block.path;
    if (path.has_panels(block.count)) {
        path.multiply_panels({records, panels, block.weights.shape, block.rows, totals}, block.count);
    } else if (is_few(path, block.count)) {
        multiply_few(block, records, panels, totals);
    } else {
        multiply_many(block, records, panels, totals);
    }
}

// Panels first <= panel < end of y, at most kStreams of weights: of one matrix, or of two by turns.
void linear_panels(const Block& block, int64_t first, int64_t end, int64_t matrices) {
    const Int4Shape& shape = block.weights.shape;
    const int64_t size = block.count * kInt4PanelRows;
    alignas(64) float totals[kStreams * kInt4RowBlock * kInt4PanelRows];
    const uint8_t* records = block.weights.records + first * matrices * shape.panel_bytes();
    multiply_panels(block, records, (end - first) * matrices, totals);
    for (int64_t panel = first; panel < end; ++panel) {
        float* of = totals + (panel - first) * matrices * size;
        if (matrices == 2) block.path.silu_multiply(of, of + size, size);
        const int64_t column = panel * kInt4PanelRows, columns = std::min(kInt4PanelRows, shape.rows - column);
        block.path.write(of, block.count, columns, block.y + column, shape.rows);
    }
}

void quantize_rows(const Int4Path& path, const float* x, int64_t count, const Int4Shape& shape, const Int4Rows& rows,
                   const ParallelFor& parallel) {
    const auto quantize = [&](int64_t row) {
        path.quantize(x + row * shape.columns, shape.columns, shape.group, part_of(rows, row, 0, shape.group));
    };
    // A row takes as long as it takes to wake a thread.
    constexpr int64_t kFew = 4;
    return (count <= kFew ? ParallelFor() : parallel)(count, quantize);
}

void multiply(const Int4Args& args, const Int4Options& options, int64_t matrices) {
    const Int4Path& path = paths().choose(options.path);
    check_int4(args, matrices);
    const Int4Shape& shape = args.weights.shape;
    // Blocks of about the same size: one row that is left over would cost a pass over the weights of its own.
    const int64_t blocks = std::max<int64_t>(1, (args.rows + kInt4RowBlock - 1) / kInt4RowBlock);
    const int64_t block_rows = round_up((args.rows + blocks - 1) / blocks, kInt4RowStep);
    for (int64_t first = 0; first < args.rows; first += block_rows) {
        const int64_t count = std::min(block_rows, args.rows - first);
        const Int4Rows rows = workspace().rows_for(count, shape);
        quantize_rows(path, args.x + first * shape.columns, count, shape, rows, options.parallel);
        const Block block{path, args.weights, rows, count, args.y + first * shape.rows};
        // No more at once: at the end, one thread waits for the other's last panels.
        const int64_t at_once = kStreams / matrices;
        options.parallel((shape.panels() + at_once - 1) / at_once, [&](int64_t item) {
            linear_panels(block, item * at_once, std::min(shape.panels(), (item + 1) * at_once), matrices);
        });
    }
}

}  // namespace

void int4_linear(const Int4Args& args, const Int4Options& options) {
    multiply(args, options, 1);
}

void int4_gate_up(const Int4Args& args, const Int4Options& options) {
    multiply(args, options, 2);
}

void int4_quantize(const float* x, int64_t rows, const Int4Shape& shape, const Int4Activations& activations,
                   std::string_view path) {
    const Int4Path& chosen = paths().choose(path);
    check_int4_shape(shape);
    const int64_t stride = shape.groups() * shape.group;
    quantize_rows(chosen, x, rows, shape,
                  {activations.values, stride, activations.scales, activations.zero_terms, shape.groups()}, {});
}

std::vector<const char*> int4_paths() {
    return paths().names();
}

}  // namespace biomedgpt
