"""Molecules and proteins, validated when they are made: nothing downstream has to check them again."""

from __future__ import annotations

import hashlib
import io
import re
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rdkit import Chem, rdBase

from .errors import InputFileError, MoleculeError, ProteinError
from .molecule_graph import MoleculeGraph, featurize
from .protein_tokens import ALLOWED_RESIDUES, MAX_RESIDUES, SPECIAL_POSITIONS

# Longer than any file a question can be about: the model's context holds 4,096 atoms or residues.
MAX_INPUT_FILE_BYTES = 16 * 2**20
_SEQUENCE_LETTERS = "the 20 amino acids and X, B, U, Z, O"
# str.upper() would turn letters such as the German sharp s or the dotless i into residues.
_UPPER = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)
_SMILES_DIRECTIONS = (Chem.BondDir.NONE, Chem.BondDir.ENDUPRIGHT, Chem.BondDir.ENDDOWNRIGHT)


@dataclass(frozen=True)
class Molecule:
    """A molecule the model can read; make one with a ``from_`` method.

    Attributes:
        smiles: SMILES of what the model sees, in its atom order.
        graph: index features, one row per heavy atom (and per hydrogen that RDKit keeps, such as ``[2H]``).
        name: the name that came with it, if any.
        notes: what was changed while reading it.
        featurize_seconds: time spent parsing and featurizing.
    """

    smiles: str
    graph: MoleculeGraph
    name: str = ""
    notes: tuple[str, ...] = ()
    featurize_seconds: float = field(default=0.0, compare=False)

    placeholder = "<moleculeHere>"

    @classmethod
    def from_smiles(cls, smiles: str) -> Molecule:
        """Reads a SMILES string; text after white space is kept as the molecule's name.

        Raises:
            MoleculeError: nothing in it, unparsable (with RDKit's reason), or an atom or bond without features.
        """
        start = time.perf_counter()
        text = _text(smiles, "SMILES", MoleculeError).strip()
        if not text:
            raise MoleculeError("the SMILES string is empty.", seen=smiles, remedy="Give one such as 'CCO'.")
        mol, reason = _parse_logged(lambda: Chem.MolFromSmiles(text))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read the SMILES {_short(text)}: {reason}.",
                seen=_short(text),
                remedy="Check brackets, ring numbers and valences.",
            )
        spelled, _, name = text.partition(" ")
        return cls._of(mol, smiles=spelled, name=name.strip(), start=start)

    @classmethod
    def from_rdkit(cls, mol: Chem.Mol) -> Molecule:
        """Takes an RDKit molecule; the caller's object is left as it is.

        A molecule that RDKit read from SMILES gives exactly the features of :meth:`from_smiles`. Explicit hydrogens
        are removed, and molecules whose double bonds or wedges do not carry SMILES marks (from a drawing or from 3D)
        are re-spelled as canonical SMILES first, since that is the only kind the model has seen.

        Raises:
            MoleculeError: not an RDKit molecule, no atoms, chemically impossible, or without features.
        """
        start = time.perf_counter()
        if not isinstance(mol, Chem.Mol):
            raise MoleculeError(
                f"expected an RDKit molecule, got {type(mol).__name__}.", remedy="RDKit returns None for bad input."
            )
        name = mol.GetProp("_Name") if mol.HasProp("_Name") else ""
        return cls._of(_as_from_smiles(mol), name=name, start=start)

    @classmethod
    def from_inchi(cls, inchi: str) -> Molecule:
        """Reads an InChI string.

        Raises:
            MoleculeError: as :meth:`from_smiles`.
        """
        start = time.perf_counter()
        text = _text(inchi, "InChI", MoleculeError).strip()
        mol, reason = _parse_logged(lambda: Chem.MolFromInchi(text))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read the InChI {_short(text)}: {reason}.",
                seen=_short(text),
                remedy="An InChI starts with 'InChI=1S/' (an InChIKey cannot be turned back into a molecule).",
            )
        return cls._of(_respelled(mol), start=start)

    @classmethod
    def from_sdf(cls, path: str | Path, *, record: int | None = None) -> Molecule:
        """Reads one molecule of an SDF or MOL file.

        Args:
            record: which one, counted from 1; may be left out if the file holds one.

        Raises:
            InputFileError: no such file, too large, several records and none chosen, or no such record.
            MoleculeError: that record cannot be read.
        """
        start = time.perf_counter()
        path = Path(path)
        blocks = _sdf_blocks(_read_text(path, "SDF"))
        index = _choose(path, len(blocks), record, "molecules")
        mol, reason = _parse_logged(lambda: Chem.MolFromMolBlock(blocks[index]))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read molecule {index + 1} of {path.name}: {reason}.",
                seen=path.name,
                remedy="Open the file in a structure editor and save it again as SDF.",
            )
        name = blocks[index].splitlines()[0].strip() if blocks[index] else ""
        return cls._of(_respelled(mol), name=name, start=start)

    @classmethod
    def _of(cls, mol: Chem.Mol, *, start: float, smiles: str = "", name: str = "") -> Molecule:
        if mol.GetNumAtoms() == 0:
            raise MoleculeError("the molecule has no atoms.", seen=smiles, remedy="Give one such as 'CCO'.")
        spelled = smiles or Chem.MolToSmiles(mol, canonical=False)
        return cls(spelled, featurize(mol), name, (), time.perf_counter() - start)

    @property
    def n_soft_tokens(self) -> int:
        """Positions it takes in a prompt: one per atom."""
        return len(self.graph.atoms)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the features: equal digests give equal soft tokens."""
        return hashlib.sha256(self.graph.atoms.tobytes() + b"/" + self.graph.bonds.tobytes()).hexdigest()


@dataclass(frozen=True)
class Protein:
    """A protein sequence the model can read; make one with :meth:`from_sequence` or :meth:`from_fasta`.

    Attributes:
        sequence: residues, upper case, only allowed letters.
        name: FASTA identifier, if any.
        notes: what was changed while reading it (a dropped stop, a cut end).
        featurize_seconds: time spent checking it.
    """

    sequence: str
    name: str = ""
    notes: tuple[str, ...] = ()
    featurize_seconds: float = field(default=0.0, compare=False)

    placeholder = "<proteinHere>"

    @classmethod
    def from_sequence(cls, sequence: str, *, truncate: bool = False, name: str = "") -> Protein:
        """Checks a one-letter sequence; case and white space do not matter, one trailing ``*`` is dropped and noted.

        Args:
            truncate: cut a sequence that is too long at 1,022 residues, with a note, instead of refusing it.

        Raises:
            ProteinError: empty, other letters (named with their positions), or too long.
        """
        start = time.perf_counter()
        residues = "".join(_text(sequence, "sequence", ProteinError).split()).translate(_UPPER)
        notes: list[str] = []
        if residues.endswith("*"):
            residues = residues[:-1]
            notes.append("the stop mark '*' at the end of the sequence was dropped")
        if not residues:
            raise ProteinError("the protein sequence is empty.", remedy="Give its residues in one-letter code.")
        _check_letters(residues)
        if len(residues) > MAX_RESIDUES:
            notes.append(_cut_note(len(residues), truncate))
            residues = residues[:MAX_RESIDUES]
        return cls(residues, name, tuple(notes), time.perf_counter() - start)

    @classmethod
    def from_fasta(cls, path: str | Path, *, record: int | str | None = None, truncate: bool = False) -> Protein:
        """Reads one record of a FASTA file.

        Args:
            record: which one: its place counted from 1, or its identifier; may be left out if the file holds one.
            truncate: see :meth:`from_sequence`.

        Raises:
            InputFileError: no such file, not FASTA, several records and none chosen, or no such record.
            ProteinError: the sequence cannot be used.
        """
        path = Path(path)
        records = list(_fasta_records(path, _read_text(path, "FASTA")))
        if isinstance(record, str):
            names = [name for name, _ in records]
            if names.count(record) != 1:
                raise InputFileError(
                    f"{path.name} holds {names.count(record)} records called {_short(record)}.",
                    seen=record,
                    remedy=f"Its records are {_listing(names)}.",
                )
            record = names.index(record) + 1
        index = _choose(path, len(records), record, "proteins", [name for name, _ in records])
        name, sequence = records[index]
        return cls.from_sequence(sequence, truncate=truncate, name=name)

    @property
    def n_soft_tokens(self) -> int:
        """Positions it takes in a prompt: one per residue, and one each for ``<cls>`` and ``<eos>``."""
        return len(self.sequence) + SPECIAL_POSITIONS

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the residues: equal digests give equal soft tokens."""
        return hashlib.sha256(self.sequence.encode("ascii")).hexdigest()


