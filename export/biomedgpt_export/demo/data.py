"""Training data: molecules with the facts RDKit computes, proteins with their labels, and a split without leaks.

Molecules are held out by a hash of their canonical SMILES without stereo marks, so stereoisomers, which have the same
answers, stay on one side. Proteins of the secondary-structure set keep that set's own test part; proteins with a
location are held out by a hash of the sequence; a sequence that is held out for one question is in no training set.
Similar, not identical, protein sequences may still lie on both sides.
"""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit import Chem, RDLogger

from biomedgpt_edge.errors import MoleculeError
from biomedgpt_edge.molecule_graph import featurize
from biomedgpt_edge.protein_tokens import ALLOWED_RESIDUES

from ..errors import TrainingDataError
from .answers import LOCATIONS
from .chemistry import GROUPS, MoleculeFacts, atom_labels, count_targets, facts_of, group_atoms
from .everyday import EVERYDAY

MOLECULES_FILE = "molecules.smi.gz"
CHEBI_FILE = "chebi20_validation.tsv"
LOCATION_FILE = "proteins_location.tsv.gz"
STRUCTURE_FILE = "proteins_secondary_structure.tsv.gz"
DATA_FILES = (MOLECULES_FILE, CHEBI_FILE, LOCATION_FILE, STRUCTURE_FILE)

SOURCES: dict[str, dict[str, str]] = {
    MOLECULES_FILE: {
        "source": "MoleculeNet: MUV, ChEMBL, Tox21, ClinTox and ESOL molecules, as collected by DeepChem",
        "terms": "MIT; ChEMBL data CC BY-SA 3.0",
    },
    CHEBI_FILE: {"source": "ChEBI-20 validation split, as in MolT5", "terms": "BSD-3-Clause; ChEBI data CC BY 4.0"},
    LOCATION_FILE: {"source": "DeepLoc, as collected by HannesStark", "terms": "MIT"},
    STRUCTURE_FILE: {"source": "NetSurfP-2.0, CASP12 and CB513, as collected by FLIP", "terms": "AFL-3.0"},
}

MAX_HEAVY_ATOMS = 60
# Molecules below this size are rare in screening libraries and common in questions, so each gets several spellings.
SMALL_HEAVY_ATOMS = 15
SMALL_SPELLINGS = 4
EVERYDAY_SPELLINGS = 60
MIN_RESIDUES = 30
HELD_OUT_PERCENT = 2
HELD_OUT_PROTEIN_PERCENT = 10
# Changes whenever preparation would give other arrays, so that a stale cache is not used.
_PREPARATION = 1

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MoleculeRecord:
    """One spelling of a molecule.

    Attributes:
        smiles: the spelling.
        key: canonical SMILES without stereo marks; decides the side of the split.
        held_out: not in training.
        formula: as in ``MoleculeFacts``.
        atoms: ``[N, 2]``; bonds: ``[B, 4]``, as ``featurize`` gives them.
        groups: ``[N, G]`` 0/1; labels: ``[N, 3]``; numbers: the other facts and the counts, int16.
    """

    smiles: str
    key: str
    held_out: bool
    formula: str
    atoms: U8
    bonds: U8
    groups: U8
    labels: U8
    numbers: npt.NDArray[np.int16]


