"""Quantized matrices on disk, unit by unit, so that work that was interrupted can be taken up again.

A unit (a layer, say) is one safetensors file that appears whole, with a digest of its contents inside. ``plan.json``
says what the work was begun with; it is not continued with anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from ..errors import JournalError
from .int4 import Int4Weight

_PLAN = "plan.json"
_ABOUT = "about"


@dataclass(frozen=True)
class Unit:
    """What was done in one step: matrices by their names in the graph, and JSON values about them."""

    matrices: dict[str, Int4Weight]
    notes: dict[str, Any]


class Journal:
    """The folder of one piece of work.

    Args:
        folder: is made, or holds what was done before.
        plan: JSON values that must be the same for work to be continued.

    Raises:
        JournalError: the folder was begun with another plan, or is none of this class's.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _PLAN
        if path.exists():
            self._compare(path, plan)
        else:
            _write(path, json.dumps(dict(plan), indent=1, sort_keys=True).encode())

    def units(self) -> list[str]:
        """Units that are done, sorted by name; a damaged one is found when it is read."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def write(self, name: str, unit: Unit) -> None:
        """Adds a unit; when this returns, it is on disk."""
        tensors: dict[str, torch.Tensor] = {}
        for matrix_name, matrix in unit.matrices.items():
            tensors[f"{matrix_name}.packed"], tensors[f"{matrix_name}.scales"] = matrix.packed, matrix.scales
        shapes = {matrix_name: [matrix.columns, matrix.group_size] for matrix_name, matrix in unit.matrices.items()}
        about = json.dumps({"shapes": shapes, "notes": unit.notes}, sort_keys=True)
        # One entry: safetensors writes several in an order that changes from run to run.
        _write(self._path(name), save(tensors, {_ABOUT: f"{_digest(tensors, about)} {about}"}))

    def read(self, name: str) -> Unit | None:
        """A unit; None where it has not been done, or its file is damaged, so that it must be done again."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            digest, _, text = metadata[_ABOUT].partition(" ")
            if digest != _digest(tensors, text):
                return None
            about = json.loads(text)
            matrices = {
                key: Int4Weight(tensors[f"{key}.packed"], tensors[f"{key}.scales"], columns, group_size)
                for key, (columns, group_size) in about["shapes"].items()
            }
        except (safetensors.SafetensorError, KeyError, ValueError):
            return None
        return Unit(matrices, about["notes"])

    def remove(self) -> None:
        """Removes the folder, once its contents have been used."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _compare(self, path: Path, plan: Mapping[str, Any]) -> None:
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JournalError(
                f"{path} cannot be read: {error}.", seen=str(path), remedy=f"Remove {self.folder} to begin again."
            ) from error
        if begun != plan:
            known = begun if isinstance(begun, dict) else {}
            changed = sorted(name for name in {*known, *plan} if known.get(name) != plan.get(name))
            raise JournalError(
                f"{self.folder} holds work that was begun with another {', '.join(changed)}.",
                seen={name: known.get(name) for name in changed},
                limit={name: plan.get(name) for name in changed},
                remedy="Use the same command, checkpoint and versions to continue, or remove it to begin again.",
            )


def _digest(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, also after a loss of power."""
    staging = path.with_name(f"{path.name}.partial")
    with staging.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
