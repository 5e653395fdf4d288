// Each kernel of the GPU decoder, and what kernels are made of, against double precision: in the emulation of a GPU,
// and, compiled by nvcc (test_decoder_kernels.cu), on one.
#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "decoder/attend.h"
#include "decoder/attend_prompt.h"
#include "decoder/embed.h"
#include "decoder/norm.h"
#include "decoder/product.h"
#include "decoder_example.h"
#include "gpu_test.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

// Sums in float32 of products of halves, which are exact.
constexpr double kFloat = 3e-6;
// One rounding to a half.
constexpr double kHalf = 6e-4;

// Rows of halves in the order of products, zeros behind them.
std::vector<uint16_t> ordered(const Numbers& rows, int64_t columns, int64_t pitch) {
    std::vector<uint16_t> halves(rows.size() / static_cast<size_t>(columns) * static_cast<size_t>(pitch));
    for (size_t i = 0; i < rows.size(); ++i) {
        const auto row = static_cast<int64_t>(i) / columns, column = static_cast<int64_t>(i) % columns;
        halves[static_cast<size_t>(row * pitch + place_of(static_cast<int>(column)))] =
            float_to_half(static_cast<float>(rows[i]));
    }
    return halves;
}

Numbers from_ordered(const std::vector<uint16_t>& halves, int64_t columns, int64_t pitch) {
    Numbers rows;
    for (size_t row = 0; row < halves.size() / static_cast<size_t>(pitch); ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            rows.push_back(half_to_float(
                halves[row * static_cast<size_t>(pitch) + static_cast<size_t>(place_of(static_cast<int>(column)))]));
        }
    }
    return rows;
}

template <class Kernel>
void launch_product(Gpu& gpu, const ProductParams& params) {
    const int panels = (params.rows + kPanel - 1) / kPanel;
    gpu.launch<Kernel>({(params.count + Kernel::kColumns - 1) / Kernel::kColumns, Kernel::units_of(panels)},
                       Kernel::shared_bytes(params.groups * params.group, params.count), params);
}

// A matrix and rows of halves on the GPU.
struct Operands {
    OnGpu<uint8_t> records;
    OnGpu<float> bias;
    OnGpu<uint16_t> x;
    ProductParams params;

    Operands(Gpu& gpu, const RandomMatrix& matrix, const std::vector<uint8_t>& records,
             const std::vector<uint16_t>& halves, int64_t pitch, int count)
        : records(gpu, records), bias(gpu, matrix.bias.empty() ? std::vector<float>(1) : matrix.bias), x(gpu, halves) {
        params.records = this->records.get();
        params.bias = matrix.bias.empty() ? nullptr : bias.get();
        params.rows = static_cast<int>(matrix.rows);
        params.group = static_cast<int>(matrix.group);
        params.groups = static_cast<int>((matrix.columns + matrix.group - 1) / matrix.group);
        params.x = x.get();
        params.pitch = static_cast<int>(pitch);
        params.count = count;
    }
};

Numbers product_of(const RandomMatrix& matrix, const Numbers& x) {
    Numbers y;
    for (size_t at = 0; at < x.size(); at += static_cast<size_t>(matrix.columns)) {
        const auto row = matrix.times(&x[at]);
        y.insert(y.end(), row.begin(), row.end());
    }
    return y;
}

template <int kBits, int kGroup, int kTiles, Output kOutput, int kWarps = kBits == 4 ? 8 : 4>
void check_product(int64_t rows, int64_t columns, int64_t group, int count, bool biased) {
    std::mt19937 random(seed(static_cast<unsigned>(rows + columns + count)));
    RandomMatrix matrix(random, rows, columns, group, kBits);
    if (biased) matrix.bias = floats_of(random_numbers(random, static_cast<size_t>(rows), 1));
    const Numbers x = rounded(random_numbers(random, static_cast<size_t>(count * columns), 1));
    const int64_t pitch = (columns + 127) / 128 * 128;
    const auto halves = ordered(x, columns, pitch);
    Gpu gpu;
    Operands operands(gpu, matrix, matrix.records, halves, pitch, count);
    const std::vector<float> before(static_cast<size_t>(count * rows), kOutput == Output::residual ? 1.5f : NAN);
    const OnGpu<float> sums(gpu, before);
    operands.params.sums = sums.get();
    launch_product<Product<kBits, kGroup, kTiles, Input::halves, kOutput, kWarps>>(gpu, operands.params);
    Numbers expected = product_of(matrix, x);
    if (kOutput == Output::residual) {
        for (double& number : expected) number += 1.5;
    }
    CHECK(difference(sums.back().data(), expected) < kFloat);
}

