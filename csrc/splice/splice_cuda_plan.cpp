#include "splice/splice_cuda_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>

#include "common/error.h"

namespace biomedgpt {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxHidden = int64_t{1} << 30;  // half the range of int32: a loop may step past its end

int64_t pieces(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

// Sums in 64 bits; `blocks` is at most kMaxInt32, the largest grid, before and after.
void add_part(SplicePlan& plan, PlanPart part, int64_t blocks) {
    if (blocks > kMaxInt32 - plan.blocks) {
        throw ArgumentError("out", "more than " + std::to_string(kMaxInt32) + " tiles", "fewer rows in one call");
    }
    part.first_block = plan.blocks;
    plan.parts.push_back(part);
    plan.blocks += static_cast<int32_t>(blocks);
}

template <typename Id>
void append_ids(const Id* ids, int64_t count, std::vector<int32_t>& to) {
    std::transform(ids, ids + count, std::back_inserter(to), [](Id id) { return static_cast<int32_t>(id); });
}

void add_tokens(SplicePlan& plan, const TokenSegment& segment) {
    if (segment.count == 0) return;
    PlanPart part = {};
    part.kind = PartKind::tokens;
    part.row = segment.row;
    part.rows = segment.count;
    part.first_id = static_cast<int64_t>(plan.ids.size());
    if (segment.ids_dtype == DType::i64) {
        append_ids(static_cast<const int64_t*>(segment.ids), segment.count, plan.ids);
    } else {
        append_ids(static_cast<const int32_t*>(segment.ids), segment.count, plan.ids);
    }
    add_part(plan, part, pieces(segment.count, kPlanTokenRows));
}

// The norm is computed in float32: an eps outside of its normal range would become 0 or infinity there.
float float_eps(double eps) {
    using Limits = std::numeric_limits<float>;
    return static_cast<float>(std::clamp(eps, double{Limits::min()}, double{Limits::max()}));
}

void add_features(SplicePlan& plan, const FeatureSegment& segment, int64_t hidden, bool allow_16bit) {
    if (segment.features.rows == 0) return;
    PlanPart part = {};
    // Only weights that are float16 already: rounding them here would cost each block what rounding once, in the
    // bundle, costs nobody.
    part.kind = allow_16bit && segment.weight.dtype == DType::f16 ? PartKind::half_width : PartKind::exact;
    part.row = segment.row;
    part.rows = segment.features.rows;
    part.features = plan_matrix(segment.features);
    part.weight = plan_matrix(segment.weight);
    part.bias = segment.bias;
    part.normalised = segment.layer_norm_eps.has_value();
    part.eps = float_eps(segment.layer_norm_eps.value_or(1.0));
    // At most 2^31 tiles by 2^24: their product cannot overflow, and more rows than that are refused all the same.
    const int64_t row_tiles = std::min(pieces(part.rows, kPlanTile), kMaxInt32 + 1);
    add_part(plan, part, row_tiles * pieces(hidden, kPlanTile));
}

}  // namespace

PlanMatrix plan_matrix(const Matrix& matrix) {
    const int64_t size = size_of(matrix.dtype);
    const int64_t row_bytes = matrix.rows > 1 ? matrix.row_stride * size : 0;  // the stride of a single row may be any
    const int64_t load = std::min<int64_t>(16, 8 * size);
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data) % 16);
    return {matrix.data,
            row_bytes,
            static_cast<int32_t>(matrix.columns),
            static_cast<int32_t>(size),
            matrix.dtype,
            address % load == 0 && row_bytes % load == 0};
}

SplicePlan plan_splice(const SpliceArgs& args, bool allow_16bit) {
    if (args.hidden > kMaxHidden || args.table.rows.rows > kMaxInt32) {
        throw ArgumentError("table", describe(args.table.rows), "at most 2^31 - 1 rows of at most 2^30 columns");
    }
    SplicePlan plan;
    // Projections take longest: their blocks start first, and token rows fill the gaps at the end.
    for (const Segment& segment : args.segments) {
        if (const auto* features = std::get_if<FeatureSegment>(&segment)) {
            add_features(plan, *features, args.hidden, allow_16bit);
        }
    }
    for (const Segment& segment : args.segments) {
        if (const auto* tokens = std::get_if<TokenSegment>(&segment)) add_tokens(plan, *tokens);
    }
    return plan;
}

}  // namespace biomedgpt
