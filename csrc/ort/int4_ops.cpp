#include "ort/int4_ops.h"

#include "int4/int4.h"
#include "int4/int4_check.h"
#include "ort/tensors.h"

namespace biomedgpt::ort {
namespace {

constexpr size_t kRecords = 1;

class Int4Kernel {
  public:
    Int4Kernel(const Api& api, const Int4Op& op, const KernelInfo& info) : api_(api), op_(op) {
        weights_.shape.columns = attribute_of(api, info, "K");
        weights_.shape.rows = attribute_of(api, info, "N");
        const Value& records = initializer_of(api, info, kRecords, "records");
        set_records(shape_of(api, records, "records"), data_of(api, records));
    }

    const Int4Op& op() const { return op_; }

    void compute(KernelContext& context) const {
        require_same_memory(api_, context, kRecords, "records", weights_.records);
        const Value& x = input_of(api_, context, kX);
        const Shape shape = shape_of_rows(api_, x, weights_.shape.columns);
        Int4Args args;
        args.rows = shape.rows();
        args.weights = weights_;
        args.x = static_cast<const float*>(data_of(api_, x));
        Value& y = output_of(api_, context, kY, shape.with_width(weights_.shape.rows));
        args.y = static_cast<float*>(data_of(api_, y));
        Pool pool{api_, context};
        const auto multiply = op_.matrices == 2 ? int4_gate_up : int4_linear;
        multiply(args, {pool.parallel_for(), "auto"});
    }

  private:
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

Status* infer_shape(const CustomOp* op, ShapeInferContext* context) {
    const Api& api = *self(op).api;
    return status_of(api, self(op).name, [&] { infer_linear(api, *context); });
}

}  // namespace

Int4Op int4_op(const Api& api, const char* name, int64_t matrices) {
    Int4Op op{};
    op.api = &api;
    op.name = name;
    op.matrices = matrices;
    set_defaults(op);
    set_linear_output(op);
    op.GetName = [](const CustomOp* of) { return self(of).name; };
    op.GetInputType = [](const CustomOp*, size_t i) { return i == kX ? ElementType::float32 : ElementType::uint8; };
    op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 2; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Int4Kernel*>(kernel); };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer_shape;
    return op;
}

}  // namespace biomedgpt::ort
