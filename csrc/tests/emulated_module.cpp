// The decoder in an emulation of a GPU, for tests in Python.
#include "decoder_host.h"
#include "python/arguments.h"
#include "python/decoder_binding.h"

PYBIND11_MODULE(_emulated, module) {
    pybind11::register_local_exception_translator(&biomedgpt::python::translate_error);
    biomedgpt::python::bind_decoder(module, [](const biomedgpt::DecoderModel& model, int64_t capacity) {
        return biomedgpt::make_emulated_decoder(model, capacity);
    });
}
