// The next token, chosen on the GPU from a row of logits: the likeliest one, or one drawn by temperature, top-k, top-p.
//
// Draws are those of runtime/biomedgpt_edge/sampling.py: of equal logits those in front are kept first, the token that
// crosses top-p stays in, and a token is drawn at a place of the sum over all that are kept, in the order of the
// vocabulary. Nothing is sorted: a threshold is found bit by bit, from sums over all that reach it. Weights are whole
// numbers of 2^-40 of the largest one, so that sums do not depend on the order in which they are added.
#pragma once

#include "decoder/places.h"
#include "simt/simt.h"

namespace biomedgpt {

// How a row's token is chosen.
struct Choice {
    float inverse_temperature;  // 0 for the likeliest token; finite
    int32_t top_k;              // 0 keeps all
    double top_p;               // 1 keeps all
    double uniform;             // 0 to 1, exclusive: where in the sum
};

// What was chosen.
struct Chosen {
    int32_t token;  // -1 where the largest logit is no finite number
    float largest;  // that logit
};

inline namespace BIOMEDGPT_SIMT {

struct ChooseParams {
    const float* logits = nullptr;  // [rows, width]
    int width = 0;
    int count = 0;  // logits of a row that may be chosen, the first ones
    const Choice* choices = nullptr;
    Chosen* chosen = nullptr;
    // Given for a chain of steps of one row: choices and chosen are counted by it, and the row's place goes on.
    uint32_t* step = nullptr;
    RowPlace* places = nullptr;
};

// A block for each row.
struct Choose {
    using Params = ChooseParams;
    static constexpr bool kSharedFirst = true;
    static constexpr int kThreads = 1024, kBlocks = 1, kWarps = kThreads / kWarpSize;
    static constexpr float kUnit = 1099511627776.0f;  // 2^40: the largest weight

    struct Shared {
        uint64_t sums[kThreads];  // of a scan
        float values[kWarps];
        int places[kWarps];
        int found;
    };
    static constexpr size_t kShared = sizeof(Shared);

    // What is kept: keys above `key`, and the first `ties` that equal it.
    struct Kept {
        uint32_t key = 0;
        uint64_t ties = ~uint64_t{0};
    };

    struct Row {
        const float* logits;
        int count;
        float largest;
        float scale;  // of differences of logits, times log2(e)

        BIOMEDGPT_DEVICE uint64_t weight(float logit) const {
            return static_cast<uint64_t>(simt::exp2_of((logit - largest) * scale) * kUnit);
        }
    };

    // Ordered as the numbers are.
    BIOMEDGPT_DEVICE static uint32_t key_of(float value) {
        const uint32_t bits = simt::float_bits(value);
        return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }

    BIOMEDGPT_DEVICE static float value_of(uint32_t key) {
        return simt::bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    }

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        simt::let_next_start();
        simt::wait_for_inputs();
        auto& shared = *reinterpret_cast<Shared*>(simt::shared());
        const int index = p.step == nullptr ? simt::block_x() : static_cast<int>(*p.step);
        Row row = {p.logits + int64_t{simt::block_x()} * p.width, p.count, 0, 0};
        int token = likeliest(shared, row);
        const bool finite = row.largest - row.largest == 0;
        const Choice choice = p.choices[index];
        if (finite && choice.inverse_temperature > 0) {
            row.scale = choice.inverse_temperature * 1.44269504088896341f;
            if (row.scale > 3e38f) row.scale = 3e38f;
            token = draw(shared, row, choice);
        }
        if (simt::thread() != 0) return;
        p.chosen[index] = {finite ? token : -1, row.largest};
        if (p.step == nullptr) return;
        *p.step += 1;
        p.places->position += 1;
        p.places->token = finite ? token : 0;
    }

    // NaN is larger than all else, and of equal ones the first wins.
    BIOMEDGPT_DEVICE static bool wins(float value, int place, float other, int other_place) {
        const bool nan = value != value, other_nan = other != other;
        if (nan != other_nan) return nan;
        return (!nan && value > other) || ((nan || value == other) && place < other_place);
    }

    BIOMEDGPT_DEVICE static void take(float& value, int& place, float other, int other_place) {
        if (!wins(other, other_place, value, place)) return;
        value = other;
        place = other_place;
    }

    BIOMEDGPT_DEVICE static int likeliest(Shared& shared, Row& row) {
        float value = -INFINITY;
        int place = row.count;
        for (int i = simt::thread(); i < row.count; i += kThreads) take(value, place, row.logits[i], i);
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
            const float other = simt::shuffle_xor(value, mask);
            take(value, place, other, simt::shuffle_xor(place, mask));
        }
        if (simt::lane() == 0) shared.values[simt::warp()] = value, shared.places[simt::warp()] = place;
        simt::sync_block();
        for (int i = 0; i < kWarps; ++i) take(value, place, shared.values[i], shared.places[i]);
        row.largest = value;
        simt::sync_block();
        return place;
    }

