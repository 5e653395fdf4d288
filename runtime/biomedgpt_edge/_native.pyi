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

# (panels, groups, bytes of a record)
def int4_records_shape(rows: int, columns: int, group: int) -> tuple[int, int, int]: ...

# records: uint8 [panels, groups * bytes of a record]; values: uint8 [N, groups * group / 2].
def int4_pack(records: _Array, values: _Array, scales: npt.NDArray[np.float16], group: int) -> None: ...
def int4_unpack(values: _Array, scales: npt.NDArray[np.float16], records: _Array, group: int) -> None: ...

# y: float32 [rows, N]; x: float32 [rows, K]; records aligned to 64 bytes.
def causal_attention(
    y: _Array,
    qkv: _Array,
    keys: _Array,
    values: _Array,
    block_bytes: int,
    first: int,
    cos: _Array,
    sin: _Array,
    threads: int = 1,
    path: str = "auto",
) -> None: ...

# Best first.
def attention_paths() -> list[str]: ...
def int4_linear(y: _Array, x: _Array, records: _Array, group: int, threads: int = 1, path: str = "auto") -> None: ...
def int4_gate_up(y: _Array, x: _Array, records: _Array, group: int, threads: int = 1, path: str = "auto") -> None: ...
def int4_quantize(
    values: _Array, scales: _Array, zero_terms: _Array, x: _Array, group: int, path: str = "auto"
) -> None: ...

# Best first.
def int4_paths() -> list[str]: ...

# (panels, bytes of a panel)
def int8_records_shape(rows: int, columns: int) -> tuple[int, int]: ...

# records: uint8 [panels, bytes of a panel]; values: int8 [N, K]; scales and biases: float32 [N].
def int8_pack(records: _Array, values: _Array, scales: _Array, biases: _Array) -> None: ...
def int8_unpack(values: _Array, scales: _Array, biases: _Array, records: _Array) -> None: ...

# y and residual: float32 [rows, N]; x: float32 [rows, K]; records aligned to 64 bytes.
def int8_linear(
    y: _Array,
    x: _Array,
    records: _Array,
    residual: _Array | None = None,
    gelu: bool = False,
    threads: int = 1,
    path: str = "auto",
) -> None: ...
def int8_quantize(values: _Array, scales: _Array, x: _Array, path: str = "auto") -> None: ...

# Best first.
def int8_paths() -> list[str]: ...
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

# (panels, bytes of a panel) of a head of eight bits; records: uint8 of that shape; values: uint8 [N, groups * group].
def int8_head_shape(rows: int, columns: int, group: int) -> tuple[int, int]: ...
def int8_head_pack(records: _Array, values: _Array, scales: npt.NDArray[np.float16], group: int) -> None: ...

_Choice: TypeAlias = tuple[float, int, float, float]

class CudaDecoder:
    def __init__(self, model: dict[str, Any], capacity: int) -> None: ...
    @property
    def device(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    def new_cache(self) -> int: ...
    def free_cache(self, cache: int) -> None: ...
    # to and rows: float16 [2 * layers * kv_heads, positions * head_size].
    def read_cache(self, cache: int, to: _Array) -> None: ...
    def write_cache(self, cache: int, rows: _Array) -> None: ...
    # x: float32 [rows, hidden], or tokens; logits: float32 [wanted, rows of the head].
    def run(
        self,
        caches: list[int],
        positions: list[int],
        x: _Array | list[int],
        wanted: list[int],
        logits: _Array | None,
        choices: list[_Choice] = ...,
    ) -> list[tuple[int, float]]: ...
    def run_chain(self, cache: int, position: int, token: int, choices: list[_Choice]) -> list[tuple[int, float]]: ...
