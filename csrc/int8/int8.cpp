// Dispatch of int8, and the blocking and threads around a path's inner loops.
#include "int8/int8.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>

#include "common/cpu_features.h"
#include "common/paths.h"
#include "int8/int8_check.h"
#include "int8/int8_path.h"

namespace biomedgpt {
namespace {

// The paths of this build that the processor can run, best first.
PathList<Int8Path> usable_paths() {
    PathList<Int8Path> usable;
    const CpuFeatures& cpu = cpu_features();
    static_cast<void>(cpu);  // not read where a build has the portable path only
#if defined(BIOMEDGPT_HAVE_INT8_AMX)
    if (cpu.amx_int8) usable.add(kInt8LinearAmx);
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AVX512_VNNI)
    if (cpu.avx512_vnni) usable.add(kInt8LinearAvx512Vnni);
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AVX_VNNI)
    if (cpu.avx_vnni && cpu.fma) usable.add(kInt8LinearAvxVnni);
#endif
#if defined(BIOMEDGPT_HAVE_INT8_AVX2)
    if (cpu.avx2 && cpu.fma) usable.add(kInt8LinearAvx2);
#endif
#if defined(BIOMEDGPT_HAVE_INT8_NEON_I8MM)
    if (cpu.neon_i8mm) usable.add(kInt8LinearNeonI8mm);
#endif
#if defined(BIOMEDGPT_HAVE_INT8_NEON_DOTPROD)
    if (cpu.neon_dotprod) usable.add(kInt8LinearNeonDotprod);
#endif
    usable.add(kInt8LinearPortable);
    return usable;
}

const PathList<Int8Path>& paths() {
    static const PathList<Int8Path> usable = usable_paths();
    return usable;
}

