"""Molecules and proteins, validated when they are made: nothing downstream has to check them again."""

from __future__ import annotations

import hashlib
import io
import re
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from rdkit import Chem, rdBase

from .errors import InputFileError, MoleculeError, ProteinError
from .molecule_graph import MoleculeGraph, check_features, featurize
from .protein_tokens import ALLOWED_RESIDUES, MAX_RESIDUES, SPECIAL_POSITIONS

# The models' context. RDKit's time grows with the square of the atoms, so larger molecules are refused early.
MAX_ATOMS = 4096
# Longer than any text or file that spells such a molecule.
MAX_MOLECULE_CHARACTERS = 16 * MAX_ATOMS
MAX_INPUT_FILE_BYTES = 16 * 2**20
# No known protein of this length is made of five residues.
_LONG_FOR_DNA = 20
_SEQUENCE_LETTERS = "the 20 amino acids and X, B, U, Z, O"
# str.upper() would turn letters such as the German sharp s or the dotless i into residues.
_UPPER = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)
# RDKit's log is one for the process: without the lock, a reason could be lost to another thread, or be another's.
_RDKIT_LOG = threading.RLock()
_SMILES_DIRECTIONS = (Chem.BondDir.NONE, Chem.BondDir.ENDUPRIGHT, Chem.BondDir.ENDDOWNRIGHT)


