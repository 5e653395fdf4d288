"""Proteins with their labels, split so that no two similar ones stand on both sides.

Whole clusters of similar sequences (see ``similarity``) are held out: those that hold a protein of the
secondary-structure set's own test part, and some more by a hash.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from biomedgpt_edge.protein_tokens import ALLOWED_RESIDUES, MAX_RESIDUES

from ..errors import TrainingDataError
from .answers import LOCATIONS, MEMBRANE
from .data import LOCATION_FILE, STRUCTURE_FILE, order, rows
from .similarity import clusters

MIN_RESIDUES = 30
HELD_OUT_SHARE = 0.12
GROUPS = 8


@dataclass(frozen=True)
class ProteinRecord:
    """A protein with a location, or with a structure (H, E, C per residue).

    ``membrane`` is M (membrane protein), S (soluble) or U (unknown). Similar sequences have the same ``group``, a
    number below ``GROUPS``.
    """

    sequence: str
    location: str = ""
    membrane: str = "U"
    structure: str = ""
    group: int = 0

    @property
    def shares(self) -> tuple[float, float]:
        """Helix and strand, from 0 to 1, of the residues that the encoder reads; there must be a structure."""
        read = self.structure[:MAX_RESIDUES]
        return read.count("H") / len(read), read.count("E") / len(read)


@dataclass(frozen=True)
class ProteinFacts:
    """What answers say of a protein: location and membrane (M or S) as DeepLoc writes them, shares from 0 to 1."""

    location: str
    membrane: str
    helix: float
    strand: float


@dataclass(frozen=True)
class ProteinSplit:
    """Proteins by label, for training and held out; ``left_out`` counts those in neither, by reason."""

    located: list[ProteinRecord]
    structured: list[ProteinRecord]
    held_out_located: list[ProteinRecord]
    held_out_structured: list[ProteinRecord]
    left_out: dict[str, int]


def proteins(data: Path) -> ProteinSplit:
    """Proteins of both files, split; each sequence once per file.

    Raises:
        TrainingDataError: an unknown location or membrane label, or a structure string of another length than its
            sequence.
    """
    structured = _structured(data)
    every = [*_located(data), *(record for record, _ in structured)]
    usable = [record for record in every if _usable(record.sequence)]
    first = {(record.sequence, bool(record.location)): record for record in reversed(usable)}
    leaders = _leaders(list(dict.fromkeys(record.sequence for record in usable)))
    tested = {leaders[r.sequence] for r, part in structured if part == "test" and r.sequence in leaders}
    held_out = {s for s, lead in leaders.items() if lead in tested or order(lead) < HELD_OUT_SHARE * 2**32}
    once = [replace(r, group=order(f"group of {leaders[r.sequence]}") % GROUPS) for r in reversed(first.values())]
    return ProteinSplit(
        located=[r for r in once if r.location and r.sequence not in held_out],
        structured=[r for r in once if r.structure and r.sequence not in held_out],
        held_out_located=[r for r in once if r.location and r.sequence in held_out],
        held_out_structured=[r for r in once if r.structure and r.sequence in held_out],
        left_out={
            f"shorter than {MIN_RESIDUES} residues or with letters that are no residues": len(every) - len(usable),
            "repeated sequences": len(usable) - len(once),
        },
    )


def _usable(sequence: str) -> bool:
    return len(sequence) >= MIN_RESIDUES and not set(sequence) - ALLOWED_RESIDUES


def _located(data: Path) -> list[ProteinRecord]:
    records = []
    for _, sequence, location, membrane in (row[:4] for row in list(rows(data / LOCATION_FILE, 4))[1:]):
        if location not in LOCATIONS:
            raise TrainingDataError(f"{LOCATION_FILE}: unknown location {location!r}.", seen=location)
        if membrane not in (*MEMBRANE, "U"):
            raise TrainingDataError(f"{LOCATION_FILE}: membrane is {membrane!r}, not M, S or U.", seen=membrane)
        records.append(ProteinRecord(sequence, location=location, membrane=membrane))
    return records


def _structured(data: Path) -> list[tuple[ProteinRecord, str]]:
    """Records and the part of the source's own split."""
    records = []
    for _, sequence, structure, part in (row[:4] for row in list(rows(data / STRUCTURE_FILE, 4))[1:]):
        if len(structure) != len(sequence) or set(structure) - set("HEC"):
            raise TrainingDataError(f"{STRUCTURE_FILE}: a structure that does not match its sequence.", seen=part)
        records.append((ProteinRecord(sequence, structure=structure), part))
    return records


def _leaders(sequences: list[str]) -> dict[str, str]:
    """The first sequence, by the alphabet, of the cluster that each one is in."""
    members: dict[int, list[str]] = defaultdict(list)
    for sequence, number in zip(sequences, clusters(sequences), strict=True):
        members[number].append(sequence)
    return {sequence: min(cluster) for cluster in members.values() for sequence in cluster}
