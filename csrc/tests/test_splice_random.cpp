// Every path against double precision on random shapes, types and layouts, and what a call may not do: allocate.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "allocations.h"
#include "common/half.h"
#include "runner.h"
#include "splice/splice.h"

using namespace biomedgpt;

namespace {

using Random = std::mt19937;

int64_t pick(Random& random, std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
}

// Values of one type, at an address that is a multiple of the type's size and of nothing more.
class Values {
  public:
    Values(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>((count + 1) * size_of(dtype))) {}

    DType dtype() const { return dtype_; }
    void* data() { return bytes_.data() + size_of(dtype_); }
    void set(int64_t i, float value) {
        if (dtype_ == DType::f32) static_cast<float*>(data())[i] = value;
        if (dtype_ == DType::f16) static_cast<uint16_t*>(data())[i] = float_to_half(value);
        if (dtype_ == DType::i8) static_cast<int8_t*>(data())[i] = static_cast<int8_t>(value * 100);
    }
    double get(int64_t i) {
        if (dtype_ == DType::f32) return double(static_cast<float*>(data())[i]);
        if (dtype_ == DType::f16) return double(half_to_float(static_cast<uint16_t*>(data())[i]));
        return static_cast<int8_t*>(data())[i];
    }

  private:
    DType dtype_;
    std::vector<char> bytes_;
};

// Text, one or two molecules or proteins and text again, of random sizes.
struct Prompt {
    struct Features {
        Values values, weight;
        std::vector<float> bias;
        int64_t rows, width, stride;
        std::optional<double> eps;
    };

    explicit Prompt(Random& random) : hidden(pick(random, {1, 5, 13, 14, 16, 28, 33, 47, 100, 128})) {
        const DType table_type = std::array{DType::f32, DType::f16, DType::i8}[random() % 3];
        table = std::make_unique<Values>(table_type, kVocab * hidden);
        fill(random, *table, kVocab * hidden);
        for (int64_t id = 0; id < kVocab; ++id) scales.push_back(0.5f + 0.125f * float(id));
        for (int64_t i = pick(random, {0, 1, 7}); i > 0; --i) ids.push_back(int64_t(random() % kVocab));
        out_type = random() % 2 == 0 ? DType::f32 : DType::f16;
        for (int64_t segment = pick(random, {1, 2}); segment > 0; --segment) add_features(random);
        for (const Features& one : features) rows += one.rows;
        rows += 2 * int64_t(ids.size());
    }

    static void fill(Random& random, Values& values, int64_t count) {
        std::uniform_real_distribution<float> uniform(-1, 1);
        for (int64_t i = 0; i < count; ++i) values.set(i, uniform(random));
    }

    void add_features(Random& random) {
        const int64_t width = pick(random, {1, 2, 15, 31, 64, 255, 300, 513, 1030});
        const int64_t count = pick(random, {0, 1, 3, 8, 16, 31, 33, 40, 70, 131}),
                      stride = width + pick(random, {0, 3});
        const auto half_or_float = [&] { return random() % 2 == 0 ? DType::f32 : DType::f16; };
        Features one{Values(half_or_float(), count * stride),
                     Values(half_or_float(), hidden * width),
                     {},
                     count,
                     width,
                     stride,
                     {}};
        fill(random, one.values, count * stride);
        fill(random, one.weight, hidden * width);
        for (int64_t i = 0; i < hidden; ++i) one.bias.push_back(float(i % 7) - 3);
        if (random() % 2 == 0) one.eps = 1e-5;
        features.push_back(std::move(one));
    }

    SpliceArgs args(Values& out) {
        SpliceArgs args;
        args.out = out.data();
        args.out_dtype = out_type;
        args.rows = rows;
        args.hidden = hidden;
        args.table.rows = {table->data(), table->dtype(), kVocab, hidden, hidden};
        if (table->dtype() == DType::i8) {
            args.table.scales = scales.data();
            args.table.scale_count = kVocab;
        }
        const auto count = static_cast<int64_t>(ids.size());
        args.segments.push_back(TokenSegment{0, ids.data(), DType::i64, count});
        int64_t row = count;
        for (Features& one : features) {
            FeatureSegment segment;
            segment.row = row;
            segment.features = {one.values.data(), one.values.dtype(), one.rows, one.width, one.stride};
            segment.weight = {one.weight.data(), one.weight.dtype(), hidden, one.width, one.width};
            segment.bias = one.bias.data();
            segment.bias_count = hidden;
            segment.layer_norm_eps = one.eps;
            args.segments.push_back(segment);
            row += one.rows;
        }
        args.segments.push_back(TokenSegment{row, ids.data(), DType::i64, count});
        return args;
    }