int64_t round_up(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

constexpr int64_t kLine = 64;

// The calling thread's memory for quantized activations, which other threads read: kept, and made anew only where a
// call needs more.
class Workspace {
  public:
    Int8Rows rows_for(int64_t rows, int64_t padded_columns) {
        // An odd number of cache lines: a tile is 16 rows, which would share sets of the L1 cache at a power of two.
        const int64_t stride = (padded_columns / kLine | 1) * kLine;
        const int64_t values = round_up(rows, kInt8RowStep) * stride;
        char* bytes = at_least(values + 2 * rows * int64_t{sizeof(float)});
        auto* scales = reinterpret_cast<float*>(bytes + values);
        return {reinterpret_cast<int8_t*>(bytes), stride, scales, reinterpret_cast<int32_t*>(scales + rows)};
    }

  private:
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

// Panels that a thread takes at once, at most: as often are the rows' values read again.
constexpr int64_t kMostPanels = 8;

struct alignas(kLine) Totals {
    int32_t of[kMostPanels][kInt8RowBlock * kInt8PanelRows];
};

// The calling thread's; null where there is no memory for them, since nobody may catch what a pool's thread throws.
Totals* totals_of_thread() {
    thread_local std::unique_ptr<Totals> mine;
    if (mine == nullptr) mine.reset(new (std::nothrow) Totals);
    return mine.get();
}

// Some rows of a call, quantized.
struct Block {
    const Int8Path& path;
    const Int8Args& args;
    Int8Rows rows;
    int64_t first;
    int64_t count;
};

// Where the values of a panel begin, from a column on.
const int8_t* values_of(const Int8Weights& weights, int64_t panel, int64_t column) {
    const uint8_t* record = weights.records + panel * weights.shape.panel_bytes();
    return reinterpret_cast<const int8_t*>(record) + column * kInt8PanelRows;
}

void multiply_columns(const Block& block, const int8_t* weights, const int8_t* next, int64_t column, int64_t columns,
                      int32_t* totals) {
    Int8Tile tile{};
    tile.weights = weights;
    tile.next = next;
    tile.columns = columns;
    tile.fresh = column == 0;
    const int64_t step = block.path.tile_rows;
    for (int64_t row = 0; row < block.count; row += step) {
        const Int8Rows& rows = block.rows;
        tile.rows = {rows.values + row * rows.stride + column, rows.stride, rows.scales + row, rows.zero_terms + row};
        tile.totals = totals + row * kInt8PanelRows;
        block.path.multiply(tile, std::min(step, block.count - row));
    }
}

// Of some rows and a panel, `totals` from the first of these rows on.
void finish_panel(const Block& block, int64_t panel, int64_t row, int64_t count, const int32_t* totals) {
    const Int8Args& args = block.args;
    const Int8Shape& shape = args.weights.shape;
    const uint8_t* record = args.weights.records + panel * shape.panel_bytes();
    const int64_t column = panel * kInt8PanelRows, offset = (block.first + row) * shape.rows + column;
    Int8Finish of{};
    of.totals = totals;
    of.row_scales = block.rows.scales + row;
    of.scales = reinterpret_cast<const float*>(record + shape.value_bytes());
    of.biases = of.scales + kInt8PanelRows;
    of.gelu = args.gelu;
    of.residual = args.residual == nullptr ? nullptr : args.residual + offset;
    of.y = args.y + offset;
    of.stride = shape.rows;
    of.columns = std::min(kInt8PanelRows, shape.rows - column);
    block.path.finish(of, count);
}

// Some columns of all rows, which fit a cache, meet all the panels before the next ones do.
void multiply_panels(const Block& block, int64_t first, int64_t end, Totals& totals) {
    const Int8Weights& weights = block.args.weights;
    const int64_t padded = weights.shape.padded_columns();
    for (int64_t column = 0; column < padded; column += kInt8BlockColumns) {
        const int64_t columns = std::min(kInt8BlockColumns, padded - column);
        for (int64_t panel = first; panel < end; ++panel) {
            const bool last = panel + 1 == end;
            const int8_t* next = values_of(weights, last ? first : panel + 1, last ? column + columns : column);
            multiply_columns(block, values_of(weights, panel, column), next, column, columns, totals.of[panel - first]);
        }
    }
    // A few rows of all the panels: what lies side by side in y is written together, and not on many pages in turn.
    constexpr int64_t kFewRows = 16;
    for (int64_t row = 0; row < block.count; row += kFewRows) {
        const int64_t count = std::min(kFewRows, block.count - row);
        for (int64_t panel = first; panel < end; ++panel) {
            finish_panel(block, panel, row, count, totals.of[panel - first] + row * kInt8PanelRows);
        }
    }
}

// Some more items than threads, so that none waits long for the last one.
int64_t panels_at_once(int64_t panels) {
    constexpr int64_t kItems = 16;
    return std::clamp<int64_t>(panels / kItems, 1, kMostPanels);
}

void quantize_rows(const Int8Path& path, const float* x, int64_t count, const Int8Shape& shape, const Int8Rows& rows,
                   const ParallelFor& parallel) {
    constexpr int64_t kAtOnce = 8;
    parallel((count + kAtOnce - 1) / kAtOnce, [&](int64_t item) {
        for (int64_t row = item * kAtOnce; row < std::min(count, (item + 1) * kAtOnce); ++row) {
            path.quantize(x + row * shape.columns, shape.columns, shape.padded_columns(),
                          rows.values + row * rows.stride, rows.scales + row, rows.zero_terms + row);
        }
    });
}

}  // namespace

void int8_linear(const Int8Args& args, const Int8Options& options) {
    const Int8Path& path = paths().choose(options.path);
    check_int8(args);
    const Int8Shape& shape = args.weights.shape;
    // Blocks of about the same size: one row that is left over would cost a pass over the weights of its own.
    const int64_t blocks = std::max<int64_t>(1, (args.rows + kInt8RowBlock - 1) / kInt8RowBlock);
    const int64_t block_rows = round_up((args.rows + blocks - 1) / blocks, kInt8RowStep);
    for (int64_t first = 0; first < args.rows; first += block_rows) {
        const int64_t count = std::min(block_rows, args.rows - first);
        const Int8Rows rows = workspace().rows_for(count, shape.padded_columns());
        quantize_rows(path, args.x + first * shape.columns, count, shape, rows, options.parallel);
        const Block block{path, args, rows, first, count};
        const int64_t at_once = panels_at_once(shape.panels());
        std::atomic<bool> failed = false;
        options.parallel((shape.panels() + at_once - 1) / at_once, [&](int64_t item) {
            Totals* totals = totals_of_thread();
            if (totals == nullptr) {
                failed = true;
                return;
            }
            multiply_panels(block, item * at_once, std::min(shape.panels(), (item + 1) * at_once), *totals);
        });
        if (failed) throw std::bad_alloc();
    }
}

void int8_quantize(const float* x, int64_t rows, int64_t columns, const Int8Activations& activations,
                   std::string_view path) {
    const Int8Path& chosen = paths().choose(path);
    const Int8Shape shape{1, columns};
    check_int8_shape(shape);
    for (int64_t row = 0; row < rows; ++row) {
        int32_t zero_term = 0;
        chosen.quantize(x + row * columns, columns, shape.padded_columns(),
                        activations.values + row * shape.padded_columns(), activations.scales + row, &zero_term);
    }
}

std::vector<const char*> int8_paths() {
    return paths().names();
}

}  // namespace biomedgpt
