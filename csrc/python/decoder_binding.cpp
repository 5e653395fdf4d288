#include "python/decoder_binding.h"

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "decoder/head_layout.h"
#include "int4/int4.h"
#include "python/arguments.h"
#include "python/cuda_array.h"
#include "python/splice_call.h"

namespace biomedgpt::python {
namespace {

constexpr Expected kFloats{1, "float32 [count], contiguous"};
constexpr Expected kFloatRows{2, "float32 [rows, width], contiguous"};
constexpr Expected kLogits{2, "float32 [wanted, rows of the head], contiguous and writeable"};
constexpr Expected kRecords{2, "uint8 [panels, bytes of a panel], contiguous"};
constexpr Expected kTable{2, "float32, float16 or int8 [vocabulary, hidden], contiguous"};
constexpr Expected kHeadValues{2, "uint8 [N, groups * group], contiguous"};
constexpr Expected kHeadScales{2, "float16 [N, groups], contiguous"};
constexpr Expected kCacheRows{2, "float16 [2 * layers * kv_heads, positions * head_size], contiguous"};

constexpr char kDecoderDoc[] = R"(A decoder on the first GPU; see csrc/decoder/decoder.h.

model: a dict of hidden, intermediate, heads, kv_heads, head_size, epsilon and choosable; rope_cos and rope_sin float32
[positions, head_size / 2]; final_norm float32 [hidden]; embeddings [vocabulary, hidden], float32, float16 or int8, and
embedding_scales, float32 [vocabulary] for int8, otherwise None; head; and layers, a tuple of (attention_norm, qkv, out,
mlp_norm, gate_up, down). A matrix is (records, rows, columns, group, bits, bias or None).
capacity: positions of a KV cache.

Raises KernelArgumentError for anything else, PlatformError where there is no GPU or it has too little memory.)";

constexpr char kRunDoc[] = R"(Appends rows, and returns what was chosen: (token, largest logit) for each of choices.

caches, positions: a list of ints each. x: embeddings float32 [rows, hidden], of the host or a CudaArray of this
decoder; or a list of tokens. wanted: rows.
logits: float32 [wanted, rows of the head], filled, or None. choices: (inverse_temperature, top_k, top_p, uniform) for
each that is wanted, or none.)";

constexpr char kChainDoc[] = R"(Appends a token and those that are chosen behind it; returns as many as choices.)";

constexpr char kArrayDoc[] = R"(A CudaArray of shape (rows,) or (rows, columns), float32 or float16, whatever it holds.

Raises PlatformError where the GPU has not so much memory.)";

constexpr char kSpliceDoc[] = R"(As _native.splice_cuda, on the decoder's stream and with its table.

out, features and weights: CudaArrays of this decoder; or tensors on its GPU, which have to be there until the stream has
passed this call. The kernel is not waited for.)";

// Keeps what a model points at alive while it is read.
class ModelReader {
  public:
    DecoderModel read(const py::dict& given) {
        DecoderModel model;
        model.hidden = number(given, "hidden");
        model.intermediate = number(given, "intermediate");
        model.heads = number(given, "heads");
        model.kv_heads = number(given, "kv_heads");
        model.head_size = number(given, "head_size");
        model.choosable = number(given, "choosable");
        model.epsilon = static_cast<float>(float_of(item(given, "epsilon"), {"epsilon"}));
        const TypedArray& cos = keep(item(given, "rope_cos"), "rope_cos", kFloatRows, DType::f32);
        const TypedArray& sin = keep(item(given, "rope_sin"), "rope_sin", kFloatRows, DType::f32);
        model.positions = cos.rows();
        cos.require(cos.rows(), model.head_size / 2);
        sin.require(cos.rows(), model.head_size / 2);
        model.rope_cos = cos.data<float>();
        model.rope_sin = sin.data<float>();
        model.final_norm = floats(item(given, "final_norm"), "final_norm", model.hidden);
        read_table(given, model);
        model.head = matrix(item(given, "head"), "head");
        const py::object layers = item(given, "layers");
        if (!PyTuple_Check(layers.ptr())) throw ArgumentError("layers", type_name(layers), "a tuple");
        for (const py::handle layer : layers) model.layers.push_back(layer_of(layer, model.hidden));
        return model;
    }