// Keys and values of a head and more, NaN where no position was.
struct RandomCache {
    CacheShape shape;
    std::vector<uint16_t> halves;

    RandomCache(std::mt19937& random, const CacheShape& of, int layers, int positions)
        : shape(of), halves(static_cast<size_t>(2 * layers * of.kv_heads * of.capacity * of.head_size), 0x7e00) {
        std::normal_distribution<float> normal;
        const auto size = static_cast<size_t>(of.head_size), capacity = static_cast<size_t>(of.capacity);
        for (size_t i = 0; i < halves.size(); ++i) {
            if (i / size % capacity < static_cast<size_t>(positions)) halves[i] = float_to_half(normal(random));
        }
    }

    // Of keys or values of a head.
    uint16_t* head(int side, int head) {
        const int64_t rows = (int64_t{shape.layer} * 2 + side) * shape.kv_heads + head;
        return halves.data() + rows * shape.capacity * shape.head_size;
    }

    Numbers rows(int side, int head, int count) {
        const uint16_t* from = this->head(side, head);
        Numbers found;
        for (int i = 0; i < count * shape.head_size; ++i) found.push_back(half_to_float(from[i]));
        return found;
    }
};

// Rows of queries, [heads * size] each.
Numbers attended_rows(RandomCache& cache, const Numbers& queries, int heads, const std::vector<int>& positions) {
    const int size = cache.shape.head_size;
    Numbers expected;
    for (size_t row = 0; row < positions.size(); ++row) {
        for (int head = 0; head < heads; ++head) {
            const int kv_head = head / (heads / cache.shape.kv_heads), count = positions[row] + 1;
            const auto keys = cache.rows(kKeys, kv_head, count), values = cache.rows(kValues, kv_head, count);
            const auto one = attended(
                &queries[(row * static_cast<size_t>(heads) + static_cast<size_t>(head)) * static_cast<size_t>(size)],
                keys.data(), values.data(), count, size, size);
            expected.insert(expected.end(), one.begin(), one.end());
        }
    }
    return expected;
}

template <int kHeadSize>
void check_attend(int heads, int kv_heads, int splits, const std::vector<int>& positions) {
    std::mt19937 random(seed(static_cast<unsigned>(heads + splits)));
    const int rows = static_cast<int>(positions.size());
    const int most = *std::max_element(positions.begin(), positions.end());
    RandomCache cache(random, {kv_heads, kHeadSize, most + 5, 1}, 2, most + 1);
    const Numbers queries = rounded(random_numbers(random, static_cast<size_t>(rows * heads * kHeadSize), 1));
    std::vector<uint16_t> halves;
    for (const double number : queries) halves.push_back(float_to_half(static_cast<float>(number)));
    Gpu gpu;
    const OnGpu<uint16_t> on_gpu(gpu, cache.halves), from(gpu, halves);
    std::vector<RowPlace> places;
    for (const int position : positions) places.push_back({on_gpu.get(), position, 0});
    const OnGpu<RowPlace> of_rows(gpu, places);
    const int pitch = (heads * kHeadSize + 127) / 128 * 128;
    const OnGpu<uint16_t> out(gpu, std::vector<uint16_t>(static_cast<size_t>(rows * pitch), 0x7e00));
    const auto kept = static_cast<size_t>(rows * heads * splits * (kHeadSize + 2));
    const OnGpu<float> partial(gpu, std::vector<float>(kept, NAN));
    const OnGpu<uint32_t> arrived(gpu, std::vector<uint32_t>(static_cast<size_t>(rows * heads)));
    AttendParams params;
    params.queries = from.get();
    params.out = out.get();
    params.out_pitch = pitch;
    params.cache = cache.shape;
    params.places = of_rows.get();
    params.heads = heads;
    params.heads_per_kv = heads / kv_heads;
    params.splits = splits;
    params.scale = kLog2E / std::sqrt(static_cast<float>(kHeadSize));
    params.partial = partial.get();
    params.arrived = arrived.get();
    for (int again = 0; again < 2; ++again) {  // the counters are as they were
        gpu.launch<Attend<kHeadSize>>({heads, splits, rows}, Attend<kHeadSize>::kShared, params);
    }
    const auto found = from_ordered(out.back(), heads * kHeadSize, pitch);
    CHECK(difference(found.data(), attended_rows(cache, queries, heads, positions)) < kHalf);
    const auto counts = arrived.back();
    CHECK(std::all_of(counts.begin(), counts.end(), [](uint32_t count) { return count == 0; }));
}

