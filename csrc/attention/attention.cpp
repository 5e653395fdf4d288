// Dispatch of attention, and the heads, rows and threads around a path's loops.
#include "attention/attention.h"

#include <algorithm>
#include <string>

#include "attention/attention_check.h"
#include "attention/attention_path.h"
#include "common/cpu_features.h"
#include "common/paths.h"

namespace biomedgpt {
namespace {

// The paths of this build that the processor can run, best first.
PathList<AttentionPath> usable_paths() {
    PathList<AttentionPath> usable;
    const CpuFeatures& cpu = cpu_features();
    static_cast<void>(cpu);  // not read where a build has the portable path only
#if defined(BIOMEDGPT_HAVE_ATTENTION_AVX512)
    if (cpu.avx512) usable.add(kAttentionAvx512);
#endif
#if defined(BIOMEDGPT_HAVE_ATTENTION_AVX2)
    if (cpu.avx2 && cpu.fma && cpu.f16c) usable.add(kAttentionAvx2);
#endif
#if defined(BIOMEDGPT_HAVE_ATTENTION_NEON)
    if (cpu.neon) usable.add(kAttentionNeon);
#endif
    usable.add(kAttentionPortable);
    return usable;
}

const PathList<AttentionPath>& paths() {
    static const PathList<AttentionPath> usable = usable_paths();
    return usable;
}

// What belongs to one head of keys and values.
class Heads {
  public:
    Heads(const AttentionArgs& args, const AttentionPath& path) : args_(args), path_(path) {}

    int64_t group() const { return args_.heads / args_.cache.shape.heads; }

    void append(int64_t kv_head) const {
        const int64_t size = args_.cache.shape.head_size;
        const float* keys = args_.qkv + (args_.heads + kv_head) * size;
        path_.append(cache_of(kv_head), rows(0, args_.rows), keys, keys + args_.cache.shape.heads * size);
    }

    // Rows first <= row < end of a query head.
    void attend(int64_t head, int64_t first, int64_t end) const {
        const int64_t size = args_.cache.shape.head_size, width = args_.heads * size;
        const AttentionHead cache = cache_of(head / group());
        for (; first < end; first += kAttentionRows) {
            const AttentionRows some = rows(first, std::min(kAttentionRows, end - first));
            path_.attend(cache, some, args_.qkv + first * some.stride + head * size,
                         args_.y + first * width + head * size, width);
        }
    }

  private:
    AttentionHead cache_of(int64_t kv_head) const {
        const KvShape& shape = args_.cache.shape;
        const int64_t offset = kv_head * shape.blocks * shape.block_bytes();
        return {shape, args_.cache.keys + offset, args_.cache.values + offset};
    }

    AttentionRows rows(int64_t first, int64_t count) const {
        const KvShape& shape = args_.cache.shape;
        const int64_t position = args_.first + first, angle = position * (shape.head_size / 2);
        return {position, count, args_.rope.cos + angle, args_.rope.sin + angle,
                (args_.heads + 2 * shape.heads) * shape.head_size};
    }

    const AttentionArgs& args_;
    const AttentionPath& path_;
};

// Rows that a thread takes at once: a head's cache comes into its own once for all of them.
constexpr int64_t kRowsAtOnce = 64;
static_assert(kRowsAtOnce % kAttentionRows == 0);
constexpr int64_t kFewRows = 8;

}  // namespace

void causal_attention(const AttentionArgs& args, const AttentionOptions& options) {
    const AttentionPath& path = paths().choose(options.path);
    check_attention(args);
    const Heads heads(args, path);
    const int64_t kv_heads = args.cache.shape.heads, group = heads.group();
    if (args.rows <= kFewRows) {
        // Little to do: threads are asked only once.
        options.parallel(args.rows == 0 ? 0 : kv_heads, [&](int64_t kv_head) {
            heads.append(kv_head);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) heads.attend(head, 0, args.rows);
        });
        return;
    }
    options.parallel(kv_heads, [&](int64_t kv_head) { heads.append(kv_head); });
    const int64_t parts = (args.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    options.parallel(args.heads * parts, [&](int64_t item) {
        const int64_t first = item % parts * kRowsAtOnce;
        heads.attend(item / parts, first, std::min(args.rows, first + kRowsAtOnce));
    });
}

std::vector<const char*> attention_paths() {
    return paths().names();
}

}  // namespace biomedgpt