  private:
    static py::object item(const py::dict& given, const char* name) {
        if (!given.contains(name)) throw ArgumentError(name, "nothing", "an entry of the model");
        return given[name];
    }

    static int64_t number(const py::dict& given, const char* name) { return int_of(item(given, name), {name}); }

    const TypedArray& keep(py::handle value, const char* name, const Expected& expected, DType dtype) {
        return kept_.emplace_back(value, name, expected, dtype, Use::read);
    }

    const float* floats(py::handle value, const char* name, int64_t count) {
        const TypedArray& array = keep(value, name, kFloats, DType::f32);
        array.require(count);
        return array.data<float>();
    }

    void read_table(const py::dict& given, DecoderModel& model) {
        Place host;
        const Array& table = tables_.emplace_back(item(given, "embeddings"), ArgName{"embeddings"}, kTable, host);
        const bool known = table.dtype() == DType::f32 || table.dtype() == DType::f16 || table.dtype() == DType::i8;
        if (!known) table.refuse();
        if (!table.contiguous()) table.refuse(", not contiguous");
        if (table.shape(1) != model.hidden) table.refuse(" where the width is " + std::to_string(model.hidden));
        model.embeddings = table.data();
        model.embedding_type = table.dtype();
        model.vocabulary = table.shape(0);
        const py::object scales = item(given, "embedding_scales");
        if (!scales.is_none()) model.embedding_scales = floats(scales, "embedding_scales", model.vocabulary);
    }

    static py::tuple tuple_of(py::handle value, const char* name, size_t size) {
        if (!PyTuple_Check(value.ptr()) || static_cast<size_t>(PyTuple_GET_SIZE(value.ptr())) != size) {
            throw ArgumentError(name, type_name(value), "a tuple of " + std::to_string(size));
        }
        return py::reinterpret_borrow<py::tuple>(value);
    }

    DecoderMatrix matrix(py::handle value, const char* name) {
        const py::tuple given = tuple_of(value, name, 6);
        const TypedArray& records = keep(given[0], name, kRecords, DType::u8);
        DecoderMatrix matrix;
        matrix.records = records.data<uint8_t>();
        matrix.bytes = records.rows() * records.columns();
        matrix.rows = int_of(given[1], {"rows"});
        matrix.columns = int_of(given[2], {"columns"});
        matrix.group = int_of(given[3], {"group"});
        const int64_t bits = int_of(given[4], {"bits"});
        if (bits != 4 && bits != 8) throw ArgumentError("bits", std::to_string(bits), "4 or 8");
        matrix.bits = static_cast<int>(bits);
        if (!given[5].is_none()) matrix.bias = floats(given[5], "bias", matrix.rows);
        return matrix;
    }

    DecoderLayer layer_of(py::handle value, int64_t hidden) {
        const py::tuple given = tuple_of(value, "layers", 6);
        DecoderLayer layer;
        layer.attention_norm = floats(given[0], "attention_norm", hidden);
        layer.qkv = matrix(given[1], "qkv");
        layer.out = matrix(given[2], "out");
        layer.mlp_norm = floats(given[3], "mlp_norm", hidden);
        layer.gate_up = matrix(given[4], "gate_up");
        layer.down = matrix(given[5], "down");
        return layer;
    }

    std::deque<TypedArray> kept_;  // whose elements stay where they are
    std::deque<Array> tables_;
};

py::list list_of(const py::object& value, const char* name) {
    if (!PyList_Check(value.ptr())) throw ArgumentError(name, type_name(value), "a list");
    return py::reinterpret_borrow<py::list>(value);
}

std::vector<int64_t> ints_of(const py::object& given, const char* name) {
    const py::list values = list_of(given, name);
    std::vector<int64_t> ints;
    for (const py::handle value : values) ints.push_back(int_of(value, {name}));
    return ints;
}

