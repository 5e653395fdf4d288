#include "attention/attention_check.h"

#include <string>

#include "common/error.h"

namespace biomedgpt {
namespace {

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
        throw ArgumentError(name, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
    }
}

void check_head_size(int64_t head_size) {
    if (head_size < kHeadStep || head_size > kMaxHeadSize || head_size % kHeadStep != 0) {
        throw ArgumentError("head_size", std::to_string(head_size),
                            "a multiple of " + std::to_string(kHeadStep) + " up to " + std::to_string(kMaxHeadSize));
    }
}

void check_aligned(const char* name, const void* data) {
    if (data == nullptr) throw ArgumentError(name, "a null pointer", "data");
    if (reinterpret_cast<uintptr_t>(data) % alignof(float) != 0) {
        throw ArgumentError(name, "misaligned data", "an address that is a multiple of the size of float32");
    }
}

struct Bytes {
    const char* name;
    uintptr_t begin;
    uintptr_t end;

    Bytes(const char* of, const void* data, int64_t size)
        : name(of), begin(reinterpret_cast<uintptr_t>(data)), end(begin + static_cast<uintptr_t>(size)) {
        check_aligned(of, data);
    }
    void require_apart(const Bytes& written) const {
        if (begin < written.end && written.begin < end) {
            throw ArgumentError(name, std::string("memory that overlaps ") + written.name, "memory of its own");
        }
    }
};

void check_memory(const AttentionArgs& args) {
    constexpr int64_t kSize = sizeof(float);
    const KvShape& kv = args.cache.shape;
    const int64_t cached = kv.heads * kv.blocks * kv.block_bytes();
    const int64_t table = args.rope.positions * (kv.head_size / 2) * kSize;
    const Bytes qkv("qkv", args.qkv, args.rows * (args.heads + 2 * kv.heads) * kv.head_size * kSize);
    const Bytes y("y", args.y, args.rows * args.heads * kv.head_size * kSize);
    const Bytes keys("keys", args.cache.keys, cached), values("values", args.cache.values, cached);
    const Bytes cos("cos", args.rope.cos, table), sin("sin", args.rope.sin, table);
    for (const Bytes* written : {&y, &keys, &values}) {
        for (const Bytes* other : {&qkv, &cos, &sin, &y, &keys, &values}) {
            if (other != written) other->require_apart(*written);
        }
    }
}

}  // namespace

KvFormat kv_format(int64_t head_size, int64_t block_bytes) {
    check_head_size(head_size);
    std::string known;
    for (const KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::i8}) {
        const int64_t bytes = KvShape{1, head_size, 1, format}.block_bytes();
        if (bytes == block_bytes) return format;
        known += (known.empty() ? "" : ", ") + std::to_string(bytes);
    }
    throw ArgumentError(
        "cache", "blocks of " + std::to_string(block_bytes) + " bytes",
        "blocks of " + known + " bytes (float32, float16, int8) for heads of " + std::to_string(head_size));
}

void check_attention(const AttentionArgs& args) {
    const KvShape& kv = args.cache.shape;
    check_head_size(kv.head_size);
    check_range("kv_heads", kv.heads, 1, kMaxHeads);
    check_range("heads", args.heads, 1, kMaxHeads);
    if (args.heads % kv.heads != 0) {
        throw ArgumentError("heads", std::to_string(args.heads), "a multiple of " + std::to_string(kv.heads));
    }
    check_range("rows", args.rows, 0, kMaxPositions);
    check_range("blocks", kv.blocks, 0, kMaxPositions / kKvBlock);
    check_range("first", args.first, 0, kMaxPositions);
    const int64_t end = args.first + args.rows;
    if (end > kv.positions()) {
        throw ArgumentError("rows", "positions up to " + std::to_string(end),
                            "up to " + std::to_string(kv.positions()) + ", the room of the cache");
    }
    check_range("rope", args.rope.positions, 0, kMaxPositions);
    if (end > args.rope.positions) {
        throw ArgumentError("rows", "positions up to " + std::to_string(end),
                            "up to " + std::to_string(args.rope.positions) + ", the end of the table of rotations");
    }
    if (args.rows > 0) check_memory(args);
}

}  // namespace biomedgpt
