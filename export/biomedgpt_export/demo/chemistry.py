"""What RDKit says about a molecule: the facts that the demo's answers state, and the labels of its atoms.

Every definition is a SMARTS pattern or an RDKit count, so a label is true by construction. Formal charges and isotopes
are invisible to the molecule encoder and nothing here depends on them, except that hydrogens are counted as drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

_SMARTS = {
    "carboxylic acid": "[CX3](=O)[OX2H1,OX1-]",
    "ester": "[CX3;$(C[#6]),$([CX3H1])](=O)[OX2H0][#6;!$(C=[O,N,S])]",
    "amide": "[CX3;$(C[#6]),$([CX3H1])](=[OX1])[NX3]",
    "urea": "[NX3][CX3](=[OX1])[NX3]",
    "carbamate": "[NX3][CX3](=[OX1])[OX2H0]",
    "guanidine": "[NX3][CX3](=[NX2,NX3+])[NX3]",
    "ketone": "[#6][CX3](=[OX1])[#6]",
    "aldehyde": "[CX3;$([CH1][#6]),$([CH2])]=[OX1]",
    "aromatic ring carbonyl": "c=[OX1]",
    "alcohol": "[OX2H][CX4]",
    "phenol": "[OX2H]c",
    "ether": "[OX2H0;!a]([#6;!$(C=[O,N,S])])[#6;!$(C=[O,N,S])]",
    "amine": "[NX3,NX4+;!a;!$(N-[!#6;!#1]);!$(N-C=[O,N,S])]([#6])",
    "imine": "[CX3;!$(C-[N,O,S])]=[NX2]",
    "nitrile": "[CX2]#[NX1]",
    "nitro": "[$([NX3](=O)=O),$([NX3+](=O)[O-])]",
    "sulfonamide": "[#6][SX4](=O)(=O)[#7]",
    "sulfone": "[#6][SX4](=O)(=O)[#6]",
    "sulfonic acid": "[#6][SX4](=O)(=O)[OX2H1,OX1-]",
    "sulfoxide": "[#6][SX3](=O)[#6]",
    "thioether": "[SX2;!a]([#6])[#6]",
    "thiol": "[SX2H][#6]",
    "disulfide": "[SX2;!a][SX2;!a]",
    "phosphate": "[PX4](=O)([OX2,OX1-])([OX2,OX1-])[OX2,OX1-]",
    "alkene": "[CX3;!$(C=[!#6])]=[CX3;!$(C=[!#6])]",
    "alkyne": "[CX2]#[CX2]",
    "fluoro": "[FX1][#6]",
    "chloro": "[ClX1][#6]",
    "bromo": "[BrX1][#6]",
    "iodo": "[IX1][#6]",
    "aromatic ring nitrogen": "n",
    "aromatic ring oxygen": "o",
    "aromatic ring sulfur": "s",
}
GROUPS: tuple[str, ...] = tuple(_SMARTS)
_PATTERNS = tuple(Chem.MolFromSmarts(smarts) for smarts in _SMARTS.values())

# Classes of the three atom labels: hydrogens 0-4, aromatic or not, smallest ring (0 none, 3-6, 7 for larger).
ATOM_CLASSES = (5, 2, 8)

# What the decoder is asked to count, and one more than the largest number it tells apart.
COUNTS: dict[str, int] = {
    "C": 48, "H": 80, "N": 16, "O": 24, "S": 6, "P": 5, "halogen": 8,
    "rings": 12, "aromatic": 10, "donors": 16, "acceptors": 24, "parts": 5,
}  # fmt: skip

_CHARGE = re.compile(r"[+-]\d*$")


@dataclass(frozen=True)
class MoleculeFacts:
    """The facts an answer may state.

    Attributes:
        heavy: atoms other than hydrogen.
        rings, aromatic: rings of the smallest set, and those of them that are aromatic.
        donors, acceptors: Lipinski's counts: N-H and O-H hydrogens; nitrogen and oxygen atoms.
        parts: fragments that no bond connects.
        formula: molecular formula in Hill order, without the charge.
        groups: names from ``GROUPS``, in that order.
    """

    heavy: int
    rings: int
    aromatic: int
    donors: int
    acceptors: int
    parts: int
    formula: str
    groups: tuple[str, ...]


def facts(mol: Chem.Mol) -> MoleculeFacts:
    """Facts of a sanitized molecule."""
    return facts_of(mol, group_atoms(mol))


def facts_of(mol: Chem.Mol, groups: npt.NDArray[np.uint8]) -> MoleculeFacts:
    """Facts of a molecule whose ``group_atoms`` are known already."""
    rings = mol.GetRingInfo().AtomRings()
    return MoleculeFacts(
        heavy=mol.GetNumHeavyAtoms(),
        rings=len(rings),
        aromatic=sum(all(mol.GetAtomWithIdx(i).GetIsAromatic() for i in ring) for ring in rings),
        donors=rdMolDescriptors.CalcNumLipinskiHBD(mol),
        acceptors=rdMolDescriptors.CalcNumLipinskiHBA(mol),
        parts=len(Chem.GetMolFrags(mol)),
        formula=_CHARGE.sub("", rdMolDescriptors.CalcMolFormula(mol)),
        groups=tuple(name for name, atoms in zip(GROUPS, groups.T, strict=True) if atoms.any()),
    )


def group_atoms(mol: Chem.Mol) -> npt.NDArray[np.uint8]:
    """``[N, len(GROUPS)]``: 1 where an atom is part of a match of the group."""
    hits = np.zeros((mol.GetNumAtoms(), len(GROUPS)), dtype=np.uint8)
    for column, pattern in enumerate(_PATTERNS):
        for match in mol.GetSubstructMatches(pattern):
            hits[list(match), column] = 1
    return hits


def atom_labels(mol: Chem.Mol) -> npt.NDArray[np.uint8]:
    """``[N, 3]``: hydrogens, aromaticity and smallest ring, as ``ATOM_CLASSES`` counts them."""
    rings = mol.GetRingInfo()

    def smallest_ring(index: int) -> int:
        return min(rings.MinAtomRingSize(index), 7) if rings.NumAtomRings(index) else 0

    labels = [
        (min(atom.GetTotalNumHs(), 4), int(atom.GetIsAromatic()), smallest_ring(atom.GetIdx()))
        for atom in mol.GetAtoms()
    ]
    return np.array(labels, dtype=np.uint8).reshape(-1, 3)


def formula_counts(formula: str) -> dict[str, int]:
    """``C2H6O`` -> ``{"C": 2, "H": 6, "O": 1}``."""
    return {symbol: int(count or 1) for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", formula)}


def count_targets(known: MoleculeFacts) -> list[int]:
    """The numbers of ``COUNTS``, each cut to the largest that is told apart."""
    atoms = formula_counts(known.formula)
    values = {symbol: atoms.get(symbol, 0) for symbol in ("C", "H", "N", "O", "S", "P")}
    values["halogen"] = sum(atoms.get(symbol, 0) for symbol in ("F", "Cl", "Br", "I"))
    values |= {name: getattr(known, name) for name in ("rings", "aromatic", "donors", "acceptors", "parts")}
    return [min(values[name], size - 1) for name, size in COUNTS.items()]
