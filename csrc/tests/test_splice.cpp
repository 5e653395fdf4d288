#include <cmath>
#include <functional>
#include <string>

#include "common/error.h"
#include "runner.h"
#include "splice/splice.h"
#include "splice_example.h"

using namespace biomedgpt;
using biomedgpt::testing::SpliceExample;

namespace {

std::vector<float> result(const SpliceExample& example, int threads, const char* path) {
    std::vector<float> out(static_cast<size_t>(example.rows() * SpliceExample::kHidden), NAN);
    splice(example.args(out), {threads, true, path});
    return out;
}

// The message of the error that `change` provokes; also checks that nothing was written.
std::string message_after(const std::function<void(SpliceArgs&)>& change) {
    const SpliceExample example;
    std::vector<float> out(static_cast<size_t>(example.rows() * SpliceExample::kHidden), 7.0f);
    SpliceArgs args = example.args(out);
    change(args);
    std::string message;
    try {
        splice(args);
    } catch (const ArgumentError& error) {
        message = error.what();
    }
    for (float value : out) CHECK(value == 7.0f);
    return message;
}

bool starts_with(const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
}

TokenSegment& tokens_of(SpliceArgs& args) {
    return std::get<TokenSegment>(args.segments[0]);
}

FeatureSegment& features_of(SpliceArgs& args) {
    return std::get<FeatureSegment>(args.segments[1]);
}

}  // namespace

TEST(every_path_agrees_with_double) {
    const SpliceExample example;
    for (const SplicePathInfo& path : splice_paths()) {
        // 301 products of about 1 whose operands have 8 bits: up to 2.4, and a tenth of that when errors have both
        // signs.
        const double tolerance = path.operands_16bit ? 0.2 : testing::kExampleTolerance;
        const double error = example.largest_error(result(example, 1, path.name));
        CHECK(error < tolerance);
    }
    CHECK(std::string(splice_paths().back().name) == "portable");
}

TEST(threads_do_not_change_a_bit) {
    const SpliceExample example;
    for (const SplicePathInfo& path : splice_paths()) {
        CHECK(result(example, 1, path.name) == result(example, 3, path.name));
    }
}

TEST(a_bad_argument_is_named_and_nothing_is_written) {
    CHECK(starts_with(message_after([](SpliceArgs& args) { args.hidden = 0; }), "out:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { args.out = nullptr; }), "out:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { args.table.rows.columns = 5; }), "table:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { args.table.rows.dtype = DType::i8; }), "table_scales:"));
    CHECK(
        starts_with(message_after([](SpliceArgs& args) { args.table.rows.rows = 10; }), "segments[0].ids[0]: got 10,"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { tokens_of(args).count = -1; }), "segments[0].ids:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { features_of(args).bias = nullptr; }), "segments[1].bias:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { features_of(args).features.row_stride = 3; }),
                      "segments[1].features:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { features_of(args).weight.data = args.out; }),
                      "segments[1].weight: got memory that overlaps out"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { features_of(args).layer_norm_eps = NAN; }),
                      "segments[1].layer_norm_eps:"));
}

TEST(rows_are_covered_exactly_once) {
    CHECK(starts_with(message_after([](SpliceArgs& args) { args.segments.pop_back(); }), "segments: got no segment"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { tokens_of(args).row = 5; }), "segments[0].row:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { tokens_of(args).row = INT64_MAX; }), "segments[0].row:"));
    CHECK(starts_with(message_after([](SpliceArgs& args) { tokens_of(args).row = -1; }), "segments[0].row:"));
}
