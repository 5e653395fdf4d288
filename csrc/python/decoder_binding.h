// The decoder for GPUs, for Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "decoder/decoder.h"

namespace biomedgpt::python {

using DecoderMaker = std::unique_ptr<CudaDecoder> (*)(const DecoderModel& model, int64_t capacity);

// Adds the class CudaDecoder, whose objects `make` makes.
void bind_decoder(pybind11::module_& module, DecoderMaker make);

// Adds int8_head_shape and int8_head_pack, between MatMulNBits' layout and that of csrc/decoder/head_layout.h.
void bind_head_layout(pybind11::module_& module);

}  // namespace biomedgpt::python
