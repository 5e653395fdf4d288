"""The demo's answers say what is true of known molecules and proteins, and are read back as they were meant."""

from __future__ import annotations

import random

import pytest
from rdkit import Chem

from biomedgpt_export.demo import answers
from biomedgpt_export.demo.chemistry import COUNTS, GROUPS, count_targets, facts, formula_counts
from biomedgpt_export.demo.everyday import EVERYDAY, SHOWN

# Counted by hand: rings, aromatic rings, donors (N-H and O-H), acceptors (N and O), formula, groups.
KNOWN = {
    "aspirin": (1, 1, 1, 4, "C9H8O4", {"carboxylic acid", "ester"}),
    "caffeine": (2, 2, 0, 6, "C8H10N4O2", {"aromatic ring nitrogen", "aromatic ring carbonyl"}),
    "glucose": (1, 0, 5, 6, "C6H12O6", {"alcohol", "ether"}),
    "paracetamol": (1, 1, 2, 3, "C8H9NO2", {"amide", "phenol"}),
    "ethanol": (0, 0, 1, 1, "C2H6O", {"alcohol"}),
    "benzene": (1, 1, 0, 0, "C6H6", set()),
    "penicillin G": (3, 1, 2, 6, "C16H18N2O4S", {"carboxylic acid", "amide", "thioether"}),
    "chloroform": (0, 0, 0, 0, "CHCl3", {"chloro"}),
    "cysteine": (0, 0, 3, 3, "C3H7NO2S", {"carboxylic acid", "amine", "thiol"}),
    "water": (0, 0, 2, 1, "H2O", set()),
}

GROUP_EXAMPLES = {
    "carboxylic acid": "CC(=O)O", "ester": "CC(=O)OC", "amide": "CC(=O)NC", "urea": "NC(=O)N",
    "carbamate": "COC(=O)N", "guanidine": "NC(=N)N", "ketone": "CC(=O)C", "aldehyde": "CC=O",
    "aromatic ring carbonyl": "O=c1cccccc1", "alcohol": "CO", "phenol": "Oc1ccccc1", "ether": "COC",
    "amine": "CN", "imine": "CC=NC", "nitrile": "CC#N", "nitro": "C[N+](=O)[O-]", "sulfonamide": "CS(=O)(=O)N",
    "sulfone": "CS(=O)(=O)C", "sulfonic acid": "CS(=O)(=O)O", "sulfoxide": "CS(=O)C", "thioether": "CSC",
    "thiol": "CS", "disulfide": "CSSC", "phosphate": "COP(=O)(O)O", "alkene": "CC=C", "alkyne": "CC#C",
    "fluoro": "CF", "chloro": "CCl", "bromo": "CBr", "iodo": "CI", "aromatic ring nitrogen": "c1ccncc1",
    "aromatic ring oxygen": "c1ccoc1", "aromatic ring sulfur": "c1ccsc1",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_facts_of_known_molecules(name: str) -> None:
    rings, aromatic, donors, acceptors, formula, groups = KNOWN[name]
    found = facts(Chem.MolFromSmiles(EVERYDAY[name]))
    assert (found.rings, found.aromatic, found.donors, found.acceptors) == (rings, aromatic, donors, acceptors)
    assert found.formula == formula
    assert set(found.groups) == groups


def test_every_group_is_found_where_it_is_alone() -> None:
    assert set(GROUP_EXAMPLES) == set(GROUPS)
    for name, smiles in GROUP_EXAMPLES.items():
        assert facts(Chem.MolFromSmiles(smiles)).groups == (name,), smiles


@pytest.mark.parametrize(
    ("smiles", "absent"),
    [
        ("CC(=O)OC", "ether"),
        ("CC(=O)O", "alcohol"),
        ("CC(=O)N", "amine"),
        ("CS(=O)(=O)C", "thioether"),
        ("COC(=O)N", "ester"),
        ("CC(=O)OC(C)=O", "ketone"),
        ("[Na+].[Cl-]", "chloro"),
        ("c1ccccc1", "alkene"),
    ],
)
def test_groups_that_are_not_there(smiles: str, absent: str) -> None:
    assert absent not in facts(Chem.MolFromSmiles(smiles)).groups


def test_nothing_depends_on_the_charge() -> None:
    charged, neutral = (facts(Chem.MolFromSmiles(s)) for s in ("CC(=O)[O-].[Na+]", "CC(=O)O"))
    assert charged.formula == "C2H3NaO2"
    assert charged.parts == 2
    assert set(charged.groups) == set(neutral.groups)


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_description_is_read_back_as_the_facts(name: str) -> None:
    known = facts(Chem.MolFromSmiles(EVERYDAY[name]))
    for seed in range(4):
        said = answers.claims(answers.description(known, random.Random(seed)))
        assert said == answers.MoleculeClaims(
            size=answers.size_class(known.heavy),
            rings=known.rings,
            aromatic=known.aromatic,
            groups=frozenset(known.groups),
            donors=known.donors,
            acceptors=known.acceptors,
            formula=known.formula,
        )


def test_the_same_seed_gives_the_same_exchange() -> None:
    known = facts(Chem.MolFromSmiles(EVERYDAY["aspirin"]))
    first, second = (answers.molecule_exchange(known, random.Random("x")) for _ in range(2))
    assert first == second


def test_parts_are_named_when_there_are_several() -> None:
    text = answers.description(facts(Chem.MolFromSmiles("CN.Cl")), random.Random(0))
    assert "two separate parts" in text


def test_count_targets_are_cut_to_their_classes() -> None:
    counts = count_targets(facts(Chem.MolFromSmiles("C" * 60)))
    assert dict(zip(COUNTS, counts, strict=True))["C"] == COUNTS["C"] - 1
    assert all(0 <= n < size for n, size in zip(counts, COUNTS.values(), strict=True))


def test_formula_counts() -> None:
    assert formula_counts("C16H18ClN2O4S") == {"C": 16, "H": 18, "Cl": 1, "N": 2, "O": 4, "S": 1}


@pytest.mark.parametrize(
    ("structure", "wanted", "shares"),
    [
        ("H" * 70 + "C" * 30, "mostly helical", "70 percent helix and 0 percent strand"),
        ("E" * 44 + "H" * 16 + "C" * 40, "mostly strand", "20 percent helix and 40 percent strand"),
        ("E" * 30 + "H" * 30 + "C" * 40, "mixed", "30 percent helix and 30 percent strand"),
        ("C" * 100, "mixed", "0 percent helix and 0 percent strand"),
    ],
)
def test_structure_answers(structure: str, wanted: str, shares: str) -> None:
    _, text = answers.structure_exchange(structure, random.Random(1))
    assert answers.claimed_structure(text) == wanted
    assert shares in text


@pytest.mark.parametrize("label", answers.LOCATIONS)
def test_location_answers(label: str) -> None:
    for membrane in "MSU":
        _, text = answers.location_exchange(label, membrane, random.Random(2))
        assert answers.claimed_location(text) == label
        assert ("membrane protein" in text) == (membrane == "M")


def test_other_questions_get_the_honest_answer() -> None:
    for given in answers.OTHER_QUESTIONS:
        assert answers.other_exchange(given, random.Random(3))[1] == answers.HONEST


def test_everyday_molecules_are_readable_and_the_shown_ones_are_among_them() -> None:
    assert set(SHOWN) <= set(EVERYDAY)
    assert all(Chem.MolFromSmiles(smiles) is not None for smiles in EVERYDAY.values())
