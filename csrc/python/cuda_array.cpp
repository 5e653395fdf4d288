#include "python/cuda_array.h"

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "common/error.h"
#include "python/arguments.h"
#include "python/dlpack.h"

namespace biomedgpt::python {
namespace {

constexpr Expected kVector{1, "an array of the same dtype and shape, contiguous"};
constexpr Expected kMatrix{2, "an array of the same dtype and shape, contiguous"};
constexpr int64_t kMaxLength = int64_t{1} << 30;  // so that no product of two and a size overflows

constexpr char kDoc[] = R"(Rows in the memory of a decoder's GPU: float32 or float16, of one or two dimensions.

Made by CudaDecoder.array. A slice of rows is a view. Exports itself by DLPack: to whoever names no stream, or another
one than the decoder's, once everything that was put into that is done.)";

DType dtype_of(const py::object& value) {
    const std::string_view name = text_of(value, {"dtype"});
    for (const DType dtype : {DType::f32, DType::f16}) {
        if (name == name_of(dtype)) return dtype;
    }
    throw ArgumentError("dtype", std::string(name), "float32 or float16");
}

dlpack::Device device_of(const CudaDecoder& decoder) {
    if (decoder.ordinal() < 0) return {dlpack::kCpu, 0};
    return {dlpack::kCuda, decoder.ordinal()};
}

}  // namespace

struct CudaArray::Export {
    dlpack::ManagedTensor managed;
    CudaArray array;
    int64_t shape[2], strides[2];

    // May run in any thread, without the GIL: nothing of Python's is kept.
    static void free(dlpack::ManagedTensor* managed) { delete static_cast<Export*>(managed->context); }

    static void free_unused(PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, "dltensor")) return;
        free(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
    }
};

CudaArray::CudaArray(std::shared_ptr<CudaDecoder> decoder, const py::object& shape, const py::object& dtype)
    : decoder_(std::move(decoder)), dtype_(dtype_of(dtype)) {
    const size_t rank = PyTuple_Check(shape.ptr()) ? static_cast<size_t>(PyTuple_GET_SIZE(shape.ptr())) : 0;
    if (rank != 1 && rank != 2) throw ArgumentError("shape", type_name(shape), "a tuple of one or two lengths");
    rank_ = static_cast<int>(rank);
    const auto lengths = py::reinterpret_borrow<py::tuple>(shape);
    for (int axis = 0; axis < rank_; ++axis) {
        const int64_t length = int_of(lengths[static_cast<size_t>(axis)], {"shape"});
        if (length < 0 || length >= kMaxLength) throw ArgumentError("shape", std::to_string(length), "0 to 2^30 - 1");
        shape_[axis] = length;
    }
    const auto wanted = static_cast<size_t>(bytes());
    const py::gil_scoped_release released;
    memory_ = decoder_->allocate(wanted);
    data_ = static_cast<char*>(memory_.get());
}

// To free memory may wait for the GPU: other threads go on meanwhile. A consumer of DLPack may have no GIL to release.
CudaArray::~CudaArray() {
    if (memory_.use_count() != 1 || PyGILState_Check() == 0) return;
    const py::gil_scoped_release released;
    memory_.reset();
}

std::string CudaArray::text() const {
    const std::string columns = rank_ == 2 ? ", " + std::to_string(shape_[1]) : "";
    return std::string(name_of(dtype_)) + " [" + std::to_string(shape_[0]) + columns + "]";
}

py::tuple CudaArray::shape() const {
    if (rank_ == 1) return py::make_tuple(shape_[0]);
    return py::make_tuple(shape_[0], shape_[1]);
}

CudaArray CudaArray::rows(const py::slice& slice) const {
    py::ssize_t begin = 0, end = 0, step = 0, count = 0;
    if (!slice.compute(static_cast<py::ssize_t>(shape_[0]), &begin, &end, &step, &count)) throw py::error_already_set();
    if (step != 1) throw ArgumentError("rows", "a step of " + std::to_string(step), "rows that follow one another");
    CudaArray view = *this;
    view.data_ += begin * shape_[1] * size_of(dtype_);
    view.shape_[0] = count;
    return view;
}

