// Random matrices and models for the decoder's tests, and what they compute in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "common/half.h"
#include "decoder/decoder.h"
#include "decoder/head_layout.h"
#include "int4/int4.h"

namespace biomedgpt::testing {

using Numbers = std::vector<double>;

inline Numbers random_numbers(std::mt19937& random, size_t count, double scale) {
    std::normal_distribution<double> normal(0, scale);
    Numbers numbers(count);
    for (double& number : numbers) number = normal(random);
    return numbers;
}

inline std::vector<float> floats_of(const Numbers& numbers) {
    return std::vector<float>(numbers.begin(), numbers.end());
}

inline Numbers widened(const std::vector<float>& floats) {
    return Numbers(floats.begin(), floats.end());
}

// A matrix in records, and the numbers that it stands for.
struct RandomMatrix {
    int64_t rows, columns, group;
    int bits;
    Numbers values;  // [rows, columns]
    std::vector<uint8_t> records;
    std::vector<float> bias;

    RandomMatrix(std::mt19937& random, int64_t rows, int64_t columns, int64_t group, int bits = 4, double scale = 0.01)
        : rows(rows), columns(columns), group(group), bits(bits) {
        const Int4Shape shape{rows, columns, group};
        const int64_t groups = shape.groups();
        std::uniform_int_distribution<int> level(0, bits == 4 ? 15 : 255);
        std::uniform_real_distribution<float> size(0.5f * static_cast<float>(scale), 1.5f * static_cast<float>(scale));
        std::vector<uint8_t> levels(static_cast<size_t>(rows * groups * group));
        std::vector<uint16_t> scales(static_cast<size_t>(rows * groups));
        for (uint8_t& one : levels) one = static_cast<uint8_t>(level(random));
        for (uint16_t& one : scales) one = float_to_half(size(random));
        const int zero = bits == 4 ? kInt4ZeroPoint : 128;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const int value = levels[static_cast<size_t>(row * groups * group + column)] - zero;
                const uint16_t half = scales[static_cast<size_t>(row * groups + column / group)];
                values.push_back(value * static_cast<double>(half_to_float(half)));
            }
        }
        if (bits == 8) {
            records.resize(static_cast<size_t>(int8_head_bytes(rows, columns, group)));
            int8_head_pack(rows, columns, group, levels.data(), scales.data(), records.data());
            return;
        }
        std::vector<uint8_t> packed(levels.size() / 2);
        for (size_t i = 0; i < packed.size(); ++i) {
            packed[i] = static_cast<uint8_t>(levels[2 * i] | levels[2 * i + 1] << 4);
        }
        records.resize(static_cast<size_t>(shape.bytes()));
        int4_pack(shape, {packed.data(), scales.data()}, records.data());
    }

    // Row `x` of `columns` numbers times the transposed matrix.
    Numbers times(const double* x) const {
        Numbers y(static_cast<size_t>(rows));
        for (int64_t row = 0; row < rows; ++row) {
            double sum = bias.empty() ? 0 : bias[static_cast<size_t>(row)];
            for (int64_t i = 0; i < columns; ++i) sum += values[static_cast<size_t>(row * columns + i)] * x[i];
            y[static_cast<size_t>(row)] = sum;
        }
        return y;
    }

    DecoderMatrix view() const {
        return {records.data(), static_cast<int64_t>(records.size()), rows, columns, group,
                bits,           bias.empty() ? nullptr : bias.data()};
    }
};

// The panels of two matrices by turns.
inline std::vector<uint8_t> interleaved(const RandomMatrix& gate, const RandomMatrix& up) {
    const int64_t panel = Int4Shape{gate.rows, gate.columns, gate.group}.panel_bytes();
    std::vector<uint8_t> both;
    for (int64_t at = 0; at < static_cast<int64_t>(gate.records.size()); at += panel) {
        both.insert(both.end(), gate.records.begin() + at, gate.records.begin() + at + panel);
        both.insert(both.end(), up.records.begin() + at, up.records.begin() + at + panel);
    }
    return both;
}

inline Numbers normed(const double* x, const std::vector<float>& gain, double epsilon) {
    double squares = 0;
    for (size_t i = 0; i < gain.size(); ++i) squares += x[i] * x[i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(gain.size()) + epsilon);
    Numbers y(gain.size());
    for (size_t i = 0; i < gain.size(); ++i) y[i] = x[i] * scale * static_cast<double>(gain[i]);
    return y;
}

// As kernels store what products and attention read.
inline double rounded(double number) {
    return half_to_float(float_to_half(static_cast<float>(number)));
}

inline Numbers rounded(Numbers numbers) {
    for (double& number : numbers) number = rounded(number);
    return numbers;
}