    BIOMEDGPT_DEVICE static int draw(Shared& shared, const Row& row, const Choice& choice) {
        Kept kept;
        if (choice.top_k > 0 && choice.top_k < row.count) {
            kept = select(shared, row, kept, static_cast<uint64_t>(choice.top_k), [](float) { return uint64_t{1}; });
        }
        if (choice.top_p < 1) {
            const auto weight = [&](float logit) { return row.weight(logit); };
            const uint64_t all = sum_from(shared, row, kept, 0, weight);
            const auto wanted = static_cast<uint64_t>(choice.top_p * static_cast<double>(all));
            Kept fewer = select(shared, row, kept, wanted > 0 ? wanted : 1, weight);
            const uint64_t each = row.weight(value_of(fewer.key));
            fewer.ties = each > 0 ? (fewer.ties + each - 1) / each : 1;
            if (fewer.key == kept.key && fewer.ties > kept.ties) fewer.ties = kept.ties;
            kept = fewer;
        }
        return place_in_sum(shared, row, kept, choice.uniform);
    }

    // The largest key at which `measure` of all that is kept from it on reaches `wanted`; in `ties`, what of the
    // measure has to come from those that equal it.
    template <class Measure>
    BIOMEDGPT_DEVICE static Kept select(Shared& shared, const Row& row, const Kept& kept, uint64_t wanted,
                                        const Measure& measure) {
        Kept found = {0, wanted};
        for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
            const uint64_t reached = sum_from(shared, row, kept, found.key | bit, measure);
            if (reached >= wanted) found.key |= bit;
        }
        const uint64_t above = found.key == ~0u ? 0 : sum_from(shared, row, kept, found.key + 1, measure);
        found.ties = wanted > above ? wanted - above : 1;
        return found;
    }

    // Over all that is kept, from a key on.
    template <class Measure>
    BIOMEDGPT_DEVICE static uint64_t sum_from(Shared& shared, const Row& row, const Kept& kept, uint32_t from,
                                              const Measure& measure) {
        uint64_t own = 0;
        for (int i = simt::thread(); i < row.count; i += kThreads) {
            const uint32_t key = key_of(row.logits[i]);
            if (key >= from && (key > kept.key || kept.key == 0)) own += measure(row.logits[i]);
        }
        const bool ties = simt::thread() == 0 && kept.key != 0 && kept.key >= from;
        if (ties) own += kept.ties * measure(value_of(kept.key));
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
            const auto low = static_cast<uint32_t>(simt::shuffle_xor(static_cast<int>(own), mask));
            const auto high = static_cast<uint32_t>(simt::shuffle_xor(static_cast<int>(own >> 32), mask));
            own += uint64_t{high} << 32 | low;
        }
        if (simt::lane() == 0) shared.sums[simt::warp()] = own;
        simt::sync_block();
        uint64_t all = 0;
        for (int i = 0; i < kWarps; ++i) all += shared.sums[i];
        simt::sync_block();
        return all;
    }

    // The sum over the threads in front of this one, and over all.
    BIOMEDGPT_DEVICE static uint64_t before(Shared& shared, uint64_t own, uint64_t& all) {
        const int place = simt::thread();
        shared.sums[place] = own;
        simt::sync_block();
        for (int step = 1; step < kThreads; step *= 2) {
            const uint64_t other = place >= step ? shared.sums[place - step] : 0;
            simt::sync_block();
            shared.sums[place] += other;
            simt::sync_block();
        }
        all = shared.sums[kThreads - 1];
        const uint64_t sum = shared.sums[place] - own;
        simt::sync_block();
        return sum;
    }

    // Here each thread has neighbouring logits: the order of the vocabulary counts.
    BIOMEDGPT_DEVICE static int place_in_sum(Shared& shared, const Row& row, const Kept& kept, double uniform) {
        const int each = (row.count + kThreads - 1) / kThreads, begin = simt::thread() * each;
        const int end = begin + each < row.count ? begin + each : row.count;
        uint64_t ties = 0, all, own = 0;
        for (int i = begin; i < end; ++i) ties += key_of(row.logits[i]) == kept.key;
        const uint64_t ties_before = before(shared, ties, all);
        uint64_t seen = ties_before;
        for (int i = begin; i < end; ++i) own += weight_if_kept(row, kept, row.logits[i], seen);
        uint64_t sum = before(shared, own, all);
        const auto target = static_cast<uint64_t>(uniform * static_cast<double>(all));
        if (sum <= target && target < sum + own) {
            seen = ties_before;
            for (int i = begin; i < end; ++i) {
                sum += weight_if_kept(row, kept, row.logits[i], seen);
                if (sum <= target) continue;
                shared.found = i;
                break;
            }
        }
        simt::sync_block();
        return shared.found;
    }

    // `ties` is how many that equal the threshold came before.
    BIOMEDGPT_DEVICE static uint64_t weight_if_kept(const Row& row, const Kept& kept, float logit, uint64_t& ties) {
        const uint32_t key = key_of(logit);
        const bool is_kept = key > kept.key || (key == kept.key && ties++ < kept.ties);
        return is_kept ? row.weight(logit) : 0;
    }
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
