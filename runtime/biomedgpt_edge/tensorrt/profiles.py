"""For which shapes an engine is built: some lengths of prompt, and single tokens.

TensorRT chooses kernels by profile, a range of shapes with one that it optimizes for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..generate import PREFILL_CHUNK
from ..manifest import DecoderSpec
from ..molecule_graph import BOND_DIRECTIONS, BOND_TYPES
from ..protein_tokens import MAX_RESIDUES, SPECIAL_POSITIONS
from ..speculation import DRAFT

# A token, and those that may be drafted behind it.
STEP_TOKENS = 1 + DRAFT
# Positions by which the part of the KV cache grows that is attended to: few shapes, so that each keeps its CUDA graph.
ATTENDED_STEP = 256
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of the inputs that vary.

    Attributes:
        lengths: shortest, usual and longest; what else varies goes with them.
        shapes: by input, the shape for each of them.
    """

    lengths: tuple[int, int, int]
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def decoder_profiles(spec: DecoderSpec, context: int) -> list[Profile]:
    """Decode first, one token or a few drafted ones; then prompts and the chunks that long ones are cut into."""
    least = min(ATTENDED_STEP, context)
    bounds = [(1, 1, STEP_TOKENS), *_ranges([STEP_TOKENS, 64, 128, PREFILL_CHUNK], context)]
    return [
        Profile(
            (low, usual, high),
            {
                "inputs_embeds": _each((low, usual, high), lambda n: (1, n, spec.hidden_size)),
                "position_ids": _each((low, usual, high), lambda n: (1, n)),
                "mask": ((1, 1, low, least), (1, 1, usual, least), (1, 1, high, context)),
                "logit_positions": ((1,), (1,), (min(high, STEP_TOKENS),)),
            },
        )
        for low, usual, high in bounds
    ]


def molecule_profiles(context: int) -> list[Profile]:
    """Molecules of drugs, and larger ones: each atom is a position of the prompt."""
    return [
        Profile(
            (low, usual, high),
            {
                "atom_type": _each((low, usual, high), lambda n: (n,)),
                "chirality": _each((low, usual, high), lambda n: (n,)),
                "adjacency": _each((low, usual, high), lambda n: (n, n)),
                "edge_counts": _each((low, usual, high), lambda n: (n, BOND_TYPES + BOND_DIRECTIONS)),
            },
        )
        for low, usual, high in [(1, 32, min(64, context)), *_ranges([64, context], context)]
    ]


def protein_profiles() -> list[Profile]:
    """Residues with the two positions around them; several lengths."""
    longest = MAX_RESIDUES + SPECIAL_POSITIONS
    return [
        Profile(
            (low, usual, high),
            {
                "residue_ids": _each((low, usual, high), lambda n: (1, n)),
                "position_ids": _each((low, usual, high), lambda n: (1, n)),
            },
        )
        for low, usual, high in [(1 + SPECIAL_POSITIONS, 128, 256), *_ranges([256, 512, longest], longest)]
    ]


def profile_for(profiles: list[Profile], length: int) -> int | None:
    """The index of the one that takes so many positions; None where none does."""
    return next((index for index, profile in enumerate(profiles) if length <= profile.lengths[2]), None)


def _ranges(bounds: list[int], most: int) -> list[tuple[int, int, int]]:
    """From behind each bound to the next, best for the longest, as far as ``most`` reaches."""
    pairs = [(low + 1, min(high, most)) for low, high in itertools.pairwise(bounds)]
    return [(low, high, high) for low, high in pairs if low <= high]


def _each(lengths: tuple[int, int, int], shape: Callable[[int], Shape]) -> tuple[Shape, Shape, Shape]:
    low, usual, high = lengths
    return shape(low), shape(usual), shape(high)