std::vector<Choice> choices_of(const py::object& given) {
    const py::list values = list_of(given, "choices");
    std::vector<Choice> choices;
    for (const py::handle value : values) {
        if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != 4) {
            throw ArgumentError("choices", type_name(value), "(inverse_temperature, top_k, top_p, uniform)");
        }
        const auto one = py::reinterpret_borrow<py::tuple>(value);
        const int64_t top_k = int_of(one[1], {"top_k"});
        if (top_k != static_cast<int32_t>(top_k)) throw ArgumentError("top_k", std::to_string(top_k), "fewer");
        choices.push_back({static_cast<float>(float_of(one[0], {"inverse_temperature"})), static_cast<int32_t>(top_k),
                           float_of(one[2], {"top_p"}), float_of(one[3], {"uniform"})});
    }
    return choices;
}

py::list chosen_to(const std::vector<Chosen>& chosen) {
    py::list tokens;
    for (const Chosen& one : chosen) tokens.append(py::make_tuple(one.token, one.largest));
    return tokens;
}

// Of a model on a GPU, what calls are checked with.
class BoundDecoder {
  public:
    BoundDecoder(DecoderMaker make, const py::object& given, int64_t capacity) {
        if (!PyDict_Check(given.ptr())) throw ArgumentError("model", type_name(given), "a dict");
        ModelReader reader;
        const DecoderModel model = reader.read(py::reinterpret_borrow<py::dict>(given));
        hidden_ = model.hidden;
        logits_ = model.head.rows;
        head_size_ = model.head_size;
        const py::gil_scoped_release released;
        decoder_ = make(model, capacity);
        cache_rows_ = 2 * static_cast<int64_t>(model.layers.size()) * model.kv_heads;  // of a model that was checked
    }

    CudaDecoder& decoder() const { return *decoder_; }

    void wait() const {
        const py::gil_scoped_release released;
        decoder_->wait();
    }

    CudaArray array(const py::object& shape, const py::object& dtype) const { return {decoder_, shape, dtype}; }

    void splice(const py::object& out, const py::object& segments, const py::object& allow_16bit) const {
        const bool rounded = bool_of(allow_16bit, {"allow_16bit"});
        const int ordinal = decoder_->ordinal();
        const auto stream = static_cast<int64_t>(reinterpret_cast<intptr_t>(decoder_->stream()));
        SpliceCall call(out, ordinal < 0 ? Place() : Place{true, stream, ordinal});
        call.take_segments(segments);
        const py::gil_scoped_release released;
        decoder_->splice(call.args(), rounded);
    }

    py::list run(const py::object& caches, const py::object& positions, const py::object& x, const py::object& wanted,
                 const py::object& logits, const py::object& choices) const {
        DecoderCall call;
        const auto of_rows = ints_of(caches, "caches"), places = ints_of(positions, "positions");
        if (of_rows.size() != places.size()) {
            throw ArgumentError("positions", std::to_string(places.size()), std::to_string(of_rows.size()));
        }
        for (size_t i = 0; i < places.size(); ++i) call.rows.push_back({of_rows[i], places[i], 0});
        std::deque<TypedArray> kept;
        take_input(x, call, kept);
        call.wanted = ints_of(wanted, "wanted");
        call.choices = choices_of(choices);
        if (!logits.is_none()) {
            const TypedArray& to = kept.emplace_back(logits, "logits", kLogits, DType::f32, Use::filled);
            to.require(static_cast<int64_t>(call.wanted.size()), logits_);
            call.logits = to.data<float>();
        }
        std::vector<Chosen> chosen(call.choices.size());
        call.chosen = chosen.data();
        {
            const py::gil_scoped_release released;
            decoder_->run(call);
        }
        return chosen_to(chosen);
    }

    py::list run_chain(const py::object& cache, const py::object& position, const py::object& token,
                       const py::object& choices) const {
        DecoderChain chain;
        chain.row = {int_of(cache, {"cache"}), int_of(position, {"position"}), int_of(token, {"token"})};
        chain.choices = choices_of(choices);
        std::vector<Chosen> chosen(chain.choices.size());
        chain.chosen = chosen.data();
        {
            const py::gil_scoped_release released;
            decoder_->run_chain(chain);
        }
        return chosen_to(chosen);
    }

