"""Molecules for training with the facts RDKit computes, and those that are held out of it.

Two molecules count as the same where the encoder, which sees no hydrogens and no charges, sees the same graph (but for
stereo marks), and where they are tautomers. A molecule is held out by a hash of its graph; whatever is the same as a
held-out molecule, as its largest part, or has one of these as a part, is not in training. The encoder cares for the
order of atoms only through the order of soft tokens, so rare kinds of molecules come in several spellings: small and
large ones, salts and ions, those of ChEBI, everyday ones.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rdkit import Chem, RDLogger
from rdkit.Chem import rdMolHash

from biomedgpt_edge.errors import MoleculeError
from biomedgpt_edge.molecule_graph import featurize

from ..errors import TrainingDataError
from .chemistry import GROUPS, SMARTS, MoleculeFacts, atom_labels, count_targets, facts_of, group_atoms, neutral_form
from .data import CHEBI_FILE, MOLECULES_FILE, chebi_lines, file_hashes, molecule_lines, order
from .everyday import EVERYDAY

WELL_KNOWN_FILE = Path(__file__).with_name("well_known.tsv")

# Held out of each source: as many as this, but no more than this share of it.
HELD_OUT = 1000
_MOST_OF_MOLECULES, _MOST_OF_CHEBI = 0.1, 1 / 3
# Training leaves larger ones out (2.5 % of ChEBI, next to none elsewhere); scores do not.
MAX_HEAVY_ATOMS = 100
# Spellings of one molecule by its role and its kind, whichever gives more; screening libraries, which most data comes
# from, hold few of the others.
_SPELLINGS = {
    "well-known": 60, "everyday": 25, "ChEBI": 6, "": 1, "tiny": 8, "small": 4, "large": 8, "ionic": 4, "other": 1,
}  # fmt: skip
_EVERYDAY_ROLES = ("well-known", "everyday")
TINY_HEAVY_ATOMS, SMALL_HEAVY_ATOMS, LARGE_HEAVY_ATOMS = 9, 15, 40
_SALTED_SHARE, _DEUTERATED_SHARE = 0.04, 0.01
# Changes whenever preparation would give other arrays, so that a stale cache is not used.
_PREPARATION = 5

U8 = npt.NDArray[np.uint8]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


# --------------------------------------------------------------------------------------------------- well-known ones


@dataclass(frozen=True)
class WellKnown:
    """One of the hundred molecules that people type first; half of them are shown in training."""

    name: str
    kind: str
    shown: bool
    smiles: str


@cache
def well_known() -> tuple[WellKnown, ...]:
    """The rows of ``well_known.tsv``."""
    with WELL_KNOWN_FILE.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    return tuple(WellKnown(row["name"], row["kind"], row["part"] == "shown", row["smiles"]) for row in table)


# ------------------------------------------------------------------------------------------------------------ keys


@dataclass(frozen=True)
class Screened:
    """A line of a source before the split.

    Attributes:
        smiles: as given.
        key: of the whole; empty where there is a problem.
        main: key and tautomer hash of the largest part.
        marks: those of the whole and of all parts.
        problem: why it can be neither trained on nor held out, or an empty string.
    """

    smiles: str
    key: str = ""
    main: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    problem: str = ""


def split_key(mol: Chem.Mol) -> str:
    """What the encoder sees but for stereo marks: canonical SMILES of elements and bonds, without any hydrogen."""
    plain = Chem.RWMol(mol)
    for atom in plain.GetAtoms():
        atom.SetIsotope(0)  # RDKit keeps labelled hydrogens as atoms
    plain = Chem.RWMol(Chem.RemoveHs(plain, sanitize=False))
    for atom in plain.GetAtoms():
        atom.SetFormalCharge(0)
        atom.SetNumRadicalElectrons(0)
        atom.SetNumExplicitHs(0)
        atom.SetNoImplicit(True)
    return str(Chem.MolToSmiles(plain, isomericSmiles=False))


def _marks(mol: Chem.Mol) -> frozenset[str]:
    neutral = Chem.RemoveHs(neutral_form(mol))
    Chem.RemoveStereochemistry(neutral)
    tautomer = rdMolHash.MolHash(neutral, rdMolHash.HashFunction.HetAtomTautomer)
    return frozenset((split_key(mol), f"tautomer {tautomer}"))


def screen(smiles: str) -> Screened:
    """Keys of a molecule and its parts, or the reason why there are none."""
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None or mol.GetNumAtoms() == 0:
        return Screened(smiles, problem="unreadable")
    parts = sorted(Chem.GetMolFrags(mol, asMols=True), key=lambda part: -part.GetNumHeavyAtoms())
    try:
        featurize(mol)
        if not _same_bonds(mol, neutral_form(mol)):
            return Screened(smiles, problem="with other bonds in neutral form")
        main = _marks(parts[0])
        return Screened(smiles, split_key(mol), main, _marks(mol).union(main, *map(_marks, parts[1:])))
    except MoleculeError:
        return Screened(smiles, problem="without features")
    except Chem.MolSanitizeException:
        return Screened(smiles, problem="without a neutral form")


def _same_bonds(one: Chem.Mol, other: Chem.Mol) -> bool:
    """A neutral form that loses its aromaticity, say, is not what the encoder sees."""
    return [bond.GetBondType() for bond in one.GetBonds()] == [bond.GetBondType() for bond in other.GetBonds()]


# ------------------------------------------------------------------------------------------------------------ split


@dataclass(frozen=True)
class MoleculeSplit:
    """SMILES on the two sides.

    Attributes:
        training: (SMILES, role); the role is ``well-known``, ``everyday``, ``ChEBI`` or empty.
        same_source, chebi: held-out SMILES, each key once.
        left_out: how many lines were left out of both, by reason.
    """

    training: list[tuple[str, str]]
    same_source: list[str]
    chebi: list[str]
    left_out: dict[str, int] = field(default_factory=dict)


def shown_molecules() -> dict[str, str]:
    """SMILES of everyday molecules and of those well-known ones that training shows, with their roles."""
    shown = {one.smiles: "well-known" for one in well_known() if one.shown}
    return {**dict.fromkeys(EVERYDAY.values(), "everyday"), **shown}


def split(data: Path, workers: int = 1) -> MoleculeSplit:
    """Divides the molecules of ``data``, of ``everyday`` and of ``well_known``.

    Raises:
        TrainingDataError: nothing usable in the sources.
    """
    shown = shown_molecules()
    libraries, chebi_source = molecule_lines(data), chebi_lines(data)
    every = list(_mapped(screen, [*libraries, *chebi_source], workers))
    left_out = Counter(one.problem for one in every if one.problem)
    molecules = [one for one in every[: len(libraries)] if not one.problem]
    chebi_molecules = [one for one in every[len(libraries) :] if not one.problem]
    if not molecules:
        raise TrainingDataError("no usable molecule in the training data.", remedy="Check the SMILES files.")
    shown_marks = _united(screen(smiles).marks for smiles in shown)
    unseen = _united(screen(one.smiles).main for one in well_known() if not one.shown)
    chebi = _held_out(chebi_molecules, shown_marks | unseen, _MOST_OF_CHEBI)
    chebi_marks = _united(one.main for one in chebi)
    same_source = _held_out(molecules, shown_marks | unseen | chebi_marks, _MOST_OF_MOLECULES)
    held_out = unseen | chebi_marks | _united(one.main | {one.key} for one in (*chebi, *same_source))
    training: dict[str, tuple[str, str]] = {}
    for role, source in (("ChEBI", chebi_molecules), ("", molecules)):
        for one in source:
            if not held_out.isdisjoint(one.marks):
                left_out["held out, or like something held out"] += 1
            elif one.key not in shown_marks:
                training.setdefault(one.key, (one.smiles, role))
    chosen = [*shown.items(), *training.values()]
    return MoleculeSplit(chosen, [one.smiles for one in same_source], [one.smiles for one in chebi], dict(left_out))


def _united(marks: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*marks)


def _held_out(source: list[Screened], excluded: frozenset[str], most: float) -> list[Screened]:
    """Those whose keys have the lowest hashes, each main part once, without those whose main part is excluded."""
    first: dict[str, Screened] = {}
    for one in source:
        if excluded.isdisjoint(one.main | {one.key}):
            first.setdefault(one.key, one)
    chosen: list[Screened] = []
    seen: set[str] = set()
    for key in sorted(first, key=order):
        if len(chosen) == min(HELD_OUT, int(most * len(first))):
            break
        if seen.isdisjoint(first[key].main):
            seen |= first[key].main
            chosen.append(first[key])
    return chosen


# --------------------------------------------------------------------------------------------------------- spellings


def training_spellings(molecule: tuple[str, str]) -> list[str]:
    """SMILES to train on for one entry of ``MoleculeSplit.training``.

    As given, in random atom orders, and now and then as a salt or labelled with deuterium.
    """
    smiles, role = molecule
    mol = Chem.MolFromSmiles(smiles)
    if mol.GetNumHeavyAtoms() > MAX_HEAVY_ATOMS:
        return []
    number = order(split_key(mol))
    count = max(_SPELLINGS[role], _SPELLINGS[_kind(mol)])
    texts = [smiles]
    if count > 1:
        texts += Chem.MolToRandomSmilesVect(mol, count - 1, randomSeed=number % 100_000 + 1)
    rng = random.Random(number)
    if rng.random() < _SALTED_SHARE:
        texts += _salted(mol, rng)
    if rng.random() < _DEUTERATED_SHARE:
        texts += _deuterated(mol, rng)
    return texts


def _kind(mol: Chem.Mol) -> str:
    heavy = mol.GetNumHeavyAtoms()
    if heavy < TINY_HEAVY_ATOMS:
        return "tiny"
    if heavy < SMALL_HEAVY_ATOMS:
        return "small"
    if heavy > LARGE_HEAVY_ATOMS:
        return "large"
    ionic = len(Chem.GetMolFrags(mol)) > 1 or Chem.GetFormalCharge(mol) != 0
    return "ionic" if ionic else "other"


_ACID_OXYGEN = Chem.MolFromSmarts("[OX2H1;$(O-C=O),$(O-S(=O)=O),$(O-P=O)]")
_BASIC_NITROGEN = Chem.MolFromSmarts("[NX3;!$(N-C=[O,N,S]);!$(N-S);!$(N-a);!$(N~[!#6])]")
_METALS = ("[Na+]", "[Na+]", "[K+]", "[Li+]")
_ACIDS = ("Cl", "Cl", "Cl", "Br", "I", "CS(=O)(=O)O", "OC(=O)C(=O)O", "OC(=O)C(F)(F)F", "OS(=O)(=O)O")


def _salted(mol: Chem.Mol, rng: random.Random) -> list[str]:
    """An acid with an alkali metal in place of its proton, or an amine with an acid; nothing of others."""
    acid = mol.GetSubstructMatch(_ACID_OXYGEN)
    if acid:
        mol = Chem.Mol(mol)
        mol.GetAtomWithIdx(acid[0]).SetFormalCharge(-1)
        mol.GetAtomWithIdx(acid[0]).SetNumExplicitHs(0)
        Chem.SanitizeMol(mol)
        return [f"{Chem.MolToSmiles(mol)}.{rng.choice(_METALS)}"]
    return [f"{Chem.MolToSmiles(mol)}.{rng.choice(_ACIDS)}"] if mol.HasSubstructMatch(_BASIC_NITROGEN) else []


def _deuterated(mol: Chem.Mol, rng: random.Random) -> list[str]:
    """The molecule with the hydrogens of up to three atoms as deuterium, which the encoder sees as atoms."""
    bearing = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetTotalNumHs()]
    if not bearing:
        return []
    labelled = Chem.AddHs(mol, onlyOnAtoms=rng.sample(bearing, min(len(bearing), rng.randint(1, 3))))
    for atom in list(labelled.GetAtoms())[mol.GetNumAtoms() :]:
        atom.SetIsotope(2)
    return [str(Chem.MolToSmiles(labelled))]


# ------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class MoleculeRecord:
    """One spelling of a molecule.

    Attributes:
        formula: as in ``MoleculeFacts``.
        atoms: ``[N, 2]``; bonds: ``[B, 4]``, as ``featurize`` gives them.
        groups: ``[N, G]`` 0/1; labels: ``[N, 3]``; numbers: the other facts and the counts, int16.
    """

    formula: str
    atoms: U8
    bonds: U8
    groups: U8
    labels: U8
    numbers: npt.NDArray[np.int16]

    @property
    def looks(self) -> bytes:
        """The same for inputs that the encoder cannot tell apart."""
        return hashlib.sha256(self.atoms.tobytes() + b"|" + self.bonds.tobytes()).digest()


_NUMBERS = ("heavy", "rings", "aromatic", "donors", "acceptors", "parts")


@dataclass(frozen=True)
class MoleculeTable:
    """Molecules as flat arrays; ``atom_start [M + 1]`` and ``bond_start [M + 1]`` say where each one lies."""

    formulas: npt.NDArray[np.bytes_]
    atom_start: npt.NDArray[np.int64]
    bond_start: npt.NDArray[np.int64]
    atoms: U8
    bonds: U8
    groups: U8
    labels: U8
    numbers: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.formulas)

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
        held = self.groups[self.atom_slice(index)]
        flags: U8 = np.unpackbits(held, axis=1, count=len(GROUPS)).max(axis=0)
        return flags

    def counts(self, index: int) -> npt.NDArray[np.int16]:
        """The numbers of ``chemistry.COUNTS``."""
        return self.numbers[index, len(_NUMBERS) :]

    def facts(self, index: int) -> MoleculeFacts:
        """What the answers state about one molecule."""
        numbers = dict(zip(_NUMBERS, self.numbers[index].tolist(), strict=False))
        groups = tuple(name for name, hit in zip(GROUPS, self.group_flags(index), strict=True) if hit)
        return MoleculeFacts(formula=self.formulas[index].decode(), groups=groups, **numbers)


def molecule_record(smiles: str) -> MoleculeRecord | None:
    """One spelling with its features and facts; None if RDKit cannot read it back, as happens to rare random ones."""
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None:
        return None
    try:
        graph = featurize(mol)
    except MoleculeError:
        return None
    neutral = neutral_form(mol)
    groups = group_atoms(neutral)
    known = facts_of(neutral, groups)
    return MoleculeRecord(
        formula=known.formula,
        atoms=graph.atoms.astype(np.uint8),
        bonds=graph.bonds.astype(np.uint8),
        groups=groups,
        labels=atom_labels(neutral),
        numbers=np.array([*(getattr(known, name) for name in _NUMBERS), *count_targets(known)], dtype=np.int16),
    )


def _records(molecule: tuple[str, str]) -> list[MoleculeRecord | None]:
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return [molecule_record(text) for text in training_spellings(molecule)]


def molecule_table(molecules: list[tuple[str, str]], workers: int = 1) -> tuple[MoleculeTable, Counter[str]]:
    """Facts, labels and features of the spellings of all ``molecules``, and how many were left out, by reason.

    The same atoms and bonds in the same order are the same input, whatever the spelling, and come once. Everyday
    molecules keep theirs: methane has one order only, and is to be seen as often as the others.
    """
    records: list[MoleculeRecord] = []
    left_out: Counter[str] = Counter()
    seen: dict[bytes, MoleculeRecord] = {}
    for (_, role), batch in zip(molecules, _mapped(_records, molecules, workers), strict=True):
        left_out[f"larger than {MAX_HEAVY_ATOMS} heavy atoms"] += not batch
        for record in batch:
            if record is None:
                left_out["spellings that cannot be read back"] += 1
                continue
            first = seen.setdefault(record.looks, record)
            if not np.array_equal(first.numbers, record.numbers):
                left_out["inputs like another one of which other things are true"] += 1
            elif first is record or role in _EVERYDAY_ROLES:
                records.append(record)
            else:
                left_out["spellings like another one"] += 1
    return _as_table(records), left_out


@cache
def everyday_table() -> MoleculeTable:
    """Of :func:`shown_molecules` alone; always the same, so it is made once."""
    return molecule_table(list(shown_molecules().items()))[0]


def _mapped(function: Callable[[_In], _Out], items: list[_In], workers: int) -> Iterator[_Out]:
    if workers <= 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(function, items, chunksize=256)


def _as_table(records: list[MoleculeRecord]) -> MoleculeTable:
    def starts(lengths: list[int]) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    return MoleculeTable(
        formulas=np.array([r.formula.encode() for r in records]),
        atom_start=starts([len(r.atoms) for r in records]),
        bond_start=starts([len(r.bonds) for r in records]),
        atoms=np.concatenate([r.atoms for r in records]),
        bonds=np.concatenate([r.bonds for r in records]),
        groups=np.packbits(np.concatenate([r.groups for r in records]), axis=1),
        labels=np.concatenate([r.labels for r in records]),
        numbers=np.stack([r.numbers for r in records]),
    )


# -------------------------------------------------------------------------------------------------------- everything


@dataclass(frozen=True)
class PreparedMolecules:
    """The training table, what it was made from, and SMILES of both sides; ``fingerprint`` identifies all of it."""

    fingerprint: str
    table: MoleculeTable
    same_source: list[str]
    chebi: list[str]
    training: list[str]
    left_out: dict[str, int]


def prepared_molecules(
    data: Path, cache: Path, workers: int = 1, report: Callable[[str], None] = lambda line: None
) -> PreparedMolecules:
    """The molecules of ``data``, split; kept in ``cache`` as ``molecules.npz`` for the next start."""
    hashes = file_hashes(data)
    known = [(one.smiles, one.shown) for one in well_known()]
    recipe = [_PREPARATION, hashes[MOLECULES_FILE], hashes[CHEBI_FILE], sorted(EVERYDAY.items()), known, SMARTS]
    fingerprint = hashlib.sha256(repr(recipe).encode()).hexdigest()
    path = cache / "molecules.npz"
    stored = _load(path, fingerprint)
    if stored is None:
        report(f"preparing molecules; this takes minutes, once: they are kept in {path}")
        divided = split(data, workers)
        table, left_out = molecule_table(divided.training, workers)
        training = [smiles for smiles, _ in divided.training]
        every = divided.left_out | left_out
        stored = PreparedMolecules(fingerprint, table, divided.same_source, divided.chebi, training, every)
        cache.mkdir(parents=True, exist_ok=True)
        _save(stored, path)
    return stored


_LISTS = ("same_source", "chebi", "training")


def _save(prepared: PreparedMolecules, path: Path) -> None:
    arrays: dict[str, Any] = {one.name: getattr(prepared.table, one.name) for one in fields(MoleculeTable)}
    # Texts as one array of bytes each: numpy would give every string the room of the longest.
    texts = {name: getattr(prepared, name) for name in _LISTS} | {"left_out": [json.dumps(prepared.left_out)]}
    arrays |= {f"text_{name}": np.frombuffer("\n".join(lines).encode(), np.uint8) for name, lines in texts.items()}
    staging = path.with_suffix(".tmp.npz")
    np.savez(staging, fingerprint=np.array(prepared.fingerprint), **arrays)
    staging.replace(path)


def _load(path: Path, fingerprint: str) -> PreparedMolecules | None:
    """What lies at ``path``, or None if there is nothing or it was made from something else."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if str(stored["fingerprint"]) != fingerprint:
            return None
        table = MoleculeTable(**{one.name: stored[one.name] for one in fields(MoleculeTable)})
        texts = {name: stored[f"text_{name}"].tobytes().decode() for name in (*_LISTS, "left_out")}
        lists = {name: texts[name].split("\n") if texts[name] else [] for name in _LISTS}
        return PreparedMolecules(fingerprint=fingerprint, table=table, left_out=json.loads(texts["left_out"]), **lists)
