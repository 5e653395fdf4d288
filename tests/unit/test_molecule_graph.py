"""The molecule featurizer: the behaviour of the reference, case by case, and digests over real molecules."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem

from biomedgpt_edge.errors import MoleculeError
from biomedgpt_edge.inputs import Molecule
from biomedgpt_edge.molecule_graph import (
    BOND_DIRECTIONS,
    BOND_TYPES,
    SELF_LOOP_DIRECTION,
    SELF_LOOP_TYPE,
    MoleculeGraph,
    dense,
    featurize,
)

CORPUS = Path(__file__).parents[1] / "data" / "molecules.tsv"
ROWS = [line.split("\t") for line in CORPUS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
FIRST_200 = "9028f47c2c34203b"

Atoms = list[tuple[int, ...]]


def features(smiles: str) -> tuple[Atoms, Atoms]:
    graph = Molecule.from_smiles(smiles).graph
    return [tuple(row) for row in graph.atoms.tolist()], [tuple(row) for row in graph.bonds.tolist()]


def digest(*molecules: str) -> str:
    whole = hashlib.sha256()
    for smiles in molecules:
        whole.update(repr(features(smiles)).encode())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize(("smiles", "expected"), ROWS, ids=[str(place) for place in range(len(ROWS))])
def test_a_molecule_of_the_corpus_has_its_recorded_features(smiles: str, expected: str) -> None:
    assert digest(smiles) == expected


def test_the_first_200_molecules_of_chebi_20_have_the_features_of_the_reference() -> None:
    assert digest(*(smiles for smiles, _ in ROWS[:200])) == FIRST_200


def test_the_whole_validation_split_has_the_digest_of_the_reference() -> None:
    with gzip.open(CORPUS.with_name("chebi20_validation.smi.gz"), "rt", encoding="utf-8") as lines:
        assert digest(*(line.rstrip("\n") for line in lines)) == "a5b3d45eb288a33d"


def test_the_whole_test_split_has_the_digest_of_the_reference() -> None:
    path = os.environ.get("BIOMEDGPT_CHEBI20_TEST")
    if path is None:
        pytest.skip("BIOMEDGPT_CHEBI20_TEST does not name ChEBI-20's test.txt (blender-nlp/MolT5)")
    rows = Path(path).read_text(encoding="utf-8").splitlines()[1:]
    assert digest(*(row.split("\t")[1] for row in rows if row)) == "f7db62eea9a19d48"


class TestAtoms:
    @pytest.mark.parametrize(("smiles", "column"), [("[H][H]", 0), ("C", 5), ("[Na+]", 10), ("I", 52), ("[Og]", 117)])
    def test_column_0_is_the_atomic_number_less_one(self, smiles: str, column: int) -> None:
        assert features(smiles)[0][0] == (column, 0)

    def test_two_at_signs_are_clockwise_and_one_is_counter_clockwise(self) -> None:
        assert features("C[C@@H](N)O")[0][1] == (5, 1)
        assert features("C[C@H](N)O")[0][1] == (5, 2)
        assert features("[C@TH1](C)(N)(O)F")[0][0] == (5, 2)

    @pytest.mark.parametrize("smiles", ["C[C@@H](C)C", "CC=[C@]=CC"])
    def test_a_mark_on_an_atom_that_is_no_stereocentre_is_removed(self, smiles: str) -> None:
        assert {chirality for _, chirality in features(smiles)[0]} == {0}

    @pytest.mark.parametrize(
        ("smiles", "atoms"),
        [
            ("[H]C([H])([H])[H]", [(5, 0)]),
            ("[H][H]", [(0, 0), (0, 0)]),
            ("[H]", [(0, 0)]),
            ("[2H]C", [(0, 0), (5, 0)]),
        ],
    )
    def test_hydrogens_stay_only_where_rdkit_keeps_them(self, smiles: str, atoms: Atoms) -> None:
        assert features(smiles)[0] == atoms

    @pytest.mark.parametrize(("smiles", "place"), [("*C", 1), ("C[*:1]", 2), ("CC[1*]", 3)])
    def test_a_wildcard_is_refused_by_its_number(self, smiles: str, place: int) -> None:
        with pytest.raises(MoleculeError, match=rf"^atom {place} is a wildcard \('.*\*"):
            Molecule.from_smiles(smiles)

    @pytest.mark.parametrize(
        ("smiles", "named"),
        [
            ("C[Pt@SP1](F)(Cl)Br", r"atom 2 \(Pt\) has chirality CHI_SQUAREPLANAR"),
            ("[C@OH1](C)C", r"atom 1 \(C\) has chirality CHI_OCTAHEDRAL"),
            ("C[As@TB1](F)(Cl)(Br)N", r"atom 2 \(As\) has chirality CHI_TRIGONALBIPYRAMIDAL"),
        ],
    )
    def test_a_centre_that_is_not_tetrahedral_is_refused_by_name(self, smiles: str, named: str) -> None:
        with pytest.raises(MoleculeError, match=named):
            Molecule.from_smiles(smiles)


class TestBonds:
    def test_types_are_single_double_triple_aromatic(self) -> None:
        assert features("CC=CC#C")[1] == [(0, 1, 0, 0), (1, 2, 1, 0), (2, 3, 0, 0), (3, 4, 2, 0)]
        assert {bond[2] for bond in features("c1ccccc1")[1]} == {3}

    def test_kekule_input_becomes_aromatic(self) -> None:
        assert features("C1=CC=CC=C1") == features("c1ccccc1")

    def test_a_nitro_group_is_written_with_charges(self) -> None:
        assert features("CN(=O)=O")[1] == [(0, 1, 0, 0), (1, 2, 0, 0), (1, 3, 1, 0)]

    def test_a_salt_is_one_graph_without_a_bond_between_its_parts(self) -> None:
        atoms, bonds = features("[Na+].[Cl-]")
        assert (atoms, bonds) == ([(10, 0), (16, 0)], [])
        assert Molecule.from_smiles("[Na+].[Cl-]").graph.bonds.shape == (0, 4)

    def test_directions_are_the_marks_of_the_spelling_not_the_geometry(self) -> None:
        assert [bond[3] for bond in features("C/C=C/C")[1]] == [1, 0, 1]
        assert [bond[3] for bond in features("C\\C=C\\C")[1]] == [2, 0, 2]

    def test_a_doubled_backslash_counts_once(self) -> None:
        assert features(r"F/C=C\F") == features(r"F/C=C\\F")
        assert [bond[3] for bond in features(r"F/C=C\F")[1]] == [1, 0, 2]

    @pytest.mark.parametrize("marks", [3, 4])
    def test_more_backslashes_are_no_smiles(self, marks: int) -> None:
        with pytest.raises(MoleculeError, match="cannot read"):
            Molecule.from_smiles("F/C=C" + "\\" * marks + "F")

    def test_marks_on_a_double_bond_without_stereo_are_removed(self) -> None:
        assert {bond[3] for bond in features("F/C(C)=C(C)/C")[1]} == {0}

    def test_a_marked_ring_closure_runs_from_the_later_atom_to_the_earlier_and_its_mark_with_it(self) -> None:
        assert [bond for bond in features(r"C[C@]\4(CC/C4=C/C)F")[1] if bond[3]] == [
            (3, 4, 0, 1),
            (5, 6, 0, 1),
            (4, 1, 0, 1),
        ]
        assert features("F/C=C1/CCCC(Cl)C/1")[1][-1] == (8, 2, 0, 1)
        marked = [bond for bond in features(STEROID)[1] if bond[3]]
        assert marked == [(17, 18, 0, 1), (19, 20, 0, 1), (18, 14, 0, 1)]

    def test_the_molecule_of_the_published_example_has_its_published_graph(self) -> None:
        atoms, bonds = features("CC(=CCC1=CC(=CC(=C1O)CC=C(C)C)/C=C/C(=O)C2=C(C=C(C=C2)O)O)C")
        assert (len(atoms), len(bonds)) == (29, 30)
        assert sum(bond[2] == 3 for bond in bonds) == 12
        assert {bond[:2]: bond[3] for bond in bonds if bond[3]} == {(6, 16): 1, (17, 18): 1}

    @pytest.mark.parametrize(
        ("smiles", "named"),
        [
            ("[NH3]->[Cu]", r"atoms 1 \(N\) and 2 \(Cu\) is of type DATIVE"),
            ("CC~O", r"atoms 2 \(C\) and 3 \(O\) is of type UNSPECIFIED"),
            ("C$C", r"atoms 1 \(C\) and 2 \(C\) is of type QUADRUPLE"),
            ("CC=CC |w:1.0|", r"atoms 2 \(C\) and 1 \(C\) has direction UNKNOWN"),
        ],
    )
    def test_a_bond_without_features_is_refused_by_its_atoms(self, smiles: str, named: str) -> None:
        with pytest.raises(MoleculeError, match=named):
            Molecule.from_smiles(smiles)

    def test_a_crossed_double_bond_is_refused(self) -> None:
        mol = Chem.MolFromSmiles("FC=CF")
        mol.GetBondWithIdx(1).SetBondDir(Chem.BondDir.EITHERDOUBLE)
        with pytest.raises(MoleculeError, match="direction EITHERDOUBLE"):
            featurize(mol)


# A mark on a ring closure behind a stereocentre, as in the reference's own example.
STEROID = r"C[C@]12CCC(=O)C=C1CC[C@@H]3[C@@H]2[C@H](C[C@]\4([C@H]3CC/C4=C/C)C)O"


@st.composite
def graphs(draw: st.DrawFn) -> MoleculeGraph:
    n = draw(st.integers(1, 12))
    atoms = draw(st.lists(st.tuples(st.integers(0, 117), st.integers(0, 2)), min_size=n, max_size=n))
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    ends = draw(st.lists(st.sampled_from(pairs), max_size=20, unique_by=frozenset)) if pairs else []
    bonds = [(a, b, draw(st.integers(0, 3)), draw(st.integers(0, 2))) for a, b in ends]
    return MoleculeGraph(
        np.array(atoms, np.int64).reshape(-1, 2), np.array(bonds, np.int64).reshape(-1, 4)
    )  # fmt: skip


class TestDense:
    @given(graphs())
    def test_equals_a_sum_over_edges_and_self_loops(self, graph: MoleculeGraph) -> None:
        n = len(graph.atoms)
        rng = np.random.default_rng(n)
        features, kinds, directions = rng.random((n, 7)), rng.random((BOND_TYPES, 7)), rng.random((BOND_DIRECTIONS, 7))
        expected = features + kinds[SELF_LOOP_TYPE] + directions[SELF_LOOP_DIRECTION]
        for begin, end, kind, direction in graph.bonds:
            for source, target in ((begin, end), (end, begin)):
                expected[target] += features[source] + kinds[kind] + directions[direction]
        form = dense(graph)
        tables = np.concatenate([kinds, directions])
        np.testing.assert_allclose(form.adjacency @ features + form.edge_counts @ tables, expected, rtol=1e-6)
        assert form.atom_type.tolist() == graph.atoms[:, 0].tolist()
        assert form.chirality.tolist() == graph.atoms[:, 1].tolist()
        assert all(array.flags.c_contiguous for array in (form.atom_type, form.chirality, form.adjacency))

    def test_equals_message_passing_of_torch_geometric(self) -> None:
        from torch_geometric.nn import SimpleConv
        from torch_geometric.utils import add_self_loops, scatter

        neighbours = SimpleConv(aggr="sum")

        @settings(max_examples=40)
        @given(graphs())
        def check(graph: MoleculeGraph) -> None:
            generator = torch.Generator().manual_seed(len(graph.bonds))
            table = torch.rand((BOND_TYPES + BOND_DIRECTIONS, 5), generator=generator, dtype=torch.float64)
            nodes = torch.rand((len(graph.atoms), 5), generator=generator, dtype=torch.float64)
            bonds = torch.from_numpy(graph.bonds.copy())
            edges = torch.cat([bonds[:, :2], bonds[:, [1, 0]]]).T
            kinds = torch.cat([bonds[:, 2:], bonds[:, 2:]])
            loops = torch.tensor([[SELF_LOOP_TYPE, SELF_LOOP_DIRECTION]]).expand(len(nodes), -1)
            edges, _ = add_self_loops(edges, num_nodes=len(nodes))
            kinds = torch.cat([kinds, loops])
            attributes = table[kinds[:, 0]] + table[BOND_TYPES + kinds[:, 1]]
            along_edges = scatter(attributes, edges[1], dim_size=len(nodes), reduce="sum")
            expected = neighbours(nodes, edges) + along_edges
            form = dense(graph)
            got = form.adjacency @ nodes.numpy() + form.edge_counts @ table.numpy()
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)

        check()


class TestGraph:
    def test_graphs_with_equal_features_are_equal_and_hash_alike(self) -> None:
        one, other = Molecule.from_smiles("CCO").graph, Molecule.from_smiles("OCC").graph
        assert one == Molecule.from_smiles("CCO").graph
        assert hash(one) == hash(Molecule.from_smiles("CCO").graph)
        assert one != other
        assert one != "CCO"

    def test_features_cannot_be_written_to(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            Molecule.from_smiles("CCO").graph.atoms[0] = 0
