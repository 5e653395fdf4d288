from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]
_TokenSegment: TypeAlias = tuple[str, int, _Array]
_FeatureSegment: TypeAlias = tuple[str, int, _Array, _Array, _Array, float | None]

__version__: str

def splice(
    out: npt.NDArray[np.float32],
    table: _Array,
    table_scales: npt.NDArray[np.float32] | None,
    segments: Sequence[_TokenSegment | _FeatureSegment],
    threads: int = 1,
    path: str = "auto",
) -> None: ...
def splice_paths() -> list[str]: ...
def cpu_features() -> dict[str, bool]: ...
def cuda_compiled() -> bool: ...
def cuda_device_count() -> int: ...