    static constexpr int64_t kVocab = 5;
    int64_t hidden, rows = 0;
    DType out_type = DType::f32;
    std::unique_ptr<Values> table;
    std::vector<float> scales;
    std::vector<int64_t> ids;
    std::vector<Features> features;
};

// What rounding may cost, relative to the sum of the terms' magnitudes: operands (two of bfloat16, whose 8 bits are off
// by at most 2^-8), sums of at most 512 words and then of blocks in float32, and the result in out's type.
double allowed(const SplicePathInfo& path, const Prompt& prompt) {
    const double operands = path.operands_16bit ? 0x1p-7 : 0;
    const double sums = 512 * 0x1p-24;
    return operands + sums + (prompt.out_type == DType::f16 ? 0x1p-11 : 0x1p-24);
}

std::vector<double> normalised(Prompt::Features& one, int64_t row) {
    std::vector<double> x;
    for (int64_t k = 0; k < one.width; ++k) x.push_back(one.values.get(row * one.stride + k));
    if (!one.eps) return x;
    double mean = 0, variance = 0;
    for (double value : x) mean += value / double(one.width);
    for (double value : x) variance += (value - mean) * (value - mean) / double(one.width);
    for (double& value : x) value = (value - mean) / std::sqrt(variance + *one.eps);
    return x;
}

// The largest error of a feature segment, in units of what is allowed.
double worst_of_features(Prompt& prompt, Prompt::Features& one, Values& out, int64_t first, double tolerance) {
    double worst = 0;
    for (int64_t row = 0; row < one.rows; ++row) {
        const std::vector<double> x = normalised(one, row);
        for (int64_t column = 0; column < prompt.hidden; ++column) {
            double sum = double(one.bias[size_t(column)]), magnitude = std::abs(sum) + 1e-3;
            for (int64_t k = 0; k < one.width; ++k) {
                const double term = x[size_t(k)] * one.weight.get(column * one.width + k);
                sum += term;
                magnitude += std::abs(term);
            }
            const double error = std::abs(out.get((first + row) * prompt.hidden + column) - sum);
            worst = std::isnan(error) ? INFINITY : std::max(worst, error / (magnitude * tolerance));
        }
    }
    return worst;
}

// Text is exact but for one multiplication by a scale and one rounding to out's type.
double worst_of_text(Prompt& prompt, Values& out, int64_t first) {
    double worst = 0;
    for (size_t i = 0; i < prompt.ids.size(); ++i) {
        const int64_t id = prompt.ids[i];
        for (int64_t column = 0; column < prompt.hidden; ++column) {
            const double value = prompt.table->get(id * prompt.hidden + column);
            const bool scaled = prompt.table->dtype() == DType::i8;
            float expected = float(value) * (scaled ? prompt.scales[size_t(id)] : 1.0f);
            if (prompt.out_type == DType::f16) expected = half_to_float(float_to_half(expected));
            worst =
                std::max(worst, std::abs(out.get((first + int64_t(i)) * prompt.hidden + column) - double(expected)));
        }
    }
    return worst;
}

}  // namespace

TEST(random_prompts_agree_with_double_on_every_path) {
    constexpr int kPrompts = 500;
    Random random(1);
    std::printf("paths:");
    for (const SplicePathInfo& path : splice_paths()) std::printf(" %s", path.name);
    std::printf("\n");
    for (int n = 0; n < kPrompts; ++n) {
        Prompt prompt(random);
        for (const SplicePathInfo& path : splice_paths()) {
            Values out(prompt.out_type, prompt.rows * prompt.hidden);
            splice(prompt.args(out), {1 + n % 2, true, path.name});
            const double tolerance = allowed(path, prompt);
            auto row = static_cast<int64_t>(prompt.ids.size());
            CHECK(worst_of_text(prompt, out, 0) == 0);
            for (Prompt::Features& one : prompt.features) {
                CHECK(worst_of_features(prompt, one, out, row, tolerance) < 1);
                row += one.rows;
            }
            CHECK(worst_of_text(prompt, out, row) == 0);
        }
    }
}

TEST(nothing_is_allocated_in_a_call) {
    Random random(2);
    Prompt prompt(random);
    while (prompt.features[0].rows == 0) prompt = Prompt(random);
    Values out(prompt.out_type, prompt.rows * prompt.hidden);
    const SpliceArgs args = prompt.args(out);
    for (const SplicePathInfo& path : splice_paths()) {
        const SpliceOptions options = {1, true, path.name};
        splice(args, options);  // makes the workspace
        const int64_t before = testing::allocations();
        splice(args, options);
        CHECK(testing::allocations() == before);
    }
}

