// The Python binding, and the only file that knows Python: turns arrays into the kernel library's structs without
// copying or casting, releases the GIL, translates errors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/cpu_features.h"
#include "common/cuda_device.h"
#include "common/dtype.h"
#include "common/error.h"
#include "splice/splice.h"

namespace py = pybind11;
using biomedgpt::ArgumentError;
using biomedgpt::DType;

namespace {

std::string type_name(py::handle value) {
    return py::str(py::type::handle_of(value).attr("__name__"));
}

std::string describe(const py::array& array) {
    std::string text = std::string(py::str(array.dtype())) + " [";
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        text += (axis > 0 ? ", " : "") + std::to_string(array.shape(axis));
    }
    return text + "]";
}

py::array array_of(py::handle value, const std::string& name, int ndim) {
    if (!py::isinstance<py::array>(value)) throw ArgumentError(name, type_name(value), "a numpy array");
    auto array = py::reinterpret_borrow<py::array>(value);
    if (array.ndim() != ndim) throw ArgumentError(name, describe(array), std::to_string(ndim) + " dimensions");
    return array;
}

DType dtype_of(const py::array& array, const std::string& name) {
    const py::dtype dtype = array.dtype();
    if (dtype.byteorder() == '=' || dtype.byteorder() == '|') {
        const char kind = dtype.kind();
        const py::ssize_t size = dtype.itemsize();
        if (kind == 'f' && size == 4) return DType::f32;
        if (kind == 'f' && size == 2) return DType::f16;
        if (kind == 'i' && size == 1) return DType::i8;
        if (kind == 'i' && size == 4) return DType::i32;
        if (kind == 'i' && size == 8) return DType::i64;
    }
    throw ArgumentError(name, describe(array), "native-endian float32, float16, int8, int32 or int64 as documented");
}

// NumPy may give any stride to an axis of length one, and to every axis of an empty array.
bool adjacent(const py::array& array, int axis) {
    return array.size() == 0 || array.shape(axis) == 1 || array.strides(axis) == array.itemsize();
}

biomedgpt::Matrix matrix_of(const py::array& array, const std::string& name) {
    biomedgpt::Matrix matrix;
    matrix.data = array.data();
    matrix.dtype = dtype_of(array, name);
    matrix.rows = array.shape(0);
    matrix.columns = array.shape(1);
    const bool strided = matrix.rows > 1 && array.size() > 0;
    if (!adjacent(array, 1) || (strided && array.strides(0) % array.itemsize() != 0)) {
        throw ArgumentError(name,
                            describe(array) + " with strides of " + std::to_string(array.strides(0)) + " and " +
                                std::to_string(array.strides(1)) + " bytes",
                            "adjacent elements in each row");
    }
    matrix.row_stride = strided ? array.strides(0) / array.itemsize() : matrix.columns;
    return matrix;
}

py::array contiguous_vector(py::handle value, const std::string& name) {
    py::array array = array_of(value, name, 1);
    if (!adjacent(array, 0)) {
        throw ArgumentError(name, describe(array) + " with a stride of " + std::to_string(array.strides(0)) + " bytes",
                            "a contiguous array");
    }
    return array;
}

const float* floats_of(const py::array& array, const std::string& name) {
    if (dtype_of(array, name) != DType::f32) throw ArgumentError(name, describe(array), "float32");
    return static_cast<const float*>(array.data());
}

// The kernel's structs, and the references that keep their memory alive while the GIL is released.
class SpliceCall {
  public:
    SpliceCall(py::handle out, py::handle table, py::handle table_scales, const py::sequence& segments) {
        set_out(out);
        args.table.rows = matrix_of(keep(array_of(table, "table", 2)), "table");
        if (!table_scales.is_none()) {
            const py::array scales = keep(contiguous_vector(table_scales, "table_scales"));
            args.table.scales = floats_of(scales, "table_scales");
            args.table.scale_count = scales.size();
        }
        const size_t count = segments.size();
        args.segments.reserve(count);
        for (size_t i = 0; i < count; ++i) add(segments[i], "segments[" + std::to_string(i) + "]");
    }

    biomedgpt::SpliceArgs args;

  private:
    py::array keep(py::array array) {
        kept_.push_back(array);
        return array;
    }

