#include "ort/attention_op.h"

#include <cstring>
#include <tuple>

#include "attention/attention.h"
#include "attention/attention_check.h"
#include "ort/tensors.h"

namespace biomedgpt::ort {
namespace {

constexpr const char* kName = "CausalAttention";

namespace in {
enum : size_t { qkv, past_key, past_value, seqlens_k, cos, sin, count };
}
namespace out {
enum : size_t { y, present_key, present_value, count };
}

struct Tensor {
    Shape shape;
    void* data;
};

class AttentionKernel {
  public:
    AttentionKernel(const Api& api, const KernelInfo& info)
        : api_(api), heads_(attribute_of(api, info, "heads")), kv_heads_(attribute_of(api, info, "kv_heads")) {
        if (heads_ < 1 || heads_ > kMaxHeads || kv_heads_ < 1 || kv_heads_ > kMaxHeads) {
            throw ArgumentError("heads", std::to_string(heads_) + " and " + std::to_string(kv_heads_),
                                "1 to " + std::to_string(kMaxHeads));
        }
    }

    const Api& api() const { return api_; }

    void compute(KernelContext& context) const {
        AttentionArgs args;
        args.heads = heads_;
        args.rope = rope(context);
        const Tensor qkv = input(context, in::qkv, "qkv", 3);
        const int64_t head_size = head_size_of(qkv.shape, context);
        args.qkv = static_cast<const float*>(qkv.data);
        args.rows = qkv.shape.dims[1];
        const Tensor past_key = input(context, in::past_key, "past_key", 3);
        const Tensor past_value = input(context, in::past_value, "past_value", 3);
        args.cache.shape = cache_shape(past_key.shape, past_value.shape, head_size);
        args.first = int64_t{last_position(context)} + 1 - args.rows;
        args.cache.keys = present(context, out::present_key, past_key);
        args.cache.values = present(context, out::present_value, past_value);
        Shape shape = qkv.shape;
        shape.dims[2] = heads_ * head_size;
        args.y = static_cast<float*>(data_of(api_, output_of(api_, context, out::y, shape)));
        check_attention(args);
        carry_over(args.cache, past_key.data, past_value.data);
        Pool pool{api_, context};
        causal_attention(args, {pool.parallel_for(), "auto"});
    }

  private:
    Tensor input(const KernelContext& context, size_t index, const char* name, size_t rank) const {
        const Value& value = input_of(api_, context, index);
        const Tensor tensor{shape_of(api_, value, name), data_of(api_, value)};
        if (tensor.shape.rank != rank) {
            throw ArgumentError(name, tensor.shape.text(), std::to_string(rank) + " dimensions");
        }
        return tensor;
    }

    RopeTable rope(const KernelContext& context) const {
        const Tensor cos = input(context, in::cos, "cos", 2), sin = input(context, in::sin, "sin", 2);
        if (!(cos.shape == sin.shape)) {
            throw ArgumentError("sin", sin.shape.text(), cos.shape.text() + ", as cos");
        }
        return {static_cast<const float*>(cos.data), static_cast<const float*>(sin.data), cos.shape.dims[0]};
    }

    // What the table of rotations says it is, and the width of qkv must agree with.
    int64_t head_size_of(const Shape& qkv, const KernelContext& context) const {
        const int64_t half = input(context, in::cos, "cos", 2).shape.dims[1];
        const int64_t all = heads_ + 2 * kv_heads_;
        if (qkv.dims[0] != 1 || half > kMaxHeadSize || qkv.dims[2] != all * 2 * half) {
            throw ArgumentError(
                "qkv", "float32 " + qkv.text(),
                "float32 [1, T, " + std::to_string(all) + " heads of " + std::to_string(half) + " * 2]");
        }
        return 2 * half;
    }

    KvShape cache_shape(const Shape& keys, const Shape& values, int64_t head_size) const {
        if (keys.dims[0] != kv_heads_ || !(keys == values)) {
            throw ArgumentError("past_value", "uint8 " + values.text() + " beside past_key " + keys.text(),
                                "the same, [" + std::to_string(kv_heads_) + ", blocks, bytes of a block]");
        }
        return {kv_heads_, head_size, keys.dims[1], kv_format(head_size, keys.dims[2])};
    }

