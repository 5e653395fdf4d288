#include "decoder_host.h"

#include "decoder/decoder_impl.h"

namespace biomedgpt {

std::unique_ptr<CudaDecoder> make_emulated_decoder(const DecoderModel& model, int64_t capacity, size_t memory,
                                                   size_t shared_limit) {
    check_decoder(model, capacity);
    return std::make_unique<DecoderOn>(std::make_unique<Gpu>(memory, shared_limit), model, capacity);
}

}  // namespace biomedgpt