template <int kHeadSize>
void check_attend_prompt(int heads, int kv_heads, int start, int rows) {
    std::mt19937 random(seed(static_cast<unsigned>(heads + start + rows)));
    RandomCache cache(random, {kv_heads, kHeadSize, start + rows + 3, 1}, 2, start + rows);
    const Numbers queries = rounded(random_numbers(random, static_cast<size_t>(rows * heads * kHeadSize), 1));
    std::vector<uint16_t> halves;
    for (const double number : queries) halves.push_back(float_to_half(static_cast<float>(number)));
    Gpu gpu;
    const OnGpu<uint16_t> on_gpu(gpu, cache.halves), from(gpu, halves);
    std::vector<RowPlace> places;
    std::vector<int> positions;
    for (int i = 0; i < rows; ++i) {
        places.push_back({on_gpu.get(), start + i, 0});
        positions.push_back(start + i);
    }
    const int pitch = (heads * kHeadSize + 127) / 128 * 128;
    const OnGpu<RowPlace> of_rows(gpu, places);
    const OnGpu<uint16_t> out(gpu, std::vector<uint16_t>(static_cast<size_t>(rows * pitch), 0x7e00));
    using Kernel = AttendPrompt<kHeadSize>;
    gpu.launch<Kernel>({(rows + Kernel::kRows - 1) / Kernel::kRows, heads}, Kernel::kShared,
                       {from.get(), out.get(), pitch, rows, cache.shape, of_rows.get(), heads,
                        kLog2E / std::sqrt(static_cast<float>(kHeadSize))});
    const auto found = from_ordered(out.back(), heads * kHeadSize, pitch);
    // Weights are halves, too.
    CHECK(difference(found.data(), attended_rows(cache, queries, heads, positions)) < 2 * kHalf);
}

