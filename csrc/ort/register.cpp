#include "ort/register.h"

#include <cstdio>
#include <initializer_list>
#include <stdexcept>

#include "ort/attention_op.h"
#include "ort/int4_ops.h"
#include "ort/int8_ops.h"
#include "ort/ort_call.h"
#include "ort/self_test.h"

namespace biomedgpt::ort {
namespace {

// Sessions hold pointers to a domain and its operators, so there is one of each, for as long as the process lives.
struct Domain {
    Int4Op linear, gate_up;
    Int8Op int8_linear, int8_gelu, int8_add;
    AttentionOp attention;
    CustomOpDomain* domain = nullptr;

    explicit Domain(const Api& api)
        : linear(int4_op(api, "Int4Linear", 1)),
          gate_up(int4_op(api, "Int4GateUp", 2)),
          int8_linear(int8_op(api, "Int8Linear", Int8After::nothing)),
          int8_gelu(int8_op(api, "Int8LinearGelu", Int8After::gelu)),
          int8_add(int8_op(api, "Int8LinearAdd", Int8After::add)),
          attention(attention_op(api)) {
        require(CreateCustomOpDomain::call(api, "biomedgpt", &domain));
        for (const CustomOp* op : std::initializer_list<const CustomOp*>{&linear, &gate_up, &int8_linear, &int8_gelu,
                                                                         &int8_add, &attention}) {
            require(CustomOpDomainAdd::call(api, domain, op));
        }
    }
};

Status* too_old(const ApiBase& base) noexcept {
    // Not a string, which might throw where nobody would catch it.
    char message[128];
    std::snprintf(message, sizeof message, "the operators of biomedgpt need ONNX Runtime 1.17 or newer; this is %s.",
                  base.GetVersionString());
    return CreateStatus::call(*base.GetApi(1), ErrorCode::not_implemented, message);
}

}  // namespace
}  // namespace biomedgpt::ort

extern "C" biomedgpt::ort::Status* RegisterCustomOps(biomedgpt::ort::SessionOptions* options,
                                                     const biomedgpt::ort::ApiBase* base) {
    using namespace biomedgpt::ort;
    const Api* api = base->GetApi(kApiVersion);
    if (api == nullptr) return too_old(*base);
    return status_of(*api, "biomedgpt", [&] {
        static const Domain domain = [&] {
            biomedgpt::require_correct_int4();
            biomedgpt::require_correct_int8();
            biomedgpt::require_correct_attention();
            return Domain(*api);
        }();
        if (domain.linear.api != api) {
            throw std::runtime_error("another copy of ONNX Runtime in this process has these operators already.");
        }
        require(AddCustomOpDomain::call(*api, options, domain.domain));
    });
}
