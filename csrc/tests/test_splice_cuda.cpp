// splice on a device, against double precision. Without a device every case says that it is skipped.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>

#include "common/cuda_device.h"
#include "common/error.h"
#include "common/half.h"
#include "runner.h"
#include "splice/splice_cuda.h"
#include "splice_example.h"

using namespace biomedgpt;
using biomedgpt::testing::SpliceExample;

#define CUDA_TEST(name)                                           \
    static void cuda_test_##name();                               \
    TEST(name) {                                                  \
        if (cuda_device_count() > 0) {                            \
            cuda_test_##name();                                   \
        } else {                                                  \
            std::printf("skipped: " #name " (no CUDA device)\n"); \
        }                                                         \
    }                                                             \
    static void cuda_test_##name()

namespace {

using Random = std::mt19937;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void require(cudaError_t code) {
    if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

// Values of one type on the host and on the device, `offset` elements behind an address that suits every load.
class Values {
  public:
    Values(DType dtype, int64_t count, const std::function<double()>& next, int64_t offset = 0)
        : dtype_(dtype), offset_(offset * size_of(dtype)), bytes_(static_cast<size_t>(count * size_of(dtype))) {
        for (int64_t i = 0; i < count; ++i) set(i, next());
        require(cudaMalloc(&memory_, bytes_.size() + static_cast<size_t>(offset_) + 1));  // of an empty segment too
    }
    ~Values() { cudaFree(memory_); }
    Values(const Values&) = delete;
    Values& operator=(const Values&) = delete;

    DType dtype() const { return dtype_; }
    char* device() const { return static_cast<char*>(memory_) + offset_; }
    void upload() { require(cudaMemcpy(device(), bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice)); }
    void download() { require(cudaMemcpy(bytes_.data(), device(), bytes_.size(), cudaMemcpyDeviceToHost)); }

    void set(int64_t i, double value) {
        if (dtype_ == DType::f32) put(i, static_cast<float>(value));
        if (dtype_ == DType::f16) put(i, float_to_half(static_cast<float>(value)));
        if (dtype_ == DType::i8) put(i, static_cast<int8_t>(std::lround(100 * value)));
    }
    double get(int64_t i) const {
        if (dtype_ == DType::f32) return static_cast<double>(take<float>(i));
        if (dtype_ == DType::f16) return static_cast<double>(half_to_float(take<uint16_t>(i)));
        return take<int8_t>(i);
    }

  private:
    template <typename T>
    void put(int64_t i, T value) {
        std::memcpy(bytes_.data() + static_cast<size_t>(i) * sizeof(T), &value, sizeof(T));
    }
    template <typename T>
    T take(int64_t i) const {
        T value;
        std::memcpy(&value, bytes_.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
        return value;
    }

    DType dtype_;
    int64_t offset_;
    std::vector<char> bytes_;
    void* memory_ = nullptr;
};

struct FeatureSpec {
    int64_t rows = 6;
    int64_t width = 300;
    DType dtype = DType::f32;
    DType weight = DType::f32;
    std::optional<double> eps = std::nullopt;
    double mean = 0;
    double size = 1;     // of features around their mean
    int64_t gap = 0;     // between rows, in elements
    int64_t offset = 0;  // of features and weights, in elements
};

struct Expected {
    double value;
    double bound;  // of the error
};

struct Features {
    FeatureSpec spec;
    int64_t row;
    Values values, weight, bias;

    int64_t stride() const { return spec.width + spec.gap; }

    // A float32 sum of n terms is off by at most n * 2^-24 of their magnitudes, 2^-23 where a tensor core cuts instead
    // of rounding; 64 more such errors are left to the norm. With float16 operands each feature is off by 2^-11 of
    // itself in addition. One product left out of 300 would be off by about 2^-8.
    Expected at(int64_t i, int64_t column, bool half_width) const {
        std::vector<double> x;
        for (int64_t k = 0; k < spec.width; ++k) x.push_back(values.get(i * stride() + k));
        if (spec.eps) normalise(x, *spec.eps);
        double sum = bias.get(column), magnitude = std::abs(sum);
        for (int64_t k = 0; k < spec.width; ++k) {
            const double product = x[static_cast<size_t>(k)] * weight.get(column * spec.width + k);
            sum += product;
            magnitude += std::abs(product);
        }
        const double relative = double(spec.width + 64) * 0x1p-23 + (half_width ? 0x1p-11 : 0);
        return {sum, magnitude * relative};
    }

    static void normalise(std::vector<double>& x, double eps) {
        const auto width = static_cast<double>(x.size());
        double mean = 0, variance = 0;
        for (double value : x) mean += value;
        mean /= width;  // of equal values exactly that value, which a sum of quotients is not
        for (double value : x) variance += (value - mean) * (value - mean) / width;
        for (double& value : x) value = (value - mean) / std::sqrt(variance + eps);
    }
};

// A prompt that grows by segments, runs on the device and is compared with double precision.
class Prompt {
  public:
    explicit Prompt(int64_t hidden, DType table = DType::f32, DType out = DType::f32, int64_t offset = 0)
        : hidden_(hidden),
          out_type_(out),
          offset_(offset),
          table_(
              table, kVocab * hidden, [this] { return uniform(-1, 1); }, offset),
          scales_(DType::f32, kVocab, [this] { return uniform(0.01, 0.02); }) {}

    Prompt& tokens(int64_t count) {
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int64_t>(random_() % kVocab));
        tokens_.push_back({rows_, std::move(ids)});
        rows_ += count;
        return *this;
    }

    Prompt& features(const FeatureSpec& spec) {
        const auto feature = [&] { return spec.mean + spec.size * uniform(-1, 1); };
        const auto weight = [&] { return uniform(-1, 1); };
        const int64_t stored = std::max<int64_t>(0, spec.rows * (spec.width + spec.gap) - spec.gap);
        features_.emplace_back(new Features{spec,
                                            rows_,
                                            {spec.dtype, stored, feature, spec.offset},
                                            {spec.weight, hidden_ * spec.width, weight, spec.offset},
                                            {DType::f32, hidden_, weight}});
        rows_ += spec.rows;
        return *this;
    }

    Features& last() { return *features_.back(); }

    // Segments are passed in the reverse of their order in the prompt: the order must not matter.
    SpliceArgs args(const Values& out) const {
        SpliceArgs args;
        args.out = out.device();
        args.out_dtype = out_type_;
        args.rows = rows_;
        args.hidden = hidden_;
        args.table.rows = {table_.device(), table_.dtype(), kVocab, hidden_, hidden_};
        if (table_.dtype() == DType::i8) {
            args.table.scales = reinterpret_cast<const float*>(scales_.device());
            args.table.scale_count = kVocab;
        }
        for (const Tokens& tokens : tokens_) {
            const auto count = static_cast<int64_t>(tokens.ids.size());
            args.segments.push_back(TokenSegment{tokens.row, tokens.ids.data(), DType::i64, count});
        }
        for (const auto& features : features_) args.segments.push_back(segment_of(*features));
        std::reverse(args.segments.begin(), args.segments.end());
        return args;
    }

    std::vector<double> run(bool allow_16bit) {
        table_.upload();
        scales_.upload();
        for (const auto& features : features_) {
            features->values.upload();
            features->weight.upload();
            features->bias.upload();
        }
        Values out(out_type_, rows_ * hidden_, [] { return kNaN; }, offset_);
        out.upload();
        cudaStream_t stream = nullptr;
        require(cudaStreamCreate(&stream));
        splice_cuda(args(out), allow_16bit, stream);
        require(cudaStreamSynchronize(stream));
        require(cudaStreamDestroy(stream));
        out.download();
        std::vector<double> values;
        for (int64_t i = 0; i < rows_ * hidden_; ++i) values.push_back(out.get(i));
        return values;
    }

    // The largest error of any element, as a multiple of what rounding can explain.
    double worst(bool allow_16bit) {
        const std::vector<double> out = run(allow_16bit);
        double worst = 0;
        const auto compare = [&](int64_t row, int64_t column, Expected expected) {
            if (out_type_ == DType::f16) expected.bound += std::abs(expected.value) * 0x1p-11 + 0x1p-25;
            const double error = std::abs(out[static_cast<size_t>(row * hidden_ + column)] - expected.value);
            const double ratio = error == 0 ? 0 : error / expected.bound;
            worst = std::isnan(ratio) ? kInfinity : std::max(worst, ratio);
        };
        for (const auto& features : features_) {
            const bool half_width = allow_16bit && features->spec.weight == DType::f16;
            for (int64_t i = 0; i < features->spec.rows; ++i) {
                for (int64_t column = 0; column < hidden_; ++column) {
                    compare(features->row + i, column, features->at(i, column, half_width));
                }
            }
        }
        for (const Tokens& tokens : tokens_) {
            for (size_t i = 0; i < tokens.ids.size(); ++i) {
                const int64_t id = tokens.ids[i];
                const double scale = table_.dtype() == DType::i8 ? scales_.get(id) : 1.0;
                for (int64_t column = 0; column < hidden_; ++column) {
                    const double value = table_.get(id * hidden_ + column) * scale;
                    compare(tokens.row + static_cast<int64_t>(i), column, {value, std::abs(value) * 0x1p-24});
                }
            }
        }
        return worst;
    }

  private:
    static constexpr int64_t kVocab = 23;

    struct Tokens {
        int64_t row;
        std::vector<int64_t> ids;
    };

    double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

    FeatureSegment segment_of(const Features& features) const {
        const FeatureSpec& spec = features.spec;
        FeatureSegment segment;
        segment.row = features.row;
        segment.features = {features.values.device(), spec.dtype, spec.rows, spec.width, features.stride()};
        segment.weight = {features.weight.device(), spec.weight, hidden_, spec.width, spec.width};
        segment.bias = reinterpret_cast<const float*>(features.bias.device());
        segment.bias_count = hidden_;
        segment.layer_norm_eps = spec.eps;
        return segment;
    }

    Random random_{biomedgpt::testing::seed(7)};
    int64_t hidden_;
    DType out_type_;
    int64_t offset_;
    Values table_, scales_;
    std::vector<Tokens> tokens_;
    std::vector<std::unique_ptr<Features>> features_;
    int64_t rows_ = 0;
};

}  // namespace

CUDA_TEST(cuda_agrees_with_double) {
    const SpliceExample example;
    std::vector<float> out(static_cast<size_t>(example.rows() * SpliceExample::kHidden), NAN);
    const auto on_device = [](const std::vector<float>& values) {
        auto next = values.begin();
        auto copy = std::make_unique<Values>(DType::f32, static_cast<int64_t>(values.size()), [&] { return *next++; });
        copy->upload();
        return copy;
    };
    const auto table = on_device(example.table), features = on_device(example.features);
    const auto weight = on_device(example.weight), bias = on_device(example.bias), result = on_device(out);
    SpliceArgs args = example.args(out);
    args.out = result->device();
    args.table.rows.data = table->device();
    auto& segment = std::get<FeatureSegment>(args.segments[1]);
    segment.features.data = features->device();
    segment.weight.data = weight->device();
    segment.bias = reinterpret_cast<const float*>(bias->device());
    cudaStream_t stream = nullptr;
    require(cudaStreamCreate(&stream));
    splice_cuda(args, true, stream);  // a permission that float32 weights have no use for
    require(cudaStreamSynchronize(stream));
    require(cudaStreamDestroy(stream));
    result->download();
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(result->get(static_cast<int64_t>(i)));
    CHECK(example.largest_error(out) < testing::kExampleTolerance);
}

CUDA_TEST(cuda_every_type_in_both_arithmetics) {
    for (DType table : {DType::f32, DType::f16, DType::i8}) {
        for (DType out : {DType::f32, DType::f16}) {
            for (DType features : {DType::f32, DType::f16}) {
                for (DType weight : {DType::f32, DType::f16}) {
                    Prompt prompt(72, table, out);
                    FeatureSpec spec;
                    spec.dtype = features;
                    spec.weight = weight;
                    prompt.tokens(5).features(spec);
                    spec.eps = 1e-5;
                    prompt.features(spec).tokens(1);
                    CHECK(prompt.worst(false) <= 1);
                    CHECK(prompt.worst(true) <= 1);
                }
            }
        }
    }
}

CUDA_TEST(cuda_odd_shapes) {
    for (int64_t hidden : {1, 37, 64, 65, 300}) {
        for (int64_t width : {1, 8, 31, 32, 33, 301}) {
            Prompt prompt(hidden);
            for (int64_t rows : {1, 63, 64, 65}) {
                FeatureSpec spec;
                spec.rows = rows;
                spec.width = width;
                spec.weight = rows % 2 == 0 ? DType::f32 : DType::f16;
                prompt.tokens(rows % 7).features(spec);
            }
            CHECK(prompt.worst(false) <= 1);
            CHECK(prompt.worst(true) <= 1);
        }
    }
}

CUDA_TEST(cuda_wide_table_rows) {
    for (int64_t hidden : {1023, 1024, 2500}) {
        for (DType table : {DType::f32, DType::f16, DType::i8}) {
            for (DType out : {DType::f32, DType::f16}) CHECK(Prompt(hidden, table, out).tokens(9).worst(false) <= 1);
        }
    }
}

CUDA_TEST(cuda_any_layout) {
    for (DType dtype : {DType::f32, DType::f16}) {
        for (int64_t offset : {0, 1}) {
            for (int64_t gap : {0, 1, 8}) {
                Prompt prompt(48, dtype, dtype, offset);
                FeatureSpec spec;
                spec.dtype = dtype;
                spec.weight = DType::f16;
                spec.width = 304;
                spec.gap = gap;
                spec.offset = offset;
                spec.eps = 1e-5;
                prompt.tokens(3).features(spec);
                CHECK(prompt.worst(false) <= 1);
                CHECK(prompt.worst(true) <= 1);
            }
        }
    }
}

CUDA_TEST(cuda_empty_segments_and_prompts) {
    FeatureSpec none, some;
    none.rows = 0;
    Prompt prompt(40);
    prompt.tokens(0).features(none).features(some).features(none).tokens(2).tokens(0).features(some);
    CHECK(prompt.worst(false) <= 1);
    CHECK(prompt.worst(true) <= 1);
    CHECK(Prompt(40).tokens(0).run(true).empty());
    CHECK(Prompt(40).run(true).empty());
}

CUDA_TEST(cuda_a_nan_stays_in_its_row) {
    for (double poison : {kNaN, kInfinity}) {
        for (bool normalised : {false, true}) {
            for (int64_t place : {0, 5, 300}) {
                Prompt prompt(70);
                FeatureSpec spec;
                spec.rows = 67;
                spec.width = 301;
                spec.weight = DType::f16;
                if (normalised) spec.eps = 1e-5;
                prompt.features(spec);
                constexpr int64_t kPoisoned = 33;
                prompt.last().values.set(kPoisoned * spec.width + place, poison);
                for (bool allow_16bit : {false, true}) {
                    const std::vector<double> out = prompt.run(allow_16bit);
                    for (int64_t i = 0; i < spec.rows * 70; ++i) {
                        CHECK(std::isfinite(out[static_cast<size_t>(i)]) == (i / 70 != kPoisoned));
                        if (i / 70 == kPoisoned && (normalised || std::isnan(poison))) {
                            CHECK(std::isnan(out[static_cast<size_t>(i)]));
                        }
                    }
                }
            }
        }
    }
}

// As float16 these would be infinite or zero; sizes also differ between the rows of a tile.
CUDA_TEST(cuda_any_magnitude) {
    for (double size : {1e6, 1e30, 1e-6, 1e-30, 1e-40}) {
        FeatureSpec spec;
        spec.weight = DType::f16;
        spec.size = size;
        Prompt prompt(40);
        prompt.features(spec);
        Features& features = prompt.last();
        for (int64_t column = 0; column < 40; ++column) features.bias.set(column, 0);
        for (int64_t k = 0; k < spec.width; ++k) features.values.set(2 * spec.width + k, 0);
        for (int64_t k = 0; k < spec.width; ++k) features.values.set(3 * spec.width + k, std::sin(double(k)));
        // Sums of subnormal floats are off by their spacing, 2^-149, whatever their magnitude.
        if (size > 1e-35) CHECK(prompt.worst(false) <= 1);
        if (size > 1e-35) CHECK(prompt.worst(true) <= 1);
        for (bool allow_16bit : {false, true}) {
            const std::vector<double> out = prompt.run(allow_16bit);
            for (int64_t i = 0; i < spec.rows * 40; ++i) {
                const Expected expected = features.at(i / 40, i % 40, allow_16bit);
                const double bound = expected.bound + double(spec.width) * 0x1p-149;
                CHECK(std::abs(out[static_cast<size_t>(i)] - expected.value) <= bound);
            }
        }
    }
}

// The width is odd on purpose: the padding behind it is -mean * scale before it is cleared, which is infinite in half.
CUDA_TEST(cuda_norm_survives_a_large_mean) {
    for (double mean : {1e3, -1e5}) {
        FeatureSpec spec;
        spec.width = 301;
        spec.weight = DType::f16;
        spec.eps = 1e-5;
        spec.mean = mean;
        Prompt prompt(40);
        prompt.features(spec);
        CHECK(prompt.worst(false) <= 1);
        CHECK(prompt.worst(true) <= 1);
        // A shift that is far from the mean: the first element lies 17 deviations away.
        for (int64_t i = 0; i < spec.rows; ++i) prompt.last().values.set(i * spec.width, 0);
        CHECK(prompt.worst(false) <= 1);
        CHECK(prompt.worst(true) <= 1);
    }
}

CUDA_TEST(cuda_norm_of_a_constant_row_is_the_bias) {
    FeatureSpec spec;
    spec.weight = DType::f16;
    spec.eps = 1e-30;
    spec.mean = 1e3;
    spec.size = 0;
    Prompt prompt(40);
    prompt.features(spec);
    for (bool allow_16bit : {false, true}) {
        const std::vector<double> out = prompt.run(allow_16bit);
        for (int64_t i = 0; i < spec.rows * 40; ++i) {
            CHECK(out[static_cast<size_t>(i)] == prompt.last().bias.get(i % 40));
        }
    }
}

CUDA_TEST(cuda_a_bad_argument_writes_nothing) {
    Prompt prompt(40);
    prompt.tokens(3);
    Values out(DType::f32, 3 * 40, [] { return 7.0; });
    out.upload();
    SpliceArgs args = prompt.args(out);
    args.table.rows.rows = 0;
    bool thrown = false;
    cudaStream_t stream = nullptr;
    require(cudaStreamCreate(&stream));
    try {
        splice_cuda(args, false, stream);
    } catch (const ArgumentError&) {
        thrown = true;
    }
    require(cudaStreamSynchronize(stream));
    require(cudaStreamDestroy(stream));
    out.download();
    CHECK(thrown);
    for (int64_t i = 0; i < 3 * 40; ++i) CHECK(out.get(i) == 7.0);
}
