"""What RDKit says about a molecule: the facts that the demo's answers state, and the labels of its atoms.

Every definition is a SMARTS pattern or an RDKit count, so a label is true by construction. The molecule encoder sees
elements, bonds and stereo marks; formal charges and isotopes are invisible to it, so acetate and acetic acid are one
and the same input. Everything is therefore said of the ``neutral_form``, and answers say so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors
from rdkit.Chem.MolStandardize import rdMolStandardize

SMARTS = {
    "carboxylic acid": "[CX3;$(C[#6]),$([CX3H1])](=O)[OX2H1,OX1-]",
    "ester": "[CX3;$(C[#6]),$([CX3H1])](=O)[OX2H0][#6;!$(C=[O,N,S])]",
    "amide": "[CX3;$(C[#6]),$([CX3H1])](=[OX1])[NX3]",
    "urea": "[NX3][CX3](=[OX1])[NX3]",
    "carbamate": "[NX3][CX3](=[OX1])[OX2H0]",
    "guanidine": "[NX3][CX3](=[NX2,NX3+])[NX3]",
    "ketone": "[#6][CX3](=[OX1])[#6]",
    "aldehyde": "[CX3;$([CH1][#6]),$([CH2])]=[OX1]",
    "aromatic ring carbonyl": "c=[OX1]",
    "alcohol": "[OX2H][CX4]",
    "phenol": "[OX2H,OX1-][c;$(c1ccccc1)]",
    "heteroaryl hydroxyl": "[OX2H][c;!$(c1ccccc1)]",
    "ether": "[OX2H0;!a]([#6;!$(C=[O,N,S])])[#6;!$(C=[O,N,S])]",
    "amine": "[NX3;!a;!$(N-[!#6;!#1]);!$(N-C=[O,N,S])]([#6])",
    "quaternary ammonium": "[NX4+]([#6])([#6])([#6])[#6]",
    "N-oxide": "[$([NX4+]([#6])([#6])[#6]),$([nX3+])][OX1-]",
    "imine": "[CX3;!$(C-[N,O,S])]=[NX2;!$(N-[O,N]);!$(N=N)]",
    "oxime": "[CX3]=[NX2][OX2]",
    "hydrazone": "[CX3]=[NX2][NX3]",
    "nitrile": "[CX2]#[NX1]",
    "nitro": "[$([NX3](=O)=O),$([NX3+](=O)[O-])]",
    "sulfonamide": "[#6][SX4](=O)(=O)[#7]",
    "sulfone": "[#6][SX4](=O)(=O)[#6]",
    "sulfonic acid": "[#6][SX4](=O)(=O)[OX2H1,OX1-]",
    "sulfoxide": "[#6][SX3;$(S=O),$([S+][O-])][#6]",
    "thioether": "[SX2;!a]([#6;!$(C=[O,N,S])])[#6;!$(C=[O,N,S])]",
    "thioester": "[CX3](=O)[SX2][#6]",
    "thiol": "[SX2H][#6]",
    "disulfide": "[#6][SX2;!a][SX2;!a][#6]",
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
GROUPS: tuple[str, ...] = tuple(SMARTS)
_PATTERNS = tuple(Chem.MolFromSmarts(smarts) for smarts in SMARTS.values())

# Classes of the three atom labels: hydrogens 0-4, aromatic or not, smallest ring (0 none, 3-6, 7 for larger).
ATOM_CLASSES = (5, 2, 8)

# What the decoder is asked to count, and one more than the largest number it tells apart.
COUNTS: dict[str, int] = {
    "heavy": 101, "C": 64, "H": 112, "N": 20, "O": 40, "S": 6, "P": 5, "halogen": 10,
    "rings": 14, "aromatic": 10, "donors": 24, "acceptors": 40, "parts": 6,
}  # fmt: skip

_CHARGE = re.compile(r"[+-]\d*$")
_ELEMENT = re.compile(r"([A-Z][a-z]?)(\d*)")
_UNCHARGER = rdMolStandardize.Uncharger()
# Oxygens that give up their proton to a charge that stays: of acids, and of what is then an N-oxide.
_ACID_OXYGEN = Chem.MolFromSmarts("[OX2H1;$(O-C=O),$(O-S(=O)=O),$(O-P=O),$(O-[NX4+]),$(O-[nX3+])]")
_ORGANIC = frozenset(("B", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I"))


@dataclass(frozen=True)
class MoleculeFacts:
    """The facts an answer may state.

    Attributes:
        heavy: atoms other than hydrogen.
        rings: bonds more than a tree has (the smallest set of rings, as people count: cubane has five).
        aromatic: rings all of whose bonds are aromatic to RDKit.
        donors, acceptors: Lipinski's counts: N-H and O-H hydrogens; nitrogen and oxygen atoms.
        parts: fragments that no bond connects.
        formula: molecular formula of the neutral form in Hill order, without a charge that remains.
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

    @property
    def composition(self) -> dict[str, int]:
        """Heavy atoms of each element, in the formula's order."""
        return {symbol: count for symbol, count in formula_counts(self.formula).items() if symbol != "H"}


