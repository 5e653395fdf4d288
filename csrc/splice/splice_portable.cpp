// splice in plain C++: the path of every machine without a better one, and what the others are compared with.
#include "splice/splice_kernel.h"

namespace biomedgpt {
namespace {

// Four floats that the compiler puts in one register where there is one. Without fused multiply-add (see
// CMakeLists.txt), so that every machine computes the same bits.
struct Portable {
    struct Vec {
        float lane[4];
    };
    static constexpr int64_t kLanes = 4;

    template <typename Function>
    static Vec each(Function function) {
        return {{function(0), function(1), function(2), function(3)}};
    }

    static Vec zero() { return {}; }
    static Vec load(const float* from) {
        return each([&](int i) { return from[i]; });
    }
    static Vec broadcast(const float* from) {
        return each([&](int) { return *from; });
    }
    static void store(float* to, Vec a) { std::memcpy(to, a.lane, sizeof a.lane); }
    static Vec add(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static Vec scale(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static Vec multiply_add(Vec sum, Vec panel, Vec weight) { return add(sum, scale(panel, weight)); }
    static Vec widen_half(const uint16_t* from) {
        return each([&](int i) { return half_to_float(from[i]); });
    }
    static Vec widen_byte(const int8_t* from) {
        return each([&](int i) { return static_cast<float>(from[i]); });
    }
    static void store_half(uint16_t* to, Vec a) {
        for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(a.lane[i]);
    }
    static Vec load_some(const float* from, int64_t count) { return load_some_of<Portable>(from, count); }
    static void store_some(float* to, Vec a, int64_t count) { store_some_of<Portable>(to, a, count); }
    static void store_half_some(uint16_t* to, Vec a, int64_t count) { store_half_some_of<Portable>(to, a, count); }
    static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
        for (int64_t row = 0; row < kLanes; ++row) {
            for (int64_t column = 0; column < kLanes; ++column)
                to[column * to_stride + row] = from[row * stride + column];
        }
    }
};

}  // namespace

// Eight or twelve sums and their operands: SSE2 and NEON have at least 16 registers.
extern const SplicePath kSplicePortable = path_of_floats<Portable, 4, 12>("portable");

}  // namespace biomedgpt
