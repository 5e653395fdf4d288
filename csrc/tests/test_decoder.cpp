// The GPU decoder as a whole, against double precision: in the emulation of a GPU, and (test_decoder.cu) on one.
#include <algorithm>
#include <functional>
#include <utility>

#include "common/error.h"
#include "decoder_example.h"
#include "gpu_test.h"
#if !defined(__CUDACC__)
#include "decoder_host.h"
#endif

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

// The reference rounds to halves where the kernels do. What is left are numbers that float32 brings to the other side
// of a rounding: of 300 random models, none was further off than 1.4e-3.
constexpr double kHalves = 2e-3;
// And weights of a softmax, which are halves where a prompt's values are multiplied: of 640 random models, two were
// beyond 2e-3, the furthest at 2.5e-3; half of them are below 6e-4.
constexpr double kPromptHalves = 5e-3;

std::unique_ptr<CudaDecoder> make_decoder(const DecoderModel& model, int64_t capacity) {
#if defined(__CUDACC__)
    return make_cuda_decoder(model, capacity);
#else
    return make_emulated_decoder(model, capacity);
#endif
}

std::vector<int64_t> random_tokens(int64_t count, int64_t vocabulary, unsigned seed = 3) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int64_t> token(0, vocabulary - 1);
    std::vector<int64_t> tokens(static_cast<size_t>(count));
    for (int64_t& one : tokens) one = token(random);
    return tokens;
}

// Tokens of one sequence behind `start` positions; logits of all of them, eight at a time.
std::vector<float> run_tokens(CudaDecoder& decoder, const RandomModel& model, int64_t cache, int64_t start,
                              const std::vector<int64_t>& tokens) {
    const auto logits = static_cast<size_t>(model.logits());
    std::vector<float> found(tokens.size() * logits, NAN);
    for (size_t begin = 0; begin < tokens.size(); begin += kMaxDecodeRows) {
        DecoderCall call;
        const size_t end = std::min(begin + kMaxDecodeRows, tokens.size());
        for (size_t i = begin; i < end; ++i) {
            call.rows.push_back({cache, start + static_cast<int64_t>(i), tokens[i]});
            call.wanted.push_back(static_cast<int64_t>(i - begin));
        }
        call.logits = &found[begin * logits];
        decoder.run(call);
    }
    return found;
}

// A prompt in one call; logits of its last position.
std::vector<float> run_prompt(CudaDecoder& decoder, const RandomModel& model, int64_t cache, int64_t start,
                              const std::vector<int64_t>& tokens) {
    std::vector<float> embeddings, found(static_cast<size_t>(model.logits()), NAN);
    DecoderCall call;
    for (size_t i = 0; i < tokens.size(); ++i) {
        const auto row = model.embedding(tokens[i]);
        embeddings.insert(embeddings.end(), row.begin(), row.end());
        call.rows.push_back({cache, start + static_cast<int64_t>(i), -1});
    }
    call.embeddings = embeddings.data();
    call.wanted = {static_cast<int64_t>(tokens.size()) - 1};
    call.logits = found.data();
    decoder.run(call);
    return found;
}

Numbers last_row(const Numbers& rows, int64_t width) {
    return Numbers(rows.end() - width, rows.end());
}

void check_model(const RandomModel& model, std::unique_ptr<CudaDecoder> decoder) {
    const auto tokens = random_tokens(21, model.sizes().vocabulary);
    const Numbers expected = model.logits_of(tokens);
    const int64_t one = decoder->new_cache(), other = decoder->new_cache();
    // Tokens by eights, then a prompt of some and tokens behind it.
    CHECK(difference(run_tokens(*decoder, model, one, 0, tokens).data(), expected) < kHalves);
    const std::vector<int64_t> begin(tokens.begin(), tokens.begin() + 18), rest(tokens.begin() + 18, tokens.end());
    const auto wanted = last_row(Numbers(expected.begin(), expected.begin() + 18 * model.logits()), model.logits());
    CHECK(difference(run_prompt(*decoder, model, other, 0, begin).data(), wanted) < kPromptHalves);
    const Numbers end(expected.begin() + 18 * model.logits(), expected.end());
    CHECK(difference(run_tokens(*decoder, model, other, 18, rest).data(), end) < kHalves);
}

void check_model(const ModelSizes& sizes) {
    const RandomModel model(sizes, seed(1));
    check_model(model, make_decoder(model.view(), 100));
}

std::string message_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

}  // namespace

GPU_TEST(decoder_computes_what_the_model_says) {
    check_model({});
}

