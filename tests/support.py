"""What tests of several folders use and no fixture can be."""

from __future__ import annotations

import importlib.util
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
    # By its path, and not called by its name alone: a folder of tests has that of a script.
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec.loader.exec_module(module)
        yield module
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
