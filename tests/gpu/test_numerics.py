"""On a GPU: every backend gives the CPU's tokens on the demo bundle, and logits near those of float32.

Run with ``pytest -m gpu`` on a machine that has one; where a backend misses something, its tests fail and say what.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.onnx import OnnxDecoder
from biomedgpt_edge.devices import DeviceName
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.prompt import Input
from biomedgpt_export.parity import ExactArithmetic
from engine_answers import ANSWERS

pytestmark = pytest.mark.gpu

PROTEIN = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"
QUESTIONS: dict[str, tuple[str, list[Input]]] = {
    "aspirin": ("Please describe this molecule.", [Molecule.from_smiles("CC(=O)Oc1ccccc1C(=O)O")]),
    "caffeine": ("Please describe this molecule.", [Molecule.from_smiles("Cn1c(=O)c2c(ncn2C)n(C)c1=O")]),
    "ethanol": ("Please describe this molecule.", [Molecule.from_smiles("CCO")]),
    "nicotine": ("How many rings does it have?", [Molecule.from_smiles("CN1CCC[C@H]1c1cccnc1")]),
    "protein": ("What are the subcellular locations of this protein?", [Protein.from_sequence(PROTEIN)]),
    "long protein": ("What is its secondary structure?", [Protein.from_sequence(PROTEIN * 6)]),
    "none": ("What is a protein?", []),
}
TOKENS = 48
# In logits: two tokens so close to each other may change places when activations are rounded to 16 bits.
NEAR_TIE = 0.1
# Of the largest logit, from the bundle's weights in float32 arithmetic; float16 has 11 bits, and errors add up.
LOGITS = 1e-2


@pytest.fixture(scope="module")
def cpu() -> Iterator[Engine]:
    with Engine.load(threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same weights in float32 arithmetic, on the CPU."""
    folder = tmp_path_factory.mktemp("exact") / "demo"
    shutil.copytree(DEMO_BUNDLE, folder)
    with ExactArithmetic(Bundle.open(folder)) as bundle:
        yield Engine(bundle, OnnxDecoder(bundle, threads=2), threads=2, allow_16bit=False)


@pytest.fixture(scope="module", params=["cuda", "tensorrt"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Engine]:
    device: DeviceName = request.param
    with Engine.load(device=device, threads=2) as engine:
        yield engine


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tokens_are_those_of_the_cpu_up_to_a_near_tie(cpu: Engine, gpu: Engine, name: str) -> None:
    question, inputs = QUESTIONS[name]
    expected, found = (engine.ask(question, *inputs, max_new_tokens=TOKENS).token_ids for engine in (cpu, gpu))
    if found == expected:
        return
    pairs = zip(found, expected, strict=False)
    step = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected)))
    margin = margin_at(cpu, question, inputs, expected[:step])
    assert margin < NEAR_TIE, f"token {step} differs, where the CPU's margin is {margin}"


def margin_at(engine: Engine, question: str, inputs: list[Input], tokens: tuple[int, ...]) -> float:
    """Between the two largest logits after a prompt and these tokens."""
    prompt = engine.prepare(question, *inputs)
    with engine.decoder.open(len(prompt) + len(tokens)) as state:
        logits = state.prefill(prompt.embeddings)
        for token in tokens:
            logits = state.step(token)
        second, first = np.sort(logits)[-2:]
    return float(first - second)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_first_logits_are_near_those_of_float32(exact: Engine, gpu: Engine, name: str) -> None:
    question, inputs = QUESTIONS[name]
    expected = exact.first_logits(exact.prepare(question, *inputs))
    found = gpu.first_logits(gpu.prepare(question, *inputs))
    assert np.abs(found - expected).max() <= LOGITS * np.abs(expected).max()


@pytest.mark.parametrize("name", ANSWERS)
def test_questions_without_near_ties_are_answered_alike(cpu: Engine, gpu: Engine, name: str) -> None:
    """Turns of a chat among them, which go on from the KV cache, and streams that alternate."""
    assert ANSWERS[name](gpu) == ANSWERS[name](cpu)


def test_streams_that_alternate_do_not_touch_each_other(gpu: Engine) -> None:
    alone = {name: gpu.ask(*_turn(name), max_new_tokens=24).token_ids for name in ("aspirin", "caffeine")}
    streams = {name: gpu.stream(*_turn(name), max_new_tokens=24) for name in alone}
    tokens: dict[str, list[int]] = {name: [] for name in alone}
    while streams:
        for name, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[name]
            elif piece.token_id is not None:
                tokens[name].append(piece.token_id)
    assert {name: tuple(ids) for name, ids in tokens.items()} == alone


def _turn(name: str) -> tuple[Any, ...]:
    question, inputs = QUESTIONS[name]
    return question, *inputs
