// attention: the same bits on every path however calls are cut, no allocation, no thread too many. What it computes is
// held against float64 in tests/kernels/test_attention.py.
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "allocations.h"
#include "attention/attention.h"
#include "common/error.h"
#include "ort/self_test.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

constexpr int64_t kPositions = 150, kHeads = 4, kKvHeads = 2, kHeadSize = 48;
constexpr int64_t kWidth = (kHeads + 2 * kKvHeads) * kHeadSize, kOut = kHeads * kHeadSize;

struct Problem {
    std::vector<float> qkv, cos, sin;

    Problem() : qkv(kPositions * kWidth), cos(kPositions * kHeadSize / 2), sin(cos.size()) {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        for (std::vector<float>* all : {&qkv, &cos, &sin}) {
            for (float& value : *all) value = normal(random);
        }
    }
};

// A cache that holds nothing, in as many bytes as it takes: a sanitizer sees what is beyond.
class Run {
  public:
    Run(const Problem& problem, KvFormat format)
        : problem_(problem), shape_{kKvHeads, kHeadSize, (kPositions + kKvBlock - 1) / kKvBlock, format} {
        const auto floats = static_cast<size_t>(shape_.heads * shape_.blocks * shape_.block_bytes()) / sizeof(float);
        keys_.assign(floats, __builtin_nanf(""));
        values_ = keys_;
        y.assign(kPositions * kOut, 7.0f);
    }

    void append(int64_t rows, const AttentionOptions& options) {
        AttentionArgs args;
        args.qkv = problem_.qkv.data() + length_ * kWidth;
        args.y = y.data() + length_ * kOut;
        args.rows = rows;
        args.first = length_;
        args.heads = kHeads;
        args.cache = {shape_, reinterpret_cast<uint8_t*>(keys_.data()), reinterpret_cast<uint8_t*>(values_.data())};
        args.rope = {problem_.cos.data(), problem_.sin.data(), kPositions};
        causal_attention(args, options);
        length_ += rows;
    }

    std::vector<float> y;

  private:
    const Problem& problem_;
    KvShape shape_;
    std::vector<float> keys_, values_;
    int64_t length_ = 0;
};

constexpr KvFormat kFormats[] = {KvFormat::f32, KvFormat::f16, KvFormat::i8};

}  // namespace

TEST(attention_has_the_same_bits_on_every_path_however_calls_are_cut) {
    const Problem problem;
    for (const KvFormat format : kFormats) {
        Run reference(problem, format);
        reference.append(kPositions, {{}, "portable"});
        for (const char* path : attention_paths()) {
            for (const int threads : {1, 3}) {
                PoolThreads pool(threads);
                Run run(problem, format);
                for (const int64_t rows : {7, 1, 9, 64, 2, 47, 4, 3, 13}) run.append(rows, {pool.parallel_for(), path});
                CHECK(std::memcmp(run.y.data(), reference.y.data(), run.y.size() * sizeof(float)) == 0);
            }
        }
    }
}

TEST(attention_allocates_nothing) {
    const Problem problem;
    for (const KvFormat format : kFormats) {
        PoolThreads pool(2);
        Run run(problem, format);
        run.append(20, {pool.parallel_for(), "auto"});  // starts the pool's threads
        const int64_t before = allocations();
        run.append(60, {pool.parallel_for(), "auto"});
        run.append(1, {pool.parallel_for(), "auto"});
        CHECK(allocations() == before);
    }
}

TEST(attention_refuses_what_the_cache_has_no_room_for) {
    const Problem problem;
    Run run(problem, KvFormat::f16);
    std::string message;
    try {
        run.append(kPositions + 1, {});
    } catch (const ArgumentError& error) {
        message = error.what();
    }
    CHECK(message == "rows: got positions up to 151, expected up to 150, the end of the table of rotations.");
    for (const float value : run.y) CHECK(value == 7.0f);
}

TEST(attention_passes_its_self_test) {
    require_correct_attention();
}
