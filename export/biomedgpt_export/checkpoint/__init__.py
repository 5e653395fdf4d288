"""Checkpoints as named tensors, opened lazily and without trusting the file.

Reading a checkpoint runs none of its content, allocates nothing that it declares before that was checked, and never
holds more of it in memory than the tensors in use.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .base import Checkpoint
from .safetensors_file import SafetensorsCheckpoint
from .sharded import ShardedCheckpoint, require_inside
from .torch_file import TorchCheckpoint

__all__ = ["Checkpoint", "open_checkpoint"]

# In the order in which transformers looks for them, so that a folder with several means the same here as there.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def open_checkpoint(path: Path, *, root: str | None = None) -> Checkpoint:
    """Open a checkpoint: a torch or safetensors file, an index of shards, or a folder with one of them.

    Args:
        path: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, a ``.index.json``, or a folder holding
            ``model.safetensors``, ``pytorch_model.bin`` or the index of either (the first found, in transformers'
            order).
        root: for torch files, the entry of the saved dict that holds the tensors, such as ``"model"``.

    Raises:
        CheckpointError: the file is missing, incomplete, malformed or in another format.
        UnsafeCheckpointError: its pickle refers to code.
        KeyMismatchError: an index and its shards disagree.
    """
    if path.is_dir():
        path = _find_in_folder(path)
    if path.suffix in _TORCH_SUFFIXES:
        return TorchCheckpoint(path, root=root)
    if root is not None:
        raise CheckpointError(f"{path.name} has no nested entries, so no root {root!r}.", seen=root)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    if path.name.endswith(".index.json"):
        return ShardedCheckpoint(path)
    raise CheckpointError(
        f"{path} is not a checkpoint by its name.",
        seen=str(path),
        remedy=f"Known are {', '.join(_TORCH_SUFFIXES)}, .safetensors, .index.json, and folders that hold one.",
    )


def _find_in_folder(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        path = folder / name
        if path.exists():
            require_inside(path, folder)
            return path
    raise CheckpointError(
        f"{folder} holds no checkpoint.", seen=str(folder), remedy=f"Looked for {', '.join(_FOLDER_FILES)}."
    )