GPU_TEST(decoder_takes_every_head_size) {
    check_model({64, 96, 2, 2, 64, 1, 40, 32, 4, false});
    check_model({128, 160, 2, 1, 128, 1, 40, 128, 4, false});
}

GPU_TEST(decoder_takes_widths_that_no_group_divides_and_biases) {
    check_model({72, 88, 3, 1, 32, 2, 33, 64, 4, true});
    check_model({200, 136, 2, 2, 32, 1, 31, 128, 4, true});
}

GPU_TEST(decoder_takes_a_head_of_eight_bits) {
    check_model({64, 64, 2, 2, 32, 1, 70, 64, 8, false});
    check_model({136, 64, 2, 2, 32, 1, 70, 128, 8, false});
}

#if !defined(__CUDACC__)
TEST(decoder_on_a_gpu_with_little_memory_for_a_block) {
    // Too little for what is normed beside the rings: the norm is a kernel of its own then.
    // And for sixteen warps: eight do then.
    const RandomModel model({128, 96, 2, 1, 32, 1, 40, 128, 4, false});
    for (const size_t kilobytes : {64, 99}) {
        check_model(model, make_emulated_decoder(model.view(), 100, size_t{1} << 30, kilobytes << 10));
    }
}

TEST(decoder_refuses_a_gpu_that_is_too_small_before_anything_runs) {
    const RandomModel model(ModelSizes{});
    const auto message = message_of([&] { make_emulated_decoder(model.view(), 100, 1000); });
    CHECK(message.find("for weights") != std::string::npos);
    CHECK(message.find("and 1000 are free") != std::string::npos);
}
#endif

GPU_TEST(decoder_reads_a_prompt_where_it_lies) {
    const RandomModel model(ModelSizes{}, seed(4));
    const auto decoder = make_decoder(model.view(), 100);
    const auto tokens = random_tokens(18, model.sizes().vocabulary);
    const int64_t hidden = model.sizes().hidden, count = static_cast<int64_t>(tokens.size());
    const size_t bytes = static_cast<size_t>(count * hidden) * sizeof(float);
    const auto spliced = decoder->allocate(bytes), rows = decoder->allocate(bytes);
    SpliceArgs args;
    args.out = spliced.get();
    args.rows = count;
    args.hidden = hidden;
    args.segments = {TokenSegment{0, tokens.data(), DType::i64, 10}, TokenSegment{10, &tokens[10], DType::i64, 8}};
    decoder->splice(args, false);
    decoder->copy_within(rows.get(), spliced.get(), bytes);
    std::vector<float> found(static_cast<size_t>(model.logits()), NAN), brought(static_cast<size_t>(count * hidden));
    DecoderCall call;
    const int64_t cache = decoder->new_cache();
    for (int64_t i = 0; i < count; ++i) call.rows.push_back({cache, i, -1});
    call.embeddings = static_cast<const float*>(rows.get());
    call.wanted = {count - 1};
    call.logits = found.data();
    decoder->run(call);
    decoder->copy(brought.data(), rows.get(), bytes);
    CHECK(std::equal(brought.end() - hidden, brought.end(), model.embedding(tokens.back()).begin()));
    // A cache that was freed comes again, unless its memory was given up meanwhile.
    for (const bool trimmed : {false, true}) {
        decoder->free_cache(decoder->new_cache());
        if (trimmed) decoder->trim();
        CHECK(run_prompt(*decoder, model, decoder->new_cache(), 0, tokens) == found);
    }
}

GPU_TEST(decoder_appends_a_prompt_in_chunks) {
    const RandomModel model(ModelSizes{});
    const auto decoder = make_decoder(model.view(), 200);
    const auto tokens = random_tokens(150, model.sizes().vocabulary);
    const Numbers expected = last_row(model.logits_of(tokens), model.logits());
    const int64_t cache = decoder->new_cache();
    run_prompt(*decoder, model, cache, 0, {tokens.begin(), tokens.begin() + 70});
    CHECK(difference(run_prompt(*decoder, model, cache, 70, {tokens.begin() + 70, tokens.end()}).data(), expected) <
          kPromptHalves);
}

