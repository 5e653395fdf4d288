// splice on a CUDA device.
#pragma once

#include "splice/splice.h"

struct CUstream_st;  // what cudaStream_t points to; spares users of this header the CUDA headers

namespace biomedgpt {

// Checks as splice() does, then queues the work on `stream` of the current device and returns without waiting for it.
// Every pointer is to device memory, except token ids: those come from a tokenizer on the host, and staying there they
// can be checked before anything is written. Buffers other than ids must live until the stream has passed this call.
// Throws ArgumentError, or DeviceError where a CUDA call fails.
void splice_cuda(const SpliceArgs& args, CUstream_st* stream);

}  // namespace biomedgpt
