"""Tensors of a ``.safetensors`` file, through the library of that name.

The format (https://huggingface.co/docs/safetensors) is a JSON header with dtype, shape and byte range of each tensor,
then the bytes. The library checks on opening that the ranges are in the file, without gaps or overlaps, and maps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from biomedgpt_edge.errors import ClosedError

from ..errors import CheckpointError
from .base import Checkpoint, missing_key, refuse_foreign_file, require_regular_file

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


class SafetensorsCheckpoint(Checkpoint):
    """One ``.safetensors`` file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        require_regular_file(path)
        self.files = [path]
        self._path = path
        try:
            with path.open("rb") as file:
                head = file.read(64)
            # The length of the header comes first, and one in 32 begins with the byte of a pickle. Its upper half is
            # zero, as the format allows headers of 100 MB, and the header itself begins with a brace.
            if head[4:9] != b"\0\0\0\0{":
                refuse_foreign_file(path, head)
            handle: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: {error}.",
                seen=str(path),
                remedy="The file is probably incomplete or damaged: copy or download it again.",
            ) from error
        self._handle: Any = handle
        self._entries: dict[str, tuple[tuple[int, ...], str]] = {}
        for key in handle.keys():
            entry = handle.get_slice(key)
            dtype = entry.get_dtype()
            if dtype not in _DTYPES:
                raise CheckpointError(f"{path}: the tensor {key!r} has the unsupported type {dtype}.", seen=dtype)
            self._entries[key] = (tuple(entry.get_shape()), _DTYPES[dtype])

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entry(key)[0]

    def dtype(self, key: str) -> str:
        return self._entry(key)[1]

    def tensor(self, key: str) -> torch.Tensor:
        self._entry(key)
        if self._handle is None:
            raise ClosedError(f"{self._path.name} is closed.")
        try:
            tensor: torch.Tensor = self._handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: cannot read {key!r}: {error}.", seen=key) from error
        return tensor

    def close(self) -> None:
        self._handle = None

    def _entry(self, key: str) -> tuple[tuple[int, ...], str]:
        if key not in self._entries:
            raise missing_key(self._path, key)
        return self._entries[key]
