// Every path of int8 against a reference, bit for bit, and against double precision; rows beside other rows and
// threads.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "int8_example.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

using Random = std::mt19937;

int64_t pick(Random& random, std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
}

Int8Shape random_shape(Random& random) {
    return {pick(random, {1, 5, 31, 32, 33, 64, 70, 96}), 1 + int64_t(random() % 300)};
}

// Every row of y is what the same row of x gives alone: whatever is beside it, on one thread or several.
void check_every_split(const std::vector<float>& x, int64_t rows, const Int8Example& matrix,
                       const std::vector<float>& expected, const char* path) {
    PoolThreads threads(3);
    CHECK(same(int8_product(x, rows, matrix, {threads.parallel_for(), path}), expected));
    const int64_t columns = matrix.shape.columns;
    for (int64_t first = 0, count = 1; first < rows; first += count, ++count) {
        const int64_t taken = std::min(count, rows - first);
        const std::vector<float> part(x.begin() + first * columns, x.begin() + (first + taken) * columns);
        const std::vector<float> of_part(expected.begin() + first * matrix.shape.rows,
                                         expected.begin() + (first + taken) * matrix.shape.rows);
        CHECK(same(int8_product(part, taken, matrix, {{}, path}), of_part));
    }
}

// What rounding may cost: half a step of the quantized activations, and four roundings of float32.
double worst_error(const std::vector<float>& x, int64_t rows, const Int8Example& matrix, const std::vector<float>& y) {
    const Int8Shape& shape = matrix.shape;
    double worst = 0;
    for (int64_t m = 0; m < rows; ++m) {
        double largest = 0;
        const float* row = x.data() + m * shape.columns;
        for (int64_t k = 0; k < shape.columns; ++k) largest = std::max(largest, std::abs(double(row[k])));
        const double half_a_step = largest / 127 * (0.5 + 1e-4);
        for (int64_t n = 0; n < shape.rows; ++n) {
            double exact = double(matrix.biases[size_t(n)]), weights = 0, magnitude = std::abs(exact);
            for (int64_t k = 0; k < shape.columns; ++k) {
                const double weight = double(matrix.scales[size_t(n)]) * matrix.weight(n, k);
                exact += double(row[k]) * weight;
                weights += std::abs(weight);
                magnitude += std::abs(double(row[k]) * weight);
            }
            const double allowed = 1e-30 + weights * half_a_step + (magnitude + weights * half_a_step) * 4 * 0x1p-24;
            worst = std::max(worst, std::abs(double(y[size_t(m * shape.rows + n)]) - exact) / allowed);
        }
    }
    return worst;
}

}  // namespace

TEST(int8_agrees_with_its_reference_on_random_shapes) {
    constexpr int kShapes = 1000;
    Random random(1);
    std::printf("int8 paths:");
    for (const char* path : int8_paths()) std::printf(" %s", path);
    std::printf("\n");
    for (int i = 0; i < kShapes; ++i) {
        const Int8Example matrix(random_shape(random), random);
        const int64_t rows = pick(random, {1, 2, 3, 5, 8, 9, 12, 13, 16, 17, 33});
        const std::vector<float> x = random_floats(rows * matrix.shape.columns, random);
        const std::vector<float> expected = int8_reference(x, rows, matrix);
        CHECK(worst_error(x, rows, matrix, expected) < 1);
        for (const char* path : int8_paths()) CHECK(same(int8_product(x, rows, matrix, {{}, path}), expected));
    }
}

TEST(int8_rows_do_not_depend_on_how_many_there_are) {
    Random random(2);
    const std::pair<int64_t, Int8Shape> sizes[] = {
        {17, {70, 2100}}, {33, {700, 100}}, {60, {300, 1024}}, {515, {40, 64}}};
    for (const auto& [rows, shape] : sizes) {
        const Int8Example matrix(shape, random);
        const std::vector<float> x = random_floats(rows * shape.columns, random);
        const std::vector<float> expected = int8_reference(x, rows, matrix);
        for (const char* path : int8_paths()) check_every_split(x, rows, matrix, expected, path);
    }
}

