// Every path of int4 against a reference, bit for bit, and against double precision; rows beside other rows and
// threads.
#include <algorithm>
#include <cstdio>

#include "int4_example.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

using Random = std::mt19937;

int64_t pick(Random& random, std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
}

Int4Shape random_shape(Random& random) {
    const int64_t group = pick(random, {128, 64, 32});
    const int64_t columns = group * (1 + int64_t(random() % 7)) - pick(random, {0, 0, 1, 31});
    return {pick(random, {1, 5, 31, 32, 33, 64, 70, 96}), columns, group};
}

// Every row of y is what the same row of x gives alone: whatever is beside it, on one thread or several.
void check_every_split(const std::vector<float>& x, int64_t rows, const Int4Matrix& matrix,
                       const std::vector<float>& expected, const char* path) {
    PoolThreads threads(3);
    CHECK(same(int4_product(x, rows, matrix, {threads.parallel_for(), path}), expected));
    const int64_t columns = matrix.shape.columns;
    for (int64_t first = 0, count = 1; first < rows; first += count, ++count) {
        const int64_t taken = std::min(count, rows - first);
        const std::vector<float> part(x.begin() + first * columns, x.begin() + (first + taken) * columns);
        const std::vector<float> of_part(expected.begin() + first * matrix.shape.rows,
                                         expected.begin() + (first + taken) * matrix.shape.rows);
        CHECK(same(int4_product(part, taken, matrix, {{}, path}), of_part));
    }
}

// What rounding may cost: one of float32 for each product and sum of the groups, relative to their magnitudes, and half
// a step of the quantized activations.
double worst_error(const std::vector<float>& x, int64_t rows, const Int4Matrix& matrix, const std::vector<float>& y) {
    const Int4Shape& shape = matrix.shape;
    double worst = 0;
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < shape.rows; ++n) {
            double exact = 0, allowed = 1e-30;
            for (int64_t group = 0; group < shape.groups(); ++group) {
                const int64_t first = group * shape.group, end = std::min(shape.columns, first + shape.group);
                double largest = 0, weights = 0, magnitude = 0;
                for (int64_t k = first; k < end; ++k) {
                    const double value = double(x[size_t(m * shape.columns + k)]);
                    const double weight = double(matrix.scale(n, group)) * matrix.weight(n, k);
                    largest = std::max(largest, std::abs(value));
                    exact += value * weight;
                    weights += std::abs(weight);
                    magnitude += std::abs(value * weight);
                }
                const double half_a_step = largest / 127 * (0.5 + 1e-4);
                allowed +=
                    weights * half_a_step + (magnitude + weights * half_a_step) * double(shape.groups() + 4) * 0x1p-24;
            }
            worst = std::max(worst, std::abs(double(y[size_t(m * shape.rows + n)]) - exact) / allowed);
        }
    }
    return worst;
}

}  // namespace

TEST(int4_agrees_with_its_reference_on_random_shapes) {
    constexpr int kShapes = 1000;
    Random random(1);
    std::printf("int4 paths:");
    for (const char* path : int4_paths()) std::printf(" %s", path);
    std::printf("\n");
    for (int i = 0; i < kShapes; ++i) {
        const Int4Matrix matrix(random_shape(random), random);
        const int64_t rows = pick(random, {1, 1, 2, 3, 4, 5, 7, 8, 9, 12});
        const std::vector<float> x = random_floats(rows * matrix.shape.columns, random);
        const std::vector<float> expected = int4_reference(x, rows, matrix);
        CHECK(worst_error(x, rows, matrix, expected) < 1);
        for (const char* path : int4_paths()) CHECK(same(int4_product(x, rows, matrix, {{}, path}), expected));
    }
}

TEST(int4_rows_do_not_depend_on_how_many_there_are) {
    Random random(2);
    for (int64_t rows : {15, 16, 17, 31, 33, 60, 259}) {
        const Int4Matrix matrix({pick(random, {70, 160}), 128 * pick(random, {1, 5}), pick(random, {128, 64, 32})},
                                random);
        const std::vector<float> x = random_floats(rows * matrix.shape.columns, random);
        const std::vector<float> expected = int4_reference(x, rows, matrix);
        for (const char* path : int4_paths()) check_every_split(x, rows, matrix, expected, path);
    }
}

