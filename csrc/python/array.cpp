#include "python/array.h"

#include <cstring>
#include <string_view>
#include <utility>

#include "common/error.h"

namespace biomedgpt::python {
namespace {

constexpr int64_t kMaxRank = 64;  // of numpy and the buffer protocol; beyond it, a shape is not worth believing

template <typename Int>
std::string described(const std::string& dtype, int64_t rank, const Int* shape) {
    if (rank < 0 || rank > kMaxRank) return dtype + " of " + std::to_string(rank) + " dimensions";
    std::string text = dtype + " [";
    for (int64_t axis = 0; axis < rank; ++axis) text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
    return text + "]";
}

std::string text_of(py::handle value) {
    return py::str(value);
}

std::optional<DType> dtype_of(char kind, int64_t size) {
    if (kind == 'f' && size == 4) return DType::f32;
    if (kind == 'f' && size == 2) return DType::f16;
    if (kind == 'i' && size == 1) return DType::i8;
    if (kind == 'i' && size == 4) return DType::i32;
    if (kind == 'i' && size == 8) return DType::i64;
    if (kind == 'u' && size == 1) return DType::u8;
    return std::nullopt;
}

std::optional<DType> dtype_of(const py::dtype& dtype) {
    constexpr int kFirstUserType = 256;  // those, like float8, choose their kind freely
    const bool native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
    if (!native || dtype.num() >= kFirstUserType) return std::nullopt;
    return dtype_of(dtype.kind(), dtype.itemsize());
}

// The format of a buffer's elements, in the notation of Python's struct module, where it is a single number.
struct BufferFormat {
    char kind = 0;  // of numpy's letters: i, u, f or b, and 0 for everything else
    bool swapped = false;

    explicit BufferFormat(std::string_view format) {
        constexpr bool kLittle = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
        if (!format.empty() && std::string_view("@=<>!").find(format[0]) != format.npos) {
            swapped = std::string_view(kLittle ? ">!" : "<").find(format[0]) != format.npos;
            format.remove_prefix(1);
        }
        if (format.size() != 1) return;
        const auto is_one_of = [&](std::string_view letters) { return letters.find(format[0]) != letters.npos; };
        kind = is_one_of("bhilqn")   ? 'i'
               : is_one_of("BHILQN") ? 'u'
               : is_one_of("efd")    ? 'f'
               : format[0] == '?'    ? 'b'
                                     : 0;
    }
};

std::string dtype_name(const BufferFormat& format, const Py_buffer& buffer) {
    const std::string bits = std::to_string(buffer.itemsize * 8);
    const std::string order = format.swapped ? "byte-swapped " : "";
    if (format.kind == 'i') return order + "int" + bits;
    if (format.kind == 'u') return order + "uint" + bits;
    if (format.kind == 'f') return order + "float" + bits;
    if (format.kind == 'b') return "bool";
    return "format \"" + std::string(buffer.format) + "\"";
}

std::optional<DType> dtype_of(const dlpack::DataType& dtype) {
    if (dtype.lanes != 1 || dtype.bits % 8 != 0) return std::nullopt;
    if (dtype.code == dlpack::kFloat) return dtype_of('f', dtype.bits / 8);
    if (dtype.code == dlpack::kInt) return dtype_of('i', dtype.bits / 8);
    if (dtype.code == dlpack::kUInt) return dtype_of('u', dtype.bits / 8);
    return std::nullopt;
}

std::string dtype_name(const dlpack::DataType& dtype) {
    const std::string lanes = dtype.lanes == 1 ? "" : "x" + std::to_string(dtype.lanes);
    const std::string bits = std::to_string(dtype.bits);
    switch (dtype.code) {
        case dlpack::kInt:
            return "int" + bits + lanes;
        case dlpack::kUInt:
            return "uint" + bits + lanes;
        case dlpack::kFloat:
            return "float" + bits + lanes;
        case dlpack::kBfloat:
            return "bfloat" + bits + lanes;
        case dlpack::kComplex:
            return "complex" + bits + lanes;
        case dlpack::kBool:
            return "bool" + lanes;
        default:
            return "DLPack type " + std::to_string(dtype.code) + " of " + bits + " bits" + lanes;
    }
}

std::string device_name(const dlpack::Device& device) {
    const std::string id = std::to_string(device.id);
    switch (device.type) {
        case dlpack::kCpu:
            return "the CPU";
        case dlpack::kCuda:
            return "cuda:" + id;
        case dlpack::kCudaHost:
            return "the CPU, pinned";
        case 8:
            return "metal:" + id;
        case 10:
            return "rocm:" + id;
        case 14:
            return "oneapi:" + id;
        default:
            return "device " + id + " of DLPack type " + std::to_string(device.type);
    }
}

// Asks for the memory itself and not a copy, of which exporters that predate such requests know nothing.
py::object capsule_of(py::handle value, const Place& place) {
    py::dict arguments;
    // 0 may not be passed on, since exporters differ in what they take it for; 1 is CUDA's legacy default stream.
    if (place.cuda) arguments["stream"] = place.stream == 0 ? 1 : place.stream;
    const py::object exporter = value.attr("__dlpack__");
    py::dict versioned = arguments.attr("copy")();
    versioned["max_version"] = py::make_tuple(dlpack::kMajorVersion, 0);
    versioned["copy"] = false;
    try {
        return exporter(**versioned);
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
    }
    return exporter(**arguments);
}

// Takes over what a capsule holds, if it is of that name; no one else may after that, and the deleter is ours to call.
template <typename Managed>
Managed* consume(py::handle capsule, const char* name, const char* used) {
    if (!PyCapsule_IsValid(capsule.ptr(), name)) return nullptr;
    void* managed = PyCapsule_GetPointer(capsule.ptr(), name);
    if (PyCapsule_SetName(capsule.ptr(), used) != 0) throw py::error_already_set();
    return static_cast<Managed*>(managed);
}

std::string capsule_name(py::handle value) {
    if (!PyCapsule_CheckExact(value.ptr())) return type_name(value);
    const char* name = PyCapsule_GetName(value.ptr());
    return name == nullptr ? "a capsule without a name" : "a capsule \"" + std::string(name) + "\"";
}

// From lengths and strides in elements, or null, to strides in bytes. False where an extent does not fit 64 bits.
bool strides_in_bytes(const dlpack::Tensor& tensor, int64_t item_size, int64_t* strides) {
    int64_t compact = 1, extent = item_size;
    for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
        const int64_t length = tensor.shape[axis];
        const int64_t stride = tensor.strides == nullptr ? compact : tensor.strides[axis];
        int64_t reach = 0;
        if (length < 0 || __builtin_mul_overflow(stride, item_size, &strides[axis]) ||
            __builtin_mul_overflow(length, strides[axis], &reach) || __builtin_add_overflow(extent, reach, &extent) ||
            __builtin_mul_overflow(compact, length, &compact)) {
            return false;
        }
    }
    return true;
}

}  // namespace

