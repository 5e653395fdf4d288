#include "probe/probe.h"

#include <string>

#include "common/cpu_features.h"
#include "common/error.h"
#include "probe/probe_loop.h"

namespace biomedgpt {

extern const ArithmeticLoop kInt8Amx, kInt8Avx512Vnni, kInt8AvxVnni, kInt8Avx2, kInt8NeonI8mm, kInt8NeonDotprod;
extern const ArithmeticLoop kFp32Avx512, kFp32Avx2, kFp32Neon;

namespace {

// Wider than any register: a compiler makes of it what the base architecture has, and a few independent chains.
typedef uint64_t Block __attribute__((vector_size(64), aligned(8)));
constexpr int64_t kBlockWords = 8;

// As far as the int4 kernels reach ahead, and beyond what prefetchers that stop at a page's end have fetched.
constexpr int64_t kAheadBytes = 4096;

const Block& block_at(const uint64_t* words) {
    return *reinterpret_cast<const Block*>(words);
}

uint64_t folded(const Block& sum) {
    uint64_t word = 0;
    for (int lane = 0; lane < kBlockWords; ++lane) word ^= sum[lane];
    return word;
}

uint64_t rest_of(const uint64_t* words, int64_t first, int64_t count) {
    uint64_t word = 0;
    for (int64_t i = first; i < count; ++i) word ^= words[i];
    return word;
}

// Streams that begin at equal distances, a block of each in turn. A prefetch past the end touches nothing.
template <int kStreams, bool kPrefetched>
uint64_t read_streams(const uint64_t* words, int64_t count) {
    const int64_t share = count / kStreams / kBlockWords * kBlockWords;
    Block sums[kStreams] = {};
    for (int64_t i = 0; i < share; i += kBlockWords) {
        for (int stream = 0; stream < kStreams; ++stream) {
            const uint64_t* from = words + stream * share + i;
            if (kPrefetched) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
            sums[stream] ^= block_at(from);
        }
    }
    for (int stream = 1; stream < kStreams; ++stream) sums[0] ^= sums[stream];
    return folded(sums[0]) ^ rest_of(words, kStreams * share, count);
}

struct Pattern {
    const char* name;
    uint64_t (*read)(const uint64_t* words, int64_t count);
};

constexpr Pattern kPatterns[] = {
    {"one stream", &read_streams<1, false>},
    {"one stream, prefetched", &read_streams<1, true>},
    {"four streams", &read_streams<4, false>},
    {"four streams, prefetched", &read_streams<4, true>},
};

// 128 bits, which every 64-bit processor in question has in its base architecture.
struct PortableFp32 {
    typedef float Sum __attribute__((vector_size(16)));
    using Operand = Sum;
    static constexpr int64_t kProducts = 4;
    static Sum zero() { return Sum{} + opaque(0.0f); }
    static Operand ones() {
        const float one = opaque(1.0f);
        return Operand{one, one, one, one};
    }
    // Not sum + a * b, whose product never changes and would be moved out of the loop.
    static Sum add(Sum sum, Operand a, Operand b) { return sum * a + b; }
    static double total(Sum sum) { return static_cast<double>(sum[0]) + sum[1] + sum[2] + sum[3]; }
};

struct PortableInt8 {
    using Sum = int32_t;
    using Operand = int8_t;
    static constexpr int64_t kProducts = 1;
    static Sum zero() { return opaque(0); }
    static Operand ones() { return opaque(int8_t{1}); }
    // A fresh copy each time: a product that never changes would be moved out of the loop.
    static Sum add(Sum sum, Operand a, Operand b) {
        __asm__ volatile("" : "+r"(a));
        return sum + a * b;
    }
    static double total(Sum sum) { return sum; }
};

std::vector<ArithmeticLoop> usable_loops() {
    [[maybe_unused]] const CpuFeatures& cpu = cpu_features();
    std::vector<ArithmeticLoop> loops;
#if defined(BIOMEDGPT_HAVE_PROBE_AMX)
    if (cpu.amx_int8) loops.push_back(kInt8Amx);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_AVX512_VNNI)
    if (cpu.avx512_vnni) loops.push_back(kInt8Avx512Vnni);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_AVX_VNNI)
    if (cpu.avx_vnni) loops.push_back(kInt8AvxVnni);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_AVX2)
    if (cpu.avx2 && cpu.fma) loops.push_back(kInt8Avx2);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_NEON_I8MM)
    if (cpu.neon_i8mm) loops.push_back(kInt8NeonI8mm);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_NEON_DOTPROD)
    if (cpu.neon_dotprod) loops.push_back(kInt8NeonDotprod);
#endif
    loops.push_back(loop_of<PortableInt8>("portable", "int8"));
#if defined(BIOMEDGPT_HAVE_PROBE_AVX512)
    if (cpu.avx512) loops.push_back(kFp32Avx512);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_AVX2)
    if (cpu.avx2 && cpu.fma) loops.push_back(kFp32Avx2);
#endif
#if defined(BIOMEDGPT_HAVE_PROBE_NEON)
    if (cpu.neon) loops.push_back(kFp32Neon);
#endif
    loops.push_back(loop_of<PortableFp32>("portable", "fp32"));
    return loops;
}

}  // namespace

const std::vector<const char*>& read_patterns() {
    static const std::vector<const char*> names = [] {
        std::vector<const char*> all;
        for (const Pattern& pattern : kPatterns) all.push_back(pattern.name);
        return all;
    }();
    return names;
}

uint64_t read_memory(const uint64_t* words, int64_t count, std::string_view pattern) {
    for (const Pattern& known : kPatterns) {
        if (pattern == known.name) return known.read(words, count);
    }
    throw ArgumentError("pattern", "'" + std::string(pattern) + "'", "one of read_patterns()");
}

const std::vector<ArithmeticLoop>& arithmetic_loops() {
    static const std::vector<ArithmeticLoop> loops = usable_loops();
    return loops;
}

double run_arithmetic(std::string_view name, std::string_view kind, int64_t steps) {
    if (steps < 1) throw ArgumentError("steps", std::to_string(steps), "at least 1");
    for (const ArithmeticLoop& loop : arithmetic_loops()) {
        if (name == loop.name && kind == loop.kind) return loop.run(steps);
    }
    throw ArgumentError("name", "'" + std::string(name) + "' of " + std::string(kind),
                        "one that arithmetic_loops() has for this processor");
}

}  // namespace biomedgpt
