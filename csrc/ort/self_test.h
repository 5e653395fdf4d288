// Small products whose results are known: what this build computes on this processor is looked at before it is used.
#pragma once

namespace biomedgpt {

// Both throw std::runtime_error, with the path's name, where a product is wrong.
void require_correct_int4();
void require_correct_int8();

}  // namespace biomedgpt