def _text(value: object, what: str, error: type[MoleculeError] | type[ProteinError]) -> str:
    if not isinstance(value, str):
        raise error(f"expected a {what} as text, got {type(value).__name__}.", remedy="Pass a string.")
    return value


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)")


def _listing(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_short(name, 40) for name in names[:limit]) + more


def _parse_logged(parse: Callable[[], Chem.Mol | None]) -> tuple[Chem.Mol | None, str]:
    """Runs an RDKit parser silently; if it gives no molecule, once more to catch the reason in RDKit's log."""
    with rdBase.BlockLogs():
        mol = parse()
    if mol is not None:
        return mol, ""
    with rdBase.CaptureErrorLog() as log:
        parse()
    lines = [re.sub(r"^\[[\d:]+\]\s*|ERROR:\s*", "", line).strip() for line in log.messages.splitlines()]
    lines = [line for line in lines if line]
    # Syntax errors come as four lines, the place of the mistake in the second.
    if len(lines) > 1 and "check for mistakes around" in lines[1]:
        return None, f"{lines[0]} ({lines[1].rpartition('check for mistakes ')[2].rstrip(':')})"
    return None, lines[0].rstrip(". ") if lines else "RDKit gives no reason"


def _as_from_smiles(mol: Chem.Mol) -> Chem.Mol:
    """A sanitized copy without explicit hydrogens whose bond directions are those of a SMILES string."""
    copy = Chem.Mol(mol)
    with rdBase.BlockLogs():
        problems = Chem.DetectChemistryProblems(copy)
        if problems:
            raise MoleculeError(
                f"RDKit cannot use this molecule: {problems[0].Message()}.", remedy="Correct its valences or charges."
            )
        Chem.SanitizeMol(copy)
        copy = Chem.RemoveHs(copy)
    directions = [bond.GetBondDir() for bond in copy.GetBonds()]
    stereo = any(bond.GetStereo() > Chem.BondStereo.STEREOANY for bond in copy.GetBonds())
    marked = any(direction != Chem.BondDir.NONE for direction in directions)
    if all(direction in _SMILES_DIRECTIONS for direction in directions) and (marked or not stereo):
        return copy
    return _respelled(copy)


