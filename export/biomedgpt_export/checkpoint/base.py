"""What every checkpoint offers, whatever file format it came in."""

from __future__ import annotations

import abc
import json
import stat
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import CheckpointError, KeyMismatchError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

#: Bound on one JSON file beside the weights. The index of a 70B model with 80 layers is below 100 KB.
MAX_JSON_BYTES = 4 << 20

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "Fetch it with `git lfs pull`."),
    (b"<!DOCTYPE", "an HTML page", "A download page was saved instead of the file; download it again."),
    (b"<html", "an HTML page", "A download page was saved instead of the file; download it again."),
    (b"\x93NUMPY", "a NumPy array", "Give the PyTorch or safetensors checkpoint instead."),
    (b"\x89HDF", "an HDF5 file", "Give the PyTorch or safetensors checkpoint instead."),
    (b"GGUF", "a GGUF file, which holds weights that are already quantized", "Give the original checkpoint instead."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    # torch/serialization.py, `_legacy_save`: a pickled MAGIC_NUMBER 0x1950a86a20f9469cfc6c comes first.
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a PyTorch file in the format from before 1.6, which is a bare pickle",
        "Convert it where running unknown code does no harm: torch.save(torch.load(old, weights_only=True), new).",
    ),
    (b"\x80", "a bare pickle", "Give a file written by torch.save (PyTorch 1.6 or later) or a safetensors file."),
)


class Checkpoint(abc.ABC):
    """Named tensors in one or more files, read one at a time.

    A context manager. Tensors that were handed out stay valid after :meth:`close`; they are views of a memory map and
    meant to be read only.

    Attributes:
        files: the files it is made of, in the order in which a provenance hash should take them.
    """

    files: list[Path]

    @abc.abstractmethod
    def keys(self) -> list[str]:
        """Names of all tensors, in file order."""

    @abc.abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, known without reading it."""

    @abc.abstractmethod
    def dtype(self, key: str) -> str:
        """Element type by its torch name: ``float32``, ``bfloat16``, ``int64``, ..."""

    @abc.abstractmethod
    def tensor(self, key: str) -> torch.Tensor:
        """One tensor. Only its own pages of the file are read."""

    def original_name(self, key: str) -> str:
        """What the file itself calls a tensor, for people; another name only where checkpoints are joined."""
        return key

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the files. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def missing_key(path: Path, key: str) -> KeyMismatchError:
    """The error for a name that the checkpoint does not have."""
    return KeyMismatchError(f"{path.name} has no tensor named {key!r}.", [key])


def read_json(path: Path) -> object:
    """The content of a JSON file beside the weights, its size bounded and its keys unambiguous."""
    require_regular_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}.", seen=str(path)) from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is too large for what it should hold.", limit=MAX_JSON_BYTES)
    try:
        return json.loads(data, object_pairs_hook=_unique_pairs)
    # RecursionError: the parser descends into brackets as deep as the file has them.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.", seen=str(path)) from error


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return content


def require_regular_file(path: Path) -> None:
    """Refuse what cannot be a checkpoint. Opening a FIFO would block, reading a device would never end."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.", seen=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file.", seen=str(path))
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty.", seen=str(path), remedy="Download or copy it again.")


def refuse_foreign_file(path: Path, head: bytes) -> None:
    """Name the format of a file that starts with the mark of one this package does not read."""
    for mark, what, remedy in _FOREIGN:
        if head.startswith(mark):
            raise CheckpointError(f"{path} is {what}.", seen=str(path), remedy=remedy)
