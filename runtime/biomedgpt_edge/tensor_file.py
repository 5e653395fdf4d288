"""safetensors files as memory-mapped numpy arrays.

The safetensors package copies each tensor; here the pages of a table stay shared between processes and are read only
where they are used. Format: safetensors 0.x (8 bytes of header size, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BundleCorruptError

MAX_HEADER_BYTES = 2**20
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I8": np.dtype("i1")}


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read-only arrays over the file, by name.

    Raises:
        BundleCorruptError: any deviation from the format, with the tensor's name or the byte where it shows.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
            raise _corrupt(path, f"its header claims {header_size:,} bytes at byte 0, and the file has {size:,}")
        header = _header(path, file.read(header_size))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + header_size
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        begin, stop = _offsets(path, name, entry)
        dtype, shape = _layout(path, name, entry)
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise _corrupt(path, f"tensor '{name}' does not fill bytes {start + begin:,} to {start + stop:,}")
        if start + stop > size:
            raise _corrupt(path, f"tensor '{name}' ends at byte {start + stop:,}, and the file has {size:,}")
        if (start + begin) % dtype.itemsize:
            raise _corrupt(path, f"tensor '{name}' starts at byte {start + begin:,}, which is not aligned")
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
        end = stop
    if start + end != size:
        raise _corrupt(path, f"its tensors end at byte {start + end:,}, and the file has {size:,}")
    return arrays


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not an object")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise _corrupt(path, f"tensor '{name}' has no valid data_offsets")
    return offsets[0], offsets[1]


def _layout(path: Path, name: str, entry: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    kind, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise _corrupt(path, f"tensor '{name}' has dtype {str(kind)[:20]!r}; known are {', '.join(_DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= 8 and all(type(d) is int and 0 <= d < 2**40 for d in shape)):
        raise _corrupt(path, f"tensor '{name}' has no valid shape")
    return _DTYPES[kind], tuple(shape)


def _corrupt(path: Path, what: str) -> BundleCorruptError:
    return BundleCorruptError(f"{path.name} is corrupt: {what}.", remedy="Export or copy the bundle again.")