GPU_TEST(decoder_runs_several_sequences_at_once) {
    const RandomModel model(ModelSizes{});
    const auto decoder = make_decoder(model.view(), 64);
    const auto logits = static_cast<size_t>(model.logits());
    std::vector<int64_t> caches;
    std::vector<std::vector<int64_t>> sequences;
    for (unsigned i = 0; i < 3; ++i) {
        caches.push_back(decoder->new_cache());
        sequences.push_back(random_tokens(4 + 3 * i, model.sizes().vocabulary, i));
        auto before = sequences.back();
        before.pop_back();
        run_tokens(*decoder, model, caches.back(), 0, before);
    }
    std::vector<float> found(3 * logits);
    DecoderCall call;
    for (size_t i = 0; i < 3; ++i) {
        call.rows.push_back({caches[i], static_cast<int64_t>(sequences[i].size()) - 1, sequences[i].back()});
        call.wanted.push_back(static_cast<int64_t>(i));
    }
    call.logits = found.data();
    decoder->run(call);
    for (size_t i = 0; i < 3; ++i) {
        const auto expected = last_row(model.logits_of(sequences[i]), model.logits());
        CHECK(difference(&found[i * logits], expected) < kHalves);
    }
    // Rows do not depend on each other: one alone gives the same bits.
    CHECK(std::equal(found.begin(), found.begin() + static_cast<int64_t>(logits),
                     run_tokens(*decoder, model, caches[0], 3, {sequences[0].back()}).begin()));
}

GPU_TEST(decoder_gives_the_same_bits_again) {
    const RandomModel model(ModelSizes{});
    const auto decoder = make_decoder(model.view(), 64);
    const int64_t cache = decoder->new_cache();
    const auto tokens = random_tokens(5, model.sizes().vocabulary);
    // The first call launches kernels, the second captures nothing and runs the graph.
    const auto first = run_tokens(*decoder, model, cache, 0, tokens);
    CHECK(run_tokens(*decoder, model, cache, 0, tokens) == first);
    const auto others = run_tokens(*decoder, model, cache, 5, random_tokens(5, model.sizes().vocabulary, 9));
    CHECK(others != first);
    CHECK(run_tokens(*decoder, model, cache, 0, tokens) == first);
}

GPU_TEST(decoder_goes_on_from_a_cache_that_was_kept) {
    const RandomModel model(ModelSizes{});
    const auto tokens = random_tokens(12, model.sizes().vocabulary);
    const std::vector<int64_t> begin(tokens.begin(), tokens.begin() + 9), rest(tokens.begin() + 9, tokens.end());
    const auto first = make_decoder(model.view(), 64), second = make_decoder(model.view(), 40);
    const int64_t from = first->new_cache(), to = second->new_cache();
    run_tokens(*first, model, from, 0, begin);
    std::vector<uint16_t> kept(2 * 2 * 1 * 9 * 32);
    first->read_cache(from, 9, kept.data());
    second->write_cache(to, 9, kept.data());
    CHECK(run_tokens(*second, model, to, 9, rest) == run_tokens(*first, model, from, 9, rest));
}

GPU_TEST(decoder_wants_any_rows_or_none) {
    const RandomModel model(ModelSizes{});
    const auto decoder = make_decoder(model.view(), 64);
    const auto tokens = random_tokens(20, model.sizes().vocabulary);
    const Numbers expected = model.logits_of(tokens);
    const int64_t cache = decoder->new_cache();
    const auto logits = static_cast<size_t>(model.logits());
    DecoderCall call;
    std::vector<float> embeddings, found(3 * logits, NAN);
    for (size_t i = 0; i < tokens.size(); ++i) {
        const auto row = model.embedding(tokens[i]);
        embeddings.insert(embeddings.end(), row.begin(), row.end());
        call.rows.push_back({cache, static_cast<int64_t>(i), 0});
    }
    call.embeddings = embeddings.data();
    decoder->run(call);
    call.wanted = {17, 0, 9};
    call.logits = found.data();
    decoder->run(call);
    for (size_t i = 0; i < 3; ++i) {
        const auto at = static_cast<int64_t>(call.wanted[i]) * model.logits();
        const Numbers wanted(expected.begin() + at, expected.begin() + at + model.logits());
        CHECK(difference(&found[i * logits], wanted) < kHalves);
    }
}

