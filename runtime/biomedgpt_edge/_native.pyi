from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]
_TokenSegment: TypeAlias = tuple[str, int, _Array]
_FeatureSegment: TypeAlias = tuple[str, int, _Array, _Array, _Array, float | None]

__version__: str

def splice(
    out: _Array,
    table: _Array,
    table_scales: npt.NDArray[np.float32] | None,
    segments: Sequence[_TokenSegment | _FeatureSegment],
    threads: int = 1,
    path: str = "auto",
    allow_16bit: bool = False,
) -> None: ...

# Tensors with DLPack on one CUDA device, but for token ids, which are host arrays; ``stream`` is a cudaStream_t.
def splice_cuda(
    out: Any,
    table: Any,
    table_scales: Any,
    segments: Sequence[_TokenSegment | tuple[str, int, Any, Any, Any, float | None]],
    stream: int = 0,
    allow_16bit: bool = False,
) -> None: ...

# Name -> whether operands of the products are rounded to 16 bits; best first.
def splice_paths() -> dict[str, bool]: ...
def cpu_features() -> dict[str, bool]: ...

# Ways to read memory; ``read_memory`` reads ``words`` once, in the calling thread, and returns their exclusive or.
def read_patterns() -> tuple[str, ...]: ...
def read_memory(words: npt.NDArray[np.int64], pattern: str) -> int: ...

# (instruction set, "int8" or "fp32", operations per step), the widest first within a kind; ``run_arithmetic`` runs one
# in the calling thread and returns half its number of operations.
def arithmetic_loops() -> list[tuple[str, str, int]]: ...
def run_arithmetic(name: str, kind: str, steps: int) -> float: ...
def cuda_compiled() -> bool: ...
def cuda_device_count() -> int: ...
