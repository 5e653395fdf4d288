"""Questions about molecules and proteins, answered on the box where the data is."""

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