TEST(int8_sums_are_exact_for_extreme_values) {
    for (int weight : {-127, 127}) {
        Int8Example matrix({33, kMaxInt8Columns});
        std::fill(matrix.values.begin(), matrix.values.end(), static_cast<int8_t>(weight));
        std::fill(matrix.scales.begin(), matrix.scales.end(), 1.0f);
        matrix.pack();
        std::vector<float> x(static_cast<size_t>(2 * kMaxInt8Columns), 127.0f);
        for (size_t i = x.size() / 2; i < x.size(); ++i) x[i] = -127.0f;
        const std::vector<float> expected = int8_reference(x, 2, matrix);
        CHECK(expected[0] == float(kMaxInt8Columns * 127 * weight) && expected[33] == -expected[0]);
        for (const char* path : int8_paths()) CHECK(same(int8_product(x, 2, matrix, {{}, path}), expected));
    }
}

TEST(int8_agrees_with_its_reference_on_adversarial_rows) {
    Random random(4);
    constexpr int64_t kRows = 20, kColumns = 200;
    Int8Example matrix({64, kColumns}, random);
    const float special[] = {0.0f, -0.0f, 1e-45f, 1e-38f, 3e38f, -3e38f};
    for (size_t i = 0; i < matrix.scales.size(); i += 2) matrix.scales[i] = special[random() % 6];
    for (size_t i = 0; i < matrix.biases.size(); i += 3) matrix.biases[i] = special[random() % 6];
    matrix.pack();
    std::vector<float> x = random_floats(kRows * kColumns, random);
    const auto row = [&](int64_t m) { return x.begin() + m * kColumns; };
    std::fill(row(0), row(1), 0.0f);
    std::fill(row(1), row(2), -3.5f);
    row(2)[1] = 1e30f;
    row(3)[100] = 3.4e38f;
    for (auto at = row(4); at != row(5); ++at) *at *= 1e-37f;
    for (auto at = row(5); at != row(6); ++at) *at *= 1e-30f;
    for (auto at = row(6); at != row(7); ++at) *at = random() % 2 == 0 ? 0.5f : -0.0f;
    const std::vector<float> expected = int8_reference(x, kRows, matrix);
    for (const char* path : int8_paths()) check_every_split(x, kRows, matrix, expected, path);
}

TEST(int8_keeps_a_nan_in_its_row) {
    Random random(5);
    const Int8Example matrix({40, 130}, random);
    for (float odd : {INFINITY, -INFINITY, NAN, -NAN}) {
        std::vector<float> x = random_floats(20 * 130, random);
        const std::vector<float> before = int8_reference(x, 20, matrix);
        x[7 * 130 + 100] = odd;
        for (const char* path : int8_paths()) {
            const std::vector<float> y = int8_product(x, 20, matrix, {{}, path});
            for (size_t i = 0; i < y.size(); ++i) CHECK(i / 40 == 7 ? std::isnan(y[i]) : y[i] == before[i]);
        }
    }
}

TEST(int8_applies_gelu_and_adds_the_residual) {
    Random random(6);
    for (int64_t rows : {1, 17, 70}) {
        Int8Example matrix({pick(random, {30, 64, 100}), 256}, random);
        matrix.scales[0] = 1;  // far out on both sides of GELU
        matrix.pack();
        const std::vector<float> x = random_floats(rows * 256, random);
        const std::vector<float> product = int8_reference(x, rows, matrix);
        const std::vector<float> residual = random_floats(rows * matrix.shape.rows, random);
        std::vector<float> first;
        for (const char* path : int8_paths()) {
            PoolThreads threads(2);
            std::vector<float> sum(product.size(), NAN), gelu(product.size(), NAN);
            Int8Args args;
            args.x = x.data();
            args.rows = rows;
            args.weights = matrix.weights();
            args.y = sum.data();
            args.residual = residual.data();
            int8_linear(args, {threads.parallel_for(), path});
            args.y = gelu.data();
            args.residual = nullptr;
            args.gelu = true;
            int8_linear(args, {threads.parallel_for(), path});
            for (size_t i = 0; i < sum.size(); ++i) {
                CHECK(sum[i] == product[i] + residual[i]);
                const double value = double(product[i]), exact = value * 0.5 * std::erfc(-value * std::sqrt(0.5));
                CHECK(std::abs(double(gelu[i]) - exact) <= std::abs(value) * 0x1p-22);
            }
            if (first.empty()) first = gelu;
            CHECK(same(gelu, first));
        }
    }
}
