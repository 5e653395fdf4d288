#include "ort/int4_ops.h"

#include <algorithm>
#include <climits>
#include <functional>
#include <memory>
#include <numeric>

#include "int4/int4.h"
#include "int4/int4_check.h"
#include "ort/ort_call.h"

namespace biomedgpt::ort {
namespace {

constexpr size_t kX = 0, kRecords = 1, kY = 0;

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

Shape shape_of(const Api& api, const Value& value, const char* name) {
    TensorTypeAndShapeInfo* info = nullptr;
    require(GetTensorTypeAndShape::call(api, &value, &info));
    const auto release = [&api](TensorTypeAndShapeInfo* of) { ReleaseTensorTypeAndShapeInfo::call(api, of); };
    const std::unique_ptr<TensorTypeAndShapeInfo, decltype(release)> owned(info, release);
    return {api, *info, name};
}

void* data_of(const Api& api, const Value& value) {
    void* data = nullptr;
    require(GetTensorMutableData::call(api, const_cast<Value*>(&value), &data));
    return data;
}

int64_t attribute(const Api& api, const KernelInfo& info, const char* name) {
    int64_t value = 0;
    require(KernelInfoGetAttributeInt64::call(api, &info, name, &value));
    return value;
}

class Int4Kernel {
  public:
    Int4Kernel(const Api& api, const Int4Op& op, const KernelInfo& info) : api_(api), op_(op) {
        weights_.shape.columns = attribute(api, info, "K");
        weights_.shape.rows = attribute(api, info, "N");
        int constant = 0;
        const Value* records = nullptr;
        require(KernelInfoGetConstantInputTensor::call(api, &info, kRecords, &constant, &records));
        if (constant == 0 || records == nullptr) {
            throw ArgumentError("records", "an input that may change", "an initializer that nothing overrides");
        }
        set_records(shape_of(api, *records, "records"), data_of(api, *records));
    }

    const Int4Op& op() const { return op_; }

    void compute(KernelContext& context) const {
        const Value* x = input(context, kX);
        if (data_of(api_, *input(context, kRecords)) != weights_.records) {
            throw ArgumentError("records", "other memory than when the session was made", "the same initializer");
        }
        Shape shape = shape_of(api_, *x, "x");
        const int64_t columns = weights_.shape.columns;
        if (shape.rank == 0 || shape.dims[shape.rank - 1] != columns) {
            throw ArgumentError("x", "float32 " + shape.text(), "float32 [..., " + std::to_string(columns) + "]");
        }
        int64_t* last = shape.dims + shape.rank - 1;
        Int4Args args;
        // Where one dimension is 0, nothing bounds the product of the others.
        const bool empty = std::find(shape.dims, last, 0) != last;
        args.rows = empty ? 0 : std::accumulate(shape.dims, last, int64_t{1}, std::multiplies<>());
        args.weights = weights_;
        args.x = static_cast<const float*>(data_of(api_, *x));
        *last = weights_.shape.rows;
        Value* y = nullptr;
        require(KernelContextGetOutput::call(api_, &context, kY, shape.dims, shape.rank, &y));
        args.y = static_cast<float*>(data_of(api_, *y));
        Pool pool{api_, context};
        const auto multiply = op_.matrices == 2 ? int4_gate_up : int4_linear;
        multiply(args, {ParallelFor(Pool::run, &pool), "auto"});
    }

  private:
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

    void set_records(const Shape& shape, const void* data) {
        Int4Shape& of = weights_.shape;
        const int64_t* dims = shape.dims;
        of.group = shape.rank == 3 ? dims[2] / 16 - 4 : 0;
        const bool known = of.group == 128 || of.group == 64 || of.group == 32;
        if (!known || of.record_bytes() != dims[2]) {
            throw ArgumentError("records", "uint8 " + shape.text(),
                                "uint8 [panels, groups, 2112, 1088 or 576], for groups of 128, 64 or 32 columns");
        }
        check_int4_shape(of);
        if (dims[0] != of.panels() * op_.matrices || dims[1] != of.groups()) {
            throw ArgumentError("records", "uint8 " + shape.text(),
                                "uint8 [" + std::to_string(of.panels() * op_.matrices) + ", " +
                                    std::to_string(of.groups()) + ", " + std::to_string(dims[2]) +
                                    "] for N = " + std::to_string(of.rows) + " and K = " + std::to_string(of.columns));
        }
        weights_.records = static_cast<const uint8_t*>(data);
        weights_.bytes = dims[0] * dims[1] * dims[2];
        check_int4_records(weights_.records);
    }

    const Value* input(const KernelContext& context, size_t index) const {
        const Value* value = nullptr;
        require(KernelContextGetInput::call(api_, &context, index, &value));
        return value;
    }

    const Api& api_;
    const Int4Op& op_;
    Int4Weights weights_;
};

const Int4Op& self(const CustomOp* op) {
    return *static_cast<const Int4Op*>(op);
}

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
    return status_of(*api, self(op).name, [&] { *kernel = new Int4Kernel(*api, self(op), *info); });
}

Status* compute(void* kernel, KernelContext* context) {
    const Int4Kernel& of = *static_cast<Int4Kernel*>(kernel);
    return status_of(*of.op().api, of.op().name, [&] { of.compute(*context); });
}

// y has the dimensions of x, known or named, but for the last.
Status* infer_shape(const CustomOp* op, ShapeInferContext* context) {
    const Api& api = *self(op).api;
    return status_of(api, self(op).name, [&] {
        TensorTypeAndShapeInfo* x = nullptr;
        require(ShapeInferContextGetInputTypeShape::call(api, context, kX, &x));
        Shape shape(api, *x, "x");
        if (shape.rank == 0) return;  // not known yet, and then neither is that of y
        const OpAttr* attribute = nullptr;
        require(ShapeInferContextGetAttribute::call(api, context, "N", &attribute));
        size_t size = 0;
        int64_t* last = shape.dims + shape.rank - 1;
        require(ReadOpAttr::call(api, attribute, OpAttrType::integer, last, sizeof *last, &size));
        require(SetDimensions::call(api, x, shape.dims, shape.rank));
        require(ShapeInferContextSetOutputTypeShape::call(api, context, kY, x));
    });
}

}  // namespace

Int4Op int4_op(const Api& api, const char* name, int64_t matrices) {
    Int4Op op{};
    op.api = &api;
    op.name = name;
    op.matrices = matrices;
    op.version = kApiVersion;
    op.GetName = [](const CustomOp* of) { return self(of).name; };
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    op.GetInputType = [](const CustomOp*, size_t i) { return i == kX ? ElementType::float32 : ElementType::uint8; };
    op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 2; };
    op.GetOutputType = [](const CustomOp*, size_t) { return ElementType::float32; };
    op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Int4Kernel*>(kernel); };
    op.GetInputCharacteristic = op.GetOutputCharacteristic =
        op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity =
        op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer_shape;
    op.GetStartVersion = [](const CustomOp*) { return 1; };
    op.GetEndVersion = [](const CustomOp*) { return INT_MAX; };
    return op;
}

}  // namespace biomedgpt::ort
