#include "ort/int8_ops.h"

#include "int8/int8.h"
#include "int8/int8_check.h"
#include "ort/tensors.h"

namespace biomedgpt::ort {
namespace {

constexpr size_t kRecords = 1, kResidual = 2;

class Int8Kernel {
  public:
    Int8Kernel(const Api& api, const Int8Op& op, const KernelInfo& info) : api_(api), op_(op) {
        weights_.shape.columns = attribute_of(api, info, "K");
        weights_.shape.rows = attribute_of(api, info, "N");
        check_int8_shape(weights_.shape);
        const Value& records = initializer_of(api, info, kRecords, "records");
        set_records(shape_of(api, records, "records"), data_of(api, records));
    }

    const Int8Op& op() const { return op_; }

    void compute(KernelContext& context) const {
        require_same_memory(api_, context, kRecords, "records", weights_.records);
        const Value& x = input_of(api_, context, kX);
        const Shape shape = shape_of_rows(api_, x, weights_.shape.columns);
        const Shape wider = shape.with_width(weights_.shape.rows);
        Int8Args args;
        args.rows = shape.rows();
        args.weights = weights_;
        args.x = static_cast<const float*>(data_of(api_, x));
        args.gelu = op_.after == Int8After::gelu;
        if (op_.after == Int8After::add) args.residual = residual(context, wider);
        args.y = static_cast<float*>(data_of(api_, output_of(api_, context, kY, wider)));
        Pool pool{api_, context};
        int8_linear(args, {pool.parallel_for(), "auto"});
    }

  private:
    void set_records(const Shape& shape, const void* data) {
        const Int8Shape& of = weights_.shape;
        if (shape.rank != 2 || shape.dims[0] != of.panels() || shape.dims[1] != of.panel_bytes()) {
            throw ArgumentError("records", "uint8 " + shape.text(),
                                "uint8 [" + std::to_string(of.panels()) + ", " + std::to_string(of.panel_bytes()) +
                                    "] for N = " + std::to_string(of.rows) + " and K = " + std::to_string(of.columns));
        }
        weights_.records = static_cast<const uint8_t*>(data);
        weights_.bytes = of.bytes();
        check_int8_records(weights_.records);
    }

    const float* residual(const KernelContext& context, const Shape& wanted) const {
        const Value& value = input_of(api_, context, kResidual);
        const Shape shape = shape_of(api_, value, "residual");
        if (!(shape == wanted)) {
            throw ArgumentError("residual", "float32 " + shape.text(), "float32 " + wanted.text());
        }
        return static_cast<const float*>(data_of(api_, value));
    }

    const Api& api_;
    const Int8Op& op_;
    Int8Weights weights_;
};

const Int8Op& self(const CustomOp* op) {
    return *static_cast<const Int8Op*>(op);
}

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
    return status_of(*api, self(op).name, [&] { *kernel = new Int8Kernel(*api, self(op), *info); });
}

Status* compute(void* kernel, KernelContext* context) {
    const Int8Kernel& of = *static_cast<Int8Kernel*>(kernel);
    return status_of(*of.op().api, of.op().name, [&] { of.compute(*context); });
}

Status* infer_shape(const CustomOp* op, ShapeInferContext* context) {
    const Api& api = *self(op).api;
    return status_of(api, self(op).name, [&] { infer_linear(api, *context); });
}

}  // namespace

Int8Op int8_op(const Api& api, const char* name, Int8After after) {
    Int8Op op{};
    op.api = &api;
    op.name = name;
    op.after = after;
    set_defaults(op);
    set_linear_output(op);
    op.GetName = [](const CustomOp* of) { return self(of).name; };
    op.GetInputType = [](const CustomOp*, size_t i) {
        return i == kRecords ? ElementType::uint8 : ElementType::float32;
    };
    op.GetInputTypeCount = [](const CustomOp* of) -> size_t { return self(of).after == Int8After::add ? 3 : 2; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Int8Kernel*>(kernel); };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer_shape;
    return op;
}

}  // namespace biomedgpt::ort
