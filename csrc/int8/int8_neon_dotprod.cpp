// int8 with SDOT of Armv8.2: one instruction multiplies 16 by 16 signed bytes and adds them to four sums.
#include "int8/int8_neon_dotprod.h"

namespace biomedgpt {

extern const Int8Path kInt8LinearNeonDotprod = int8_path<NeonDotprod>("neon_dotprod");

}  // namespace biomedgpt
