"""The trained model as a checkpoint folder in the layout of the BioMedGPT-10B release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families.biomedgpt_10b import WEIGHTS
from ..families.release_files import ReleaseSizes, side_files
from .model import DemoConfig, DemoModel

RECORD = "demo.json"
# The release stores decoder and protein encoder in half precision, the rest in full.
_HALF = ("llm.", "prot_structure_encoder.")


def release_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The flat state dict of the release, in its dtypes."""
    return {key: value.half() if key.startswith(_HALF) else value.clone() for key, value in model.state_dict().items()}


def release_sizes(config: DemoConfig) -> ReleaseSizes:
    """What the configuration files say of a model of these sizes."""
    return ReleaseSizes(
        pieces=config.pieces,
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        ffn=config.ffn,
        positions=config.max_positions,
        rms_norm_eps=config.rms_eps,
        esm_hidden=config.esm_hidden,
        esm_layers=config.esm_layers,
        esm_heads=config.esm_heads,
        esm_ffn=config.esm_ffn,
    )


def write_release(model: DemoModel, tokenizer: Path, out: Path, record: dict[str, Any]) -> None:
    """Writes weights, side folders and ``demo.json`` into ``out``; the weights last, whole or not at all."""
    for name, content in side_files(release_sizes(model.config), tokenizer.read_bytes()).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    write_record(out / RECORD, record)
    weights = out / WEIGHTS
    weights.parent.mkdir(parents=True, exist_ok=True)
    staging = weights.with_suffix(".tmp")
    torch.save(release_tensors(model), staging)
    staging.replace(weights)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes ``demo.json``: what the model was trained on, how, and what it scores."""
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """The contents of ``demo.json``.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", remedy="Train the model again.") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, not an object.", remedy=f"Name a {RECORD}.")
    return record
