// Dispatch of splice, and the blocking and threads around a path's inner loops.
#include "splice/splice.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "common/cpu_features.h"
#include "common/error.h"
#include "common/parallel.h"
#include "splice/splice_path.h"

namespace biomedgpt {
namespace {

// Panels that stay in the L2 cache while the other operand passes over them: 96 rows of 2560 floats, 192 of bfloat16.
// Of 2 MiB, half: with two thirds (measured) what streams through pushes them out.
constexpr int64_t kPanelWords = 264 * 1024;
// One panel of the widest features must fit, too.
constexpr int64_t kMaxPanelWords = kWordStride * kMaxLanes;
static_assert(kMaxPanelWords >= kPanelWords);
// From this many feature rows on, it pays to pack weights into panels rather than features (measured).
constexpr int64_t kManyRows = 128;

int64_t round_up(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

// A thread's own memory, of a size that depends on nothing: made in its first call, kept for the later ones.
struct alignas(64) Workspace {
    float panels[kMaxPanelWords];
    float rows[kMaxGroup * kWordStride];
    float broadcast[kMaxTileRows * kWordStride];
};

Workspace& workspace() {
    thread_local const std::unique_ptr<Workspace> mine(new Workspace);
    return *mine;
}

// The paths of this build that the processor can run, best first.
class Paths {
  public:
    Paths() {
        const CpuFeatures& cpu = cpu_features();
        static_cast<void>(cpu);  // not read where a build has the portable path only
#if defined(BIOMEDGPT_HAVE_AMX)
        if (cpu.amx_bf16) add(kSpliceAmxBf16);
#endif
        // Processors with tiles leave dot products of pairs to them: there, these take twice as long as fused
        // multiply-add (measured on Sapphire Rapids), and float32 is faster.
#if defined(BIOMEDGPT_HAVE_AVX512_BF16)
        if (cpu.avx512_bf16 && !cpu.amx) add(kSpliceAvx512Bf16);
#endif
#if defined(BIOMEDGPT_HAVE_AVX512)
        if (cpu.avx512) add(kSpliceAvx512);
#endif
#if defined(BIOMEDGPT_HAVE_AVX512_BF16)
        if (cpu.avx512_bf16 && cpu.amx) add(kSpliceAvx512Bf16);
#endif
#if defined(BIOMEDGPT_HAVE_AVX2)
        if (cpu.avx2 && cpu.fma && cpu.f16c) add(kSpliceAvx2);
#endif
#if defined(BIOMEDGPT_HAVE_NEON_BF16)
        if (cpu.neon_bf16) add(kSpliceNeonBf16);
#endif
#if defined(BIOMEDGPT_HAVE_NEON)
        add(kSpliceNeon);
#endif
        // Behind float32, which is exact and, by the rate of its instructions, as fast.
#if defined(BIOMEDGPT_HAVE_NEON_FP16)
        if (cpu.neon_fp16) add(kSpliceNeonFp16);
#endif
        add(kSplicePortable);
    }

    const SplicePath* const* begin() const { return paths_; }
    const SplicePath* const* end() const { return paths_ + count_; }

  private:
    void add(const SplicePath& path) { paths_[count_++] = &path; }

    const SplicePath* paths_[6];
    int count_ = 0;
};

const Paths& paths() {
    static const Paths found;
    return found;
}

bool permitted(const SplicePath& path, const SpliceOptions& options) {
    return options.allow_16bit || !path.operands_16bit;
}

const SplicePath& choose_path(const SpliceOptions& options) {
    for (const SplicePath* path : paths()) {
        if (permitted(*path, options) && (options.path == "auto" || options.path == path->name)) return *path;
    }
    std::string names = "auto";
    for (const SplicePath* path : paths()) {
        if (permitted(*path, options)) names += std::string(", ") + path->name;
    }
    throw ArgumentError(
        "path", "\"" + std::string(options.path) + "\"",
        "one this machine can run" + std::string(options.allow_16bit ? "" : " without 16-bit operands") + ": " + names);
}

// What a thread works with, and on.
struct Share {
    const SpliceArgs& args;
    const SplicePath& path;
    int threads;  // that share the work, at most
    Claims claims;

    void* out(int64_t row, int64_t column) const {
        return static_cast<char*>(args.out) + (row * args.hidden + column) * size_of(args.out_dtype);
    }
};

int64_t id_at(const TokenSegment& segment, int64_t i) {
    return segment.ids_dtype == DType::i64 ? static_cast<const int64_t*>(segment.ids)[i]
                                           : static_cast<const int32_t*>(segment.ids)[i];
}

void write_token(const Share& share, int64_t id, int64_t row) {
    const EmbeddingTable& table = share.args.table;
    const DType dtype = table.rows.dtype;
    const int64_t hidden = share.args.hidden;
    const float scale = table.scales == nullptr ? 1.0f : table.scales[id];
    if (dtype == share.args.out_dtype) {
        std::memcpy(share.out(row, 0), table.rows.at(id, 0), static_cast<size_t>(hidden * size_of(dtype)));
        return;
    }
    if (share.args.out_dtype == DType::f32) {
        share.path.widen(table.rows.at(id, 0), dtype, hidden, scale, static_cast<float*>(share.out(row, 0)));
        return;
    }
    float* values = workspace().rows;
    for (int64_t first = 0; first < hidden; first += kWordStride) {
        const int64_t count = std::min(kWordStride, hidden - first);
        share.path.widen(table.rows.at(id, first), dtype, count, scale, values);
        share.path.narrow(values, count, static_cast<uint16_t*>(share.out(row, first)));
    }
}

void write_segment(Share& share, const TokenSegment& segment) {
    constexpr int64_t kRowsOfItem = 8;
    share.claims.take((segment.count + kRowsOfItem - 1) / kRowsOfItem, [&](int64_t item) {
        const int64_t end = std::min(segment.count, (item + 1) * kRowsOfItem);
        for (int64_t i = item * kRowsOfItem; i < end; ++i) write_token(share, id_at(segment, i), segment.row + i);
    });
}

// The sizes that a product is worked on in.
struct Blocking {
    const TileShape& shape;
    int64_t words;        // per row, padded as the path wants it
    int64_t panel_words;  // with room for the whole vectors that packing writes
    int64_t block_rows;   // rows whose panels stay in the cache
};

// For `rows` to be packed into panels, `columns` wide.
Blocking blocking_of(const SplicePath& path, int64_t rows, int64_t columns) {
    const auto time = [rows](const TileShape& shape) { return round_up(rows, shape.lanes) * shape.tenths; };
    const TileShape& shape =
        *std::min_element(path.shapes, path.shapes + path.shape_count,
                          [&](const TileShape& a, const TileShape& b) { return time(a) < time(b); });
    const int64_t words = round_up((columns + path.values - 1) / path.values, path.words_step);
    const int64_t panel_words = round_up(words, kMaxGroup) * shape.lanes;
    return {shape, words, panel_words, std::max<int64_t>(1, kPanelWords / panel_words) * shape.lanes};
}

// `pack_row(row, words)` writes the words of one of `count` rows.
template <class PackRow>
void pack_panels(const SplicePath& path, const Blocking& blocking, int64_t count, Workspace& memory, PackRow pack_row) {
    const int64_t lanes = blocking.shape.lanes;
    for (int64_t row = 0; row < round_up(count, lanes); row += path.group) {
        for (int64_t g = 0; g < path.group; ++g) {
            float* words = memory.rows + g * kWordStride;
            if (row + g < count) {
                pack_row(row + g, words);
            } else {
                std::fill(words, words + blocking.words, 0.0f);
            }
        }
        float* panel = memory.panels + row / lanes * blocking.panel_words + row % lanes;
        path.pack_panel(memory.rows, blocking.words, lanes, panel);
    }
}

// Words of the rows of `matrix` from `first` on, as many as a tile broadcasts; zeros beyond the last one.
void pack_broadcast(const SplicePath& path, const Blocking& blocking, const Matrix& matrix, int64_t first,
                    Workspace& memory) {
    for (int64_t r = 0; r < blocking.shape.rows; ++r) {
        float* words = memory.broadcast + r * kWordStride;
        if (first + r < matrix.rows) {
            path.pack_row(matrix.at(first + r, 0), matrix.dtype, matrix.columns, blocking.words, words);
        } else {
            std::fill(words, words + blocking.words, 0.0f);
        }
    }
}

void pack_features(const SplicePath& path, const Blocking& blocking, const FeatureSegment& segment, int64_t first,
                   int64_t count, Workspace& memory) {
    const Matrix& features = segment.features;
    pack_panels(path, blocking, count, memory, [&](int64_t row, float* words) {
        path.widen(features.at(first + row, 0), features.dtype, features.columns, 1.0f, words);
        if (segment.layer_norm_eps) path.normalise(words, features.columns, *segment.layer_norm_eps);
        path.pack_row(words, DType::f32, features.columns, blocking.words, words);
    });
}

using Tile = float[kMaxTileRows * kMaxLanes];

// The columns of an item: whole tiles, and whole cache lines of float32, which two threads would write in turn.
int64_t columns_of_item(const TileShape& shape) {
    constexpr int64_t kLine = 16, kAtLeast = 64;
    return round_up(kAtLeast, std::lcm(shape.rows, kLine));
}

// For few feature rows: those are packed into panels, and weights pass over them, which are read once from memory as
// they lie there. An item is some columns of out, that is, of the weights; each thread packs the features for itself,
// which takes less than waiting for one another would.
void write_few_rows(Share& share, const FeatureSegment& segment) {
    const SplicePath& path = share.path;
    const Matrix& features = segment.features;
    const int64_t hidden = share.args.hidden;
    const Blocking blocking = blocking_of(path, features.rows, features.columns);
    const TileShape& shape = blocking.shape;
    const int64_t step = columns_of_item(shape);
    Workspace& memory = workspace();
    alignas(64) Tile tile = {};
    for (int64_t first = 0; first < features.rows; first += blocking.block_rows) {
        const int64_t block = std::min(blocking.block_rows, features.rows - first);
        bool packed = false;
        share.claims.take((hidden + step - 1) / step, [&](int64_t item) {
            if (!packed) pack_features(path, blocking, segment, first, block, memory);
            packed = true;
            const int64_t end = std::min(hidden, (item + 1) * step);
            for (int64_t column = item * step; column < end; column += shape.rows) {
                pack_broadcast(path, blocking, segment.weight, column, memory);
                for (int64_t row = 0; row < block; row += shape.lanes) {
                    const float* panel = memory.panels + row / shape.lanes * blocking.panel_words;
                    shape.multiply(panel, memory.broadcast, blocking.words, tile);
                    shape.write_transposed(tile, {share.out(segment.row + first + row, column), share.args.out_dtype,
                                                  hidden, segment.bias + column, std::min(shape.lanes, block - row),
                                                  std::min(shape.rows, end - column)});
                }
            }
        });
    }
}

// Whether feature rows can be broadcast from where they lie: as they would have to be copied for every block of weights
// otherwise, there is nothing to be gained then.
bool worth_packing_weights(const SplicePath& path, const FeatureSegment& segment) {
    return segment.features.rows >= kManyRows && path.values == 1 && segment.features.dtype == DType::f32 &&
           !segment.layer_norm_eps;
}

// For many feature rows: an item is some weights, which are packed into panels, and features pass over them. Few enough
// weights that every thread gets several items, and as many as stay in the cache otherwise.
void write_many_rows(Share& share, const FeatureSegment& segment) {
    constexpr int64_t kItemsPerThread = 8;
    const SplicePath& path = share.path;
    const Matrix &features = segment.features, &weight = segment.weight;
    const int64_t hidden = share.args.hidden;
    const Blocking blocking = blocking_of(path, hidden, features.columns);
    const TileShape& shape = blocking.shape;
    const int64_t step =
        std::min(blocking.block_rows, round_up(hidden / (kItemsPerThread * share.threads) + 1, shape.lanes));
    Workspace& memory = workspace();
    alignas(64) Tile tile = {};
    share.claims.take((hidden + step - 1) / step, [&](int64_t item) {
        const int64_t first = item * step, block = std::min(step, hidden - first);
        pack_panels(path, blocking, block, memory, [&](int64_t row, float* words) {
            path.pack_row(weight.at(first + row, 0), weight.dtype, weight.columns, blocking.words, words);
        });
        for (int64_t row = 0; row < features.rows; row += shape.rows) {
            const bool whole = row + shape.rows <= features.rows;
            if (!whole) pack_broadcast(path, blocking, features, row, memory);
            const auto* broadcast = whole ? static_cast<const float*>(features.at(row, 0)) : memory.broadcast;
            const int64_t stride = whole ? features.row_stride : kWordStride;
            for (int64_t column = 0; column < block; column += shape.lanes) {
                const float* panel = memory.panels + column / shape.lanes * blocking.panel_words;
                shape.multiply_strided(panel, broadcast, stride, blocking.words, tile);
                shape.write(tile, {share.out(segment.row + row, first + column), share.args.out_dtype, hidden,
                                   segment.bias + first + column, std::min(shape.rows, features.rows - row),
                                   std::min(shape.lanes, block - column)});
            }
        }
    });
}

void write_segment(Share& share, const FeatureSegment& segment) {
    if (worth_packing_weights(share.path, segment)) {
        write_many_rows(share, segment);
    } else {
        write_few_rows(share, segment);
    }
}

// Multiplications, or about as much work.
int64_t operations(const SpliceArgs& args) {
    constexpr int64_t kPerCopiedValue = 8;  // bound by memory, not by arithmetic
    int64_t sum = 0;
    for (const Segment& segment : args.segments) {
        if (const auto* tokens = std::get_if<TokenSegment>(&segment)) {
            sum += tokens->count * args.hidden * kPerCopiedValue;
        } else {
            const Matrix& features = std::get<FeatureSegment>(segment).features;
            sum += features.rows * features.columns * args.hidden;
        }
    }
    return sum;
}

}  // namespace

void splice(const SpliceArgs& args, const SpliceOptions& options) {
    if (options.threads < 1 || options.threads > kMaxThreads) {
        throw ArgumentError("threads", std::to_string(options.threads), "1 to " + std::to_string(kMaxThreads));
    }
    const SplicePath& path = choose_path(options);
    check_splice(args);
    const int threads = worthwhile_threads(options.threads, args.hidden, operations(args));
    std::atomic<bool> out_of_memory{false};  // a body may not throw: it may run in a thread that nobody watches
    Items items(threads);
    for_threads(threads, [&](int thread) {
        try {
            for (int i = 0; i < threads; ++i) {
                Share share{args, path, threads, Claims(items, (thread + i) % threads)};
                for (const Segment& segment : args.segments) {
                    std::visit([&](const auto& typed) { write_segment(share, typed); }, segment);
                }
            }
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    });
    if (out_of_memory) throw std::bad_alloc();
}

std::vector<SplicePathInfo> splice_paths() {
    std::vector<SplicePathInfo> names;
    for (const SplicePath* path : paths()) names.push_back({path->name, path->operands_16bit});
    return names;
}

}  // namespace biomedgpt