    int64_t new_cache() const {
        const py::gil_scoped_release released;
        return decoder_->new_cache();
    }

    void free_cache(const py::object& cache) const {
        const int64_t freed = int_of(cache, {"cache"});
        const py::gil_scoped_release released;
        decoder_->free_cache(freed);
    }

    void trim() const {
        const py::gil_scoped_release released;
        decoder_->trim();
    }

    void read_cache(const py::object& cache, const py::object& to) const {
        const int64_t from = int_of(cache, {"cache"});
        const TypedArray rows(to, "to", kCacheRows, DType::f16, Use::filled);
        const int64_t positions = positions_of(rows);
        const py::gil_scoped_release released;
        decoder_->read_cache(from, positions, rows.data<uint16_t>());
    }

    void write_cache(const py::object& cache, const py::object& from) const {
        const int64_t to = int_of(cache, {"cache"});
        if (py::isinstance<CudaArray>(from)) {
            const auto& there = py::cast<const CudaArray&>(from);
            const int64_t positions = there.shape(1) / head_size_;
            const bool fits = there.dtype() == DType::f16 && there.rank() == 2 && there.is_of(*decoder_) &&
                              there.shape(0) == cache_rows_ && there.shape(1) == positions * head_size_ &&
                              positions <= decoder_->capacity();
            if (!fits) throw ArgumentError("rows", there.text(), kCacheRows.text);
            const py::gil_scoped_release released;
            decoder_->write_cache(to, positions, reinterpret_cast<const uint16_t*>(there.data()));
            return;
        }
        const TypedArray rows(from, "from", kCacheRows, DType::f16, Use::read);
        const int64_t positions = positions_of(rows);
        const py::gil_scoped_release released;
        decoder_->write_cache(to, positions, rows.data<uint16_t>());
    }

  private:
    void take_input(const py::object& x, DecoderCall& call, std::deque<TypedArray>& kept) const {
        if (PyList_Check(x.ptr())) {
            const auto tokens = ints_of(x, "tokens");
            if (tokens.size() != call.rows.size()) {
                throw ArgumentError("tokens", std::to_string(tokens.size()), std::to_string(call.rows.size()));
            }
            for (size_t i = 0; i < tokens.size(); ++i) call.rows[i].token = tokens[i];
            return;
        }
        if (py::isinstance<CudaArray>(x)) {
            const auto& rows = py::cast<const CudaArray&>(x);
            const bool fits = rows.dtype() == DType::f32 && rows.rank() == 2 && rows.is_of(*decoder_) &&
                              rows.shape(0) == static_cast<int64_t>(call.rows.size()) && rows.shape(1) == hidden_;
            if (!fits) {
                throw ArgumentError("x", rows.text(),
                                    "float32 [" + std::to_string(call.rows.size()) + ", " + std::to_string(hidden_) +
                                        "] of this decoder");
            }
            call.embeddings = reinterpret_cast<const float*>(rows.data());
            return;
        }
        const TypedArray& embeddings = kept.emplace_back(x, "x", kFloatRows, DType::f32, Use::read);
        embeddings.require(static_cast<int64_t>(call.rows.size()), hidden_);
        call.embeddings = embeddings.data<float>();
    }

    int64_t positions_of(const TypedArray& rows) const {
        const int64_t positions = rows.columns() / head_size_;
        rows.require(cache_rows_, positions * head_size_);
        if (positions > decoder_->capacity()) {
            throw ArgumentError("positions", std::to_string(positions),
                                "at most " + std::to_string(decoder_->capacity()));
        }
        return positions;
    }

    std::shared_ptr<CudaDecoder> decoder_;  // and of its arrays
    int64_t hidden_ = 0, logits_ = 0, cache_rows_ = 0, head_size_ = 0;
};

}  // namespace