TEST(a_wide_call_on_several_threads_allocates_nothing_either) {
    constexpr int64_t kRows = 300, kWidth = 700, kHidden = 301;
    Random random(3);
    Values features(DType::f32, kRows * kWidth), weight(DType::f16, kHidden * kWidth), table(DType::f32, kHidden);
    Prompt::fill(random, features, kRows * kWidth);
    Prompt::fill(random, weight, kHidden * kWidth);
    const std::vector<float> bias(kHidden, 0.5f);
    FeatureSegment segment;
    segment.features = {features.data(), DType::f32, kRows, kWidth, kWidth};
    segment.weight = {weight.data(), DType::f16, kHidden, kWidth, kWidth};
    segment.bias = bias.data();
    segment.bias_count = kHidden;
    for (const SplicePathInfo& path : splice_paths()) {
        std::vector<float> results[2];
        for (int threads : {1, 3}) {
            std::vector<float>& out = results[threads / 2];
            out.resize(kRows * kHidden);
            SpliceArgs args;
            args.out = out.data();
            args.rows = kRows;
            args.hidden = kHidden;
            args.table.rows = {table.data(), DType::f32, 1, kHidden, kHidden};
            args.segments.push_back(segment);
            const SpliceOptions options = {threads, true, path.name};
            splice(args, options);
            const int64_t before = testing::allocations();
            splice(args, options);
            // Threads are taken as they come: one may have had its first share only now.
            CHECK(testing::allocations() - before <= threads - 1);
        }
        CHECK(results[0] == results[1]);
    }
}

TEST(a_row_does_not_depend_on_how_many_there_are) {
    constexpr int64_t kRows = 131, kWidth = 600, kStride = 605, kHidden = 101, kPart = 50;
    Random random(4);
    Values features(DType::f32, kRows * kStride), weight(DType::f16, kHidden * kWidth), table(DType::f32, kHidden);
    Prompt::fill(random, features, kRows * kStride);
    Prompt::fill(random, weight, kHidden * kWidth);
    features.set(70 * kStride, INFINITY);
    const std::vector<float> bias(kHidden, 0.5f);
    const auto segment_of = [&](int64_t first, int64_t rows) {
        FeatureSegment segment;
        segment.row = first;
        segment.features = {static_cast<float*>(features.data()) + first * kStride, DType::f32, rows, kWidth, kStride};
        segment.weight = {weight.data(), DType::f16, kHidden, kWidth, kWidth};
        segment.bias = bias.data();
        segment.bias_count = kHidden;
        return segment;
    };
    for (const SplicePathInfo& path : splice_paths()) {
        // All rows at once have the weights packed, parts of them the features.
        std::vector<float> results[2];
        for (const bool parts : {false, true}) {
            std::vector<float>& out = results[parts];
            out.resize(kRows * kHidden);
            SpliceArgs args;
            args.out = out.data();
            args.rows = kRows;
            args.hidden = kHidden;
            args.table.rows = {table.data(), DType::f32, 1, kHidden, kHidden};
            const int64_t step = parts ? kPart : kRows;
            for (int64_t row = 0; row < kRows; row += step) {
                args.segments.push_back(segment_of(row, std::min(step, kRows - row)));
            }
            splice(args, {2, true, path.name});
        }
        CHECK(std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0);
    }
}

TEST(a_nan_stays_in_its_row_and_subnormals_count) {
    constexpr int64_t kRows = 35, kWidth = 40, kHidden = 30;
    Values features(DType::f32, kRows * kWidth), weight(DType::f32, kHidden * kWidth), table(DType::f32, kHidden);
    for (int64_t i = 0; i < kRows * kWidth; ++i) features.set(i, 0x1p-140f);
    for (int64_t i = 0; i < kHidden * kWidth; ++i) weight.set(i, 0x1p20f);
    features.set(17 * kWidth + 3, std::numeric_limits<float>::quiet_NaN());
    const std::vector<float> bias(kHidden, 0.0f);
    FeatureSegment segment;
    segment.features = {features.data(), DType::f32, kRows, kWidth, kWidth};
    segment.weight = {weight.data(), DType::f32, kHidden, kWidth, kWidth};
    segment.bias = bias.data();
    segment.bias_count = kHidden;
    for (const SplicePathInfo& path : splice_paths()) {
        std::vector<float> out(kRows * kHidden, 7.0f);
        SpliceArgs args;
        args.out = out.data();
        args.rows = kRows;
        args.hidden = kHidden;
        args.table.rows = {table.data(), DType::f32, 1, kHidden, kHidden};
        args.segments.push_back(segment);
        splice(args, {1, true, path.name});
        for (int64_t i = 0; i < kRows * kHidden; ++i) {
            const float value = out[size_t(i)];
            const float expected = path.operands_16bit ? 0.0f : float(kWidth) * 0x1p-120f;
            CHECK(i / kHidden == 17 ? std::isnan(value) : value == expected);
        }
    }
}
