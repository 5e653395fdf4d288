// What ONNX Runtime calls when this library is given to SessionOptions.register_custom_ops_library.
#pragma once

#include "ort/ort_abi.h"

// Adds the domain "biomedgpt" to `options`; once for each of them. Fails where ONNX Runtime is older than 1.17, or
// where the kernels compute a wrong product on this processor.
extern "C" __attribute__((visibility("default"))) biomedgpt::ort::Status* RegisterCustomOps(
    biomedgpt::ort::SessionOptions* options, const biomedgpt::ort::ApiBase* base);
