// Argument checks of splice, shared by every device: whatever passes here is safe to run. A call that passes allocates
// nothing here, so texts are made only where they are thrown.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/error.h"
#include "splice/splice.h"

namespace biomedgpt {
namespace {

std::string vector_of(const char* dtype, int64_t count) {
    return std::string(dtype) + " [" + std::to_string(count) + "]";
}

// An argument's name: "table", or the field of a segment.
struct Name {
    const char* field;
    int64_t segment = -1;

    std::string text() const {
        if (segment < 0) return field;
        return "segments[" + std::to_string(segment) + "]." + field;
    }
    Name of(const char* other) const { return {other, segment}; }
};

struct Bytes {
    uintptr_t begin;
    uintptr_t end;
};

Bytes bytes_of(const void* data, int64_t size) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    return {begin, begin + static_cast<uintptr_t>(size)};
}

// Checks that hold for every buffer: it exists, it is aligned, and it is not the memory about to be written.
class BufferCheck {
  public:
    explicit BufferCheck(const SpliceArgs& args)
        : out_(bytes_of(args.out, args.rows * args.hidden * size_of(args.out_dtype))) {}

    void usable(const Name& name, const void* data, DType dtype, int64_t count) const {
        if (count == 0) return;
        if (data == nullptr) throw ArgumentError(name.text(), "a null pointer", "data");
        if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
            throw ArgumentError(name.text(), "misaligned data",
                                std::string("an address that is a multiple of the size of ") + name_of(dtype));
        }
    }

    void input(const Name& name, const void* data, DType dtype, int64_t count) const {
        usable(name, data, dtype, count);
        const Bytes bytes = bytes_of(data, count * size_of(dtype));
        if (bytes.begin < out_.end && out_.begin < bytes.end && count > 0) {
            throw ArgumentError(name.text(), "memory that overlaps out", "memory apart from out");
        }
    }

    void input(const Name& name, const Matrix& matrix) const {
        const bool empty = matrix.rows == 0 || matrix.columns == 0;
        input(name, matrix.data, matrix.dtype, empty ? 0 : (matrix.rows - 1) * matrix.row_stride + matrix.columns);
    }

  private:
    Bytes out_;
};

void check_table(const SpliceArgs& args, const BufferCheck& buffers) {
    const Matrix& rows = args.table.rows;
    const bool known = rows.dtype == DType::f32 || rows.dtype == DType::f16 || rows.dtype == DType::i8;
    if (!known || rows.rows < 0 || rows.columns != args.hidden || (rows.rows > 1 && rows.row_stride != rows.columns)) {
        throw ArgumentError(
            "table", describe(rows),
            "float32, float16 or int8 [vocab, " + std::to_string(args.hidden) + "], contiguous, as wide as out");
    }
    buffers.input({"table"}, rows);
    const bool scaled = rows.dtype == DType::i8;
    if (!scaled && args.table.scales != nullptr) {
        throw ArgumentError("table_scales", vector_of("float32", args.table.scale_count),
                            std::string("none with a ") + name_of(rows.dtype) + " table");
    }
    if (scaled && (args.table.scales == nullptr || args.table.scale_count != rows.rows)) {
        throw ArgumentError("table_scales",
                            args.table.scales == nullptr ? "none" : vector_of("float32", args.table.scale_count),
                            vector_of("float32", rows.rows) + ", one scale per row of the int8 table");
    }
    if (scaled) buffers.input({"table_scales"}, args.table.scales, DType::f32, args.table.scale_count);
}

template <typename Id>
void check_ids(const Name& name, const Id* ids, int64_t count, int64_t vocab) {
    const Id* end = ids + count;
    const Id* bad = std::find_if(ids, end, [vocab](Id id) { return id < 0 || id >= vocab; });
    if (bad != end) {
        throw ArgumentError(name.text() + "[" + std::to_string(bad - ids) + "]", std::to_string(*bad),
                            "0 <= id < " + std::to_string(vocab) + ", the rows of table");
    }
}

void check_segment(const Name& name, const TokenSegment& segment, const SpliceArgs& args, const BufferCheck& buffers) {
    const Name ids = name.of("ids");
    if ((segment.ids_dtype != DType::i64 && segment.ids_dtype != DType::i32) || segment.count < 0) {
        throw ArgumentError(ids.text(), vector_of(name_of(segment.ids_dtype), segment.count), "int64 or int32 [count]");
    }
    buffers.input(ids, segment.ids, segment.ids_dtype, segment.count);
    const int64_t vocab = args.table.rows.rows;
    if (segment.ids_dtype == DType::i64) {
        check_ids(ids, static_cast<const int64_t*>(segment.ids), segment.count, vocab);
    } else {
        check_ids(ids, static_cast<const int32_t*>(segment.ids), segment.count, vocab);
    }
}

