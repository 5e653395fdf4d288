// Which block of the CUDA launch writes what; needs no device.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/error.h"
#include "runner.h"
#include "splice/splice_cuda_plan.h"

using namespace biomedgpt;

namespace {

using Random = std::mt19937;

int64_t below(Random& random, int64_t limit) {
    return static_cast<int64_t>(random() % static_cast<uint32_t>(limit));
}

// A list of segments in any order, some of them empty. Addresses are made up: a plan reads no data but ids.
struct RandomPrompt {
    std::vector<int64_t> ids;
    std::vector<int32_t> narrow_ids;
    SpliceArgs args;

    explicit RandomPrompt(Random& random) {
        for (int64_t i = 0; i < 300; ++i) ids.push_back(below(random, 1000));
        for (int64_t id : ids) narrow_ids.push_back(static_cast<int32_t>(id));
        args.hidden = 1 + below(random, 200);
        args.table.rows = {&args, DType::f16, 1000, args.hidden, args.hidden};
        for (int64_t count = below(random, 9); count > 0; --count) {
            if (below(random, 2) == 0) {
                add_tokens(random);
            } else {
                add_features(random);
            }
        }
        std::shuffle(args.segments.begin(), args.segments.end(), random);
    }

    void add_tokens(Random& random) {
        const int64_t count = below(random, 40), first = below(random, 250);
        if (below(random, 2) == 0) {
            args.segments.push_back(TokenSegment{args.rows, ids.data() + first, DType::i64, count});
        } else {
            args.segments.push_back(TokenSegment{args.rows, narrow_ids.data() + first, DType::i32, count});
        }
        args.rows += count;
    }

    void add_features(Random& random) {
        FeatureSegment segment;
        segment.row = args.rows;
        segment.features = {&args, DType::f32, below(random, 200), 7, 7};
        segment.weight = {&args, below(random, 2) == 0 ? DType::f16 : DType::f32, args.hidden, 7, 7};
        args.segments.push_back(segment);
        args.rows += segment.features.rows;
    }

    // The id that belongs in a row of out, or -1 in a row of features.
    int64_t id_at(int64_t row) const {
        for (const Segment& segment : args.segments) {
            const auto* tokens = std::get_if<TokenSegment>(&segment);
            if (tokens == nullptr || row < tokens->row || row >= tokens->row + tokens->count) continue;
            return tokens->ids_dtype == DType::i64 ? static_cast<const int64_t*>(tokens->ids)[row - tokens->row]
                                                   : static_cast<const int32_t*>(tokens->ids)[row - tokens->row];
        }
        return -1;
    }
};

// How often each element of out is written, as the kernel places its blocks.
std::vector<int> writes(const SplicePlan& plan, const RandomPrompt& prompt) {
    const int64_t hidden = prompt.args.hidden;
    std::vector<int> counts(static_cast<size_t>(prompt.args.rows * hidden));
    for (int block = 0; block < plan.blocks; ++block) {
        const int index = find_part(plan.parts.data(), static_cast<int>(plan.parts.size()), block);
        const PlanPart& part = plan.parts[static_cast<size_t>(index)];
        const PlanTile tile = tile_of(part, block, static_cast<int32_t>(hidden));
        CHECK(tile.rows > 0 && tile.columns > 0);
        CHECK(tile.rows <= (part.kind == PartKind::tokens ? kPlanTokenRows : kPlanTile));
        for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
            const int64_t id = prompt.id_at(part.row + row);
            CHECK((part.kind == PartKind::tokens) == (id >= 0));
            if (id >= 0) CHECK(plan.ids.at(static_cast<size_t>(part.first_id + row)) == id);
            for (int64_t column = tile.column; column < tile.column + tile.columns; ++column) {
                ++counts.at(static_cast<size_t>((part.row + row) * hidden + column));
            }
        }
    }
    return counts;
}

SpliceArgs args_of(const FeatureSegment& segment) {
    SpliceArgs args;
    args.rows = segment.features.rows;
    args.hidden = segment.weight.rows;
    args.segments.push_back(segment);
    return args;
}

bool refused(const SpliceArgs& args) {
    try {
        plan_splice(args, false);
    } catch (const ArgumentError&) {
        return true;
    }
    return false;
}

}  // namespace

TEST(plan_writes_every_element_once) {
    Random random(1);
    for (int i = 0; i < 200; ++i) {
        const RandomPrompt prompt(random);
        const std::vector<int> counts = writes(plan_splice(prompt.args, i % 2 == 0), prompt);
        CHECK(std::all_of(counts.begin(), counts.end(), [](int count) { return count == 1; }));
    }
}

TEST(plan_permits_16_bits_only_where_weights_have_them) {
    FeatureSegment segment;
    segment.features = {&segment, DType::f32, 3, 5, 5};
    for (DType dtype : {DType::f32, DType::f16}) {
        segment.weight = {&segment, dtype, 9, 5, 5};
        for (bool allowed : {false, true}) {
            const bool narrow = allowed && dtype == DType::f16;
            CHECK(plan_splice(args_of(segment), allowed).parts.at(0).kind ==
                  (narrow ? PartKind::half_width : PartKind::exact));
        }
    }
}

TEST(plan_knows_which_rows_can_be_read_16_bytes_at_a_time) {
    alignas(16) const char data[64] = {};
    CHECK(plan_matrix({data, DType::f32, 2, 4, 4}).aligned);
    CHECK(plan_matrix({data, DType::f16, 2, 3, 8}).aligned);
    CHECK(plan_matrix({data + 8, DType::i8, 2, 8, 8}).aligned);
    CHECK(plan_matrix({data, DType::f32, 1, 3, 3}).aligned);  // a single row has no next one
    CHECK(!plan_matrix({data, DType::f32, 2, 3, 3}).aligned);
    CHECK(!plan_matrix({data + 8, DType::f32, 2, 4, 4}).aligned);
    CHECK(!plan_matrix({data + 8, DType::f16, 2, 8, 8}).aligned);
    CHECK(!plan_matrix({data + 4, DType::i8, 2, 8, 8}).aligned);
}

TEST(plan_refuses_what_exceeds_a_launch) {
    FeatureSegment segment;
    segment.features = {&segment, DType::f32, int64_t{1} << 37, 5, 5};
    segment.weight = {&segment, DType::f32, 64, 5, 5};
    CHECK(refused(args_of(segment)));
    segment.features.rows -= kPlanTile;  // 2^31 - 1 tiles
    const SplicePlan plan = plan_splice(args_of(segment), false);
    CHECK(plan.blocks == std::numeric_limits<int32_t>::max());
    CHECK(tile_of(plan.parts[0], plan.blocks - 1, 64).row == segment.features.rows - kPlanTile);
    segment.weight.rows = 65;
    CHECK(refused(args_of(segment)));
    SpliceArgs wide;
    wide.hidden = int64_t{1} << 31;
    CHECK(refused(wide));
}
