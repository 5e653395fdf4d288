"""Several checkpoints as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Checkpoint, missing_key

if TYPE_CHECKING:
    import torch


class JoinedCheckpoint(Checkpoint):
    """Shows the tensors of each checkpoint under a prefix of its own.

    Args:
        parts: checkpoints by prefix. Of several prefixes that a name begins with the longest counts, so that one part
            can stand in the place of the same part of another checkpoint, whose tensors are then not shown.
    """

    def __init__(self, parts: Mapping[str, Checkpoint]) -> None:
        self._parts = dict(sorted(parts.items(), key=lambda part: len(part[0]), reverse=True))
        self.files = [path for checkpoint in parts.values() for path in checkpoint.files]

    def keys(self) -> list[str]:
        shown = ((checkpoint, prefix + key) for prefix, checkpoint in self._parts.items() for key in checkpoint.keys())
        return [key for checkpoint, key in shown if self._place(key)[0] is checkpoint]

    def shape(self, key: str) -> tuple[int, ...]:
        checkpoint, name = self._place(key)
        return checkpoint.shape(name)

    def dtype(self, key: str) -> str:
        checkpoint, name = self._place(key)
        return checkpoint.dtype(name)

    def tensor(self, key: str) -> torch.Tensor:
        checkpoint, name = self._place(key)
        return checkpoint.tensor(name)

    def original_name(self, key: str) -> str:
        checkpoint, name = self._place(key)
        return checkpoint.original_name(name)

    def close(self) -> None:
        for checkpoint in self._parts.values():
            checkpoint.close()

    def _place(self, key: str) -> tuple[Checkpoint, str]:
        for prefix, checkpoint in self._parts.items():
            if key.startswith(prefix):
                return checkpoint, key.removeprefix(prefix)
        raise missing_key(self.files[0], key)
