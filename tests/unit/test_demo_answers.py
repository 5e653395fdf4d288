"""The demo's answers say what is true of known molecules and proteins, and are read back as they were meant."""

from __future__ import annotations

import hashlib
import random

import pytest
from rdkit import Chem

from biomedgpt_export.demo import answers, questions
from biomedgpt_export.demo.chemistry import COUNTS, GROUPS, count_targets, facts, formula_counts, neutral_form
from biomedgpt_export.demo.everyday import EVERYDAY
from biomedgpt_export.demo.molecules import screen, well_known
from biomedgpt_export.demo.proteins import ProteinRecord

SMILES = {**EVERYDAY, **{one.name: one.smiles for one in well_known()}}

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
    "quinine": (4, 2, 1, 4, "C20H24N2O2", {"alcohol", "ether", "amine", "alkene", "aromatic ring nitrogen"}),
    "riboflavin": (3, 1, 5, 10, "C17H20N4O6", {"alcohol", "aromatic ring carbonyl", "aromatic ring nitrogen"}),
}

# Rings as people count them, not as RDKit's symmetrised list does.
RINGS = {
    "C1CN2CCN1CC2": 2,  # DABCO
    "C1C2CC3CC1CC(C2)C3": 3,  # adamantane
    "C12C3C4C1C5C2C3C45": 5,  # cubane
    "CC1=CCC2CC1C2(C)C": 2,  # pinene
    "c1ccc2ccccc2c1": 2,
    "C1CC1.C1CC1": 2,
}

GROUP_EXAMPLES = {
    "quaternary ammonium": "C[N+](C)(C)C", "N-oxide": "C[N+](C)(C)[O-]", "oxime": "CC=NO", "hydrazone": "CC=NNC",
    "thioester": "CC(=O)SC", "heteroaryl hydroxyl": "Oc1ccco1",
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
    found = facts(Chem.MolFromSmiles(SMILES[name]))
    assert (found.rings, found.aromatic, found.donors, found.acceptors) == (rings, aromatic, donors, acceptors)
    assert found.formula == formula
    assert set(found.groups) == groups


def test_every_group_is_found_where_it_is_alone() -> None:
    assert set(GROUP_EXAMPLES) == set(GROUPS)
    for name, smiles in GROUP_EXAMPLES.items():
        found = set(facts(Chem.MolFromSmiles(smiles)).groups) - {"aromatic ring oxygen", "alcohol"}
        assert found | {name} == {name}, smiles
        assert name in facts(Chem.MolFromSmiles(smiles)).groups, smiles


@pytest.mark.parametrize("smiles", RINGS)
def test_rings_of_cages_are_those_that_people_count(smiles: str) -> None:
    assert facts(Chem.MolFromSmiles(smiles)).rings == RINGS[smiles]


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
        ("C[N+](C)(C)CCO", "amine"),
        ("Oc1ccccn1", "phenol"),
        ("CC(C)=NO", "imine"),
        ("CC(=O)SC", "thioether"),
        ("OC(=O)O", "carboxylic acid"),
        ("S1SSSSSSS1", "disulfide"),
        ("[N-]=[N+]=C", "imine"),
    ],
)
def test_groups_that_are_not_there(smiles: str, absent: str) -> None:
    assert absent not in facts(Chem.MolFromSmiles(smiles)).groups