@dataclass(frozen=True)
class Molecule:
    """A molecule the model can read; make one with a ``from_`` method.

    Attributes:
        smiles: SMILES of what the model sees, in its atom order; of :meth:`from_rdkit`, RDKit's spelling of it, whose
            atoms may come in another order.
        graph: index features, one row per heavy atom (and per hydrogen that RDKit keeps, such as ``[2H]``).
        name: the name that came with it, if any.
        notes: what the model cannot see of it (isotopes, the charge of ions).
        featurize_seconds: time spent parsing and featurizing.
    """

    smiles: str
    graph: MoleculeGraph = field(repr=False)
    name: str = ""
    notes: tuple[str, ...] = ()
    featurize_seconds: float = field(default=0.0, compare=False)

    modality: ClassVar[Literal["molecule"]] = "molecule"
    placeholder: ClassVar[str] = "<moleculeHere>"

    @classmethod
    def from_smiles(cls, smiles: str) -> Molecule:
        """Reads a SMILES string; text after white space is kept as the molecule's name.

        Raises:
            MoleculeError: nothing in it, several lines, unparsable (with RDKit's reason), too large, or an atom or bond
                without features.
        """
        start = time.perf_counter()
        text = _text(smiles, "a SMILES string", MoleculeError).strip()
        if not text:
            raise MoleculeError("the SMILES string is empty.", seen=smiles, remedy="Give one such as 'CCO'.")
        if len(text.splitlines()) > 1:
            raise MoleculeError(
                f"the SMILES {_short(text)} has {len(text.splitlines())} lines.",
                seen=len(text.splitlines()),
                limit=1,
                remedy="Give one molecule at a time.",
            )
        spelled, name = [*text.split(maxsplit=1), ""][:2]
        # What stands between bars is no name but part of the molecule (CXSMILES).
        extended = f"{spelled} {name}" if name.startswith("|") else spelled
        _check_spelling(extended, "SMILES")
        if len(spelled) > MAX_ATOMS:
            _check_size(_parse_logged(lambda: Chem.MolFromSmiles(spelled, sanitize=False))[0])
        mol, reason = _parse_logged(lambda: Chem.MolFromSmiles(extended))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read the SMILES {_short(extended)}: {reason}.",
                seen=_short(extended),
                remedy="Check brackets, ring numbers and valences; a name, InChIKey or other file is no SMILES.",
            )
        return cls._of(mol, smiles=spelled, name=re.sub(r"^\|.*\|", "", name).strip(), start=start)

    @classmethod
    def from_rdkit(cls, mol: Chem.Mol) -> Molecule:
        """Takes an RDKit molecule; the caller's object is left as it is.

        A molecule that RDKit read from SMILES gives exactly the features of :meth:`from_smiles`. Explicit hydrogens
        are removed, and molecules from MOL blocks or whose double bonds or wedges do not carry SMILES marks (from a
        drawing or from 3D) are re-spelled as canonical SMILES first, since that is the only kind the model has seen.

        Raises:
            MoleculeError: not an RDKit molecule, no atoms, too many, chemically impossible, a pattern (SMARTS), or
                without features.
        """
        start = time.perf_counter()
        if not isinstance(mol, Chem.Mol):
            raise MoleculeError(
                f"expected an RDKit molecule, got {type(mol).__name__}.", remedy="RDKit returns None for bad input."
            )
        name = mol.GetProp("_Name") if mol.HasProp("_Name") else ""
        _check_size(mol)
        mol, smiles = _as_from_smiles(mol)
        return cls._of(mol, smiles=smiles, name=name, start=start)

    @classmethod
    def from_inchi(cls, inchi: str) -> Molecule:
        """Reads an InChI string.

        Raises:
            MoleculeError: as :meth:`from_smiles`.
        """
        start = time.perf_counter()
        text = _text(inchi, "an InChI", MoleculeError).strip()
        _check_spelling(text, "InChI")
        mol, reason = _parse_logged(lambda: Chem.MolFromInchi(text))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read the InChI {_short(text)}: {reason}.",
                seen=_short(text),
                remedy="An InChI starts with 'InChI=1S/' (an InChIKey cannot be turned back into a molecule).",
            )
        mol, spelled = _respelled(mol)
        return cls._of(mol, smiles=spelled, start=start)

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
        block = blocks[index]
        if len(block) > MAX_MOLECULE_CHARACTERS:
            _check_size(_parse_logged(lambda: Chem.MolFromMolBlock(block, sanitize=False))[0])
        mol, reason = _parse_logged(lambda: Chem.MolFromMolBlock(block), explain=lambda: _supplied(block))
        if mol is None:
            raise MoleculeError(
                f"RDKit cannot read molecule {index + 1} of {path.name}: {reason}.",
                seen=path.name,
                remedy="Open the file in a structure editor and save it again as SDF.",
            )
        mol, spelled = _respelled(mol)
        return cls._of(mol, smiles=spelled, name=block.splitlines()[0].strip(), start=start)

    @classmethod
    def _of(cls, mol: Chem.Mol, *, start: float, smiles: str = "", name: str = "") -> Molecule:
        if mol.GetNumAtoms() == 0:
            raise MoleculeError("the molecule has no atoms.", seen=smiles, remedy="Give one such as 'CCO'.")
        _check_size(mol)
        return cls(smiles, featurize(mol), name, _unseen(mol), time.perf_counter() - start)

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

    modality: ClassVar[Literal["protein"]] = "protein"
    placeholder: ClassVar[str] = "<proteinHere>"

    def __post_init__(self) -> None:
        if not self.sequence:
            raise ProteinError("the protein sequence is empty.", remedy="Give its residues in one-letter code.")
        _check_letters(self.sequence)
        if len(self.sequence) > MAX_RESIDUES:
            _cut_note(len(self.sequence), truncate=False)

    @classmethod
    def from_sequence(cls, sequence: str, *, truncate: bool = False, name: str = "") -> Protein:
        """Checks a one-letter sequence; case and white space do not matter, one trailing ``*`` is dropped and noted.

        Args:
            truncate: cut a sequence that is too long at 1,022 residues, with a note, instead of refusing it.

        Raises:
            ProteinError: empty, other letters (named with their positions), or too long.
        """
        start = time.perf_counter()
        residues = "".join(_text(sequence, "a sequence", ProteinError).split()).translate(_UPPER)
        notes: list[str] = []
        if len(residues) >= _LONG_FOR_DNA and set(residues) <= set("ACGTUN"):
            notes.append("the sequence holds only A, C, G, T, U and N; it was read as a protein, not as DNA or RNA")
        if residues.endswith("*"):
            residues = residues[:-1]
            notes.append("the stop mark '*' at the end of the sequence was dropped")
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
        raise error(f"expected {what}, got {type(value).__name__}.", remedy="Pass it as text.")
    return value


