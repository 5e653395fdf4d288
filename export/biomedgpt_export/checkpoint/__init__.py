"""Checkpoints as named tensors, opened lazily and without trusting the file.

Reading a checkpoint runs none of its content, allocates nothing that it declares before that was checked, and never
holds more of it in memory than the tensors in use.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ..errors import CheckpointError
from .base import Checkpoint
from .gptq import GptqCheckpoint, GptqWeight
from .gptq_config import BITS, GptqConfig
from .joined import JoinedCheckpoint
from .safetensors_file import SafetensorsCheckpoint
from .sharded import ShardedCheckpoint, require_inside
from .torch_file import TorchCheckpoint

__all__ = [
    "Checkpoint",
    "GptqCheckpoint",
    "GptqConfig",
    "GptqWeight",
    "JoinedCheckpoint",
    "open_checkpoint",
    "open_gptq",
]

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


def open_gptq(folder: Path) -> GptqCheckpoint:
    """Open the folder of a model that AutoGPTQ or GPTQModel quantized; its matrices read like ordinary ones.

    Raises:
        CheckpointError: it does not say that it is quantized, or in a way that is not read here, or its numbers are
            unsound; and all that :func:`open_checkpoint` raises.
    """
    config = GptqConfig.read(folder)
    if config is None:
        raise CheckpointError(
            f"{folder} does not say that it is quantized.",
            seen=str(folder),
            remedy="A quantized model has quantize_config.json, or quantization_config in its config.json.",
        )
    with ExitStack() as opened:
        inner = opened.enter_context(open_checkpoint(_find_gptq(folder, config)))
        checkpoint = GptqCheckpoint(inner, config)
        opened.pop_all()
    return checkpoint


def _find_gptq(folder: Path, config: GptqConfig) -> Path:
    """AutoGPTQ's own file name, or else the folder, for the names that everybody uses."""
    for suffix in (".safetensors", ".safetensors.index.json", ".bin"):
        path = folder / f"gptq_model-{BITS}bit-{config.group_size}g{suffix}"
        if path.exists():
            require_inside(path, folder)
            return path
    return folder


def _find_in_folder(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        path = folder / name
        if path.exists():
            require_inside(path, folder)
            return path
    raise CheckpointError(
        f"{folder} holds no checkpoint.", seen=str(folder), remedy=f"Looked for {', '.join(_FOLDER_FILES)}."
    )
