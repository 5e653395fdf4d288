"""RDKit molecule -> the index arrays that the molecule encoder reads.

The features are those of the ``BaseGNN`` featurizer the released weights were trained with (OpenBioMed ``main``): two
columns per atom, two per bond. Anything the tables have no row for is an error that names the atom or the bond.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from rdkit import Chem

from .errors import MoleculeError

# Rows of the bond tables beyond RDKit's own: a self loop has a bond type of its own and direction "none".
BOND_TYPES = 6
BOND_DIRECTIONS = 3
SELF_LOOP_TYPE = 4
SELF_LOOP_DIRECTION = 0

_CHIRALITY = MappingProxyType(
    {
        Chem.ChiralType.CHI_UNSPECIFIED: 0,
        Chem.ChiralType.CHI_TETRAHEDRAL_CW: 1,
        Chem.ChiralType.CHI_TETRAHEDRAL_CCW: 2,
    }
)
_BOND_TYPE = MappingProxyType(
    {
        Chem.BondType.SINGLE: 0,
        Chem.BondType.DOUBLE: 1,
        Chem.BondType.TRIPLE: 2,
        Chem.BondType.AROMATIC: 3,
    }
)
_BOND_DIRECTION = MappingProxyType(
    {
        Chem.BondDir.NONE: 0,
        Chem.BondDir.ENDUPRIGHT: 1,
        Chem.BondDir.ENDDOWNRIGHT: 2,
    }
)


@dataclass(frozen=True, eq=False)
class MoleculeGraph:
    """Index features of one molecule, atoms and bonds in RDKit's order; equal if all of them are.

    Attributes:
        atoms: int64 ``[N, 2]``: atomic number - 1, chirality tag (0 none, 1 clockwise, 2 counter-clockwise).
        bonds: int64 ``[B, 4]``: begin atom, end atom, type (0 single, 1 double, 2 triple, 3 aromatic), direction
            (0 none, 1 end-up-right, 2 end-down-right). One row per bond; both directed edges carry the same features.
    """

    atoms: npt.NDArray[np.int64]
    bonds: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        self.atoms.setflags(write=False)
        self.bonds.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MoleculeGraph):
            return NotImplemented
        return np.array_equal(self.atoms, other.atoms) and np.array_equal(self.bonds, other.bonds)

    def __hash__(self) -> int:
        return hash((self.atoms.tobytes(), self.bonds.tobytes()))


@dataclass(frozen=True, eq=False)
class DenseGraph:
    """The dense form of a graph, as the exported encoder takes it.

    Attributes:
        atom_type: int64 ``[N]``.
        chirality: int64 ``[N]``.
        adjacency: float32 ``[N, N]``, A + I.
        edge_counts: float32 ``[N, 9]``: how many edges of each of the 6 types, then of each of the 3 directions, end
            in the atom, its self loop included.
    """

    atom_type: npt.NDArray[np.int64]
    chirality: npt.NDArray[np.int64]
    adjacency: npt.NDArray[np.float32]
    edge_counts: npt.NDArray[np.float32]


def featurize(mol: Chem.Mol) -> MoleculeGraph:
    """Index features of a sanitized RDKit molecule.

    Raises:
        MoleculeError: an atom or bond that the encoder's tables have no row for (wildcards, non-tetrahedral
            chirality, dative, quadruple, zero-order or unspecified bonds, wavy or crossed directions).
    """
    atoms = np.array([_atom_features(a) for a in mol.GetAtoms()], dtype=np.int64).reshape(-1, 2)
    bonds = np.array([_bond_features(b) for b in mol.GetBonds()], dtype=np.int64).reshape(-1, 4)
    return MoleculeGraph(atoms, bonds)


def check_features(mol: Chem.Mol) -> None:
    """Checks everything but bond directions, which differ between a drawing and the SMILES made from it.

    Raises:
        MoleculeError: as :func:`featurize`.
    """
    for atom in mol.GetAtoms():
        _atom_features(atom)
    for bond in mol.GetBonds():
        _bond_type(bond)


def dense(graph: MoleculeGraph) -> DenseGraph:
    """The dense form of ``graph``; exact, since the encoder's aggregation is a plain sum over neighbours."""
    n = len(graph.atoms)
    adjacency = np.eye(n, dtype=np.float32)
    counts = np.zeros((n, BOND_TYPES + BOND_DIRECTIONS), dtype=np.float32)
    counts[:, SELF_LOOP_TYPE] = 1.0
    counts[:, BOND_TYPES + SELF_LOOP_DIRECTION] = 1.0
    begin, end, kind, direction = graph.bonds.T
    for source, target in ((begin, end), (end, begin)):
        np.add.at(adjacency, (target, source), 1.0)
        np.add.at(counts, (target, kind), 1.0)
        np.add.at(counts, (target, BOND_TYPES + direction), 1.0)
    return DenseGraph(
        np.ascontiguousarray(graph.atoms[:, 0]), np.ascontiguousarray(graph.atoms[:, 1]), adjacency, counts
    )


def _atom_features(atom: Chem.Atom) -> tuple[int, int]:
    number = atom.GetAtomicNum()
    if number == 0:
        raise MoleculeError(
            f"atom {atom.GetIdx() + 1} is a wildcard ('{atom.GetSmarts()}'), which stands for no element.",
            seen=atom.GetSmarts(),
            remedy="Replace it by a real atom, or by hydrogen.",
        )
    tag = _CHIRALITY.get(atom.GetChiralTag())
    if tag is None:
        raise MoleculeError(
            f"atom {atom.GetIdx() + 1} ({atom.GetSymbol()}) has chirality {atom.GetChiralTag().name}, "
            "but the molecule encoder only knows tetrahedral centres.",
            seen=atom.GetChiralTag().name,
            remedy="Remove the stereo mark of this atom.",
        )
    return number - 1, tag


def _bond_features(bond: Chem.Bond) -> tuple[int, int, int, int]:
    direction = _BOND_DIRECTION.get(bond.GetBondDir())
    if direction is None:
        raise MoleculeError(
            f"{_where(bond)} has direction {bond.GetBondDir().name}, which the molecule encoder does not know.",
            seen=bond.GetBondDir().name,
            remedy="Remove the stereo mark of this bond.",
        )
    return bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), _bond_type(bond), direction


def _bond_type(bond: Chem.Bond) -> int:
    kind = _BOND_TYPE.get(bond.GetBondType())
    if kind is None:
        raise MoleculeError(
            f"{_where(bond)} is of type {bond.GetBondType().name}, "
            "but the molecule encoder only knows single, double, triple and aromatic bonds.",
            seen=bond.GetBondType().name,
            remedy="Draw it as a single bond, or leave the ligand and the metal unconnected.",
        )
    return kind


def _where(bond: Chem.Bond) -> str:
    ends = [f"{atom.GetIdx() + 1} ({atom.GetSymbol()})" for atom in (bond.GetBeginAtom(), bond.GetEndAtom())]
    return f"the bond between atoms {ends[0]} and {ends[1]}"