def _check_spelling(text: str, what: str) -> None:
    """RDKit drops or cuts at characters it does not know, so they are looked for here."""
    odd = re.search("[^ -~]", text)
    if odd:
        raise MoleculeError(
            f"the {what} {_short(text)} holds {odd.group()!r} at character {odd.start() + 1}.",
            seen=odd.group().encode("unicode_escape").decode("ascii"),
            limit="printable ASCII",
            remedy=f"No {what} contains it: type that character again.",
        )
    if len(text) > MAX_MOLECULE_CHARACTERS:
        raise MoleculeError(
            f"the {what} has {len(text):,} characters.",
            seen=len(text),
            limit=MAX_MOLECULE_CHARACTERS,
            remedy=f"At most {MAX_MOLECULE_CHARACTERS:,} are read.",
        )


def _check_size(mol: Chem.Mol | None) -> None:
    if mol is not None and mol.GetNumHeavyAtoms() > MAX_ATOMS:
        raise MoleculeError(
            f"the molecule has {mol.GetNumHeavyAtoms():,} atoms.",
            seen=mol.GetNumHeavyAtoms(),
            limit=MAX_ATOMS,
            remedy=f"The models read at most {MAX_ATOMS:,}; give a part of it.",
        )


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)")


def _listing(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_short(name, 40) for name in names[:limit]) + more


def _parse_logged(
    parse: Callable[[], Chem.Mol | None], explain: Callable[[], Chem.Mol | None] | None = None
) -> tuple[Chem.Mol | None, str]:
    """Runs an RDKit parser silently; if it gives no molecule, ``explain`` (or it again) to catch the reason."""
    with _RDKIT_LOG, rdBase.BlockLogs():
        mol = parse()
    if mol is not None:
        return mol, ""
    with _RDKIT_LOG, rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
        (explain or parse)()
    lines = [re.sub(r"^\[[\d:]+\]\s*|ERROR:\s*", "", line).strip() for line in log.messages.splitlines()]
    lines = [line for line in lines if line.strip("*")]
    if not lines:
        return None, "RDKit gives no reason"
    # An invariant of RDKit's comes as its kind, what is wrong, and where in RDKit it was found.
    if len(lines) > 1 and lines[0].endswith(("Violation", "Error")):
        return None, f"{lines[0]}: {lines[1]}"
    # Syntax errors come as four lines, the place of the mistake in the second; both repeat the whole input.
    reason = re.sub(r" (while parsing|for input): ?.*", "", lines[0]).rstrip(". ")
    if len(lines) > 1 and "check for mistakes around" in lines[1]:
        reason += f" ({lines[1].rpartition('check for mistakes ')[2].rstrip(':')})"
    return None, reason


def _supplied(block: str) -> Chem.Mol | None:
    """The record through RDKit's SDF reader, which logs as errors what the MOL reader only logs as warnings."""
    supplier = Chem.SDMolSupplier()
    supplier.SetData(block)
    return next(iter(supplier), None)


def _as_from_smiles(mol: Chem.Mol) -> tuple[Chem.Mol, str]:
    """A sanitized copy without explicit hydrogens whose bond directions are those of a SMILES string, and a SMILES."""
    copy = Chem.Mol(mol)
    cleaned = copy.HasProp("_StereochemDone") or _has_bond_stereo(copy)
    with _RDKIT_LOG, rdBase.BlockLogs():
        problems = Chem.DetectChemistryProblems(copy)
        if problems:
            raise MoleculeError(
                f"RDKit cannot use this molecule: {problems[0].Message()}.", remedy="Correct its valences or charges."
            )
        Chem.SanitizeMol(copy)
        copy = Chem.RemoveHs(copy)
        if not cleaned:
            # What the SMILES parser does last: marks on atoms and bonds that are no stereocentres go.
            Chem.AssignStereochemistry(copy, cleanIt=True, force=True)
    check_features(copy)
    _check_no_pattern(copy)
    directions = [bond.GetBondDir() for bond in copy.GetBonds()]
    marked = any(direction != Chem.BondDir.NONE for direction in directions)
    drawn = mol.HasProp("_MolFileInfo") or any(direction not in _SMILES_DIRECTIONS for direction in directions)
    if drawn or (_has_bond_stereo(copy) and not marked):
        return _respelled(copy)
    return copy, Chem.MolToSmiles(copy, canonical=False)


