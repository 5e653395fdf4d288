#include "ort/register.h"

#include "int4/int4.h"
#include "ort/int4_ops.h"
#include "ort/ort_call.h"
#include "ort/self_test.h"

namespace biomedgpt::ort {
namespace {

// Sessions hold pointers to a domain and its operators, so there is one of each, for as long as the process lives.
struct Domain {
    Int4Op linear, gate_up;
    CustomOpDomain* domain = nullptr;

    explicit Domain(const Api& api) : linear(int4_op(api, "Int4Linear", 1)), gate_up(int4_op(api, "Int4GateUp", 2)) {
        require(CreateCustomOpDomain::call(api, "biomedgpt", &domain));
        require(CustomOpDomainAdd::call(api, domain, &linear));
        require(CustomOpDomainAdd::call(api, domain, &gate_up));
    }
};

Status* too_old(const ApiBase& base) {
    const Api* first = base.GetApi(1);
    const std::string message = "the operators of biomedgpt need ONNX Runtime 1.17 or newer; this is " +
                                std::string(base.GetVersionString()) + ".";
    return CreateStatus::call(*first, ErrorCode::not_implemented, message.c_str());
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
            return Domain(*api);
        }();
        require(AddCustomOpDomain::call(*api, options, domain.domain));
    });
}