    void set_out(py::handle value) {
        const py::array out = keep(array_of(value, "out", 2));
        const bool contiguous = (out.flags() & py::array::c_style) != 0;
        if (dtype_of(out, "out") != DType::f32 || !contiguous || !out.writeable()) {
            throw ArgumentError(
                "out", describe(out) + (contiguous ? "" : ", not contiguous") + (out.writeable() ? "" : ", read-only"),
                "float32 [rows, hidden], contiguous and writeable");
        }
        args.out = static_cast<float*>(const_cast<void*>(out.data()));
        args.rows = out.shape(0);
        args.hidden = out.shape(1);
    }

    void add(const py::object& value, const std::string& name) {
        const bool is_tuple = py::isinstance<py::tuple>(value);
        const auto tuple = is_tuple ? py::reinterpret_borrow<py::tuple>(value) : py::tuple();
        const std::string kind =
            !tuple.empty() && py::isinstance<py::str>(tuple[0]) ? std::string(py::str(tuple[0])) : "";
        if (kind == "tokens" && tuple.size() == 3) {
            args.segments.emplace_back(tokens(tuple, name));
        } else if (kind == "features" && tuple.size() == 6) {
            args.segments.emplace_back(features(tuple, name));
        } else {
            throw ArgumentError(
                name,
                is_tuple ? "a tuple of " + std::to_string(tuple.size()) + " that starts with \"" + kind + "\""
                         : type_name(value),
                "(\"tokens\", row, ids) or "
                "(\"features\", row, features, weight, bias, layer_norm_eps or None)");
        }
    }

    static int64_t row_of(const py::tuple& tuple, const std::string& name) {
        if (!py::isinstance<py::int_>(tuple[1])) throw ArgumentError(name + ".row", type_name(tuple[1]), "an int");
        return tuple[1].cast<int64_t>();
    }

    biomedgpt::TokenSegment tokens(const py::tuple& tuple, const std::string& name) {
        const py::array ids = keep(contiguous_vector(tuple[2], name + ".ids"));
        biomedgpt::TokenSegment segment;
        segment.row = row_of(tuple, name);
        segment.ids = ids.data();
        segment.ids_dtype = dtype_of(ids, name + ".ids");
        segment.count = ids.size();
        return segment;
    }

    biomedgpt::FeatureSegment features(const py::tuple& tuple, const std::string& name) {
        const py::array bias = keep(contiguous_vector(tuple[4], name + ".bias"));
        biomedgpt::FeatureSegment segment;
        segment.row = row_of(tuple, name);
        segment.features = matrix_of(keep(array_of(tuple[2], name + ".features", 2)), name + ".features");
        segment.weight = matrix_of(keep(array_of(tuple[3], name + ".weight", 2)), name + ".weight");
        segment.bias = floats_of(bias, name + ".bias");
        segment.bias_count = bias.size();
        const py::object eps = tuple[5];
        if (py::isinstance<py::float_>(eps)) {
            segment.layer_norm_eps = eps.cast<double>();
        } else if (!eps.is_none()) {
            throw ArgumentError(name + ".layer_norm_eps", type_name(eps), "a float or None");
        }
        return segment;
    }

    std::vector<py::array> kept_;
};

void splice(const py::object& out, const py::object& table, const py::object& table_scales,
            const py::sequence& segments, int threads, const std::string& path) {
    const SpliceCall call(out, table, table_scales, segments);
    const py::gil_scoped_release released;
    biomedgpt::splice(call.args, threads, path);
}

py::dict cpu_features() {
    const biomedgpt::CpuFeatures& cpu = biomedgpt::cpu_features();
    py::dict features;
    features["avx2"] = cpu.avx2;
    features["fma"] = cpu.fma;
    features["f16c"] = cpu.f16c;
    features["avx512f"] = cpu.avx512f;
    features["neon"] = cpu.neon;
    return features;
}

void translate_argument_error(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const ArgumentError& error) {
        const py::object type = py::module_::import("biomedgpt_edge.errors").attr("KernelArgumentError");
        const py::object instance = type(error.what(), py::arg("seen") = error.given());
        PyErr_SetObject(type.ptr(), instance.ptr());
    }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native kernels. Arrays are used in place: nothing is copied, cast or kept.";
    module.attr("__version__") = BIOMEDGPT_VERSION;
    py::register_local_exception_translator(&translate_argument_error);
    module.def("splice", &splice, py::arg("out"), py::arg("table"), py::arg("table_scales").none(true),
               py::arg("segments"), py::arg("threads") = 1, py::arg("path") = "auto");
    module.def("splice_paths", &biomedgpt::splice_paths);
    module.def("cpu_features", &cpu_features);
    module.def("cuda_compiled", &biomedgpt::cuda_compiled);
    module.def("cuda_device_count", &biomedgpt::cuda_device_count);
}
