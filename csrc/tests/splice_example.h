// A small prompt with one segment of each kind, and its result in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "splice/splice.h"

namespace biomedgpt::testing {

struct SpliceExample {
    static constexpr int64_t kVocab = 11, kHidden = 37, kWidth = 301, kRows = 6, kStride = 305;

    std::vector<float> table = wave(kVocab * kHidden, 0.37);
    std::vector<float> features = wave(kRows * kStride, 0.73);
    std::vector<float> weight = wave(kHidden * kWidth, 1.19);
    std::vector<float> bias = wave(kHidden, 0.11);
    std::vector<int64_t> ids = {10, 0, 3};
    double eps = 1e-5;

    static std::vector<float> wave(int64_t count, double step) {
        std::vector<float> values(static_cast<size_t>(count));
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(std::sin(step * double(i)) + 0.25);
        return values;
    }

    int64_t rows() const { return static_cast<int64_t>(ids.size()) + kRows; }

    // The features come first in the prompt and second in the list: segments may be in any order.
    SpliceArgs args(std::vector<float>& out) const {
        SpliceArgs args;
        args.out = out.data();
        args.rows = rows();
        args.hidden = kHidden;
        args.table.rows = {table.data(), DType::f32, kVocab, kHidden, kHidden};
        args.segments.push_back(TokenSegment{kRows, ids.data(), DType::i64, static_cast<int64_t>(ids.size())});
        FeatureSegment projected;
        projected.features = {features.data(), DType::f32, kRows, kWidth, kStride};
        projected.weight = {weight.data(), DType::f32, kHidden, kWidth, kWidth};
        projected.bias = bias.data();
        projected.bias_count = kHidden;
        projected.layer_norm_eps = eps;
        args.segments.push_back(projected);
        return args;
    }

    double projected(int64_t row, int64_t column) const {
        const float* x = features.data() + row * kStride;
        double mean = 0, variance = 0, sum = bias[static_cast<size_t>(column)];
        for (int64_t k = 0; k < kWidth; ++k) mean += double(x[k]) / kWidth;
        for (int64_t k = 0; k < kWidth; ++k) variance += (x[k] - mean) * (x[k] - mean) / kWidth;
        const double rstd = 1 / std::sqrt(variance + eps);
        for (int64_t k = 0; k < kWidth; ++k) {
            sum += (x[k] - mean) * rstd * double(weight[static_cast<size_t>(column * kWidth + k)]);
        }
        return sum;
    }

    double largest_error(const std::vector<float>& out) const {
        double largest = 0;
        for (int64_t row = 0; row < rows(); ++row) {
            for (int64_t column = 0; column < kHidden; ++column) {
                const double expected =
                    row < kRows
                        ? projected(row, column)
                        : double(table[static_cast<size_t>(ids[static_cast<size_t>(row - kRows)] * kHidden + column)]);
                const double error = std::abs(double(out[static_cast<size_t>(row * kHidden + column)]) - expected);
                largest = std::isnan(error) ? INFINITY : std::max(largest, error);
            }
        }
        return largest;
    }
};

// Sums of 301 products of about 1 in float32; a wrong index gives errors of about 1.
constexpr double kExampleTolerance = 1e-4;

}  // namespace biomedgpt::testing
