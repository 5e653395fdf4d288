// What kernels of the decoder count on.
#include <limits>
#include <set>
#include <utility>

#include "attention/attention.h"
#include "common/error.h"
#include "decoder/decoder.h"
#include "decoder/head_layout.h"
#include "int4/int4.h"

namespace biomedgpt {
namespace {

// What keeps every index of a launch within 31 bits, and products of sizes within 64.
constexpr int64_t kMaxWidth = int64_t{1} << 20, kMaxCount = int64_t{1} << 20;

void require(bool holds, const std::string& what, int64_t given, const std::string& expected) {
    if (!holds) throw ArgumentError(what, std::to_string(given), expected);
}

void require_there(const void* pointer, const std::string& what) {
    if (pointer == nullptr) throw ArgumentError(what, "nothing", "an array");
}

void check_matrix(const std::string& name, const DecoderMatrix& matrix, int64_t rows, int64_t columns, int times) {
    require_there(matrix.records, name);
    require(matrix.rows == rows, name + ".rows", matrix.rows, std::to_string(rows));
    require(matrix.columns == columns, name + ".columns", matrix.columns, std::to_string(columns));
    require(matrix.bits == 4 || matrix.bits == 8, name + ".bits", matrix.bits, "4 or 8");
    const Int4Shape shape{rows, columns, matrix.group};
    check_int4_shape(shape);
    const int64_t bytes = matrix.bits == 4 ? shape.bytes() : int8_head_bytes(rows, columns, matrix.group);
    require(matrix.bytes == times * bytes, name + ".bytes", matrix.bytes, std::to_string(times * bytes));
}

// Written so that NaN is refused.
void check_choice(const Choice& choice) {
    const auto refuse = [](const char* what, double given, const char* expected) {
        throw ArgumentError(what, std::to_string(given), expected);
    };
    if (!(choice.inverse_temperature >= 0 && choice.inverse_temperature <= std::numeric_limits<float>::max())) {
        refuse("inverse_temperature", choice.inverse_temperature, "0 or more, and finite");
    }
    require(choice.top_k >= 0, "top_k", choice.top_k, "0 or more");
    if (!(choice.top_p > 0 && choice.top_p <= 1)) refuse("top_p", choice.top_p, "above 0, and at most 1");
    if (!(choice.uniform >= 0 && choice.uniform < 1)) refuse("uniform", choice.uniform, "0 or more, and below 1");
}

void check_sizes(const DecoderModel& model) {
    const auto size = model.head_size;
    require(size == 32 || size == 64 || size == 128, "head_size", size, "32, 64 or 128");
    require(model.kv_heads > 0 && model.kv_heads < kMaxHeads, "kv_heads", model.kv_heads, "1 to 4095");
    require(model.heads > 0 && model.heads < kMaxHeads && model.heads % model.kv_heads == 0, "heads", model.heads,
            "a multiple of kv_heads below 4096");
    require(model.hidden > 0 && model.hidden < kMaxWidth && model.hidden % 8 == 0, "hidden", model.hidden,
            "a multiple of 8 below 2^20");
    require(model.intermediate > 0 && model.intermediate < kMaxWidth, "intermediate", model.intermediate,
            "1 to 2^20 - 1");
    if (!(model.epsilon > 0 && model.epsilon < 1)) {
        throw ArgumentError("epsilon", std::to_string(model.epsilon), "above 0, and below 1");
    }
    require(model.vocabulary > 0 && model.vocabulary < kMaxWidth, "vocabulary", model.vocabulary, "1 to 2^20 - 1");
    require(model.positions > 0 && model.positions < kMaxCount, "positions", model.positions, "1 to 2^20 - 1");
    require(!model.layers.empty() && model.layers.size() < 1024, "layers", static_cast<int64_t>(model.layers.size()),
            "1 to 1023");
}

}  // namespace

void check_decoder(const DecoderModel& model, int64_t capacity) {
    check_sizes(model);
    require(capacity > 0 && capacity <= model.positions, "capacity", capacity,
            "1 to the " + std::to_string(model.positions) + " positions of the rotation");
    const int64_t heads_width = model.heads * model.head_size;
    const int64_t qkv_rows = heads_width + 2 * model.kv_heads * model.head_size;
    for (size_t i = 0; i < model.layers.size(); ++i) {
        const DecoderLayer& layer = model.layers[i];
        const std::string name = "layers[" + std::to_string(i) + "].";
        require_there(layer.attention_norm, name + "attention_norm");
        require_there(layer.mlp_norm, name + "mlp_norm");
        check_matrix(name + "qkv", layer.qkv, qkv_rows, model.hidden, 1);
        check_matrix(name + "out", layer.out, model.hidden, heads_width, 1);
        check_matrix(name + "gate_up", layer.gate_up, model.intermediate, model.hidden, 2);
        check_matrix(name + "down", layer.down, model.hidden, model.intermediate, 1);
        for (const DecoderMatrix* matrix : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
            require(matrix->bits == 4, name + "bits", matrix->bits, "4: eight bits are for the head");
        }
    }
    check_matrix("head", model.head, model.head.rows, model.hidden, 1);
    require(model.head.rows < kMaxWidth, "head.rows", model.head.rows, "at most 2^20 - 1");
    require(model.choosable > 0 && model.choosable <= model.head.rows, "choosable", model.choosable,
            "1 to the " + std::to_string(model.head.rows) + " rows of the head");
    require_there(model.final_norm, "final_norm");
    require_there(model.rope_cos, "rope_cos");
    require_there(model.rope_sin, "rope_sin");
    require_there(model.embeddings, "embeddings");
    if ((model.embedding_type == DType::i8) != (model.embedding_scales != nullptr)) {
        throw ArgumentError("embedding_scales", model.embedding_scales == nullptr ? "nothing" : "an array",
                            "an array for an int8 table, and for no other one");
    }
}

void check_call(const DecoderModel& model, int64_t capacity, const DecoderCall& call) {
    const auto count = static_cast<int64_t>(call.rows.size());
    require(count > 0 && count <= kMaxPromptRows, "rows", count, "1 to " + std::to_string(kMaxPromptRows));
    const auto wanted = static_cast<int64_t>(call.wanted.size());
    require(wanted <= kMaxDecodeRows, "wanted", wanted, "at most " + std::to_string(kMaxDecodeRows));
    for (const int64_t row : call.wanted) {
        require(row >= 0 && row < count, "wanted", row, "0 to " + std::to_string(count - 1));
    }
    std::set<std::pair<int64_t, int64_t>> places;
    for (int64_t i = 0; i < count; ++i) {
        const DecoderRow& row = call.rows[static_cast<size_t>(i)];
        require(row.position >= 0 && row.position < capacity, "position", row.position,
                "0 to " + std::to_string(capacity - 1));
        require(call.embeddings != nullptr || (row.token >= 0 && row.token < model.vocabulary), "token", row.token,
                "0 to " + std::to_string(model.vocabulary - 1));
        require(places.insert({row.cache, row.position}).second, "position", row.position, "each position once");
        if (count <= kMaxDecodeRows) continue;
        const DecoderRow& first = call.rows.front();
        require(row.cache == first.cache && row.position == first.position + i, "rows", count,
                "at most " + std::to_string(kMaxDecodeRows) + ", or positions of one cache, one after the other");
    }
    const auto choices = static_cast<int64_t>(call.choices.size());
    require(choices == 0 || choices == wanted, "choices", choices, "one for each wanted row, or none");
    for (const Choice& choice : call.choices) check_choice(choice);
    if (choices > 0) require_there(call.chosen, "chosen");
    if (wanted > 0 && choices == 0) require_there(call.logits, "logits");
}

void check_chain(const DecoderModel& model, int64_t capacity, const DecoderChain& chain) {
    const auto steps = static_cast<int64_t>(chain.choices.size());
    require(steps > 0 && steps <= kMaxChain, "choices", steps, "1 to " + std::to_string(kMaxChain));
    require(chain.row.position >= 0 && chain.row.position <= capacity - steps, "position", chain.row.position,
            "0 to " + std::to_string(capacity - steps));
    require(chain.row.token >= 0 && chain.row.token < model.vocabulary, "token", chain.row.token,
            "0 to " + std::to_string(model.vocabulary - 1));
    require(model.choosable <= model.vocabulary, "choosable", model.choosable, "at most the tokens of the table");
    for (const Choice& choice : chain.choices) check_choice(choice);
    require_there(chain.chosen, "chosen");
}

}  // namespace biomedgpt
