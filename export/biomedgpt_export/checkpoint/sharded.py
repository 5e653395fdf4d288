"""A checkpoint in several files, tied together by an index.

The layout is that of Hugging Face transformers: ``model.safetensors.index.json`` (or ``pytorch_model.bin.index.json``)
holds ``weight_map``, from tensor name to the file beside it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from biomedgpt_edge.errors import ClosedError

from ..errors import CheckpointError, KeyMismatchError
from .base import Checkpoint, missing_key, read_json
from .safetensors_file import SafetensorsCheckpoint
from .torch_file import TorchCheckpoint

if TYPE_CHECKING:
    import torch


class ShardedCheckpoint(Checkpoint):
    """All shards of an index. The index and the shards must name exactly the same tensors."""

    def __init__(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
        shards = {name: _shard_path(index, name) for name in sorted(set(weight_map.values()))}
        self.files = [index, *shards.values()]
        self._index = index
        self._weight_map = weight_map
        self._closed = False
        with ExitStack() as opened:
            self._shards = {name: opened.enter_context(_open_shard(path)) for name, path in shards.items()}
            self._require_same_keys()
            self._opened = opened.pop_all()

    def keys(self) -> list[str]:
        return list(self._weight_map)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shard_of(key).shape(key)

    def dtype(self, key: str) -> str:
        return self._shard_of(key).dtype(key)

    def tensor(self, key: str) -> torch.Tensor:
        shard = self._shard_of(key)
        if self._closed:
            raise ClosedError(f"{self._index.name} is closed.")
        return shard.tensor(key)

    def close(self) -> None:
        self._closed = True
        self._opened.close()

    def _shard_of(self, key: str) -> Checkpoint:
        if key not in self._weight_map:
            raise missing_key(self._index, key)
        return self._shards[self._weight_map[key]]

    def _require_same_keys(self) -> None:
        found = {(key, name) for name, shard in self._shards.items() for key in shard.keys()}
        listed = set(self._weight_map.items())
        problems = [f"{key} is not in {name}, where the index puts it" for key, name in sorted(listed - found)]
        problems += [f"{key} in {name} is not in the index" for key, name in sorted(found - listed)]
        if problems:
            raise KeyMismatchError(
                f"{self._index} and its shards do not name the same tensors ({len(problems)} problems): {problems[0]}.",
                problems,
                remedy="Copy the index and all shards again from the same revision.",
            )


def _open_shard(path: Path) -> Checkpoint:
    return SafetensorsCheckpoint(path) if path.suffix == ".safetensors" else TorchCheckpoint(path)


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names.", seen=str(index))
    return weight_map


def _shard_path(index: Path, name: str) -> Path:
    """The shard beside the index; a name from a downloaded file must not reach other places of this machine."""
    if not name.endswith((".safetensors", ".bin")) or "/" in name or "\\" in name or "\0" in name or ":" in name:
        raise CheckpointError(
            f"{index} names the shard {name[:100]!r}, which is not a plain file name of a checkpoint.", seen=name[:100]
        )
    path = index.parent / name
    require_inside(path, index.parent)
    return path


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder.

    One such link is normal: the Hugging Face cache keeps ``snapshots/<revision>/<name>`` as links into ``blobs/`` of
    the same repository.
    """
    try:
        target, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.", seen=str(path)) from error
    blobs = home.parent.parent / "blobs"
    if target.parent != home and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise CheckpointError(
            f"{path} is a link that leaves its folder.",
            seen=str(path),
            remedy="Put the file itself beside the index if that is what you want.",
        )
