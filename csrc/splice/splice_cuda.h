// splice on a CUDA device.
#pragma once

#include "splice/splice.h"

struct CUstream_st;  // what cudaStream_t points to; spares users of this header the CUDA headers

namespace biomedgpt {

// Checks as splice() does, then queues one copy and one kernel on `stream` of the current device (compute
// capability 7.5 or later) and returns without waiting for the kernel; the copy may wait for what the stream was given
// before.
//
// Every pointer is to device memory, except token ids: those come from a tokenizer on the host, and staying there they
// can be checked before anything is written. Ids may be freed on return, the other buffers once the stream has passed
// this call. The stream must not be under capture.
//
// `allow_16bit` as in SpliceOptions; it matters to segments with float16 weights, which are then multiplied by tensor
// cores. Their features are rounded to 11 significant bits, after a scaling per row that rules out an overflow.
//
// Throws ArgumentError, or DeviceError where a CUDA call fails.
void splice_cuda(const SpliceArgs& args, bool allow_16bit, CUstream_st* stream);

}  // namespace biomedgpt