namespace {

// The memory of the host on the other side of a copy.
Array host_side(const py::object& value, const char* name, const CudaArray& array) {
    Place host;
    Array found(value, {name}, array.rank() == 1 ? kVector : kMatrix, host);
    const bool same = found.dtype() == array.dtype() && found.shape(0) == array.shape(0) &&
                      (array.rank() == 1 || found.shape(1) == array.shape(1));
    if (!same || !found.contiguous()) found.refuse(" where " + array.text() + " is needed");
    return found;
}

}  // namespace

void CudaArray::upload(const py::object& from) const {
    const Array source = host_side(from, "from", *this);
    const py::gil_scoped_release released;
    decoder_->copy(data_, source.data(), static_cast<size_t>(bytes()));
}

void CudaArray::download(const py::object& to) const {
    const Array target = host_side(to, "to", *this);
    if (!target.writeable()) target.refuse(", read-only");
    const py::gil_scoped_release released;
    decoder_->copy(target.data(), data_, static_cast<size_t>(bytes()));
}

void CudaArray::copy_from(const CudaArray& from) const {
    if (from.text() != text() || !from.is_of(*decoder_)) {
        throw ArgumentError("from", from.text(), text() + " of the same decoder");
    }
    if (from.data_ < data_ + bytes() && data_ < from.data_ + bytes()) {
        throw ArgumentError("from", "rows that are partly these", "others");
    }
    const py::gil_scoped_release released;
    decoder_->copy_within(data_, from.data_, static_cast<size_t>(bytes()));
}

py::tuple CudaArray::device() const {
    const dlpack::Device device = device_of(*decoder_);
    return py::make_tuple(device.type, device.id);
}

py::capsule CudaArray::exported(const py::object& stream, const py::object& device, const py::object& copy) const {
    if (!device.is_none() && !device.equal(this->device())) {
        throw py::buffer_error("this array cannot be exported to another device; download it.");
    }
    if (copy.is(py::handle(Py_True))) throw py::buffer_error("a copy of this array cannot be exported.");
    const auto own = static_cast<int64_t>(reinterpret_cast<intptr_t>(decoder_->stream()));
    constexpr int64_t kUnordered = -1;  // the consumer takes care of it itself
    const int64_t theirs = stream.is_none() ? 0 : int_of(stream, {"stream"});
    if (theirs != own && theirs != kUnordered) {
        const py::gil_scoped_release released;
        decoder_->wait();
    }
    auto made = std::make_unique<Export>(Export{{}, *this, {shape_[0], shape_[1]}, {shape_[1], 1}});
    if (rank_ == 1) made->strides[0] = 1;
    const dlpack::DataType dtype = {dlpack::kFloat, static_cast<uint8_t>(8 * size_of(dtype_)), 1};
    made->managed.tensor = {data_, device_of(*decoder_), rank_, dtype, made->shape, made->strides, 0};
    made->managed.context = made.get();
    made->managed.deleter = &Export::free;
    PyObject* capsule = PyCapsule_New(&made->managed, "dltensor", &Export::free_unused);
    if (capsule == nullptr) throw py::error_already_set();
    made.release();
    return py::reinterpret_steal<py::capsule>(capsule);
}

void bind_cuda_array(py::module_& module) {
    const auto dtype = [](const CudaArray& self) {
        return self.dtype() == DType::f32 ? py::dtype("float32") : py::dtype("float16");
    };
    // Local: another module of the same source may be loaded beside this one.
    py::class_<CudaArray>(module, "CudaArray", kDoc, py::module_local())
        .def_property_readonly("shape", [](const CudaArray& self) { return self.shape(); })
        .def_property_readonly("dtype", dtype)
        .def_property_readonly("nbytes", &CudaArray::bytes)
        .def_property_readonly(
            "pointer",
            [](const CudaArray& self) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(self.data())); })
        .def("__len__", [](const CudaArray& self) { return self.shape(0); })
        .def("__getitem__", &CudaArray::rows, py::arg("rows"))
        .def("__repr__", [](const CudaArray& self) { return "CudaArray(" + self.text() + ")"; })
        .def("upload", &CudaArray::upload, py::arg("source"))
        .def("download", &CudaArray::download, py::arg("target"))
        .def("copy_from", &CudaArray::copy_from, py::arg("source"))
        .def("__dlpack_device__", &CudaArray::device)
        .def(
            "__dlpack__",
            [](const CudaArray& self, const py::object& stream, const py::object&, const py::object& device,
               const py::object& copy) { return self.exported(stream, device, copy); },
            py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
            py::arg("dl_device") = py::none(), py::arg("copy") = py::none());
}

}  // namespace biomedgpt::python