inline double silu(double x) {
    return x / (1 + std::exp(-x));
}

// A head's elements, the first half with the second.
inline void rotate(double* head, int64_t size, int64_t position, const std::vector<float>& cos,
                   const std::vector<float>& sin) {
    for (int64_t i = 0; i < size / 2; ++i) {
        const auto angle = static_cast<size_t>(position * (size / 2) + i);
        const double c = cos[angle], s = sin[angle], first = head[i], second = head[i + size / 2];
        head[i] = first * c - second * s;
        head[i + size / 2] = second * c + first * s;
    }
}

// What a query sees of so many keys and values, each `stride` apart.
inline Numbers attended(const double* query, const double* keys, const double* values, int64_t count, int64_t stride,
                        int64_t size) {
    Numbers scores(static_cast<size_t>(count)), y(static_cast<size_t>(size));
    double most = -INFINITY, total = 0;
    for (int64_t j = 0; j < count; ++j) {
        double& score = scores[static_cast<size_t>(j)];
        for (int64_t i = 0; i < size; ++i) score += query[i] * keys[j * stride + i];
        score /= std::sqrt(static_cast<double>(size));
        most = std::max(most, score);
    }
    for (double& score : scores) total += score = std::exp(score - most);
    for (int64_t j = 0; j < count; ++j) {
        const double weight = scores[static_cast<size_t>(j)] / total;
        for (int64_t i = 0; i < size; ++i) y[static_cast<size_t>(i)] += weight * values[j * stride + i];
    }
    return y;
}

struct RandomRope {
    std::vector<float> cos, sin;

    RandomRope(int64_t positions, int64_t size) {
        for (int64_t position = 0; position < positions; ++position) {
            for (int64_t i = 0; i < size / 2; ++i) {
                const double angle = static_cast<double>(position) *
                                     std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(size));
                cos.push_back(static_cast<float>(std::cos(angle)));
                sin.push_back(static_cast<float>(std::sin(angle)));
            }
        }
    }
};

struct RandomLayer {
    std::vector<float> attention_norm, mlp_norm;
    RandomMatrix qkv, out, gate, up, down;
    std::vector<uint8_t> gate_up;
};

struct ModelSizes {
    int64_t hidden = 64, intermediate = 100, heads = 2, kv_heads = 1, head_size = 32, layers = 2, vocabulary = 50;
    int64_t group = 64;
    int head_bits = 4;
    bool biased = false;
};

// A small random decoder, and the same in double precision, but that what lies in memory as halves is rounded to them.
class RandomModel {
  public:
    explicit RandomModel(const ModelSizes& sizes, unsigned seed = 1)
        : sizes_(sizes),
          random_(seed),
          rope_(kPositions, sizes.head_size),
          final_norm_(gain()),
          head_(random_, sizes.vocabulary + 1, sizes.hidden, sizes.group, sizes.head_bits,
                sizes.head_bits == 4 ? 0.03 : 0.002),
          table_(random_numbers(random_, static_cast<size_t>(sizes.vocabulary * sizes.hidden), 0.5)) {
        const int64_t width = sizes.heads * sizes.head_size, rows = width + 2 * sizes.kv_heads * sizes.head_size;
        for (int64_t i = 0; i < sizes.layers; ++i) {
            layers_.push_back({gain(),
                               gain(),
                               matrix(rows, sizes.hidden),
                               matrix(sizes.hidden, width),
                               matrix(sizes.intermediate, sizes.hidden),
                               matrix(sizes.intermediate, sizes.hidden),
                               matrix(sizes.hidden, sizes.intermediate),
                               {}});
            RandomLayer& layer = layers_.back();
            layer.gate_up = interleaved(layer.gate, layer.up);
            if (!sizes.biased) continue;
            layer.qkv.bias = floats_of(random_numbers(random_, static_cast<size_t>(rows), 0.2));
            layer.out.bias = floats_of(random_numbers(random_, static_cast<size_t>(sizes.hidden), 0.2));
        }
        for (double number : table_) {
            const uint16_t half = float_to_half(static_cast<float>(number));
            halves_.push_back(half);
        }
    }

    static constexpr int64_t kPositions = 300;
    static constexpr float kEpsilon = 1e-5f;

    const ModelSizes& sizes() const { return sizes_; }
    int64_t logits() const { return head_.rows; }