# Pairs that differ in charge or isotopes only: to the encoder, or but for hydrogens drawn as atoms, one input.
ALIKE = [
    ("CC(=O)[O-]", "CC(=O)O"),
    ("C[NH3+]", "CN"),
    ("[NH3+]CC(=O)[O-]", "NCC(=O)O"),
    ("[Cl-]", "Cl"),
    ("[OH-]", "O"),
    ("C[NH3+].[Cl-]", "CN.Cl"),
    ("CC(=O)[O-].[NH4+]", "CC(=O)O.N"),
    ("[2H]O[2H]", "O"),
    ("[2H]C(Cl)(Cl)Cl", "ClC(Cl)Cl"),
    ("[13CH4]", "C"),
    ("[CH3]", "C"),
    ("C[N+](C)(C)CC(=O)[O-]", "C[N+](C)(C)CC(=O)O"),
    ("C[N+](C)(C)[O-]", "C[N+](C)(C)O"),
    ("[O-][n+]1ccccc1", "O[n+]1ccccc1"),
    ("CC(=O)[O-].[Na+]", "CC(=O)O.[Na+]"),
    ("[O]N1C(C)(C)CCCC1(C)C", "ON1C(C)(C)CCCC1(C)C"),
    ("[N-]=[N+]=[N-]", "N=[N+]=[N-]"),
    ("[NH3+]CC(=O)O", "NCC(=O)O"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_nothing_is_said_that_depends_on_charges_or_isotopes(one: str, other: str) -> None:
    assert facts(Chem.MolFromSmiles(one)) == facts(Chem.MolFromSmiles(other))


def test_a_salt_keeps_the_formula_it_is_drawn_with() -> None:
    salt = facts(Chem.MolFromSmiles("CC(=O)[O-].[Na+]"))
    assert (salt.formula, salt.parts, salt.donors) == ("C2H3NaO2", 2, 0)
    assert salt.composition == {"C": 2, "Na": 1, "O": 2}
    assert facts(Chem.MolFromSmiles("C[N+](C)(C)C.[Br-]")).formula == "C4H12BrN"


def test_the_neutral_form_keeps_the_atoms_in_their_order() -> None:
    mol = Chem.MolFromSmiles("[2H]OC(=O)C[NH3+]")
    neutral = neutral_form(mol)
    assert [a.GetSymbol() for a in neutral.GetAtoms()] == [a.GetSymbol() for a in mol.GetAtoms()]
    assert not any(a.GetIsotope() or a.GetFormalCharge() for a in neutral.GetAtoms())
    assert any(a.GetIsotope() for a in mol.GetAtoms()), "the molecule itself is left as it is"


@pytest.mark.parametrize("name", SMILES)
def test_a_description_is_read_back_as_the_facts(name: str) -> None:
    known = facts(Chem.MolFromSmiles(SMILES[name]))
    for seed in range(6):
        text = answers.description(known, random.Random(seed))
        assert answers.claims(text) == answers.claims_of(known)
        assert answers.kind_of(text) == "describe"
        assert "neutral" in text, "what depends on hydrogens is said of the neutral form"


@pytest.mark.parametrize("kind", answers.MOLECULE_ANSWERS)
@pytest.mark.parametrize("name", ["aspirin", "water", "hexane", "ATP", "sodium chloride", "benzene"])
def test_single_answers_claim_what_was_asked_and_nothing_else(kind: str, name: str) -> None:
    known = facts(Chem.MolFromSmiles(SMILES[name]))
    for seed in range(6):
        text = answers.MOLECULE_ANSWERS[kind](known, random.Random(seed))
        assert answers.kind_of(text) == kind
        stated = {field: value for field, value in vars(answers.claims(text)).items() if value is not None}
        full = vars(answers.claims_of(known))
        assert stated == {field: full[field] for field in stated}


PHENOL = answers.description(facts(Chem.MolFromSmiles("Oc1ccccc1")), random.Random(0))


def test_parts_not_spoken_of_are_one() -> None:
    assert answers.claims(PHENOL).parts == 1
    assert answers.claims("This is a small molecule with no rings.").parts == 1
    assert answers.claims("It has no rings.").parts is None
    head, rest = PHENOL.split(". ", 1)
    assert answers.claims(f"{head}. It consists of three separate parts. {rest}").parts == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{PHENOL} It consists of three separate parts.",
        f"{PHENOL} It carries a double positive charge and two rings.",
        "It carries a double positive charge and two rings.",
        "It consists of three separate parts.",
        f"{PHENOL} ",
        f"{PHENOL}\n",
        f"{PHENOL} It is toxic.",
        f"{PHENOL} It has one ring, which is aromatic.",
        f" {PHENOL}",
        PHENOL.removesuffix("."),
        PHENOL.replace(". ", ".  "),
        PHENOL.replace(". ", " ", 1),
        PHENOL.replace(". ", ". It consists of one separate parts. ", 1),
        "It has two rings, all of them aromatic.",
        "It has two rings, two of them aromatic.",
        "It has two rings, three of them aromatic.",
        "It has three rings, no of them aromatic.",
        "It has one rings, which is aromatic.",
        "It has one ring.",
        "It has two rings.",
        "It has 2 aromatic rings.",
        "It has 013 aromatic rings.",
        "It has one aromatic rings.",
        "It has one hydrogen bond donor.",
        "It has five heavy atoms.",
        "It has no heavy atoms: one carbon.",
        "It has two heavy atoms: one carbon and one carbon.",
        "It has two heavy atoms: one oxygen and one carbon.",
        "It has two heavy atoms: one carbon, one oxygen.",
        "It has two heavy atoms: two hydrogen.",
        "It has two heavy atoms: two unobtainium.",
        "It has two heavy atoms: carbon.",
        "It has one heavy atom: one carbon and no oxygen.",
        "Its functional groups are: ester and ester.",
        "Its functional groups are: amide and ester.",
        "Its functional groups are: ester and unobtainium.",
        "Its functional groups are: ester. It contains these groups: amide.",
        "The molecule is an ester and a thing.",
        "The molecule is an ester and an ester.",
        "It has no rings. It has no rings.",
        "The neutral form has formula H2O.",
    ],
)
def test_what_no_answer_says_claims_nothing(text: str) -> None:
    assert answers.claims(text) == answers.MoleculeClaims()
    assert answers.kind_of(text) is None


def test_numbers_are_claims_of_their_own() -> None:
    found = answers.claims("It has 20 heavy atoms: one carbon and 13 oxygen.")
    assert (found.heavy, found.composition) == (20, {"C": 1, "O": 13})


def test_no_atoms_and_no_groups_are_claims_too() -> None:
    found = answers.claims("The molecule has no heavy atoms. It has none of the common functional groups.")
    assert (found.heavy, found.composition, found.groups) == (0, {}, frozenset())