GPU_TEST(decoder_takes_tables_of_other_types) {
    const RandomModel model(ModelSizes{});
    const ModelSizes& sizes = model.sizes();
    const auto tokens = random_tokens(3, sizes.vocabulary);
    std::vector<float> floats, scales;
    std::vector<int8_t> bytes;
    std::vector<float> from_bytes;
    for (int64_t token = 0; token < sizes.vocabulary; ++token) {
        const auto row = model.embedding(token);
        const float scale = 0.01f * static_cast<float>(token + 1);
        scales.push_back(scale);
        for (const float number : row) {
            floats.push_back(number);
            bytes.push_back(static_cast<int8_t>(std::clamp(std::round(number / scale), -127.0f, 127.0f)));
            from_bytes.push_back(static_cast<float>(bytes.back()) * scale);
        }
    }
    const auto logits_of = [&](const void* table, DType type, const float* of_rows) {
        DecoderModel view = model.view();
        view.embeddings = table;
        view.embedding_type = type;
        view.embedding_scales = of_rows;
        const auto decoder = make_decoder(view, 10);
        return run_tokens(*decoder, model, decoder->new_cache(), 0, tokens);
    };
    const auto expected = make_decoder(model.view(), 10);
    CHECK(logits_of(floats.data(), DType::f32, nullptr) ==
          run_tokens(*expected, model, expected->new_cache(), 0, tokens));
    CHECK(logits_of(bytes.data(), DType::i8, scales.data()) == logits_of(from_bytes.data(), DType::f32, nullptr));
}

GPU_TEST(decoder_refuses_what_does_not_fit) {
    const RandomModel model(ModelSizes{});
    const auto refuses = [&](const char* what, const std::function<void(DecoderModel&)>& change, int64_t capacity) {
        DecoderModel view = model.view();
        change(view);
        CHECK(message_of([&] { make_decoder(view, capacity); }).find(what) != std::string::npos);
    };
    refuses("head_size: got 48", [](DecoderModel& view) { view.head_size = 48; }, 10);
    refuses("heads: got 3", [](DecoderModel& view) { view.heads = 3, view.kv_heads = 2; }, 10);
    refuses("hidden: got 60", [](DecoderModel& view) { view.hidden = 60; }, 10);
    refuses("capacity: got 301", [](DecoderModel&) {}, 301);
    refuses("capacity: got 0", [](DecoderModel&) {}, 0);
    refuses("layers[1].down.bytes", [](DecoderModel& view) { view.layers[1].down.bytes -= 1; }, 10);
    refuses("layers[0].qkv.rows", [](DecoderModel& view) { view.layers[0].qkv.rows += 1; }, 10);
    refuses(
        "layers[0].bits", [](DecoderModel& view) { view.layers[0].out.bits = 8, view.layers[0].out.bytes = 64 * 66; },
        10);
    refuses("head.bits: got 2", [](DecoderModel& view) { view.head.bits = 2; }, 10);
    refuses("final_norm: got nothing", [](DecoderModel& view) { view.final_norm = nullptr; }, 10);
    refuses("embedding_scales", [](DecoderModel& view) { view.embedding_type = DType::i8; }, 10);
    refuses("layers: got 0", [](DecoderModel& view) { view.layers.clear(); }, 10);
}

GPU_TEST(decoder_refuses_calls_that_cannot_be) {
    const RandomModel model(ModelSizes{});
    const auto decoder = make_decoder(model.view(), 20);
    const int64_t cache = decoder->new_cache();
    std::vector<float> logits(static_cast<size_t>(9 * model.logits())), embeddings(300 * 64);
    const auto refuses = [&](const char* what, std::vector<DecoderRow> rows, const float* x,
                             std::vector<int64_t> wanted) {
        DecoderCall call;
        call.rows = std::move(rows);
        call.embeddings = x;
        call.wanted = std::move(wanted);
        call.logits = logits.data();
        CHECK(message_of([&] { decoder->run(call); }).find(what) != std::string::npos);
    };
    const float* given = embeddings.data();
    refuses("rows: got 0", {}, nullptr, {});
    refuses("position: got 20", {{cache, 20, 0}}, nullptr, {0});
    refuses("position: got -1", {{cache, -1, 0}}, nullptr, {0});
    refuses("token: got 50", {{cache, 0, 50}}, nullptr, {0});
    refuses("token: got -1", {{cache, 0, -1}}, nullptr, {0});
    refuses("cache: got 77", {{77, 0, 0}}, nullptr, {0});
    refuses("wanted: got 1", {{cache, 0, 0}}, nullptr, {1});
    refuses("position: got 3", {{cache, 3, 0}, {cache, 3, 1}}, nullptr, {0});
    std::vector<DecoderRow> apart, many;
    for (int64_t i = 0; i < 9; ++i) apart.push_back({cache, i < 8 ? i : 10, 0});
    refuses("rows: got 9", apart, given, {0});
    for (int64_t i = 0; i < 257; ++i) many.push_back({cache, i, 0});
    refuses("rows: got 257", many, given, {});
    refuses("wanted: got 9", {{cache, 0, 0}}, given, std::vector<int64_t>(9, 0));
    decoder->free_cache(cache);
    refuses("cache: got", {{cache, 0, 0}}, nullptr, {0});
}
