// attention in plain C++: the path of every machine without a better one, and what the others are compared with.
#include "attention/attention_kernel.h"

namespace biomedgpt {
namespace {

struct Portable {
    static constexpr int kLanes = 16, kRows = 1, kRowBlocks = 1, kBlocks = 1, kRowVectors = 1, kVectors = 1;
    struct Floats {
        float lane[kLanes];
    };

    template <class Lane>
    static Floats each(const Lane& lane) {
        Floats all;
        for (int i = 0; i < kLanes; ++i) all.lane[i] = lane(i);
        return all;
    }

    static Floats zero() { return set(0.0f); }
    static Floats set(float value) {
        return each([=](int) { return value; });
    }
    static Floats load(const float* from) {
        return each([=](int i) { return from[i]; });
    }
    static void store(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
    }
    static Floats max(const Floats& a, const Floats& b) {
        return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Floats load_halves(const uint8_t* from) {
        uint16_t halves[kLanes];
        std::memcpy(halves, from, sizeof halves);
        return each([&](int i) { return half_to_float(halves[i]); });
    }
    static Floats load_bytes(const uint8_t* from) {
        return each([=](int i) { return static_cast<float>(static_cast<int8_t>(from[i])); });
    }
    static void store_halves(uint16_t* to, const Floats& values) {
        for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(values.lane[i]);
    }
};

}  // namespace

extern const AttentionPath kAttentionPortable = attention_path<Portable>("portable");

}  // namespace biomedgpt