std::string type_name(py::handle value) {
    return Py_TYPE(value.ptr())->tp_name;
}

std::string ArgName::text() const {
    return segment < 0 ? field : "segments[" + std::to_string(segment) + "]." + field;
}

std::string Place::text() const {
    if (!cuda) return "in CPU memory";
    return device ? "on cuda:" + std::to_string(*device) + ", like the arguments before it" : "on a CUDA device";
}

void Array::Release::operator()(Py_buffer* buffer) const {
    PyBuffer_Release(buffer);
    delete buffer;
}

void Array::Release::operator()(dlpack::ManagedTensor* managed) const {
    if (managed->deleter != nullptr) managed->deleter(managed);
}

void Array::Release::operator()(dlpack::ManagedTensorVersioned* managed) const {
    if (managed->deleter != nullptr) managed->deleter(managed);
}

Array::Array(py::handle value, const ArgName& name, const Expected& expected, Place& place)
    : name_(name), expected_(&expected) {
    if (!place.cuda && py::isinstance<py::array>(value)) {
        take_numpy(value);
    } else if (!place.cuda && PyObject_CheckBuffer(value.ptr())) {
        take_buffer(value);
    } else if (py::hasattr(value, "__dlpack__")) {
        take_dlpack(value, place);
    } else {
        throw ArgumentError(name_.text(), type_name(value), expected.text);
    }
}

bool Array::adjacent(int axis) const {
    return size() == 0 || shape_[axis] == 1 || strides_[axis] == size_of(dtype_);
}

bool Array::contiguous() const {
    if (expected_->rank == 1) return adjacent(0);
    return adjacent(1) && (size() == 0 || shape_[0] == 1 || strides_[0] == shape_[1] * size_of(dtype_));
}

void Array::refuse(const std::string& what) const {
    throw ArgumentError(name_.text(), described(name_of(dtype_), expected_->rank, shape_) + what, expected_->text);
}

// `dtype_name` is a function: a name is made only for an error.
template <typename DTypeName, typename Int>
void Array::take_elements(std::optional<DType> dtype, const DTypeName& dtype_name, int64_t rank, const Int* shape) {
    if (!dtype || rank != expected_->rank) {
        throw ArgumentError(name_.text(), described(dtype_name(), rank, shape), expected_->text);
    }
    dtype_ = *dtype;
    for (int64_t axis = 0; axis < rank; ++axis) shape_[axis] = shape[axis];
}

