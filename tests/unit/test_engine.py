"""Engine: asking, streaming, chatting, budgets and closing."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.decoder.onnx import OnnxDecoder, OnnxState, _allocate
from biomedgpt_edge.errors import ClosedError, InputError, OptionError, PlatformError, PromptTooLongError

ETHANOL = Molecule.from_smiles("CCO")


@pytest.fixture(scope="module")
def engine(tiny_bundle_fp32: Path) -> Iterator[Engine]:
    with Engine.load(tiny_bundle_fp32) as engine:
        yield engine


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[OnnxState]]:
    """Weak references to every decoder state that is opened."""
    opened: list[weakref.ref[OnnxState]] = []
    original = OnnxDecoder.open

    def recording(self: OnnxDecoder, capacity: int) -> OnnxState:
        state = original(self, capacity)
        opened.append(weakref.ref(state))
        return state

    monkeypatch.setattr(OnnxDecoder, "open", recording)
    return opened


def test_asking_twice_gives_the_same_answer(engine: Engine) -> None:
    first = engine.ask("Please describe this molecule.", ETHANOL, max_new_tokens=12)
    again = engine.ask("Please describe this molecule.", ETHANOL, max_new_tokens=12)
    assert first.token_ids == again.token_ids
    assert first.text == again.text


def test_streamed_pieces_join_to_the_answer(engine: Engine) -> None:
    answer = engine.ask("Hello", ETHANOL, max_new_tokens=20)
    stream = engine.stream("Hello", ETHANOL, max_new_tokens=20)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == answer.text == stream.answer.text
    assert tuple(piece.token_id for piece in pieces if piece.token_id is not None) == answer.token_ids


def test_the_number_of_threads_changes_no_token(tiny_bundle_fp32: Path) -> None:
    answers = []
    for threads in (1, 2):
        with Engine.load(tiny_bundle_fp32, threads=threads) as engine:
            answers.append(engine.ask("Hello", ETHANOL, max_new_tokens=16).token_ids)
    assert answers[0] == answers[1]


def test_no_token_beyond_the_tokenizer_is_ever_chosen(engine: Engine) -> None:
    answer = engine.ask("Hello", ETHANOL, max_new_tokens=64, temperature=50.0, seed=1)
    assert max(answer.token_ids) < len(engine.bundle.tokenizer)
    assert engine.first_logits(engine.prepare("Hello")).shape == (len(engine.bundle.tokenizer) + 1,)


def test_timings_add_up(engine: Engine) -> None:
    molecule = Molecule.from_smiles("CCCCCCO")
    timings = engine.ask("Hello", molecule, max_new_tokens=8).timings
    assert timings.new_tokens == 8
    assert timings.steps == 7
    assert timings.tpot == timings.decode / 7
    assert timings.ttft >= timings.encode + timings.splice + timings.prefill
    assert timings.featurize == molecule.featurize_seconds > 0


def test_one_token_has_no_time_per_output_token(engine: Engine) -> None:
    timings = engine.ask("Hello", max_new_tokens=1).timings
    assert timings.steps == 0
    assert timings.tpot is None


def test_closing_a_stream_frees_its_state(engine: Engine, states: list[weakref.ref[OnnxState]]) -> None:
    stream = engine.stream("Hello", ETHANOL)
    next(stream)
    assert len(states) == 1
    stream.close()
    gc.collect()
    assert states[0]() is None
    assert list(stream) == []
    with pytest.raises(ClosedError):
        _ = stream.answer


def test_dropping_a_stream_frees_its_state(engine: Engine, states: list[weakref.ref[OnnxState]]) -> None:
    next(engine.stream("Hello", ETHANOL))
    gc.collect()
    assert states[0]() is None


def test_two_streams_at_once_do_not_disturb_each_other(engine: Engine) -> None:
    alone = [engine.ask(question, ETHANOL, max_new_tokens=10).token_ids for question in ("One", "Two")]
    streams = [engine.stream(question, ETHANOL, max_new_tokens=10) for question in ("One", "Two")]
    for _ in zip(*streams, strict=False):
        pass
    for stream in streams:
        list(stream)
    assert [stream.answer.token_ids for stream in streams] == alone


def test_a_prompt_over_the_context_is_refused_before_anything_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(engine._encoders, "encode", never)
    protein = Protein.from_sequence("M" * 1000)
    with pytest.raises(PromptTooLongError, match=r"2,004 of molecules and proteins") as caught:
        engine.stream("What are these?", protein, protein)
    assert caught.value.limit == engine.bundle.manifest.decoder.context


def test_a_budget_error_says_how_many_new_tokens_fit(engine: Engine) -> None:
    prompt = len(engine.prepare("Hello"))
    room = engine.bundle.manifest.decoder.context - prompt
    with pytest.raises(PromptTooLongError, match=f"at most {room:,} new tokens"):
        engine.stream("Hello", max_new_tokens=room + 1)
    engine.stream("Hello", max_new_tokens=room).close()


def test_features_are_computed_once_per_content(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = engine._encoders._encode_molecule
    monkeypatch.setattr(engine._encoders, "_encode_molecule", lambda item: calls.append(item) or original(item))
    for _ in range(3):
        engine.prepare("Hello", Molecule.from_smiles("CCCCCCCN"))
    engine.prepare("Hello", Molecule.from_smiles("CCCCCCCS"))
    assert len(calls) == 2


def test_chat_remembers_text_and_inputs(engine: Engine) -> None:
    chat = engine.chat()
    first = chat.ask("Please describe this molecule.", ETHANOL, max_new_tokens=4)
    prompt = chat.prepare("Is it toxic?")
    assert f"Assistant: {first.text} ### Human: Is it toxic? ### Assistant: " in prompt.text
    assert (prompt.token_ids == -1).sum() == ETHANOL.n_soft_tokens


def test_a_cancelled_answer_is_not_remembered(engine: Engine) -> None:
    chat = engine.chat()
    with chat.stream("Hello", ETHANOL) as stream:
        next(stream)
    assert chat.turns == []


def test_first_logits_are_those_of_the_first_token(engine: Engine) -> None:
    logits = engine.first_logits(engine.prepare("Hello", ETHANOL))
    choices = logits[: len(engine.bundle.tokenizer)]
    assert engine.ask("Hello", ETHANOL, max_new_tokens=1).token_ids == (int(np.argmax(choices)),)


@pytest.mark.parametrize("inputs", [("CCO",), (None,), (["CCO"],)])
def test_inputs_must_be_molecules_or_proteins(engine: Engine, inputs: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"Molecule\.from_smiles"):
        engine.ask("Hello", *inputs)


def test_unknown_options_are_not_swallowed(engine: Engine) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        engine.ask("Hello", max_tokens=3)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_checked(tiny_bundle_fp32: Path, threads: object) -> None:
    with pytest.raises(OptionError, match="threads"):
        Engine.load(tiny_bundle_fp32, threads=threads)


def test_a_closed_engine_says_so(tiny_bundle_fp32: Path) -> None:
    engine = Engine.load(tiny_bundle_fp32)
    engine.close()
    with pytest.raises(ClosedError, match="engine is closed"):
        engine.ask("Hello")


def test_a_kv_cache_that_no_memory_holds_is_an_error_with_its_size(tiny_bundle_fp32: Path) -> None:
    bundle = Engine.load(tiny_bundle_fp32).bundle
    spec = dataclasses.replace(bundle.manifest.decoder, head_size=2**12, kv_heads=2**12, layers=2**10)
    with pytest.raises(PlatformError, match=r"KV cache of 1,000,000 positions takes .* GiB"):
        _allocate(spec, 10**6)