template <int kHeadSize, Input kInput>
void check_qkv(int heads, int kv_heads, int count, bool biased) {
    std::mt19937 random(seed(static_cast<unsigned>(heads + count)));
    const int columns = 104, rows = (heads + 2 * kv_heads) * kHeadSize, group = 64, pitch = 128;
    RandomMatrix matrix(random, rows, columns, group);
    if (biased) matrix.bias = floats_of(random_numbers(random, static_cast<size_t>(rows), 1));
    RandomCache cache(random, {kv_heads, kHeadSize, 40, 1}, 2, 0);
    const RandomRope rope(40, kHeadSize);
    const auto source = floats_of(random_numbers(random, static_cast<size_t>(count * columns), 2));
    const auto gain = floats_of(random_numbers(random, static_cast<size_t>(columns), 1));
    Gpu gpu;
    const OnGpu<uint16_t> on_gpu(gpu, cache.halves);
    Numbers x;
    std::vector<RowPlace> places;
    for (int i = 0; i < count; ++i) {
        const Numbers row = widened({source.begin() + i * columns, source.begin() + (i + 1) * columns});
        const Numbers one = rounded(kInput == Input::normed ? normed(row.data(), gain, 1e-5) : row);
        x.insert(x.end(), one.begin(), one.end());
        places.push_back({on_gpu.get(), 3 + 2 * i, 0});
    }
    const auto halves = ordered(x, columns, pitch);
    Operands operands(gpu, matrix, matrix.records, halves, pitch, count);
    const OnGpu<float> rows_of(gpu, source), gains(gpu, gain), cos(gpu, rope.cos), sin(gpu, rope.sin);
    const OnGpu<RowPlace> of_rows(gpu, places);
    const OnGpu<uint16_t> queries(gpu, std::vector<uint16_t>(static_cast<size_t>(count * heads * kHeadSize), 0x7e00));
    ProductParams& params = operands.params;
    if (kInput == Input::normed) {
        params.x = nullptr;
        params.normed = {rows_of.get(), gains.get(), nullptr, columns, 1e-5f};
    }
    params.out = queries.get();
    params.out_pitch = heads * kHeadSize;
    params.cache = cache.shape;
    params.rope = {cos.get(), sin.get()};
    params.places = of_rows.get();
    params.heads = heads;
    for (int size = kHeadSize; size > 1; size /= 2) ++params.head_bits;
    launch_product<Product<4, 0, 1, kInput, Output::qkv>>(gpu, params);
    cache.halves = on_gpu.back();
    Numbers expected_queries, found_queries, expected, found;
    for (const uint16_t half : queries.back()) found_queries.push_back(half_to_float(half));
    for (int i = 0; i < count; ++i) {
        Numbers row = matrix.times(&x[static_cast<size_t>(i * columns)]);
        const int position = places[static_cast<size_t>(i)].position;
        for (int head = 0; head < heads + kv_heads; ++head) {
            rotate(&row[static_cast<size_t>(head * kHeadSize)], kHeadSize, position, rope.cos, rope.sin);
        }
        expected_queries.insert(expected_queries.end(), row.begin(), row.begin() + heads * kHeadSize);
        expected.insert(expected.end(), row.begin() + heads * kHeadSize, row.end());
        for (const int side : {kKeys, kValues}) {
            for (int head = 0; head < kv_heads; ++head) {
                const auto one = cache.rows(side, head, position + 1);
                found.insert(found.end(), one.end() - kHeadSize, one.end());
            }
        }
    }
    CHECK(difference(found_queries.data(), expected_queries) < kHalf);
    CHECK(difference(found.data(), expected) < kHalf);
    const auto written =
        std::count_if(cache.halves.begin(), cache.halves.end(), [](uint16_t h) { return h != 0x7e00; });
    CHECK(written == 2 * kv_heads * kHeadSize * count);  // and nothing else of the cache
}

// One product of fragments: a [16, 16], b [16, 8].
struct Multiply {
    struct Params {
        const float* a;
        const float* b;
        float* c;
    };
    static constexpr int kThreads = 32, kBlocks = 1;
    static constexpr bool kSharedFirst = false;

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        const int group = simt::lane() / 4, quarter = simt::lane() % 4;
        uint32_t a[4], b[2];
        for (int i = 0; i < 4; ++i) {
            const float* at = p.a + (group + i % 2 * 8) * 16 + quarter * 2 + i / 2 * 8;
            a[i] = simt::half_pair(at[0], at[1]);
        }
        for (int i = 0; i < 2; ++i) {
            const float* at = p.b + (quarter * 2 + i * 8) * 8 + group;
            b[i] = simt::half_pair(at[0], at[8]);
        }
        float c[4] = {};
        simt::mma(c, a, b);
        for (int i = 0; i < 4; ++i) p.c[(group + i / 2 * 8) * 8 + quarter * 2 + i % 2] = c[i];
    }
};

// Four matrices of 8 x 8, by way of shared memory; the last two rows are not there.
struct Transpose {
    struct Params {
        const uint16_t* rows;
        uint32_t* pairs;
    };
    static constexpr int kThreads = 32, kBlocks = 1;
    static constexpr bool kSharedFirst = false;

    BIOMEDGPT_DEVICE static void run(const Params& p) {
        auto* memory = reinterpret_cast<uint16_t*>(simt::shared());
        simt::copy_async(memory + simt::lane() * 8, p.rows + simt::lane() * 8, simt::lane() < 30);
        simt::commit_copies();
        simt::wait_copies<0>();
        simt::sync_warp();
        uint32_t pairs[4];
        simt::load_transposed(pairs, memory + simt::lane() * 8);
        for (int i = 0; i < 4; ++i) p.pairs[simt::lane() * 4 + i] = pairs[i];
    }
};

