// splice in plain C++: the path of every machine without a better one, and what the others are compared with.
#include "splice/splice_kernel.h"

namespace biomedgpt {
namespace {

// Four floats, by an extension that GCC and Clang have on every machine: one register where there are such, scalars
// where not. Without fused multiply-add (see CMakeLists.txt), so that every machine computes the same bits.
struct Portable {
    using Vec = float __attribute__((vector_size(16)));
    static constexpr int64_t kLanes = 4;

    static Vec zero() { return Vec{}; }
    static Vec load(const float* from) {
        Vec a;
        std::memcpy(&a, from, sizeof a);
        return a;
    }
    static Vec broadcast(const float* from) { return Vec{*from, *from, *from, *from}; }
    static void store(float* to, Vec a) { std::memcpy(to, &a, sizeof a); }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec scale(Vec a, Vec b) { return a * b; }
    static Vec multiply_add(Vec sum, Vec panel, Vec word) { return sum + panel * word; }
    static Vec widen_half(const uint16_t* from) {
        return Vec{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
    }
    static Vec widen_byte(const int8_t* from) {
        return Vec{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
                   static_cast<float>(from[3])};
    }
    static void store_half(uint16_t* to, Vec a) {
        for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(a[i]);
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
extern const SplicePath kSplicePortable =
    path_of_floats<Portable>("portable", tile_shape<Portable, 2, 4>(), tile_shape<Portable, 1, 12>());

}  // namespace biomedgpt
