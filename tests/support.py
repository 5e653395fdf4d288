"""What tests of several folders use and no fixture can be."""

from __future__ import annotations

import importlib
import math
import re
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def benchmark_script(name: str) -> Iterator[ModuleType]:
    """benchmarks/NAME.py as a module, which finds what lies beside it, as a script does."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        # transformers looks for a package "kernels", and finds the folder of tests of this name.
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
    for added in set(sys.modules) - before:
        file = getattr(sys.modules[added], "__file__", None)
        if file is not None and Path(file).parent == BENCHMARKS:
            del sys.modules[added]


@contextmanager
def bounded_memory(limit: int) -> Iterator[None]:
    """Fails if Python objects inside grow past ``limit`` bytes: sizes that a file declares must not be believed."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def bytes_of_linears(graph: Path) -> int:
    """Matrices of a graph, packed or not, with their scales, zero points and orders; in records of int8 with biases."""
    import onnx

    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    linear = re.compile(r"(layers\..*|lm_head)\.(weight|weight_int[48]|records|records_int8|scales|zero_points|order)")
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in tensors
        if linear.fullmatch(tensor.name) and "norm" not in tensor.name
    )
