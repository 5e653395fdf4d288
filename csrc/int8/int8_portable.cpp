// int8 in plain C++: the path of every machine without a better one, and what the others are compared with.
#include "int8/int8_kernel.h"

namespace biomedgpt {
namespace {

// A whole panel is a vector; compilers make of the loops over it what the base architecture has.
struct Portable {
    static constexpr int kLanes = 32, kPass = 1, kTileRows = 1;
    static constexpr bool kPlus128 = false;
    struct Ints {
        int32_t lane[kLanes];
    };
    struct Weights {
        int8_t byte[kQuad * kLanes];
    };
    struct Quad {
        int8_t byte[kQuad];
    };

    static Weights load(const int8_t* from) {
        Weights all;
        std::memcpy(&all, from, sizeof all);
        return all;
    }
    static Quad broadcast(const int8_t* from) {
        Quad quad;
        std::memcpy(&quad, from, sizeof quad);
        return quad;
    }
    static Ints dot(Ints sums, const Weights& weights, const Quad& quad) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < kQuad; ++j) sums.lane[i] += weights.byte[kQuad * i + j] * quad.byte[j];
        }
        return sums;
    }
    static Ints set(int32_t value) {
        Ints all;
        for (int32_t& lane : all.lane) lane = value;
        return all;
    }
    static Ints load_sums(const int32_t* from) {
        Ints all;
        std::memcpy(&all, from, sizeof all);
        return all;
    }
    static void store_sums(int32_t* to, const Ints& sums) { std::memcpy(to, &sums, sizeof sums); }
};

}  // namespace

extern const Int8Path kInt8LinearPortable = int8_path<Portable>("portable");

}  // namespace biomedgpt
