// Dispatch of splice and the blocking around a path's inner loops.
#include "splice/splice.h"

#include <algorithm>
#include <cmath>

#include "common/cpu_features.h"
#include "common/error.h"
#include "common/parallel.h"
#include "splice/splice_path.h"

namespace biomedgpt {
namespace {

// A weight block of 48 x 512 float32 is 96 KiB: it stays in L2 while all feature rows pass over it. Of the running
// tile, 4 + 3 rows x 2 KiB stay in L1. Sums over 512 terms, then over blocks, also keep rounding errors small.
constexpr int64_t kBlockColumns = 48;
constexpr int64_t kBlockWidth = 512;
static_assert(kBlockColumns % kTileColumns == 0 && kBlockWidth % kWidthStep == 0);

int64_t round_up(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

std::vector<const SplicePath*> available_paths() {
    std::vector<const SplicePath*> paths;
#if defined(BIOMEDGPT_HAVE_AVX2)
    const CpuFeatures& cpu = cpu_features();
    if (cpu.avx2 && cpu.fma && cpu.f16c) paths.push_back(&kSpliceAvx2);
#endif
    paths.push_back(&kSplicePortable);
    return paths;
}

const SplicePath& choose_path(std::string_view name) {
    const std::vector<const SplicePath*> paths = available_paths();
    if (name == "auto") return *paths.front();
    std::string names = "auto";
    for (const SplicePath* path : paths) {
        if (name == path->name) return *path;
        names += std::string(", ") + path->name;
    }
    throw ArgumentError("path", "\"" + std::string(name) + "\"", "one this machine can run: " + names);
}

int64_t id_at(const TokenSegment& segment, int64_t i) {
    return segment.ids_dtype == DType::i64 ? static_cast<const int64_t*>(segment.ids)[i]
                                           : static_cast<const int32_t*>(segment.ids)[i];
}

void write_segment(const TokenSegment& segment, const SpliceArgs& args, int threads, const SplicePath& path) {
    const EmbeddingTable& table = args.table;
    const int parts = worthwhile_parts(threads, segment.count, segment.count * args.hidden);
    for_parts(parts, segment.count, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t id = id_at(segment, i);
            const float scale = table.scales == nullptr ? 1.0f : table.scales[id];
            path.widen(table.rows.at(id, 0), table.rows.dtype, args.hidden, scale,
                       args.out + (segment.row + i) * args.hidden);
        }
    });
}

// Normalises before the product, not after: rstd * (W x - mean * rowsum(W)) cancels where the mean is large. Two passes
// in double for the same reason; they are 1/1000 of the product's work.
void normalise(float* row, int64_t width, double eps) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += row[i];
    const double mean = sum / static_cast<double>(width);
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i) row[i] = static_cast<float>((row[i] - mean) * rstd);
}

// The feature rows as float32, normalised, zero-padded to whole tiles in both directions.
struct PreparedRows {
    int64_t stride = 0;
    std::vector<float> values;
};

PreparedRows prepare(const FeatureSegment& segment, int threads, const SplicePath& path) {
    const Matrix& features = segment.features;
    PreparedRows rows;
    rows.stride = round_up(features.columns, kWidthStep);
    rows.values.resize(static_cast<size_t>(round_up(features.rows, kTileRows) * rows.stride));
    constexpr int64_t kOperationsPerValue = 16;  // three passes, two of them bound by the latency of a double addition
    const int parts = worthwhile_parts(threads, features.rows, features.rows * features.columns * kOperationsPerValue);
    for_parts(parts, features.rows, [&](int, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* row = rows.values.data() + r * rows.stride;
            path.widen(features.at(r, 0), features.dtype, features.columns, 1.0f, row);
            if (segment.layer_norm_eps) normalise(row, features.columns, *segment.layer_norm_eps);
        }
    });
    return rows;
}

// Where one block of the weight matrix lies.
struct BlockPosition {
    int64_t column;  // first output column, that is, first row of the weight matrix
    int64_t columns;
    int64_t k;      // first input column
    int64_t width;  // a multiple of kWidthStep, reaching into the padding in the last block
};

void load_block(const Matrix& weight, const BlockPosition& at, const SplicePath& path, float* block) {
    const int64_t valid = std::min(at.width, weight.columns - at.k);
    for (int64_t c = 0; c < round_up(at.columns, kTileColumns); ++c) {
        float* row = block + c * kBlockWidth;
        const int64_t filled = c < at.columns ? valid : 0;
        if (filled > 0) path.widen(weight.at(at.column + c, at.k), weight.dtype, filled, 1.0f, row);
        std::fill(row + filled, row + at.width, 0.0f);
    }
}

void multiply_block(const FeatureSegment& segment, const PreparedRows& rows, const float* block,
                    const BlockPosition& at, const SplicePath& path, float* out, int64_t hidden) {
    float tile[kTileRows][kTileColumns];
    for (int64_t r = 0; r < segment.features.rows; r += kTileRows) {
        const float* features = rows.values.data() + r * rows.stride + at.k;
        const int64_t tile_rows = std::min(kTileRows, segment.features.rows - r);
        for (int64_t c = 0; c < at.columns; c += kTileColumns) {
            path.dot_tile(features, rows.stride, block + c * kBlockWidth, kBlockWidth, at.width, tile);
            const int64_t tile_columns = std::min(kTileColumns, at.columns - c);
            for (int64_t i = 0; i < tile_rows; ++i) {
                float* target = out + (segment.row + r + i) * hidden + at.column + c;
                const float* start = at.k == 0 ? segment.bias + at.column + c : target;
                for (int64_t j = 0; j < tile_columns; ++j) target[j] = start[j] + tile[i][j];
            }
        }
    }
}

void write_segment(const FeatureSegment& segment, const SpliceArgs& args, int threads, const SplicePath& path) {
    const int64_t count = segment.features.rows;
    if (count == 0) return;
    const PreparedRows rows = prepare(segment, threads, path);
    // Threads divide the columns, so each weight is read and widened once, by one thread.
    const int parts = worthwhile_parts(threads, args.hidden, count * args.hidden * segment.features.columns);
    constexpr int64_t kBlockSize = kBlockColumns * kBlockWidth;
    std::vector<float> blocks(static_cast<size_t>(parts * kBlockSize));
    for_parts(parts, args.hidden, [&](int part, int64_t begin, int64_t end) {
        float* block = blocks.data() + part * kBlockSize;
        for (int64_t column = begin; column < end; column += kBlockColumns) {
            for (int64_t k = 0; k < rows.stride; k += kBlockWidth) {
                const BlockPosition at = {column, std::min(kBlockColumns, end - column), k,
                                          std::min(kBlockWidth, rows.stride - k)};
                load_block(segment.weight, at, path, block);
                multiply_block(segment, rows, block, at, path, args.out, args.hidden);
            }
        }
    });
}

}  // namespace

void splice(const SpliceArgs& args, int threads, std::string_view path_name) {
    constexpr int kMaxThreads = 1024;
    if (threads < 1 || threads > kMaxThreads) {
        throw ArgumentError("threads", std::to_string(threads), "1 to " + std::to_string(kMaxThreads));
    }
    const SplicePath& path = choose_path(path_name);
    check_splice(args);
    for (const Segment& segment : args.segments) {
        std::visit([&](const auto& typed) { write_segment(typed, args, threads, path); }, segment);
    }
}

std::vector<std::string> splice_paths() {
    std::vector<std::string> names;
    for (const SplicePath* path : available_paths()) names.emplace_back(path->name);
    return names;
}

}  // namespace biomedgpt