def neutral_form(mol: Chem.Mol) -> Chem.Mol:
    """A copy without isotopes, unpaired electrons and, as far as protons can do it, charges; same atoms, same order.

    What cannot be told apart without seeing charges gets one form: acetate is acetic acid, the cation of betaine is
    betaine, an acid beside sodium is its salt. A charge that protons cannot remove (sodium alone, quaternary nitrogen)
    stays, and so do the ions that balance it.

    Raises:
        rdkit.Chem.MolSanitizeException: an atom would have a valence it cannot have, as in some metal complexes.
    """
    if not any(a.GetIsotope() or a.GetFormalCharge() or a.GetNumRadicalElectrons() for a in mol.GetAtoms()):
        return mol
    mol = Chem.Mol(mol)
    for atom in mol.GetAtoms():
        atom.SetIsotope(0)
        if atom.GetNumRadicalElectrons() and atom.GetSymbol() in _ORGANIC:
            atom.SetNumRadicalElectrons(0)
            atom.SetNoImplicit(False)
    mol = _UNCHARGER.uncharge(mol)
    Chem.SanitizeMol(mol)
    excess = Chem.GetFormalCharge(mol)
    for (oxygen,) in mol.GetSubstructMatches(_ACID_OXYGEN)[: max(0, excess)]:
        atom = mol.GetAtomWithIdx(oxygen)
        atom.SetFormalCharge(-1)
        atom.SetNoImplicit(True)
        atom.SetNumExplicitHs(0)
    anions = [atom for atom in mol.GetAtoms() if atom.GetFormalCharge() < 0 and atom.GetSymbol() in "CNOS"]
    for atom in anions[: max(0, -excess)]:  # those that the uncharger does not know, such as azide
        atom.SetNumExplicitHs(atom.GetTotalNumHs() + 1)
        atom.SetFormalCharge(atom.GetFormalCharge() + 1)
    if excess:
        Chem.SanitizeMol(mol)
    return mol


def facts(mol: Chem.Mol) -> MoleculeFacts:
    """Facts of a sanitized molecule, that is, of its neutral form."""
    neutral = neutral_form(mol)
    return facts_of(neutral, group_atoms(neutral))


def facts_of(mol: Chem.Mol, groups: npt.NDArray[np.uint8]) -> MoleculeFacts:
    """Facts of a neutral form whose ``group_atoms`` are known already."""
    parts = len(Chem.GetMolFrags(mol))
    # RDKit's own list of rings is symmetrised: it has six faces of cubane, three rings of DABCO.
    rings = mol.GetNumBonds() - mol.GetNumAtoms() + parts
    return MoleculeFacts(
        heavy=mol.GetNumHeavyAtoms(),
        rings=rings,
        aromatic=min(rings, rdMolDescriptors.CalcNumAromaticRings(mol)),
        donors=rdMolDescriptors.CalcNumLipinskiHBD(mol),
        acceptors=rdMolDescriptors.CalcNumLipinskiHBA(mol),
        parts=parts,
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
        (min(atom.GetTotalNumHs(includeNeighbors=True), 4), int(atom.GetIsAromatic()), smallest_ring(atom.GetIdx()))
        for atom in mol.GetAtoms()
    ]
    return np.array(labels, dtype=np.uint8).reshape(-1, 3)


def formula_counts(formula: str) -> dict[str, int]:
    """``C2H6O`` -> ``{"C": 2, "H": 6, "O": 1}``."""
    return {symbol: int(count or 1) for symbol, count in _ELEMENT.findall(formula)}


def count_targets(known: MoleculeFacts) -> list[int]:
    """The numbers of ``COUNTS``, each cut to the largest that is told apart."""
    atoms = formula_counts(known.formula)
    values = {symbol: atoms.get(symbol, 0) for symbol in ("C", "H", "N", "O", "S", "P")}
    values["halogen"] = sum(atoms.get(symbol, 0) for symbol in ("F", "Cl", "Br", "I"))
    values |= {name: getattr(known, name) for name in ("heavy", "rings", "aromatic", "donors", "acceptors", "parts")}
    return [min(values[name], size - 1) for name, size in COUNTS.items()]
