// int4 with SDOT of Armv8.2: one instruction multiplies 16 by 16 signed bytes and adds them to four sums.
#include "int4/int4_neon_dotprod.h"

namespace biomedgpt {

extern const Int4Path kInt4NeonDotprod = int4_path<NeonDotprod>("neon_dotprod");

}  // namespace biomedgpt