// Calls into the exporter. Whatever it raises is about this argument; interrupts and exits are not.
template <typename Call>
auto Array::ask_exporter(py::handle value, const Call& call) const {
    try {
        return call();
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_Exception)) throw;
        throw ArgumentError(name_.text(),
                            type_name(value) + " that cannot be used in place (" + type_name(error.value()) + ": " +
                                text_of(error.value()) + ")",
                            expected_->text);
    }
}

void Array::take_numpy(py::handle value) {
    auto array = py::reinterpret_borrow<py::array>(value);
    const py::dtype dtype = array.dtype();
    take_elements(dtype_of(dtype), [&] { return text_of(dtype); }, array.ndim(), array.shape());
    for (int axis = 0; axis < expected_->rank; ++axis) strides_[axis] = array.strides()[axis];
    data_ = const_cast<void*>(array.data());
    writeable_ = array.writeable();
    array_ = std::move(array);
}

void Array::take_buffer(py::handle value) {
    auto buffer = std::make_unique<Py_buffer>();
    ask_exporter(value, [&] {
        if (PyObject_GetBuffer(value.ptr(), buffer.get(), PyBUF_RECORDS_RO) != 0) throw py::error_already_set();
    });
    buffer_.reset(buffer.release());
    const BufferFormat format(buffer_->format);
    take_elements(
        format.swapped ? std::nullopt : dtype_of(format.kind, buffer_->itemsize),
        [&] { return dtype_name(format, *buffer_); }, buffer_->ndim, buffer_->shape);
    for (int axis = 0; axis < expected_->rank; ++axis) strides_[axis] = buffer_->strides[axis];
    data_ = buffer_->buf;
    writeable_ = buffer_->readonly == 0;
}

void Array::take_dlpack(py::handle value, Place& place) {
    using Device = std::pair<int32_t, int32_t>;
    // Asked first: to export an array only to find it on another device may make that device wait.
    const Device device = ask_exporter(value, [&] {
        const py::object answer = value.attr("__dlpack_device__")();
        try {
            return answer.cast<Device>();
        } catch (const py::cast_error&) {
            throw ArgumentError(name_.text(), type_name(value) + " whose __dlpack_device__ gives " + text_of(answer),
                                "a pair of ints");
        }
    });
    require_place({device.first, device.second}, place);
    const py::object capsule = ask_exporter(value, [&] { return capsule_of(value, place); });
    versioned_.reset(consume<dlpack::ManagedTensorVersioned>(capsule, "dltensor_versioned", "used_dltensor_versioned"));
    if (versioned_ != nullptr) {
        const uint32_t major = versioned_->version.major;
        if (major != dlpack::kMajorVersion) {
            throw ArgumentError(name_.text(), "DLPack version " + std::to_string(major), "version 1");
        }
        if ((versioned_->flags & dlpack::kIsCopied) != 0) {
            throw ArgumentError(name_.text(), type_name(value) + " that exports a copy of itself", expected_->text);
        }
        take_tensor(versioned_->tensor, place);
        writeable_ = (versioned_->flags & dlpack::kReadOnly) == 0;
        return;
    }
    managed_.reset(consume<dlpack::ManagedTensor>(capsule, "dltensor", "used_dltensor"));
    if (managed_ == nullptr) {
        throw ArgumentError(name_.text(), type_name(value) + " whose __dlpack__ gives " + capsule_name(capsule),
                            "a capsule \"dltensor_versioned\" or \"dltensor\"");
    }
    take_tensor(managed_->tensor, place);
    writeable_ = true;  // there is no flag, so exporters refuse to export what is read-only
}

void Array::take_tensor(const dlpack::Tensor& tensor, Place& place) {
    require_place(tensor.device, place);
    take_elements(dtype_of(tensor.dtype), [&] { return dtype_name(tensor.dtype); }, tensor.ndim, tensor.shape);
    if (!strides_in_bytes(tensor, size_of(dtype_), strides_)) refuse(" of an impossible extent");
    data_ = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
}

void Array::require_place(const dlpack::Device& device, Place& place) const {
    const bool there = place.cuda ? device.type == dlpack::kCuda && device.id == place.device.value_or(device.id)
                                  : device.type == dlpack::kCpu || device.type == dlpack::kCudaHost;
    if (!there) throw ArgumentError(name_.text(), "a tensor on " + device_name(device), "one " + place.text());
    if (place.cuda) place.device = device.id;
}

}  // namespace biomedgpt::python
