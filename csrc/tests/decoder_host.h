// The decoder in an emulation of a GPU: the kernels' own source, compiled as C++.
#pragma once

#include <memory>

#include "decoder/decoder.h"

namespace biomedgpt {

// `memory` and `shared_limit` are what the GPU would have, in bytes: of all, and for a block.
std::unique_ptr<CudaDecoder> make_emulated_decoder(const DecoderModel& model, int64_t capacity,
                                                   size_t memory = size_t{1} << 30,
                                                   size_t shared_limit = size_t{227} << 10);

}  // namespace biomedgpt
