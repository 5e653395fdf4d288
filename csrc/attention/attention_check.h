// Argument checks of attention: whatever passes is safe to run. A call that passes allocates nothing here.
#pragma once

#include "attention/attention.h"

namespace biomedgpt {

void check_attention(const AttentionArgs& args);

}  // namespace biomedgpt
