// Calls into ONNX Runtime with exceptions for statuses, and calls from it the other way round.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "common/error.h"
#include "ort/ort_abi.h"

namespace biomedgpt::ort {

// A status that a function of ONNX Runtime returned, on its way to be returned again.
struct Failure {
    Status* status;
};

inline void require(Status* status) {
    if (status != nullptr) throw Failure{status};
}

// What `body` throws, as a status whose message begins with `where`. Nothing may be thrown through ONNX Runtime.
template <typename Body>
Status* status_of(const Api& api, const char* where, const Body& body) noexcept {
    const auto failed = [&](ErrorCode code, const char* what) noexcept {
        try {
            return CreateStatus::call(api, code, (std::string(where) + ": " + what).c_str());
        } catch (const std::bad_alloc&) {
            return CreateStatus::call(api, code, where);
        }
    };
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const ArgumentError& error) {
        return failed(ErrorCode::invalid_argument, error.what());
    } catch (const std::bad_alloc&) {
        return failed(ErrorCode::runtime_exception, "out of memory.");
    } catch (const std::exception& error) {
        return failed(ErrorCode::runtime_exception, error.what());
    }
}

}  // namespace biomedgpt::ort
