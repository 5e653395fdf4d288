// The arguments of a splice as the kernel library's structs.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "python/array.h"
#include "splice/splice.h"

namespace biomedgpt::python {

// Keeps what `args` points at alive while the GIL is released. Methods throw ArgumentError.
class SpliceCall {
  public:
    // Arrays have to be in `place`, but for token ids.
    SpliceCall(py::handle out, const Place& place) : place_(place) { set_out(out); }

    void take_table(py::handle table, py::handle scales);
    void take_segments(py::handle segments);

    const SpliceArgs& args() const { return args_; }
    const Place& place() const { return place_; }

  private:
    const Array& keep(py::handle value, const ArgName& name, const Expected& expected);
    void set_out(py::handle value);
    void add(py::handle value, int64_t index);
    void add_tokens(const py::tuple& tuple, int64_t index);
    void add_features(const py::tuple& tuple, int64_t index);

    Place place_;
    std::vector<Array> kept_;
    SpliceArgs args_;
};

}  // namespace biomedgpt::python
