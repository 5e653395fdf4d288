// Argument checks of int4: whatever passes is safe to run. A call that passes allocates nothing here.
#pragma once

#include "int4/int4.h"

namespace biomedgpt {

// `matrices` is 2 for a gate and an up projection, otherwise 1.
void check_int4(const Int4Args& args, int64_t matrices);

void check_int4_records(const uint8_t* records);

}  // namespace biomedgpt
