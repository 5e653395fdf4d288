// Tensors and attributes of an operator's node, as operators here need them.
#pragma once

#include <climits>
#include <memory>
#include <string>

#include "common/parallel_for.h"
#include "ort/ort_call.h"

namespace biomedgpt::ort {

// A tensor's dimensions, of which no operator here needs many.
struct Shape {
    static constexpr size_t kMaxRank = 8;
    int64_t dims[kMaxRank] = {};
    size_t rank = 0;

    // `name` is the tensor's, for the error.
    Shape(const Api& api, const TensorTypeAndShapeInfo& info, const char* name) {
        require(GetDimensionsCount::call(api, &info, &rank));
        if (rank > kMaxRank) {
            throw ArgumentError(name, std::to_string(rank) + " dimensions", "at most " + std::to_string(kMaxRank));
        }
        require(GetDimensions::call(api, &info, dims, rank));
    }

    std::string text() const {
        std::string all = "[";
        for (size_t i = 0; i < rank; ++i) all += (i > 0 ? ", " : "") + std::to_string(dims[i]);
        return all + "]";
    }
};

inline Shape shape_of(const Api& api, const Value& value, const char* name) {
    TensorTypeAndShapeInfo* info = nullptr;
    require(GetTensorTypeAndShape::call(api, &value, &info));
    const auto release = [&api](TensorTypeAndShapeInfo* of) { ReleaseTensorTypeAndShapeInfo::call(api, of); };
    const std::unique_ptr<TensorTypeAndShapeInfo, decltype(release)> owned(info, release);
    return {api, *info, name};
}

inline void* data_of(const Api& api, const Value& value) {
    void* data = nullptr;
    require(GetTensorMutableData::call(api, const_cast<Value*>(&value), &data));
    return data;
}

inline int64_t attribute_of(const Api& api, const KernelInfo& info, const char* name) {
    int64_t value = 0;
    require(KernelInfoGetAttributeInt64::call(api, &info, name, &value));
    return value;
}

inline const Value& input_of(const Api& api, const KernelContext& context, size_t index) {
    const Value* value = nullptr;
    require(KernelContextGetInput::call(api, &context, index, &value));
    return *value;
}

inline Value& output_of(const Api& api, KernelContext& context, size_t index, const Shape& shape) {
    Value* value = nullptr;
    require(KernelContextGetOutput::call(api, &context, index, shape.dims, shape.rank, &value));
    return *value;
}

// An integer attribute of the node whose shapes are inferred.
inline int64_t attribute_of(const Api& api, const ShapeInferContext& context, const char* name) {
    const OpAttr* attribute = nullptr;
    require(ShapeInferContextGetAttribute::call(api, &context, name, &attribute));
    int64_t value = 0;
    size_t size = 0;
    require(ReadOpAttr::call(api, attribute, OpAttrType::integer, &value, sizeof value, &size));
    return value;
}

// The shape of an output is that of an input, but for the last dimension, which `last` gives from it. Where nothing is
// known of the input yet, nothing is of the output.
template <typename Last>
void infer_last(const Api& api, ShapeInferContext& context, size_t input, size_t output, const char* name,
                const Last& last) {
    TensorTypeAndShapeInfo* info = nullptr;
    require(ShapeInferContextGetInputTypeShape::call(api, &context, input, &info));
    Shape shape(api, *info, name);
    if (shape.rank == 0) return;
    shape.dims[shape.rank - 1] = last(shape.dims[shape.rank - 1]);
    require(SetDimensions::call(api, info, shape.dims, shape.rank));
    require(ShapeInferContextSetOutputTypeShape::call(api, &context, output, info));
}

// ONNX Runtime's own threads: a second pool beside them would fight them for the processors.
struct Pool {
    const Api& api;
    const KernelContext& context;

    static void run(void* pool, size_t count, ParallelFor::Round round, void* state) {
        const Pool& self = *static_cast<Pool*>(pool);
        constexpr size_t kNoBatches = 0;
        require(KernelContextParallelFor::call(self.api, &self.context, round, count, kNoBatches, state));
    }
};

// What is alike for all operators: for the CPU, every input and output required, of any version.
inline void set_defaults(CustomOp& op) {
    op.version = kApiVersion;
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op.GetInputCharacteristic = op.GetOutputCharacteristic =
        op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity =
        op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.GetStartVersion = [](const CustomOp*) { return 1; };
    op.GetEndVersion = [](const CustomOp*) { return INT_MAX; };
}

}  // namespace biomedgpt::ort