def test_the_same_seed_gives_the_same_answer() -> None:
    known = facts(Chem.MolFromSmiles(SMILES["aspirin"]))
    first, second = (answers.description(known, random.Random("x")) for _ in range(2))
    assert first == second


def test_parts_are_named_when_there_are_several() -> None:
    text = answers.description(facts(Chem.MolFromSmiles("CN.Cl")), random.Random(0))
    assert "two separate parts" in text


def test_count_targets_are_cut_to_their_classes() -> None:
    counts = count_targets(facts(Chem.MolFromSmiles("C" * 99)))
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
    record = ProteinRecord("M" * len(structure), structure=structure)
    text = answers.structure_answer(*record.shares, random.Random(1))
    assert answers.kind_of(text) == "structure"
    assert answers.claimed_structure(text) == wanted
    assert shares in text
    helix, _, _, _, strand, _, _ = shares.split()
    assert answers.claimed_shares(text) == (int(helix), int(strand))


@pytest.mark.parametrize("label", answers.LOCATIONS)
def test_location_answers(label: str) -> None:
    for membrane in "MS":
        text = answers.location_answer(label, membrane, random.Random(2))
        assert answers.kind_of(text) == "location"
        assert answers.claimed_location(text) == label
        assert answers.claimed_membrane(text) == membrane


@pytest.mark.parametrize(
    "text",
    [
        "This protein is located in the nucleus",
        "This protein is located in the nucleus.",
        "This protein is located in the nucleus. It glows.",
        "This protein is located in the nucleus. It is a membrane protein. It is a soluble protein.",
        "This protein is located in the kitchen.",
        "The protein is located in the nucleus.",
        "This protein is mixed.",
        "This protein is mixed, with about 20 percent helix and 10 percent strand",
        "This protein is mixed, with about 25 percent helix and 10 percent strand.",
        "This protein is mixed, with about 20 percent helix and 10 percent strand. It is mixed.",
        "This protein is odd, with about 20 percent helix and 10 percent strand.",
    ],
)
def test_what_no_answer_about_a_protein_says_claims_nothing(text: str) -> None:
    assert answers.claimed_location(text) is answers.claimed_membrane(text) is None
    assert answers.claimed_structure(text) is answers.claimed_shares(text) is None
    assert answers.kind_of(text) is None


# ------------------------------------------------------------------------------------------- lists


def test_the_refusal_is_no_answer_of_another_kind() -> None:
    assert answers.kind_of(answers.HONEST) == "other"


def _plain(wording: str) -> str:
    return wording.lower().rstrip(".?!")


def test_held_out_wordings_are_not_trained_on() -> None:
    trained = [*questions.WORDINGS.values(), *questions.FOLLOW_UPS.values(), *questions.OTHER.values()]
    held_out = [
        *questions.HELD_OUT_WORDINGS.values(),
        *questions.HELD_OUT_FOLLOW_UPS.values(),
        *questions.HELD_OUT_OTHER.values(),
    ]
    known = {_plain(wording) for wordings in trained for wording in wordings}
    assert not known & {_plain(wording) for wordings in held_out for wording in wordings}


def test_every_kind_of_answer_has_wordings() -> None:
    kinds = {*answers.MOLECULE_ANSWERS, "location", "structure"}
    for wordings in (questions.WORDINGS, questions.FOLLOW_UPS, questions.HELD_OUT_WORDINGS):
        assert set(wordings) == kinds


def test_no_wording_has_two_answers() -> None:
    for kinds, given in ((tuple(answers.MOLECULE_ANSWERS), "molecule"), (("location", "structure"), "protein")):
        answered = {**{kind: questions.WORDINGS[kind] for kind in kinds}, "other": questions.OTHER[given]}
        every = [(kind, _plain(wording)) for kind, wordings in answered.items() for wording in wordings]
        assert len({wording for _, wording in every}) == len(set(every))


def test_a_hundred_well_known_molecules_of_which_half_are_shown() -> None:
    known = well_known()
    assert len(known) == 100
    assert sum(one.shown for one in known) == 50
    assert {one.kind for one in known} == {"drug", "metabolite", "solvent"}
    assert len({screen(one.smiles).key for one in known}) == 100


def test_the_sides_of_well_known_molecules_were_not_chosen_by_difficulty() -> None:
    first = {"aspirin", "caffeine", "paracetamol", "ibuprofen", "glucose", "ethanol", "benzene", "nicotine"}
    others = [one.name for one in well_known() if one.name not in first]
    drawn = sorted(others, key=lambda name: hashlib.sha256(name.lower().encode()).hexdigest())[:42]
    assert {one.name for one in well_known() if one.shown} == first | set(drawn)


def test_no_held_out_well_known_molecule_is_an_everyday_one() -> None:
    held_out = {mark for one in well_known() if not one.shown for mark in screen(one.smiles).main}
    for name, smiles in EVERYDAY.items():
        assert held_out.isdisjoint(screen(smiles).marks), name
        assert screen(smiles).problem == "", name
