"""Questions about molecules and proteins, answered on the box where the data is."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Answer, AnswerStream, Chat, Engine, Piece, PreparedPrompt
    from .errors import BioMedGPTError
    from .inputs import Molecule, Protein
    from .sampling import GenerationOptions

__all__ = [
    "Answer",
    "AnswerStream",
    "BioMedGPTError",
    "Chat",
    "Engine",
    "GenerationOptions",
    "Molecule",
    "Piece",
    "PreparedPrompt",
    "Protein",
]

_MODULES = {
    **dict.fromkeys(("Answer", "AnswerStream", "Chat", "Engine", "Piece", "PreparedPrompt"), "engine"),
    "BioMedGPTError": "errors",
    **dict.fromkeys(("Molecule", "Protein"), "inputs"),
    "GenerationOptions": "sampling",
}


# Official builds of ONNX Runtime report to their maker unless this stands in the environment before they are imported
# (its Privacy.md). Molecules are secrets: nothing leaves the machine, not even that it was asked.
TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
if "onnxruntime" in sys.modules and os.environ.get(TELEMETRY_SWITCH) != "1":
    warnings.warn(
        "onnxruntime was imported before biomedgpt_edge, so its telemetry could not be switched off; "
        f"import biomedgpt_edge first, or set {TELEMETRY_SWITCH}=1",
        stacklevel=2,
    )
os.environ[TELEMETRY_SWITCH] = "1"


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``doctor`` runs where a dependency is missing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
