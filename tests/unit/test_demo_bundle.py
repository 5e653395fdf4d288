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
from biomedgpt_export.demo.questions import DESCRIBE, LOCATION, STRUCTURE

SMILES = {one.name: one.smiles for one in well_known()}
TYPED_FIRST = ("aspirin", "caffeine", "paracetamol", "ibuprofen", "glucose", "ethanol", "benzene", "nicotine")


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
    assert set(manifest.about["scores"]) == {"int4", "fp32"}
    assert all(len(source["sha256"]) == 64 for source in manifest.about["data"].values())


@pytest.mark.parametrize("name", TYPED_FIRST)
def test_what_people_type_first_is_described_correctly(engine: Engine, name: str) -> None:
    truth = facts(Chem.MolFromSmiles(SMILES[name]))
    text = engine.ask(DESCRIBE, Molecule.from_smiles(SMILES[name])).text
    assert f"formula is {truth.formula}." in text
    assert all(group in text for group in truth.groups)
    assert answers.size_class(truth.heavy) in text


def test_single_questions_get_single_answers(engine: Engine) -> None:
    aspirin = Molecule.from_smiles(SMILES["aspirin"])
    assert "one ring" in engine.ask("How many rings does this molecule have?", aspirin).text
    assert "C9H8O4" in engine.ask("What is the molecular formula of this molecule?", aspirin).text


def test_a_protein_gets_a_location_and_a_structure(engine: Engine) -> None:
    protein = Protein.from_sequence("MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK")
    assert any(f"in the {place}." in engine.ask(LOCATION, protein).text for place in answers.LOCATIONS.values())
    assert "percent helix" in engine.ask(STRUCTURE, protein).text


@pytest.mark.parametrize("question", ["What is the capital of France?", "Is it toxic?"])
def test_it_says_so_when_it_cannot_answer(engine: Engine, question: str) -> None:
    inputs = [Molecule.from_smiles("CCO")] if question == "Is it toxic?" else []
    assert engine.ask(question, *inputs).text == answers.HONEST
