// Argument checks of int8: whatever passes is safe to run. A call that passes allocates nothing here.
#pragma once

#include "int8/int8.h"

namespace biomedgpt {

void check_int8(const Int8Args& args);

void check_int8_records(const uint8_t* records);

}  // namespace biomedgpt