def _respelled(mol: Chem.Mol) -> Chem.Mol:
    """The molecule read back from its canonical SMILES."""
    smiles = Chem.MolToSmiles(mol)
    again, reason = _parse_logged(lambda: Chem.MolFromSmiles(smiles))
    if again is None:
        raise MoleculeError(f"RDKit cannot read back its own SMILES {_short(smiles)}: {reason}.", seen=_short(smiles))
    return again


def _read_text(path: Path, kind: str) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_INPUT_FILE_BYTES:
            raise InputFileError(
                f"{path} has {size:,} bytes.",
                seen=size,
                limit=MAX_INPUT_FILE_BYTES,
                remedy=f"The limit for a {kind} file is {MAX_INPUT_FILE_BYTES:,}; put the record in a file of its own.",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputFileError(f"there is no file {path}.", seen=str(path), remedy="Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is not a text file (byte {error.start}).", seen=str(path), remedy=f"Give a {kind} file."
        ) from error
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}.", seen=str(path)) from error


def _sdf_blocks(text: str) -> list[str]:
    blocks: list[str] = []
    current = io.StringIO()
    for line in text.splitlines(keepends=True):
        if line.startswith("$$$$"):
            blocks.append(current.getvalue())
            current = io.StringIO()
        else:
            current.write(line)
    if current.getvalue().strip():
        blocks.append(current.getvalue())
    return blocks


def _fasta_records(path: Path, text: str) -> Iterator[tuple[str, str]]:
    name: str | None = None
    lines: list[str] = []
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith(">"):
            if name is not None:
                yield name, "".join(lines)
            name, lines = (stripped[1:].split() or [""])[0], []
        elif stripped and not stripped.startswith(";"):
            if name is None:
                raise InputFileError(
                    f"{path.name} is not FASTA: line {number} comes before any line that starts with '>'.",
                    seen=_short(stripped, 40),
                    remedy="Put a header line such as '>my_protein' in front of the sequence.",
                )
            lines.append(stripped)
    if name is not None:
        yield name, "".join(lines)


def _choose(path: Path, count: int, record: int | None, what: str, names: list[str] | None = None) -> int:
    if count == 0:
        raise InputFileError(f"{path.name} holds no {what}.", seen=str(path), remedy="Check the file.")
    if record is None and count > 1:
        listed = f" ({_listing(names)})" if names else ""
        raise InputFileError(
            f"{path.name} holds {count} {what}{listed}, and a question is about one of them.",
            seen=count,
            limit=1,
            remedy="Choose one with record=1, 2, …, or put it in a file of its own.",
        )
    chosen = 1 if record is None else record
    if not 1 <= chosen <= count:
        raise InputFileError(
            f"{path.name} holds {count} {what}; there is no record {chosen}.", seen=chosen, limit=count,
            remedy="Records are counted from 1.",
        )  # fmt: skip
    return chosen - 1


def _check_letters(residues: str) -> None:
    bad: dict[str, list[int]] = {}
    for position, letter in enumerate(residues, start=1):
        if letter not in ALLOWED_RESIDUES:
            bad.setdefault(letter, []).append(position)
    if not bad:
        return
    named = "; ".join(
        f"{letter!r} at {', '.join(map(str, places[:5]))}{' …' if len(places) > 5 else ''}"
        for letter, places in list(bad.items())[:8]
    )
    raise ProteinError(
        f"the sequence holds {sum(map(len, bad.values()))} letters that are no residues: {named}.",
        seen=sorted(bad),
        limit=_SEQUENCE_LETTERS,
        remedy=f"Allowed are {_SEQUENCE_LETTERS}; write X for an unknown residue and remove gaps.",
    )


def _cut_note(length: int, truncate: bool) -> str:
    if not truncate:
        raise ProteinError(
            f"the protein has {length:,} residues.",
            seen=length,
            limit=MAX_RESIDUES,
            remedy=f"The protein encoder reads at most {MAX_RESIDUES:,}; pass truncate=True to use the first "
            f"{MAX_RESIDUES:,} only, or give one domain.",
        )
    return f"the protein was cut: the first {MAX_RESIDUES:,} of its {length:,} residues were used"