    DecoderModel view() const {
        DecoderModel model;
        model.hidden = sizes_.hidden;
        model.intermediate = sizes_.intermediate;
        model.heads = sizes_.heads;
        model.kv_heads = sizes_.kv_heads;
        model.head_size = sizes_.head_size;
        model.positions = kPositions;
        model.epsilon = kEpsilon;
        for (const RandomLayer& layer : layers_) {
            DecoderMatrix gate_up = layer.gate.view();
            gate_up.records = layer.gate_up.data();
            gate_up.bytes = static_cast<int64_t>(layer.gate_up.size());
            model.layers.push_back({layer.attention_norm.data(), layer.qkv.view(), layer.out.view(),
                                    layer.mlp_norm.data(), gate_up, layer.down.view()});
        }
        model.final_norm = final_norm_.data();
        model.head = head_.view();
        model.rope_cos = rope_.cos.data();
        model.rope_sin = rope_.sin.data();
        model.embeddings = halves_.data();
        model.vocabulary = model.choosable = sizes_.vocabulary;
        return model;
    }

    // Of a token, as the table has it.
    std::vector<float> embedding(int64_t token) const {
        std::vector<float> row;
        for (int64_t i = 0; i < sizes_.hidden; ++i) {
            row.push_back(half_to_float(halves_[static_cast<size_t>(token * sizes_.hidden + i)]));
        }
        return row;
    }

    // Logits of every position of a sequence that begins with these tokens: [tokens, logits()].
    Numbers logits_of(const std::vector<int64_t>& tokens) const {
        Numbers rows;
        for (const int64_t token : tokens) {
            const auto row = embedding(token);
            rows.insert(rows.end(), row.begin(), row.end());
        }
        for (const RandomLayer& layer : layers_) run(layer, rows, static_cast<int64_t>(tokens.size()));
        Numbers found;
        for (size_t i = 0; i < tokens.size(); ++i) {
            const auto row = head_.times(rounded(normed(&rows[i * hidden()], final_norm_, kEpsilon)).data());
            found.insert(found.end(), row.begin(), row.end());
        }
        return found;
    }

  private:
    size_t hidden() const { return static_cast<size_t>(sizes_.hidden); }

    std::vector<float> gain() {
        auto numbers = random_numbers(random_, hidden(), 0.1);
        for (double& number : numbers) number += 1;
        return floats_of(numbers);
    }

    RandomMatrix matrix(int64_t rows, int64_t columns) {
        return RandomMatrix(random_, rows, columns, sizes_.group, 4, 0.4 / std::sqrt(static_cast<double>(columns)));
    }

    void run(const RandomLayer& layer, Numbers& rows, int64_t count) const {
        const int64_t size = sizes_.head_size, heads = sizes_.heads, kv_heads = sizes_.kv_heads;
        const int64_t stride = (heads + 2 * kv_heads) * size;
        Numbers qkv;
        for (int64_t i = 0; i < count; ++i) {
            auto row = layer.qkv.times(
                rounded(normed(&rows[static_cast<size_t>(i) * hidden()], layer.attention_norm, kEpsilon)).data());
            for (int64_t h = 0; h < heads + kv_heads; ++h)
                rotate(&row[static_cast<size_t>(h * size)], size, i, rope_.cos, rope_.sin);
            row = rounded(std::move(row));
            qkv.insert(qkv.end(), row.begin(), row.end());
        }
        for (int64_t i = 0; i < count; ++i) {
            Numbers joined;
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t kv = h / (heads / kv_heads);
                const double* keys = qkv.data() + (heads + kv) * size;
                const auto one =
                    attended(qkv.data() + i * stride + h * size, keys, keys + kv_heads * size, i + 1, stride, size);
                joined.insert(joined.end(), one.begin(), one.end());
            }
            double* row = &rows[static_cast<size_t>(i) * hidden()];
            const auto update = layer.out.times(rounded(joined).data());
            for (size_t j = 0; j < hidden(); ++j) row[j] += update[j];
            const auto x = rounded(normed(row, layer.mlp_norm, kEpsilon));
            auto gated = layer.gate.times(x.data());
            const auto up = layer.up.times(x.data());
            for (size_t j = 0; j < gated.size(); ++j) gated[j] = rounded(silu(gated[j]) * up[j]);
            const auto down = layer.down.times(gated.data());
            for (size_t j = 0; j < hidden(); ++j) row[j] += down[j];
        }
    }

    ModelSizes sizes_;
    std::mt19937 random_;
    RandomRope rope_;
    std::vector<float> final_norm_;
    RandomMatrix head_;
    Numbers table_;
    std::vector<uint16_t> halves_;
    std::vector<RandomLayer> layers_;
};

// The largest difference, as a part of the largest number that is expected; NaN counts as infinite.
template <class T>
double difference(const T* found, const Numbers& expected) {
    double most = 0, largest = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double gap = std::abs(static_cast<double>(found[i]) - expected[i]);
        most = std::max(most, std::isnan(gap) ? INFINITY : gap);
        largest = std::max(largest, std::abs(expected[i]));
    }
    return most / largest;
}

}  // namespace biomedgpt::testing
