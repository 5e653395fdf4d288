#include "python/splice_call.h"

#include <string>

#include "common/error.h"
#include "python/arguments.h"

namespace biomedgpt::python {
namespace {

constexpr Expected kOut{2, "float32 or float16 [rows, hidden], contiguous and writeable"};
constexpr Expected kTable{2, "float32, float16 or int8 [vocab, hidden], contiguous"};
constexpr Expected kScales{1, "float32 [vocab], contiguous, or None"};
constexpr Expected kIds{1, "int64 or int32 [count], contiguous"};
constexpr Expected kFeatures{2, "float32 or float16 [count, in], the elements of a row adjacent"};
constexpr Expected kWeight{2, "float32 or float16 [hidden, in], contiguous"};
constexpr Expected kBias{1, "float32 [hidden], contiguous"};

Matrix matrix_of(const Array& array) {
    const bool strided = array.shape(0) > 1 && array.size() > 0;
    if (!array.adjacent(1) || (strided && array.stride(0) % size_of(array.dtype()) != 0)) {
        array.refuse(" with strides of " + std::to_string(array.stride(0)) + " and " + std::to_string(array.stride(1)) +
                     " bytes");
    }
    const int64_t stride = strided ? array.stride(0) / size_of(array.dtype()) : array.shape(1);
    return {array.data(), array.dtype(), array.shape(0), array.shape(1), stride};
}

const float* floats_of(const Array& vector) {
    if (vector.dtype() != DType::f32) vector.refuse();
    require_contiguous(vector);
    return static_cast<const float*>(vector.data());
}

// A tuple of its own: other threads may change the list while an exporter runs.
py::tuple items_of(py::handle segments) {
    PyObject* items = PySequence_Check(segments.ptr()) ? PySequence_Tuple(segments.ptr()) : nullptr;
    if (items != nullptr) return py::reinterpret_steal<py::tuple>(items);
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw ArgumentError("segments", type_name(segments), "a list or tuple of segments");
}

std::string segment_text(py::handle value) {
    if (!PyTuple_Check(value.ptr())) return type_name(value);
    const auto tuple = py::reinterpret_borrow<py::tuple>(value);
    const std::string text = "a tuple of " + std::to_string(tuple.size());
    if (tuple.empty()) return text;
    constexpr size_t kEnough = 40;
    const py::object first = tuple[0];
    const bool is_text = PyUnicode_Check(first.ptr());
    return text + " that starts with " + (is_text ? std::string(py::repr(first)).substr(0, kEnough) : type_name(first));
}

}  // namespace

void SpliceCall::take_segments(py::handle segments) {
    const py::tuple items = items_of(segments);
    kept_.reserve(kept_.size() + 3 * items.size());
    args_.segments.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) add(items[i], static_cast<int64_t>(i));
}

void SpliceCall::take_table(py::handle table, py::handle scales) {
    args_.table.rows = matrix_of(keep(table, {"table"}, kTable));
    if (scales.is_none()) return;
    const Array& array = keep(scales, {"table_scales"}, kScales);
    args_.table.scales = floats_of(array);
    args_.table.scale_count = array.size();
}

const Array& SpliceCall::keep(py::handle value, const ArgName& name, const Expected& expected) {
    return kept_.emplace_back(value, name, expected, place_);
}

void SpliceCall::set_out(py::handle value) {
    const Array& out = keep(value, {"out"}, kOut);
    const bool is_float = out.dtype() == DType::f32 || out.dtype() == DType::f16;
    if (!is_float) out.refuse();
    if (!out.contiguous()) out.refuse(", not contiguous");
    if (!out.writeable()) out.refuse(", read-only");
    args_.out = out.data();
    args_.out_dtype = out.dtype();
    args_.rows = out.shape(0);
    args_.hidden = out.shape(1);
}

void SpliceCall::add(py::handle value, int64_t index) {
    const auto tuple = PyTuple_Check(value.ptr()) ? py::reinterpret_borrow<py::tuple>(value) : py::tuple();
    const auto is = [&](const char* kind, size_t size) {
        return tuple.size() == size && PyUnicode_Check(tuple[0].ptr()) &&
               PyUnicode_CompareWithASCIIString(tuple[0].ptr(), kind) == 0;
    };
    if (is("tokens", 3)) {
        add_tokens(tuple, index);
    } else if (is("features", 6)) {
        add_features(tuple, index);
    } else {
        throw ArgumentError("segments[" + std::to_string(index) + "]", segment_text(value),
                            "(\"tokens\", row, ids) or "
                            "(\"features\", row, features, weight, bias, layer_norm_eps or None)");
    }
}

void SpliceCall::add_tokens(const py::tuple& tuple, int64_t index) {
    TokenSegment segment;
    segment.row = int_of(tuple[1], {"row", index});
    // Those of a tokenizer, wherever the other arrays are.
    Place host;
    const Array& ids = kept_.emplace_back(tuple[2], ArgName{"ids", index}, kIds, host);
    require_contiguous(ids);
    segment.ids = ids.data();
    segment.ids_dtype = ids.dtype();
    segment.count = ids.size();
    args_.segments.emplace_back(segment);
}

void SpliceCall::add_features(const py::tuple& tuple, int64_t index) {
    FeatureSegment segment;
    segment.row = int_of(tuple[1], {"row", index});
    segment.features = matrix_of(keep(tuple[2], {"features", index}, kFeatures));
    segment.weight = matrix_of(keep(tuple[3], {"weight", index}, kWeight));
    const Array& bias = keep(tuple[4], {"bias", index}, kBias);
    segment.bias = floats_of(bias);
    segment.bias_count = bias.size();
    const py::object eps = tuple[5];
    if (PyFloat_Check(eps.ptr())) {
        segment.layer_norm_eps = PyFloat_AS_DOUBLE(eps.ptr());
    } else if (!eps.is_none()) {
        throw ArgumentError(ArgName{"layer_norm_eps", index}.text(), type_name(eps), "a float or None");
    }
    args_.segments.emplace_back(segment);
}

}  // namespace biomedgpt::python