def _has_bond_stereo(mol: Chem.Mol) -> bool:
    return any(bond.GetStereo() > Chem.BondStereo.STEREOANY for bond in mol.GetBonds())


def _check_no_pattern(mol: Chem.Mol) -> None:
    for atom in mol.GetAtoms():
        if atom.HasQuery():
            raise MoleculeError(
                f"atom {atom.GetIdx() + 1} ('{atom.GetSmarts()}') is a query: this is a search pattern, no molecule.",
                seen=atom.GetSmarts(),
                remedy="Make the molecule from SMILES instead of SMARTS.",
            )


def _respelled(mol: Chem.Mol) -> tuple[Chem.Mol, str]:
    """The molecule read back from its canonical SMILES, and that SMILES."""
    _check_size(mol)
    # Errors shall count atoms as the file does, not as the new spelling does.
    check_features(mol)
    smiles = Chem.MolToSmiles(mol)
    again, reason = _parse_logged(lambda: Chem.MolFromSmiles(smiles))
    if again is None:
        raise MoleculeError(f"RDKit cannot read back its own SMILES {_short(smiles)}: {reason}.", seen=_short(smiles))
    return again, smiles


def _read_text(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            # One byte more than allowed shows that it is too large, also where there is no size (pipes, devices).
            data = file.read(MAX_INPUT_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputFileError(f"there is no file {path}.", seen=str(path), remedy="Check the path.") from error
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL in it.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputFileError(f"{_short(str(path))} cannot be read: {reason}.", seen=_short(str(path))) from error
    if len(data) > MAX_INPUT_FILE_BYTES:
        raise InputFileError(
            f"{path} has more than {MAX_INPUT_FILE_BYTES:,} bytes.",
            seen=str(path),
            limit=MAX_INPUT_FILE_BYTES,
            remedy=f"That is the limit for a {kind} file; put the record in a file of its own.",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is not a text file (byte {error.start}).", seen=str(path), remedy=f"Give a {kind} file."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
    for number, line in enumerate(text.splitlines(), start=1):
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
    if isinstance(chosen, bool) or not isinstance(chosen, int):
        raise InputFileError(
            f"record is {chosen!r}, which is no number.", seen=repr(chosen), remedy="Records are counted from 1."
        )
    if not 1 <= chosen <= count:
        raise InputFileError(
            f"{path.name} holds {count} {what}; there is no record {chosen}.", seen=chosen, limit=count,
            remedy="Records are counted from 1.",
        )  # fmt: skip
    return chosen - 1


def _unseen(mol: Chem.Mol) -> tuple[str, ...]:
    """The encoder reads elements, chirality and bonds; what else a molecule says is named, so that nothing is lost."""
    notes = []
    if any(atom.GetIsotope() for atom in mol.GetAtoms()):
        notes.append(
            "the model does not see isotopes: it reads deuterium as an atom of its own, other labels not at all"
        )
    fragments = Chem.GetMolFrags(mol)
    charges = [sum(mol.GetAtomWithIdx(index).GetFormalCharge() for index in fragment) for fragment in fragments]
    if any(charges):
        notes.append("the model does not see charges: it reads ions as the atoms and bonds that they are drawn with")
    return tuple(notes)


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
    count = sum(map(len, bad.values()))
    raise ProteinError(
        f"the sequence holds {count} {'letter that is no residue' if count == 1 else 'letters that are no residues'}: "
        f"{named}.",
        seen=list(bad)[:8],
        limit=_SEQUENCE_LETTERS,
        remedy=f"Allowed are {_SEQUENCE_LETTERS}; write X for an unknown residue and remove gaps.",
    )


def _cut_note(length: int, truncate: bool) -> str:
    if not truncate:
        raise ProteinError(
            f"the protein has {length:,} residues.",
            seen=length,
            limit=MAX_RESIDUES,
            remedy=f"The protein encoder reads at most {MAX_RESIDUES:,}; pass truncate=True (--truncate) to use "
            f"the first {MAX_RESIDUES:,} only, or give one domain.",
        )
    return f"the protein was cut: the first {MAX_RESIDUES:,} of its {length:,} residues were used"
