// Times the kernels of the GPU decoder at the sizes of a model, with events, and prints a line of JSON for each: its
// microseconds (the median of some rounds), the bytes that it has to move and the operations that it has to do.
//
// Usage: time_decoder HIDDEN INTERMEDIATE HEADS KV_HEADS HEAD_SIZE VOCABULARY GROUP CAPACITY ROUNDS
// Weights are random; they come from several copies by turns, more than a cache holds. Compiled as C++ it runs the
// emulation, whose times mean nothing.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder/attend.h"
#include "decoder/attend_prompt.h"
#include "decoder/choose.h"
#include "decoder/norm.h"
#include "decoder/product.h"
#include "int4/int4.h"
#include "simt/gpu.h"

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {
namespace {

struct Sizes {
    int hidden, intermediate, heads, kv_heads, head_size, vocabulary, group, capacity, rounds;
};

// Larger than any cache, so that weights come from memory: on the emulation, one copy.
#if defined(__CUDACC__)
constexpr size_t kMoreThanCaches = size_t{512} << 20;
constexpr int kLaunches = 24, kCopyMegabytes = 1024;
#else
constexpr size_t kMoreThanCaches = 1;
constexpr int kLaunches = 1, kCopyMegabytes = 1;
#endif

class Bench {
  public:
    explicit Bench(const Sizes& sizes)
        : sizes_(sizes),
          residual_(random<float>(256 * int64_t{sizes.hidden}, 0x3f000000u)),
          gain_(random<float>(sizes.hidden, 0x3f000000u)),
          x_(random<uint16_t>(256 * int64_t{padded(std::max(sizes.hidden, sizes.intermediate))}, 0x2c00u)),
          out_(gpu_, static_cast<size_t>(256 * int64_t{padded(std::max(sizes.intermediate, width()))}), "output"),
          sums_(gpu_, static_cast<size_t>(256 * int64_t{std::max(sizes.hidden, sizes.vocabulary)}), "sums"),
          cache_(random<uint16_t>(2 * int64_t{sizes.kv_heads} * sizes.capacity * sizes.head_size, 0x2c00u)),
          angles_(random<float>(int64_t{sizes.capacity} * sizes.head_size / 2, 0x3f000000u)),
          places_(gpu_, 256, "places"),
          partial_(gpu_, static_cast<size_t>(8 * sizes.heads * 16 * (sizes.head_size + 2)), "partial"),
          arrived_(gpu_, static_cast<size_t>(8 * sizes.heads), "counters") {
        gpu_.clear(arrived_.get(), arrived_.bytes());
        gpu_.clear(sums_.get(), sums_.bytes());
        gpu_.wait();
    }

    void run() {
        time_copy();
        const int qkv = width() + 2 * sizes_.kv_heads * sizes_.head_size;
        time_product<1, Input::normed, Output::qkv>("norm and qkv", qkv, sizes_.hidden, 1);
        time_product<1, Input::normed, Output::gated>("norm and gate_up", sizes_.intermediate, sizes_.hidden, 1);
        for (const int rows : {1, 2, 4, 8}) {
            time_product<1, Input::halves, Output::qkv>("qkv", qkv, sizes_.hidden, rows);
            time_product<1, Input::halves, Output::residual>("out", sizes_.hidden, width(), rows);
            time_product<1, Input::halves, Output::gated>("gate_up", sizes_.intermediate, sizes_.hidden, rows);
            time_product<1, Input::halves, Output::residual>("down", sizes_.hidden, sizes_.intermediate, rows);
            time_product<1, Input::halves, Output::logits>("head", sizes_.vocabulary, sizes_.hidden, rows);
        }
        for (const int rows : {94, 256}) {
            if (rows > sizes_.capacity) continue;
            time_product<8, Input::halves, Output::qkv>("qkv", qkv, sizes_.hidden, rows);
            time_product<8, Input::halves, Output::residual>("out", sizes_.hidden, width(), rows);
            time_product<8, Input::halves, Output::gated>("gate_up", sizes_.intermediate, sizes_.hidden, rows);
            time_product<8, Input::halves, Output::residual>("down", sizes_.hidden, sizes_.intermediate, rows);
            time_attention_of_a_prompt(rows);
        }
        for (const int depth : {128, 512, 1536}) {
            if (depth < sizes_.capacity) time_attention(depth);
        }
        time_norm();
        time_choice();
    }

  private:
    static int padded(int width) { return (width + 127) / 128 * 128; }
    int width() const { return sizes_.heads * sizes_.head_size; }

    // Numbers whose exponent is that of `like`, so that all are finite.
    template <class T>
    Buffer<T> random(int64_t count, uint32_t like) {
        std::vector<T> values(static_cast<size_t>(count));
        for (T& value : values) {
            const uint32_t mantissa = sizeof(T) == 4 ? random_() & 0x007fffffu : random_() & 0x03ffu;
            const uint32_t bits = like | mantissa;
            std::memcpy(&value, &bits, sizeof value);
        }
        Buffer<T> buffer(gpu_, values.size(), "a benchmark");
        gpu_.copy(buffer.get(), values.data(), buffer.bytes());
        gpu_.wait();
        return buffer;
    }

    // Records of `copies` matrices, one behind the other.
    Buffer<uint8_t> weights(const Int4Shape& shape, size_t copies, int times) {
        const auto bytes = static_cast<size_t>(shape.bytes()) * static_cast<size_t>(times);
        std::vector<uint8_t> one(bytes);
        for (uint8_t& byte : one) byte = static_cast<uint8_t>(random_());
        const auto record = static_cast<size_t>(shape.record_bytes()), values = static_cast<size_t>(16 * shape.group);
        for (size_t at = 0; at < bytes; at += record) {
            for (size_t i = at + values; i < at + record; i += 2) one[i] = 0x66, one[i + 1] = 0x20;  // a scale of .009
        }
        Buffer<uint8_t> all(gpu_, bytes * copies, "weights");
        for (size_t i = 0; i < copies; ++i) gpu_.copy(all.get() + i * bytes, one.data(), bytes);
        gpu_.wait();
        return all;
    }

    // Medians of rounds; `work` is given the number of the launch.
    void time(const std::string& name, int rows, double bytes, double operations,
              const std::function<void(int)>& work) {
        for (int i = 0; i < 3; ++i) work(i);
        std::vector<double> times;
        for (int round = 0; round < sizes_.rounds; ++round) {
            Event begin, end;
            gpu_.record(begin);
            for (int i = 0; i < kLaunches; ++i) work(i);
            gpu_.record(end);
            gpu_.wait();
            times.push_back(end.microseconds_since(begin) / kLaunches);
        }
        std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
        std::printf(
            "{\"kernel\": \"%s\", \"rows\": %d, \"microseconds\": %.3f, \"bytes\": %.0f, \"operations\": %.0f}\n",
            name.c_str(), rows, times[times.size() / 2], bytes, operations);
        std::fflush(stdout);
    }

    void time_copy() {
        const size_t bytes = size_t{kCopyMegabytes} << 20;
        const Buffer<uint8_t> from(gpu_, bytes, "a copy"), to(gpu_, bytes, "a copy");
        time("copy", 1, 2.0 * static_cast<double>(bytes), 0, [&](int) { gpu_.copy(to.get(), from.get(), bytes); });
    }

    void fill_places(int rows, int first) {
        std::vector<RowPlace> places;
        for (int i = 0; i < rows; ++i) places.push_back({cache_.get(), first + i, 0});
        gpu_.copy(places_.get(), places.data(), places.size() * sizeof(RowPlace));
        gpu_.wait();
    }

    template <int kTiles, Input kInput, Output kOutput>
    void time_product(const char* name, int matrix_rows, int columns, int rows) {
        if (sizes_.group == 128) {
            time_kernel<Product<4, 128, kTiles, kInput, kOutput>>(name, kOutput, kInput, matrix_rows, columns, rows);
        } else {
            time_kernel<Product<4, 0, kTiles, kInput, kOutput>>(name, kOutput, kInput, matrix_rows, columns, rows);
        }
    }

    template <class Kernel>
    void time_kernel(const char* name, Output output, Input input, int matrix_rows, int columns, int rows) {
        const Int4Shape shape{matrix_rows, columns, sizes_.group};
        const int times = output == Output::gated ? 2 : 1;
        const auto bytes = static_cast<size_t>(shape.bytes()) * static_cast<size_t>(times);
        const size_t copies = kMoreThanCaches / bytes + 1;
        const Buffer<uint8_t> records = weights(shape, copies, times);
        fill_places(rows, 0);
        ProductParams params;
        params.rows = matrix_rows;
        params.group = sizes_.group;
        params.groups = static_cast<int>(shape.groups());
        params.count = rows;
        params.x = x_.get();
        params.pitch = padded(std::max(sizes_.hidden, sizes_.intermediate));
        if (input == Input::normed) params.normed = {residual_.get(), gain_.get(), nullptr, sizes_.hidden, 1e-5f};
        params.sums = sums_.get();
        params.out = out_.get();
        params.out_pitch = padded(std::max(sizes_.intermediate, width()));
        params.cache = {sizes_.kv_heads, sizes_.head_size, sizes_.capacity, 0};
        params.rope = {angles_.get(), angles_.get()};
        params.places = places_.get();
        params.heads = sizes_.heads;
        for (int size = sizes_.head_size; size > 1; size /= 2) ++params.head_bits;
        const size_t shared = Kernel::shared_bytes(params.groups * params.group, rows);
        if (shared > gpu_.shared_limit()) return;
        const Grid grid{(rows + Kernel::kColumns - 1) / Kernel::kColumns,
                        Kernel::units_of(static_cast<int>(shape.panels()))};
        const double moved = static_cast<double>(bytes) + rows * (2.0 * columns + 4.0 * matrix_rows);
        const double operations = 2.0 * times * rows * static_cast<double>(matrix_rows) * columns;
        time(name, rows, moved, operations, [&](int launch) {
            ProductParams one = params;
            one.records = records.get() + static_cast<size_t>(launch) % copies * bytes;
            gpu_.launch<Kernel>(grid, shared, one);
        });
    }

    float scale() const { return kLog2E / std::sqrt(static_cast<float>(sizes_.head_size)); }

    template <template <int> class Kernel, class Launch>
    void for_head_size(const Launch& launch) {
        if (sizes_.head_size == 32) return launch(Kernel<32>{});
        if (sizes_.head_size == 64) return launch(Kernel<64>{});
        if (sizes_.head_size == 128) return launch(Kernel<128>{});
        throw std::invalid_argument("HEAD_SIZE: 32, 64 or 128");
    }

    void time_attention(int depth) {
        fill_places(1, depth);
        const int blocks = 2 * gpu_.multiprocessors(),
                  splits = std::min(16, std::max(1, (blocks + sizes_.heads - 1) / sizes_.heads));
        const double bytes = 4.0 * sizes_.kv_heads * sizes_.head_size * depth;
        for_head_size<Attend>([&](auto kernel) {
            using Kernel = decltype(kernel);
            AttendParams params;
            params.queries = x_.get();
            params.out = out_.get();
            params.out_pitch = padded(width());
            params.cache = {sizes_.kv_heads, sizes_.head_size, sizes_.capacity, 0};
            params.places = places_.get();
            params.heads = sizes_.heads;
            params.heads_per_kv = sizes_.heads / sizes_.kv_heads;
            params.splits = splits;
            params.scale = scale();
            params.partial = partial_.get();
            params.arrived = arrived_.get();
            time("attend at " + std::to_string(depth), 1, bytes, 4.0 * width() * depth,
                 [&](int) { gpu_.launch<Kernel>({sizes_.heads, splits, 1}, Kernel::kShared, params); });
        });
    }

    void time_attention_of_a_prompt(int rows) {
        fill_places(rows, 0);
        const double bytes = 2.0 * rows * (2.0 * width() + 2.0 * sizes_.kv_heads * sizes_.head_size);
        for_head_size<AttendPrompt>([&](auto kernel) {
            using Kernel = decltype(kernel);
            const AttendPromptParams params = {x_.get(),
                                               out_.get(),
                                               padded(width()),
                                               rows,
                                               {sizes_.kv_heads, sizes_.head_size, sizes_.capacity, 0},
                                               places_.get(),
                                               sizes_.heads,
                                               scale()};
            time("attend, prompt", rows, bytes, 2.0 * width() * rows * (rows + 1.0), [&](int) {
                gpu_.launch<Kernel>({(rows + Kernel::kRows - 1) / Kernel::kRows, sizes_.heads}, Kernel::kShared,
                                    params);
            });
        });
    }

    void time_norm() {
        const NormParams params = {
            {residual_.get(), gain_.get(), nullptr, sizes_.hidden, 1e-5f}, out_.get(), padded(sizes_.hidden)};
        time("norm", 1, 10.0 * sizes_.hidden, 4.0 * sizes_.hidden,
             [&](int) { gpu_.launch<Norm>({1}, Norm::kShared, params); });
    }

    void time_choice() {
        const Buffer<float> logits = random<float>(sizes_.vocabulary, 0x3f800000u);
        const Buffer<Chosen> chosen(gpu_, 1, "a token");
        Buffer<Choice> choice(gpu_, 1, "a choice");
        const struct {
            const char* name;
            Choice choice;
        } cases[] = {{"choose, greedy", {0, 0, 1, 0}}, {"choose, top-k 50, top-p 0.9", {1.25f, 50, 0.9f, 0.5f}}};
        for (const auto& one : cases) {
            gpu_.copy(choice.get(), &one.choice, sizeof(Choice));
            gpu_.wait();
            ChooseParams params;
            params.logits = logits.get();
            params.width = params.count = sizes_.vocabulary;
            params.choices = choice.get();
            params.chosen = chosen.get();
            time(one.name, 1, 4.0 * sizes_.vocabulary, sizes_.vocabulary,
                 [&](int) { gpu_.launch<Choose>({1}, Choose::kShared, params); });
        }
    }

    Gpu gpu_;
    std::mt19937 random_{1};
    Sizes sizes_;
    Buffer<float> residual_, gain_;
    Buffer<uint16_t> x_, out_;
    Buffer<float> sums_;
    Buffer<uint16_t> cache_;
    Buffer<float> angles_;
    Buffer<RowPlace> places_;
    Buffer<float> partial_;
    Buffer<uint32_t> arrived_;
};

}  // namespace
}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt

int main(int count, char** given) {
    if (count != 10) {
        std::fprintf(stderr,
                     "time_decoder HIDDEN INTERMEDIATE HEADS KV_HEADS HEAD_SIZE VOCABULARY GROUP CAPACITY ROUNDS\n");
        return 2;
    }
    int numbers[9];
    for (int i = 0; i < 9; ++i) numbers[i] = std::atoi(given[i + 1]);
    try {
        biomedgpt::Bench({numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6],
                          numbers[7], numbers[8]})
            .run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
