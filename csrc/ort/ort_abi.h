// The part of ONNX Runtime's C interface that these operators use. No package registry carries its headers, but the
// interface is public, frozen and only ever appended to: a position in the table of functions keeps its meaning, and so
// does a field of OrtCustomOp. Source: include/onnxruntime/core/session/onnxruntime_c_api.h of ONNX Runtime, where
// structs OrtApi, OrtApiBase and OrtCustomOp stand; positions are counted from the first function of OrtApi, which is
// 0, and agree in the headers of ORT_API_VERSION 17 and 30.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biomedgpt::ort {

// The version asked for: that of ONNX Runtime 1.17, the first with all entries below.
constexpr uint32_t kApiVersion = 17;

struct CustomOp;
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct OpAttr;
struct SessionOptions;
struct ShapeInferContext;
struct Status;  // null for success, otherwise of whoever receives it
struct TensorTypeAndShapeInfo;
struct Value;

enum class ErrorCode : int { fail = 1, invalid_argument = 2, runtime_exception = 6, not_implemented = 9 };
enum class ElementType : int { float32 = 1, uint8 = 2, int32 = 6 };
enum class OpAttrType : int { integer = 1 };

struct Api {
    void (*entries[275])();
};

struct ApiBase {
    const Api* (*GetApi)(uint32_t version);  // null where the version is not offered
    const char* (*GetVersionString)();
};

template <size_t kPosition, typename Signature>
struct Entry;

template <size_t kPosition, typename Result, typename... Args>
struct Entry<kPosition, Result(Args...)> {
    [[nodiscard]] static Result call(const Api& api, Args... args) {
        static_assert(kPosition < sizeof api.entries / sizeof *api.entries);
        return reinterpret_cast<Result (*)(Args...)>(api.entries[kPosition])(args...);
    }
};

using CreateStatus = Entry<0, Status*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Entry<26, Status*(const char*, CustomOpDomain**)>;
using CustomOpDomainAdd = Entry<27, Status*(CustomOpDomain*, const CustomOp*)>;
using AddCustomOpDomain = Entry<28, Status*(SessionOptions*, CustomOpDomain*)>;
using GetTensorMutableData = Entry<51, Status*(Value*, void**)>;
using SetDimensions = Entry<59, Status*(TensorTypeAndShapeInfo*, const int64_t*, size_t)>;
using GetDimensionsCount = Entry<61, Status*(const TensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Entry<62, Status*(const TensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Entry<65, Status*(const Value*, TensorTypeAndShapeInfo**)>;
using KernelInfoGetAttributeInt64 = Entry<86, Status*(const KernelInfo*, const char*, int64_t*)>;
using KernelContextGetInput = Entry<90, Status*(const KernelContext*, size_t, const Value**)>;
using KernelContextGetOutput = Entry<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(TensorTypeAndShapeInfo*)>;
using KernelInfoGetConstantInputTensor = Entry<249, Status*(const KernelInfo*, size_t, int*, const Value**)>;
using ShapeInferContextGetInputTypeShape =
    Entry<268, Status*(const ShapeInferContext*, size_t, TensorTypeAndShapeInfo**)>;
using ShapeInferContextGetAttribute = Entry<269, Status*(const ShapeInferContext*, const char*, const OpAttr**)>;
using ShapeInferContextSetOutputTypeShape =
    Entry<270, Status*(const ShapeInferContext*, size_t, const TensorTypeAndShapeInfo*)>;
using ReadOpAttr = Entry<272, Status*(const OpAttr*, OpAttrType, void*, size_t, size_t*)>;
using KernelContextParallelFor =
    Entry<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;

struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);  // CreateKernelV2 stands for it
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);  // null for the CPU
    ElementType (*GetInputType)(const CustomOp*, size_t);
    size_t (*GetInputTypeCount)(const CustomOp*);
    ElementType (*GetOutputType)(const CustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void*, KernelContext*);  // KernelComputeV2 stands for it
    void (*KernelDestroy)(void*);
    int (*GetInputCharacteristic)(const CustomOp*, size_t);  // 0 is required, 1 optional, 2 variadic
    int (*GetOutputCharacteristic)(const CustomOp*, size_t);
    int (*GetInputMemoryType)(const CustomOp*, size_t);  // 0 is that of the execution provider
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
    Status* (*KernelComputeV2)(void*, KernelContext*);
    Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
    // Of version 18, for whoever looks at them whatever the version says.
    size_t (*GetMayInplace)(int**, int**);
    void (*ReleaseMayInplace)(int*, int*);
    size_t (*GetAliasMap)(int**, int**);
    void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace biomedgpt::ort
