// How the operators' library answers an ONNX Runtime that is too old, one that cannot register a domain, and a second
// one in the same process.
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

// One that cannot register a domain, and one that can do nothing else.
const Api& failing() {
    static Api api = [] {
        Api made{};
        set(made, 0, create_status);
        set(made, 26, no_domain);
        return made;
    }();
    return api;
}

const Api& registering() {
    static Api api = [] {
        Api made{};
        set(made, 0, create_status);
        set(made, 26, +[](const char*, CustomOpDomain**) -> Status* { return nullptr; });
        set(made, 27, +[](CustomOpDomain*, const CustomOp*) -> Status* { return nullptr; });
        set(made, 28, +[](SessionOptions*, CustomOpDomain*) -> Status* { return nullptr; });
        return made;
    }();
    return api;
}

}  // namespace

TEST(ort_is_refused_when_it_is_too_old) {
    const ApiBase base{[](uint32_t version) { return version <= 16 ? &failing() : nullptr; }, [] { return "1.16.3"; }};
    CHECK(RegisterCustomOps(nullptr, &base) != nullptr);
    CHECK(code == ErrorCode::not_implemented);
    CHECK(message == "the operators of biomedgpt need ONNX Runtime 1.17 or newer; this is 1.16.3.");
}

TEST(ort_failures_are_passed_on) {
    const ApiBase base{[](uint32_t) { return &failing(); }, [] { return "1.17.0"; }};
    CHECK(RegisterCustomOps(nullptr, &base) != nullptr);
    CHECK(code == ErrorCode::fail && message == "no domain");
}

// Last of those that register: a process keeps the first domain that succeeds.
TEST(ort_is_refused_when_another_copy_of_it_came_first) {
    const ApiBase first{[](uint32_t) { return &registering(); }, [] { return "1.17.0"; }};
    const ApiBase second{[](uint32_t) { return &failing(); }, [] { return "1.18.0"; }};
    CHECK(RegisterCustomOps(nullptr, &first) == nullptr);
    CHECK(RegisterCustomOps(nullptr, &first) == nullptr);
    CHECK(RegisterCustomOps(nullptr, &second) != nullptr);
    CHECK(code == ErrorCode::runtime_exception);
    CHECK(message == "biomedgpt: another copy of ONNX Runtime in this process has these operators already.");
}

TEST(int4_passes_its_self_test) {
    require_correct_int4();
}

TEST(int8_passes_its_self_test) {
    require_correct_int8();
}