bool is_float(const Matrix& matrix) {
    return matrix.dtype == DType::f32 || matrix.dtype == DType::f16;
}

void check_segment(const Name& name, const FeatureSegment& segment, const SpliceArgs& args,
                   const BufferCheck& buffers) {
    const Matrix& features = segment.features;
    if (!is_float(features) || features.rows < 0 || features.columns < 1 || features.columns > kMaxSpliceWidth ||
        (features.rows > 1 && features.row_stride < features.columns)) {
        throw ArgumentError(name.of("features").text(), describe(features),
                            "float32 or float16 [count, in] with in from 1 to " + std::to_string(kMaxSpliceWidth) +
                                ", rows apart by at least their width");
    }
    const Matrix& weight = segment.weight;
    if (!is_float(weight) || weight.rows != args.hidden || weight.columns != features.columns ||
        (weight.rows > 1 && weight.row_stride != weight.columns)) {
        throw ArgumentError(name.of("weight").text(), describe(weight),
                            "float32 or float16 [" + std::to_string(args.hidden) + ", " +
                                std::to_string(features.columns) + "], contiguous: [width of out, width of features]");
    }
    if (segment.bias_count != args.hidden) {
        throw ArgumentError(name.of("bias").text(), vector_of("float32", segment.bias_count),
                            vector_of("float32", args.hidden) + ", the width of out");
    }
    if (segment.layer_norm_eps && !(std::isfinite(*segment.layer_norm_eps) && *segment.layer_norm_eps > 0)) {
        throw ArgumentError(name.of("layer_norm_eps").text(), std::to_string(*segment.layer_norm_eps),
                            "a finite number above 0, or none");
    }
    buffers.input(name.of("features"), features);
    buffers.input(name.of("weight"), weight);
    buffers.input(name.of("bias"), segment.bias, DType::f32, segment.bias_count);
}

struct Span {
    int64_t begin;
    int64_t count;
    int64_t segment;
};

Span span_of(const Segment& segment, int64_t index) {
    if (const auto* tokens = std::get_if<TokenSegment>(&segment)) return {tokens->row, tokens->count, index};
    const auto& features = std::get<FeatureSegment>(segment);
    return {features.row, features.features.rows, index};
}

// A row that no segment writes would reach the decoder uninitialised, a row that two write would depend on their order.
void check_coverage(const SpliceArgs& args) {
    thread_local std::vector<Span> spans;  // keeps its memory for the next call
    spans.clear();
    for (size_t i = 0; i < args.segments.size(); ++i) {
        const Span span = span_of(args.segments[i], static_cast<int64_t>(i));
        if (span.begin < 0 || span.begin > args.rows || span.count > args.rows - span.begin) {
            throw ArgumentError(Name{"row", span.segment}.text(),
                                std::to_string(span.begin) + " for " + std::to_string(span.count) + " rows",
                                "rows within out, which has " + std::to_string(args.rows));
        }
        if (span.count > 0) spans.push_back(span);
    }
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    spans.push_back({args.rows, 0, -1});
    int64_t covered = 0;
    for (const Span& span : spans) {
        if (span.begin < covered) {
            throw ArgumentError(Name{"row", span.segment}.text(), std::to_string(span.begin),
                                "at least " + std::to_string(covered) + ", since another segment writes up to there");
        }
        if (span.begin > covered) {
            throw ArgumentError("segments",
                                "no segment for rows " + std::to_string(covered) + " to " + std::to_string(span.begin),
                                "every row of out covered");
        }
        covered = span.begin + span.count;
    }
}

}  // namespace

void check_splice(const SpliceArgs& args) {
    const bool known = args.out_dtype == DType::f32 || args.out_dtype == DType::f16;
    if (!known || args.rows < 0 || args.hidden < 1) {
        throw ArgumentError("out", describe({nullptr, args.out_dtype, args.rows, args.hidden, args.hidden}),
                            "float32 or float16 [rows, hidden] with hidden >= 1");
    }
    const BufferCheck buffers(args);
    buffers.usable({"out"}, args.out, args.out_dtype, args.rows * args.hidden);
    check_table(args, buffers);
    for (size_t i = 0; i < args.segments.size(); ++i) {
        const Name name{"", static_cast<int64_t>(i)};
        std::visit([&](const auto& segment) { check_segment(name, segment, args, buffers); }, args.segments[i]);
    }
    check_coverage(args);
}

}  // namespace biomedgpt