#if !defined(__CUDACC__)
template <class Body>
struct Bodied {
    using Params = Body;
    static constexpr int kThreads = 64, kBlocks = 1;
    static void run(const Params& body) { body(); }
};

template <class Body>
void run_threads(const Body& body, size_t shared = 256) {
    Gpu gpu;
    gpu.launch<Bodied<Body>>({2, 1, 1}, shared, body);
}

#endif

}  // namespace

#if !defined(__CUDACC__)

// --- the emulation ---------------------------------------------------------------------------------------------------

template <class Body>
bool is_error(const Body& body) {
    try {
        run_threads(body);
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

TEST(simt_barriers_that_some_threads_never_reach_are_errors) {
    CHECK(is_error([] {
        if (simt::lane() != 3) simt::sync_warp();
    }));
    CHECK(is_error([] { simt::lane() == 0 ? simt::sync_warp() : simt::sync_block(); }));
    CHECK(!is_error([] {
        if (simt::warp() == 0) simt::sync_block();  // warps that have ended count as arrived
    }));
}

TEST(simt_a_byte_behind_shared_memory_is_an_error) {
    for (const int byte : {255, 256, 700}) {
        CHECK(is_error([=] {
                  if (simt::thread() == 0) simt::shared()[byte] = 0;
              }) == (byte > 255));
    }
}

TEST(simt_rows_of_matrices_lie_in_shared_memory_at_multiples_of_sixteen) {
    for (const int byte : {0, 112, 240, 8, 256, -16}) {
        CHECK(is_error([=] {
                  uint32_t pairs[4];
                  simt::load_transposed(pairs, simt::shared() + byte);
              }) == (byte % 16 != 0 || byte < 0 || byte > 240));
    }
}

TEST(simt_shared_memory_holds_nan_and_copies_arrive_at_once_or_when_they_are_waited_for) {
    alignas(16) static const float source[4] = {1, 2, 3, 4};
    static std::array<int, 2> early, late;
    static bool poisoned, waited;
    early = late = {};
    poisoned = waited = true;
    for (int i = 0; i < 100; ++i) {
        run_threads([] {
            auto* memory = reinterpret_cast<float*>(simt::shared());
            if (simt::thread() != 0) return;
            poisoned = poisoned && std::isnan(memory[0]) && std::isnan(memory[7]);
            const auto look = [&](size_t moment) { ++(std::isnan(memory[5]) ? late : early)[moment]; };
            simt::copy_async(memory, source);
            simt::commit_copies();
            simt::copy_async(memory + 4, source);
            simt::commit_copies();
            look(0);
            simt::wait_copies<1>();
            look(1);
            waited = waited && memory[1] == 2;
            simt::wait_copies<0>();
            waited = waited && memory[5] == 2;
        });
    }
    CHECK(poisoned && waited);
    for (const size_t moment : {0, 1}) CHECK(early[moment] > 50 && late[moment] > 50);
}

#endif

// --- what kernels are made of
// ------------------------------------------------------------------------------------------

GPU_TEST(mma_multiplies_as_ptx_lays_fragments) {
    std::mt19937 random(seed(1));
    const Numbers a = rounded(random_numbers(random, 16 * 16, 1)), b = rounded(random_numbers(random, 16 * 8, 1));
    Gpu gpu;
    const OnGpu<float> of_a(gpu, floats_of(a)), of_b(gpu, floats_of(b)), found(gpu, std::vector<float>(16 * 8, NAN));
    gpu.launch<Multiply>({1}, 0, {of_a.get(), of_b.get(), found.get()});
    Numbers expected(16 * 8);
    for (size_t i = 0; i < expected.size(); ++i) {
        for (size_t k = 0; k < 16; ++k) expected[i] += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
    }
    CHECK(difference(found.back().data(), expected) < kFloat);
}

GPU_TEST(what_came_asynchronously_is_read_transposed) {
    std::vector<uint16_t> rows(32 * 8);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint16_t>(i + 1);
    Gpu gpu;
    const OnGpu<uint16_t> from(gpu, rows);
    const OnGpu<uint32_t> found(gpu, std::vector<uint32_t>(4 * 32));
    gpu.launch<Transpose>({1}, 2 * 32 * 16, {from.get(), found.get()});
    const auto pairs = found.back();
    for (size_t lane = 0; lane < 32; ++lane) {
        for (size_t matrix = 0; matrix < 4; ++matrix) {
            const size_t row = matrix * 8 + lane % 4 * 2, column = lane / 4;
            const uint32_t pair = rows[row * 8 + column] | uint32_t{rows[(row + 1) * 8 + column]} << 16;
            CHECK(pairs[lane * 4 + matrix] == (row < 30 ? pair : pair & 0u));  // the last two rows were not there
        }
    }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

GPU_TEST(product_of_few_rows) {
    for (const int count : {1, 2, 3, 8}) {
        check_product<4, 128, 1, Output::logits>(77, 256, 128, count, false);
        check_product<4, 128, 1, Output::residual>(64, 1300, 128, count, true);
        check_product<4, 0, 1, Output::residual>(33, 200, 64, count, false);
        check_product<4, 0, 1, Output::logits>(31, 360, 32, count, true);
    }
}

GPU_TEST(product_by_more_warps) {
    // Of which some have no record, one or several.
    check_product<4, 128, 1, Output::residual, 16>(64, 1300, 128, 1, true);
    check_product<4, 128, 1, Output::residual, 16>(33, 4500, 128, 3, false);
    check_product<4, 128, 1, Output::residual, 16>(32, 128, 128, 8, false);
}

GPU_TEST(product_of_eight_bits) {
    for (const int count : {1, 5, 8}) {
        check_product<8, 128, 1, Output::logits>(77, 300, 128, count, false);
        check_product<8, 0, 1, Output::logits>(40, 136, 64, count, false);
        check_product<8, 0, 1, Output::logits>(40, 136, 32, count, false);
    }
}

GPU_TEST(product_of_many_rows) {
    check_product<4, 128, 4, Output::residual>(40, 264, 128, 9, true);
    check_product<4, 128, 4, Output::residual>(32, 128, 128, 33, false);
    check_product<4, 128, 8, Output::residual>(64, 1152, 128, 70, false);
    check_product<4, 128, 6, Output::residual>(40, 300, 128, 94, true);
    check_product<4, 0, 6, Output::residual>(32, 96, 32, 49, false);
    check_product<4, 0, 8, Output::residual>(50, 160, 32, 128, false);
    check_product<4, 0, 4, Output::residual>(50, 72, 64, 32, false);
}

GPU_TEST(product_of_gate_and_up) {
    std::mt19937 random(seed(5));
    const int rows = 75, columns = 200, count = 3, pitch = 256, out_pitch = 128;
    const RandomMatrix gate(random, rows, columns, 128, 4, 0.03), up(random, rows, columns, 128, 4, 0.03);
    const auto both = interleaved(gate, up);
    const Numbers x = rounded(random_numbers(random, count * columns, 1));
    const auto halves = ordered(x, columns, pitch);
    Gpu gpu;
    Operands operands(gpu, gate, both, halves, pitch, count);
    const OnGpu<uint16_t> gated(gpu, std::vector<uint16_t>(count * out_pitch, 0x7e00));
    operands.params.out = gated.get();
    operands.params.out_pitch = out_pitch;
    launch_product<Product<4, 128, 1, Input::halves, Output::gated>>(gpu, operands.params);
    const auto out = gated.back();
    Numbers expected = product_of(gate, x);
    const Numbers other = product_of(up, x);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = silu(expected[i]) * other[i];
    CHECK(difference(from_ordered(out, rows, out_pitch).data(), expected) < kHalf);
    const auto written = std::count_if(out.begin(), out.end(), [](uint16_t half) { return half != 0x7e00; });
    CHECK(written == rows * count);  // zeros that stand behind a row stay
}

GPU_TEST(product_rotates_and_keeps_keys_and_values) {
    check_qkv<128, Input::halves>(2, 1, 3, false);
    check_qkv<64, Input::halves>(3, 3, 2, true);
    check_qkv<32, Input::halves>(3, 1, 4, true);
}

GPU_TEST(product_of_normed_rows) {
    check_qkv<128, Input::normed>(1, 1, 1, true);
    check_qkv<64, Input::normed>(2, 1, 8, false);
    check_qkv<32, Input::normed>(2, 2, 5, false);
}

GPU_TEST(norm_of_picked_rows) {
    std::mt19937 random(seed(2));
    const int columns = 120, pitch = 128;
    const auto source = floats_of(random_numbers(random, 5 * columns, 3));
    const auto gain = floats_of(random_numbers(random, columns, 1));
    const std::vector<int32_t> picked = {4, 0, 4};
    Gpu gpu;
    const OnGpu<float> rows(gpu, source), gains(gpu, gain);
    const OnGpu<int32_t> which(gpu, picked);
    const OnGpu<uint16_t> normed_rows(gpu, std::vector<uint16_t>(3 * pitch, 0x7e00));
    gpu.launch<Norm>({3}, Norm::kShared,
                     {{rows.get(), gains.get(), which.get(), columns, 1e-6f}, normed_rows.get(), pitch});
    const auto out = normed_rows.back();
    Numbers expected;
    for (const int32_t row : picked) {
        const auto from = widened({source.begin() + row * columns, source.begin() + (row + 1) * columns});
        const auto one = normed(from.data(), gain, 1e-6);
        expected.insert(expected.end(), one.begin(), one.end());
    }
    CHECK(difference(from_ordered(out, columns, pitch).data(), expected) < kHalf);
    for (int row = 0; row < 3; ++row) {
        for (int i = columns; i < pitch; ++i) CHECK(out[static_cast<size_t>(row * pitch + i)] == 0);
    }
}

GPU_TEST(attention_of_few_rows) {
    check_attend<128>(2, 1, 1, {0});
    check_attend<128>(2, 2, 4, {37, 2});
    check_attend<64>(4, 2, 16, {5, 130, 0});
    check_attend<64>(2, 1, 3, {64, 65, 66, 67});
    check_attend<32>(3, 1, 7, {99});
    check_attend<64>(2, 1, 5, {300, 63, 64, 191});
    check_attend<128>(1, 1, 3, {500});
}

GPU_TEST(attention_of_a_prompt) {
    check_attend_prompt<128>(1, 1, 0, 65);
    check_attend_prompt<64>(4, 2, 5, 9);
    check_attend_prompt<64>(1, 1, 63, 1);
    check_attend_prompt<32>(2, 1, 100, 130);
}

GPU_TEST(attention_whose_largest_score_comes_last_or_first) {
    // Scores that differ by thousands: what was kept before has to vanish, and nothing may become NaN.
    std::mt19937 random(seed(8));
    for (const int place : {0, 40, 69}) {
        RandomCache cache(random, {1, 32, 70, 0}, 1, 70);
        for (int i = 0; i < 32; ++i) cache.head(kKeys, 0)[place * 32 + i] = float_to_half(900);
        Gpu gpu;
        const OnGpu<uint16_t> on_gpu(gpu, cache.halves), query(gpu, std::vector<uint16_t>(32, float_to_half(30)));
        const OnGpu<RowPlace> at(gpu, {{on_gpu.get(), 69, 0}});
        const OnGpu<uint16_t> out(gpu, std::vector<uint16_t>(128)), prompt(gpu, std::vector<uint16_t>(128));
        const OnGpu<float> partial(gpu, std::vector<float>(4 * 34));
        const OnGpu<uint32_t> arrived(gpu, {0});
        gpu.launch<Attend<32>>(
            {1, 4, 1}, Attend<32>::kShared,
            {query.get(), out.get(), 128, cache.shape, at.get(), 1, 1, 4, 0.25f, partial.get(), arrived.get()});
        gpu.launch<AttendPrompt<32>>({1, 1}, AttendPrompt<32>::kShared,
                                     {query.get(), prompt.get(), 128, 1, cache.shape, at.get(), 1, 0.25f});
        const auto values = cache.rows(kValues, 0, 70);
        const Numbers expected(values.begin() + place * 32, values.begin() + place * 32 + 32);
        CHECK(difference(from_ordered(out.back(), 32, 128).data(), expected) < kHalf);
        CHECK(difference(from_ordered(prompt.back(), 32, 128).data(), expected) < kHalf);
    }
}
