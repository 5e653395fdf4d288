// The decoder for GPUs.
//
// Status: compiled for compute capability 7.5 to 12.1, and not yet run on a device. The same source, compiled as C++,
// is compared with double precision in an emulation of a GPU (csrc/tests/test_decoder.cpp), so that what is left to
// show on a device is what the emulation cannot: the instructions in simt_cuda.h, the calls in gpu_cuda.h, and time.
#include "decoder/decoder_impl.h"

namespace biomedgpt {

std::unique_ptr<CudaDecoder> make_cuda_decoder(const DecoderModel& model, int64_t capacity) {
    check_decoder(model, capacity);
    return std::make_unique<DecoderOn>(std::make_unique<Gpu>(), model, capacity);
}

}  // namespace biomedgpt
