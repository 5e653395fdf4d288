// How the operators' library answers an ONNX Runtime that is too old, and one that cannot register a domain.
#include <string>

#include "ort/register.h"
#include "ort/self_test.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::ort;

namespace {

std::string message;
ErrorCode code;

// A status of the stand-in is any address but null.
Status* create_status(ErrorCode of, const char* text) {
    code = of;
    message = text;
    return reinterpret_cast<Status*>(&message);
}

Status* no_domain(const char*, CustomOpDomain**) {
    return create_status(ErrorCode::fail, "no domain");
}

template <typename Function>
void set(Api& api, size_t position, Function function) {
    api.entries[position] = reinterpret_cast<void (*)()>(function);
}

const Api& stand_in() {
    static Api api = [] {
        Api made{};
        set(made, 0, create_status);
        set(made, 26, no_domain);
        return made;
    }();
    return api;
}

}  // namespace

TEST(ort_is_refused_when_it_is_too_old) {
    const ApiBase base{[](uint32_t version) { return version <= 16 ? &stand_in() : nullptr; }, [] { return "1.16.3"; }};
    CHECK(RegisterCustomOps(nullptr, &base) != nullptr);
    CHECK(code == ErrorCode::not_implemented);
    CHECK(message == "the operators of biomedgpt need ONNX Runtime 1.17 or newer; this is 1.16.3.");
}

TEST(ort_failures_are_passed_on) {
    const ApiBase base{[](uint32_t) { return &stand_in(); }, [] { return "1.17.0"; }};
    CHECK(RegisterCustomOps(nullptr, &base) != nullptr);
    CHECK(code == ErrorCode::fail && message == "no domain");
}

TEST(int4_passes_its_self_test) {
    require_correct_int4();
}