    int32_t last_position(const KernelContext& context) const {
        const Tensor last = input(context, in::seqlens_k, "seqlens_k", 1);
        if (last.shape.dims[0] != 1) throw ArgumentError("seqlens_k", last.shape.text(), "int32 [1], one sequence");
        int32_t value;
        std::memcpy(&value, last.data, sizeof value);
        return value;
    }

    uint8_t* present(KernelContext& context, size_t index, const Tensor& past) const {
        return static_cast<uint8_t*>(data_of(api_, output_of(api_, context, index, past.shape)));
    }

    // What the cache held before, where its outputs are not its inputs.
    static void carry_over(const KvCache& cache, const void* past_keys, const void* past_values) {
        const auto bytes = static_cast<size_t>(cache.shape.heads * cache.shape.blocks * cache.shape.block_bytes());
        const auto overlap = [bytes](const void* a, const void* b) {
            const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
            return first < second + bytes && second < first + bytes;
        };
        for (const auto& [to, own, other] :
             {std::tuple(cache.keys, past_keys, past_values), std::tuple(cache.values, past_values, past_keys)}) {
            if (overlap(to, other) || (to != own && overlap(to, own))) {
                throw ArgumentError("present_key", "memory that overlaps the cache's inputs",
                                    "that of past_key, or memory of its own, and so for present_value");
            }
        }
        if (cache.keys != past_keys) std::memcpy(cache.keys, past_keys, bytes);
        if (cache.values != past_values) std::memcpy(cache.values, past_values, bytes);
    }

    const Api& api_;
    const int64_t heads_, kv_heads_;
};

const Api& api_of(const CustomOp* op) {
    return *static_cast<const AttentionOp*>(op)->api;
}

ElementType input_type(const CustomOp*, size_t index) {
    const bool cache = index == in::past_key || index == in::past_value;
    return cache ? ElementType::uint8 : index == in::seqlens_k ? ElementType::int32 : ElementType::float32;
}

Status* create(const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
    return status_of(*api, kName, [&] { *kernel = new AttentionKernel(*api, *info); });
}

Status* compute(void* kernel, KernelContext* context) {
    const AttentionKernel& of = *static_cast<AttentionKernel*>(kernel);
    return status_of(of.api(), kName, [&] { of.compute(*context); });
}

Status* infer_shape(const CustomOp* op, ShapeInferContext* context) {
    const Api& api = api_of(op);
    return status_of(api, kName, [&] {
        const int64_t heads = attribute_of(api, *context, "heads"), kv_heads = attribute_of(api, *context, "kv_heads");
        const auto same = [](int64_t last) { return last; };
        infer_last(api, *context, in::past_key, out::present_key, "past_key", same);
        infer_last(api, *context, in::past_value, out::present_value, "past_value", same);
        const auto known = [](int64_t count) { return count >= 1 && count <= kMaxHeads; };
        if (!known(heads) || !known(kv_heads)) return;  // refused when the kernel is made
        const int64_t all = heads + 2 * kv_heads;
        infer_last(api, *context, in::qkv, out::y, "qkv",
                   [=](int64_t last) { return last < 0 ? last : last / all * heads; });
    });
}

}  // namespace

AttentionOp attention_op(const Api& api) {
    AttentionOp op{};
    set_defaults(op);
    op.api = &api;
    op.GetName = [](const CustomOp*) { return kName; };
    op.GetInputType = input_type;
    op.GetInputTypeCount = [](const CustomOp*) -> size_t { return in::count; };
    op.GetOutputType = [](const CustomOp*, size_t i) {
        return i == out::y ? ElementType::float32 : ElementType::uint8;
    };
    op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return out::count; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<AttentionKernel*>(kernel); };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer_shape;
    return op;
}

}  // namespace biomedgpt::ort