namespace {

py::tuple int8_head_shape(const py::object& rows, const py::object& columns, const py::object& group) {
    const int64_t n = int_of(rows, {"rows"}),
                  bytes = int8_head_bytes(n, int_of(columns, {"columns"}), int_of(group, {"group"}));
    const int64_t panels = (n + kInt4PanelRows - 1) / kInt4PanelRows;
    return py::make_tuple(panels, bytes / panels);
}

void int8_head_pack(const py::object& records, const py::object& values, const py::object& scales,
                    const py::object& group) {
    const TypedArray to(records, "records", kRecords, DType::u8, Use::filled);
    const TypedArray from(values, "values", kHeadValues, DType::u8, Use::read);
    const TypedArray by_group(scales, "scales", kHeadScales, DType::f16, Use::read);
    const int64_t size = int_of(group, {"group"}), rows = by_group.rows();
    check_int4_shape({1, 1, size});
    const int64_t bytes = int8_head_bytes(rows, by_group.columns() * size, size);
    from.require(rows, by_group.columns() * size);
    const int64_t panels = (rows + kInt4PanelRows - 1) / kInt4PanelRows;
    to.require(panels, bytes / panels);
    const py::gil_scoped_release released;
    biomedgpt::int8_head_pack(rows, by_group.columns() * size, size, from.data<uint8_t>(), by_group.data<uint16_t>(),
                              to.data<uint8_t>());
}

}  // namespace

void bind_head_layout(py::module_& module) {
    module.def("int8_head_shape", &int8_head_shape, py::arg("rows"), py::arg("columns"), py::arg("group"));
    module.def("int8_head_pack", &int8_head_pack, py::arg("records"), py::arg("values"), py::arg("scales"),
               py::arg("group"));
}

void bind_decoder(py::module_& module, DecoderMaker make) {
    bind_cuda_array(module);
    py::class_<BoundDecoder>(module, "CudaDecoder", kDecoderDoc)
        .def(py::init([make](const py::object& model, const py::object& capacity) {
                 return std::make_unique<BoundDecoder>(make, model, int_of(capacity, {"capacity"}));
             }),
             py::arg("model"), py::arg("capacity"))
        .def_property_readonly("device", [](const BoundDecoder& self) { return self.decoder().device(); })
        .def_property_readonly("overlaps", [](const BoundDecoder& self) { return self.decoder().overlaps(); })
        .def_property_readonly("capacity", [](const BoundDecoder& self) { return self.decoder().capacity(); })
        .def_property_readonly("bytes", [](const BoundDecoder& self) { return self.decoder().bytes(); })
        .def_property_readonly("cache_bytes", [](const BoundDecoder& self) { return self.decoder().cache_bytes(); })
        .def_property_readonly("stream",
                               [](const BoundDecoder& self) {
                                   return static_cast<int64_t>(reinterpret_cast<intptr_t>(self.decoder().stream()));
                               })
        .def("wait", &BoundDecoder::wait)
        .def("array", &BoundDecoder::array, kArrayDoc, py::arg("shape"), py::arg("dtype"))
        .def("splice", &BoundDecoder::splice, kSpliceDoc, py::arg("out"), py::arg("segments"), py::arg("allow_16bit"))
        .def("new_cache", &BoundDecoder::new_cache)
        .def("trim", &BoundDecoder::trim)
        .def("free_cache", &BoundDecoder::free_cache, py::arg("cache"))
        .def("read_cache", &BoundDecoder::read_cache, py::arg("cache"), py::arg("to"))
        .def("write_cache", &BoundDecoder::write_cache, py::arg("cache"), py::arg("rows"))
        .def("run", &BoundDecoder::run, kRunDoc, py::arg("caches"), py::arg("positions"), py::arg("x"),
             py::arg("wanted"), py::arg("logits"), py::arg("choices") = py::list())
        .def("run_chain", &BoundDecoder::run_chain, kChainDoc, py::arg("cache"), py::arg("position"), py::arg("token"),
             py::arg("choices"));
}

}  // namespace biomedgpt::python
