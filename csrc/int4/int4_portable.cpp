// int4 in plain C++: the path of every machine without a better one, and what the others are compared with.
#include "int4/int4_kernel.h"

namespace biomedgpt {
namespace {

// A whole panel is a vector; compilers make of the loops over it what the base architecture has.
struct Portable {
    static constexpr int kLanes = 32, kPass = 1, kTileRows = 1, kUnpackedTileRows = 1;
    struct Floats {
        float lane[kLanes];
    };
    struct Ints {
        int32_t lane[kLanes];
    };
    struct Quads {
        uint8_t byte[4 * kLanes];
    };
    using Partial = Ints;

    template <class Vector, class Lane>
    static Vector each(const Lane& lane) {
        Vector all;
        for (int i = 0; i < kLanes; ++i) all.lane[i] = lane(i);
        return all;
    }

    static Quads load(const uint8_t* from) {
        Quads all;
        std::memcpy(&all, from, sizeof all);
        return all;
    }
    static Quads low(Quads quads) {
        for (uint8_t& byte : quads.byte) byte &= 15;
        return quads;
    }
    static Quads high(Quads quads) {
        for (uint8_t& byte : quads.byte) byte = static_cast<uint8_t>(byte >> 4);
        return quads;
    }
    static Quads broadcast(const int8_t* from) {
        Quads all;
        for (int i = 0; i < kLanes; ++i) std::memcpy(all.byte + 4 * i, from, 4);
        return all;
    }
    static Partial start(Ints sum) { return sum; }
    static Partial dot(Partial sum, const Quads& weights, const Quads& x) {
        for (int i = 0; i < kLanes; ++i) {
            int32_t of_quad = 0;
            for (int j = 4 * i; j < 4 * i + 4; ++j) of_quad += weights.byte[j] * static_cast<int8_t>(x.byte[j]);
            sum.lane[i] += of_quad;
        }
        return sum;
    }
    static Ints finish(const Ints&, Partial sum) { return sum; }
    static Ints set(int32_t value) {
        return each<Ints>([=](int) { return value; });
    }
    static Ints add(const Ints& a, const Ints& b) {
        return each<Ints>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static Floats set(float value) {
        return each<Floats>([=](int) { return value; });
    }
    static Floats zero() { return set(0.0f); }
    static Floats load(const float* from) {
        return each<Floats>([=](int i) { return from[i]; });
    }
    static void store(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }
    static Floats to_floats(const Ints& a) {
        return each<Floats>([&](int i) { return static_cast<float>(a.lane[i]); });
    }
    static Floats load_halves(const uint8_t* from) {
        uint16_t halves[kLanes];
        std::memcpy(halves, from, sizeof halves);
        return each<Floats>([&](int i) { return half_to_float(halves[i]); });
    }
    static Floats scale(const Floats& a, const Floats& b) {
        return each<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    // Rounded once, like the instruction, which the C library looks for where the base architecture has none.
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
    }
};

}  // namespace

extern const Int4Path kInt4Portable = int4_path<Portable>("portable");

}  // namespace biomedgpt
