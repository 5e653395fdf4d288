// What a consumer needs of the DLPack ABI, version 1.3: https://dmlc.github.io/dlpack/latest/c_api.html.
//
// Within a major version the layouts are fixed, and so are the first three fields of ManagedTensorVersioned across
// versions; minor versions only add device types and dtype codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biomedgpt::dlpack {

struct Version {
    uint32_t major;
    uint32_t minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };  // kCudaHost: pinned, and so in CPU memory too

struct Device {
    int32_t type;
    int32_t id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null, before version 1.2, for rows that follow one another
    uint64_t byte_offset;
};

// In capsules named "dltensor".
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);  // may be null
};

constexpr uint32_t kMajorVersion = 1;
constexpr uint64_t kReadOnly = 1u << 0;
constexpr uint64_t kIsCopied = 1u << 1;

// In capsules named "dltensor_versioned". Of another major version only what precedes `flags` may be touched.
struct ManagedTensorVersioned {
    Version version;
    void* context;
    void (*deleter)(ManagedTensorVersioned*);  // may be null
    uint64_t flags;
    Tensor tensor;
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24));
static_assert(sizeof(void*) != 8 || offsetof(ManagedTensorVersioned, tensor) == 32);

}  // namespace biomedgpt::dlpack
