// Small problems whose results are known: what this build computes on this processor is looked at before it is used.
#pragma once

namespace biomedgpt {

// Throw std::runtime_error, with the path's name, where a product is wrong.
void require_correct_int4();
void require_correct_int8();

// Likewise where attention over any element type of the cache gives something else than what is known.
void require_correct_attention();

}  // namespace biomedgpt
