"""The packaged bundle: whole, small, and right about the molecules that people type first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rdkit import Chem

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_export.demo import answers
from biomedgpt_export.demo.chemistry import facts
from biomedgpt_export.demo.molecules import well_known
from biomedgpt_export.demo.questions import DESCRIBE, LOCATION, STRUCTURE, WORDINGS

TYPED_FIRST = ("aspirin", "caffeine", "paracetamol", "ibuprofen", "glucose", "ethanol", "benzene", "nicotine")
SMILES = {one.name: one.smiles for one in well_known()}
PROTEIN = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load() as engine:
        yield engine


def test_every_hash_matches(engine: Engine) -> None:
    engine.bundle.verify()


def test_it_is_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO_BUNDLE.iterdir()) <= 10_000_000


def test_it_says_what_it_is_and_how_it_was_made(engine: Engine) -> None:
    manifest = engine.bundle.manifest
    assert manifest.name == "BioMedGPT demo"
    assert manifest.precision == "int4"
    assert manifest.policy.notice == f"{answers.HONEST} Answers can be wrong and are no medical advice."
    scores = manifest.about["scores"]
    assert (scores["precision"], scores["fp32_from"]) == ("int4", "bundle")
    assert all(len(source["sha256"]) == 64 for source in manifest.about["data"].values())


@pytest.mark.parametrize("name", TYPED_FIRST)
def test_what_people_type_first_is_described_correctly(engine: Engine, name: str) -> None:
    truth = facts(Chem.MolFromSmiles(SMILES[name]))
    text = engine.ask(DESCRIBE, Molecule.from_smiles(SMILES[name])).text
    assert answers.claims(text) == answers.claims_of(truth)


SECTIONS = (
    "chebi",
    "location",
    "location_low_identity",
    "refusals",
    "same_source",
    "structure",
    "together",
    "well_known_held_out",
    "well_known_shown",
    "wordings",
)
# Section -> field -> lowest share at int4.
FLOORS = {
    "same_source": {
        "group_f1": 0.97, "rings": 0.93, "aromatic_rings": 0.97, "donors": 0.90, "acceptors": 0.90, "formula": 0.45,
    },
    "chebi": {"group_f1": 0.92, "rings": 0.75},
    "well_known_held_out": {"groups_exact": 38 / 50, "rings": 43 / 50},
    "structure": {"accuracy": 0.62},
}  # fmt: skip
MOST_LOST = 0.03


@pytest.mark.parametrize(
    ("section", "field", "floor"),
    [(section, field, floor) for section, floors in FLOORS.items() for field, floor in floors.items()],
)
def test_the_recorded_scores_keep_their_floors(engine: Engine, section: str, field: str, floor: float) -> None:
    sections = engine.bundle.manifest.about["scores"]["sections"]
    assert sections[section]["rows"][field]["bundle"]["value"] >= floor


def test_locations_are_better_than_the_regression(engine: Engine) -> None:
    sections = engine.bundle.manifest.about["scores"]["sections"]
    located, distant = (sections[name]["rows"]["accuracy"] for name in ("location", "location_low_identity"))
    assert located["bundle"]["value"] >= located["baseline"] + 0.03
    assert distant["bundle"]["value"] >= distant["baseline"]


@pytest.mark.parametrize("section", SECTIONS)
def test_int4_keeps_what_fp32_knows(engine: Engine, section: str) -> None:
    for field, row in engine.bundle.manifest.about["scores"]["sections"][section]["rows"].items():
        assert row["bundle"]["value"] >= row["fp32"]["value"] - MOST_LOST, field


def test_int4_answers_as_many_held_out_questions_right_as_fp32(engine: Engine) -> None:
    """The worst that a paired bootstrap over the questions leaves open is one point."""
    together = engine.bundle.manifest.about["scores"]["sections"]["together"]
    assert together["count"] >= 2000
    assert together["rows"]["fields"]["over_fp32"]["low"] >= -0.01


def test_every_section_of_the_scores_is_looked_at(engine: Engine) -> None:
    assert list(engine.bundle.manifest.about["scores"]["sections"]) == list(SECTIONS)


@pytest.mark.parametrize("kind", answers.MOLECULE_ANSWERS)
def test_single_questions_get_single_answers(engine: Engine, kind: str) -> None:
    text = engine.ask(WORDINGS[kind][0], Molecule.from_smiles(SMILES["aspirin"])).text
    assert answers.kind_of(text) == kind
    full = vars(answers.claims_of(facts(Chem.MolFromSmiles(SMILES["aspirin"]))))
    assert all(full[field] == value for field, value in vars(answers.claims(text)).items() if value is not None)


def test_a_follow_up_is_about_the_same_molecule(engine: Engine) -> None:
    chat = engine.chat()
    chat.ask(DESCRIBE, Molecule.from_smiles(SMILES["caffeine"]))
    assert answers.claims(chat.ask("How many rings does it have?").text).rings == 2
    assert answers.claims(chat.ask("And its formula?").text).formula == "C8H10N4O2"


@pytest.mark.parametrize(("one", "other"), [("CC(=O)[O-]", "CC(=O)O"), ("CC[NH3+]", "CCN"), ("[13CH4]", "C")])
def test_charges_and_isotopes_change_nothing_that_is_said(engine: Engine, one: str, other: str) -> None:
    texts = [engine.ask(DESCRIBE, Molecule.from_smiles(smiles)).text for smiles in (one, other)]
    assert texts[0] == texts[1]
    assert "neutral" in texts[0]


def test_a_protein_gets_a_location_and_a_structure(engine: Engine) -> None:
    protein = Protein.from_sequence(PROTEIN)
    assert answers.claimed_location(engine.ask(LOCATION, protein).text) is not None
    assert answers.claimed_structure(engine.ask(STRUCTURE, protein).text) is not None


@pytest.mark.parametrize("question", ["What is the capital of France?", "Is it toxic?"])
def test_it_says_so_when_it_cannot_answer(engine: Engine, question: str) -> None:
    inputs = [Molecule.from_smiles("CCO")] if question == "Is it toxic?" else []
    assert engine.ask(question, *inputs).text == answers.HONEST


def test_two_molecules_in_one_question_are_declined(engine: Engine) -> None:
    two = [Molecule.from_smiles(SMILES[name]) for name in ("aspirin", "caffeine")]
    assert engine.ask(DESCRIBE, *two).text == answers.HONEST