TEST(int4_sums_are_exact_for_extreme_values) {
    Random random(3);
    for (int64_t group : {128, 64, 32}) {
        for (int weight : {0, 15}) {
            Int4Matrix matrix({40, 2 * group, group});
            std::fill(matrix.values.begin(), matrix.values.end(), static_cast<uint8_t>(weight * 17));
            std::fill(matrix.scales.begin(), matrix.scales.end(), uint16_t{0x3c00});
            matrix.pack();
            for (int64_t rows : {1, 8, 40}) {
                std::vector<float> x(static_cast<size_t>(rows * 2 * group), 127.0f);
                for (size_t i = x.size() / 2; i < x.size(); ++i) x[i] = -127.0f;
                const std::vector<float> expected = int4_reference(x, rows, matrix);
                CHECK(rows == 1 || expected[0] == float(2 * group * 127 * (weight - 8)));
                for (const char* path : int4_paths()) CHECK(same(int4_product(x, rows, matrix, {{}, path}), expected));
            }
        }
    }
}

TEST(int4_agrees_with_its_reference_on_adversarial_blocks) {
    Random random(4);
    constexpr int64_t kRows = 20;
    for (int64_t group : {128, 64, 32}) {
        Int4Matrix matrix({64, 3 * group, group}, random);
        const std::vector<uint16_t> special = {0x0000, 0x8000, 0x0001,
                                               0x83ff, 0x7bff, 0xfbff};  // 0, subnormal, largest
        for (size_t i = 0; i < matrix.scales.size(); i += 2) matrix.scales[i] = special[random() % special.size()];
        matrix.pack();
        std::vector<float> x = random_floats(kRows * 3 * group, random);
        const auto row = [&](int64_t m) { return x.begin() + m * 3 * group; };
        std::fill(row(0), row(1), 0.0f);
        std::fill(row(1), row(2), -3.5f);
        row(2)[1] = 1e30f;
        row(3)[group] = 3.4e38f;
        for (auto at = row(4); at != row(5); ++at) *at *= 1e-37f;
        for (auto at = row(5); at != row(6); ++at) *at *= 1e-30f;
        for (auto at = row(6); at != row(7); ++at) *at = random() % 2 == 0 ? 0.5f : -0.0f;
        const std::vector<float> expected = int4_reference(x, kRows, matrix);
        for (const char* path : int4_paths()) check_every_split(x, kRows, matrix, expected, path);
    }
}

TEST(int4_keeps_a_nan_in_its_row) {
    Random random(5);
    const Int4Matrix matrix({40, 128, 64}, random);
    for (float odd : {INFINITY, -INFINITY, NAN, -NAN}) {
        std::vector<float> x = random_floats(20 * 128, random);
        const std::vector<float> before = int4_reference(x, 20, matrix);
        x[7 * 128 + 100] = odd;
        for (const char* path : int4_paths()) {
            const std::vector<float> y = int4_product(x, 20, matrix, {{}, path});
            for (size_t i = 0; i < y.size(); ++i) CHECK(i / 40 == 7 ? std::isnan(y[i]) : y[i] == before[i]);
        }
    }
}

TEST(int4_gate_up_is_silu_of_one_product_times_the_other) {
    Random random(6);
    for (int64_t rows : {1, 3, 8, 17, 70}) {
        const Int4Shape shape = {pick(random, {30, 64, 100}), 256, pick(random, {128, 32})};
        Int4Matrix gate(shape, random), up(shape, random);
        gate.scales[0] = float_to_half(300.0f);  // far out on both sides of silu
        gate.pack();
        const Int4GateUp both(gate, up);
        const std::vector<float> x = random_floats(rows * shape.columns, random);
        const std::vector<float> of_gate = int4_reference(x, rows, gate), of_up = int4_reference(x, rows, up);
        std::vector<float> first;
        for (const char* path : int4_paths()) {
            PoolThreads threads(2);
            std::vector<float> y(of_gate.size(), NAN);
            int4_gate_up({x.data(), y.data(), rows, both.weights}, {threads.parallel_for(), path});
            for (size_t i = 0; i < y.size(); ++i) {
                const double g = double(of_gate[i]), expected = g / (1 + std::exp(-g)) * double(of_up[i]);
                const double allowed = std::abs(expected) * 0x1p-21 + std::abs(g * double(of_up[i])) * 0x1p-125;
                CHECK(std::abs(double(y[i]) - expected) <= allowed);
            }
            if (first.empty()) first = y;
            CHECK(same(y, first));
        }
    }
}