@dataclass(frozen=True)
class MoleculeTable:
    """Molecules as flat arrays; ``atom_start [M + 1]`` and ``bond_start [M + 1]`` say where each one lies."""

    smiles: npt.NDArray[np.bytes_]
    formulas: npt.NDArray[np.bytes_]
    held_out: npt.NDArray[np.bool_]
    atom_start: npt.NDArray[np.int64]
    bond_start: npt.NDArray[np.int64]
    atoms: U8
    bonds: U8
    groups: U8
    labels: U8
    numbers: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.smiles)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Atoms of each molecule, ``[M]``."""
        return np.diff(self.atom_start)

    def atom_slice(self, index: int) -> slice:
        """Rows of one molecule's atoms."""
        return slice(int(self.atom_start[index]), int(self.atom_start[index + 1]))

    def bond_slice(self, index: int) -> slice:
        """Rows of one molecule's bonds."""
        return slice(int(self.bond_start[index]), int(self.bond_start[index + 1]))

    def group_flags(self, index: int) -> U8:
        """``[G]``: which groups occur."""
        rows = self.groups[self.atom_slice(index)]
        flags: U8 = np.unpackbits(rows, axis=1, count=len(GROUPS)).max(axis=0)
        return flags

    def counts(self, index: int) -> npt.NDArray[np.int16]:
        """The numbers of ``chemistry.COUNTS``."""
        return self.numbers[index, 6:]

    def facts(self, index: int) -> MoleculeFacts:
        """What the answers state about one molecule."""
        heavy, rings, aromatic, donors, acceptors, parts = (int(n) for n in self.numbers[index, :6])
        groups = tuple(name for name, hit in zip(GROUPS, self.group_flags(index), strict=True) if hit)
        return MoleculeFacts(heavy, rings, aromatic, donors, acceptors, parts, self.formulas[index].decode(), groups)

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the table; ``fingerprint`` names what it was made from."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        staging = path.with_suffix(".tmp.npz")
        np.savez(staging, fingerprint=np.array(fingerprint), **arrays)
        staging.replace(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> MoleculeTable | None:
        """The table at ``path``, or None if there is none or it was made from something else."""
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            return cls(**{field.name: stored[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class ProteinRecord:
    """A protein with a location (``membrane`` is M, S or U) or a secondary structure (H, E, C per residue)."""

    sequence: str
    location: str = ""
    membrane: str = "U"
    structure: str = ""


@dataclass(frozen=True)
class ProteinSplit:
    """Proteins by label, for training and held out."""

    located: list[ProteinRecord]
    structured: list[ProteinRecord]
    held_out_located: list[ProteinRecord]
    held_out_structured: list[ProteinRecord]


# ------------------------------------------------------------------------------------------------------ files


def file_hashes(data: Path) -> dict[str, str]:
    """SHA-256 of each training file.

    Raises:
        TrainingDataError: a file is missing.
    """
    missing = [name for name in DATA_FILES if not (data / name).is_file()]
    if missing:
        raise TrainingDataError(
            f"{data} lacks {', '.join(missing)}.", seen=missing, remedy="Name the folder that holds the training files."
        )
    return {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in DATA_FILES}


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Tab-separated rows of a plain or gzipped file.

    Raises:
        TrainingDataError: a row has too few columns, or the file is not text.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"{path.name} cannot be read: {error}.", remedy="Fetch the file again.") from error
    for line_number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = line.split("\t")
        if len(row) < columns:
            raise TrainingDataError(
                f"{path.name}, line {line_number}: {len(row)} columns, expected {columns}.", seen=line[:80]
            )
        yield row


def _percent(text: str) -> int:
    """A number from 0 to 99 that depends on ``text`` only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


# -------------------------------------------------------------------------------------------------- molecules


def molecule_sources(data: Path) -> Iterator[tuple[str, bool]]:
    """(SMILES, everyday) of everything that may be trained on or held out."""
    for smiles in EVERYDAY.values():
        yield smiles, True
    for row in _rows(data / MOLECULES_FILE, 1):
        yield row[0].split()[0], False
    for index, row in enumerate(_rows(data / CHEBI_FILE, 2)):
        if index:  # the first row is the header
            yield row[1].replace("\\\\", "\\"), False


def split_key(mol: Chem.Mol) -> str:
    """Canonical SMILES without stereo marks."""
    return str(Chem.MolToSmiles(mol, isomericSmiles=False))


def _everyday_keys() -> frozenset[str]:
    return frozenset(split_key(Chem.MolFromSmiles(smiles)) for smiles in EVERYDAY.values())


_EVERYDAY_KEYS = _everyday_keys()


def molecule_records(source: tuple[str, bool]) -> list[MoleculeRecord]:
    """All spellings of one molecule; empty for what cannot be read, has no features or is too large."""
    smiles, everyday = source
    mol = Chem.MolFromSmiles(smiles)
    if mol is None or not 1 <= mol.GetNumAtoms() <= MAX_HEAVY_ATOMS:
        return []
    key = split_key(mol)
    known = key in _EVERYDAY_KEYS
    held_out = not known and _percent(key) < HELD_OUT_PERCENT
    spellings = [smiles]
    if everyday:
        spellings += _spellings(mol, key, EVERYDAY_SPELLINGS - 1)
    elif mol.GetNumHeavyAtoms() < SMALL_HEAVY_ATOMS and not held_out and not known:
        spellings += _spellings(mol, key, SMALL_SPELLINGS - 1)
    return [record for text in spellings for record in _record(text, key, held_out)]


def _spellings(mol: Chem.Mol, key: str, count: int) -> list[str]:
    """``count`` random atom orders of a molecule, the same ones each time."""
    return list(Chem.MolToRandomSmilesVect(mol, count, randomSeed=_percent(key) + 1))


def _record(smiles: str, key: str, held_out: bool) -> list[MoleculeRecord]:
    """One record, or none if the spelling cannot be read or has no features."""
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None:
        return []
    try:
        graph = featurize(mol)
    except MoleculeError:
        return []
    groups = group_atoms(mol)
    known = facts_of(mol, groups)
    numbers = [known.heavy, known.rings, known.aromatic, known.donors, known.acceptors, known.parts]
    return [
        MoleculeRecord(
            smiles=smiles,
            key=key,
            held_out=held_out,
            formula=known.formula,
            atoms=graph.atoms.astype(np.uint8),
            bonds=graph.bonds.astype(np.uint8),
            groups=groups,
            labels=atom_labels(mol),
            numbers=np.array([*numbers, *count_targets(known)], dtype=np.int16),
        )
    ]


def molecule_table(sources: Iterable[tuple[str, bool]], workers: int = 1) -> MoleculeTable:
    """Facts, labels and features of all molecules, each molecule once (and its spellings).

    Raises:
        TrainingDataError: nothing usable in the sources.
    """
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    records: list[MoleculeRecord] = []
    seen: set[bytes] = set()
    for batch in _mapped(list(dict.fromkeys(sources)), workers):
        if not batch:
            continue
        # The same atoms and bonds in the same order are the same input, whatever the spelling.
        fingerprint = hashlib.sha256(batch[0].atoms.tobytes() + b"|" + batch[0].bonds.tobytes()).digest()
        if fingerprint not in seen or len(batch) == EVERYDAY_SPELLINGS:
            seen.add(fingerprint)
            records.extend(batch)
    if not records:
        raise TrainingDataError("no usable molecule in the training data.", remedy="Check the SMILES files.")
    return _as_table(records)


def _mapped(sources: list[tuple[str, bool]], workers: int) -> Iterator[list[MoleculeRecord]]:
    if workers <= 1:
        yield from map(molecule_records, sources)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(molecule_records, sources, chunksize=256)


def _as_table(records: list[MoleculeRecord]) -> MoleculeTable:
    def starts(lengths: list[int]) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    return MoleculeTable(
        smiles=np.array([r.smiles.encode() for r in records]),
        formulas=np.array([r.formula.encode() for r in records]),
        held_out=np.array([r.held_out for r in records]),
        atom_start=starts([len(r.atoms) for r in records]),
        bond_start=starts([len(r.bonds) for r in records]),
        atoms=np.concatenate([r.atoms for r in records]),
        bonds=np.concatenate([r.bonds for r in records]),
        groups=np.packbits(np.concatenate([r.groups for r in records]), axis=1),
        labels=np.concatenate([r.labels for r in records]),
        numbers=np.stack([r.numbers for r in records]),
    )


def prepared_molecules(data: Path, cache: Path, workers: int = 1) -> MoleculeTable:
    """The molecule table of ``data``, kept in ``cache`` as ``molecules.npz`` for the next start."""
    hashes = file_hashes(data)
    recipe = [_PREPARATION, hashes[MOLECULES_FILE], hashes[CHEBI_FILE], sorted(EVERYDAY.items()), GROUPS]
    fingerprint = hashlib.sha256(repr(recipe).encode()).hexdigest()
    path = cache / "molecules.npz"
    table = MoleculeTable.load(path, fingerprint)
    if table is None:
        table = molecule_table(molecule_sources(data), workers)
        cache.mkdir(parents=True, exist_ok=True)
        table.save(path, fingerprint)
    return table


# --------------------------------------------------------------------------------------------------- proteins


def _usable(sequence: str) -> bool:
    return len(sequence) >= MIN_RESIDUES and not set(sequence) - ALLOWED_RESIDUES


def proteins(data: Path) -> ProteinSplit:
    """Proteins of both files, split; each sequence once per file.

    Raises:
        TrainingDataError: an unknown location, or a structure string of another length than its sequence.
    """
    located: dict[str, ProteinRecord] = {}
    for _, sequence, location, membrane in (row[:4] for row in list(_rows(data / LOCATION_FILE, 4))[1:]):
        if location not in LOCATIONS:
            raise TrainingDataError(f"{LOCATION_FILE}: unknown location {location!r}.", seen=location)
        if _usable(sequence):
            located.setdefault(sequence, ProteinRecord(sequence, location=location, membrane=membrane))
    structured: dict[str, ProteinRecord] = {}
    tested: set[str] = set()
    for _, sequence, structure, part in (row[:4] for row in list(_rows(data / STRUCTURE_FILE, 4))[1:]):
        if len(structure) != len(sequence) or set(structure) - set("HEC"):
            raise TrainingDataError(f"{STRUCTURE_FILE}: a structure that does not match its sequence.", seen=part)
        if _usable(sequence):
            structured.setdefault(sequence, ProteinRecord(sequence, structure=structure))
            if part == "test":
                tested.add(sequence)
    held_out = tested | {s for s in located if s in tested or _percent(s) < HELD_OUT_PROTEIN_PERCENT}
    return ProteinSplit(
        located=[r for s, r in located.items() if s not in held_out],
        structured=[r for s, r in structured.items() if s not in held_out],
        held_out_located=[r for s, r in located.items() if s in held_out],
        held_out_structured=[r for s, r in structured.items() if s in tested],
    )
