"""Engine: asking, streaming, chatting, budgets and closing."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from biomedgpt_edge import Engine, Molecule, Piece, Protein, encoders
from biomedgpt_edge.decoder.kv_cache import KvLayout
from biomedgpt_edge.decoder.onnx import OnnxDecoder, OnnxState, _allocate
from biomedgpt_edge.errors import (
    ClosedError,
    InputError,
    KernelArgumentError,
    OptionError,
    PlatformError,
    PromptTooLongError,
)
from biomedgpt_edge.prompt import TokenSegment
from biomedgpt_edge.splice import FeaturePart, TokenPart, splice

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

    def recording(self: OnnxDecoder, capacity: int, start: np.ndarray | None = None) -> OnnxState:
        state = original(self, capacity, start)
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_only_what_is_stored_in_few_bits_is_multiplied_in_few_bits(
    tiny_bundles: Callable[[str], Path], precision: str
) -> None:
    inputs = [ETHANOL, Protein.from_sequence("MKVLAAGIC")]
    with Engine.load(tiny_bundles(precision)) as engine:
        prepared = engine.prepare("What are these?", *inputs)
        items = iter(inputs)
        parts = [
            TokenPart(segment.ids)
            if isinstance(segment, TokenSegment)
            else FeaturePart(engine._encoders.encode(item := next(items)), engine._projection(item))
            for segment in prepared.segments
        ]
        allowed, forbidden = (
            splice(parts, engine.bundle.embeddings, threads=1, allow_16bit=rounded) for rounded in (True, False)
        )
    np.testing.assert_array_equal(prepared.embeddings, forbidden if precision == "fp32" else allowed)


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
    assert states[-1]() is not None
    stream.close()
    gc.collect()
    assert [state() for state in states] == [None] * len(states)
    assert list(stream) == []
    with pytest.raises(ClosedError):
        _ = stream.answer


def test_dropping_a_stream_frees_its_state(engine: Engine, states: list[weakref.ref[OnnxState]]) -> None:
    next(engine.stream("Hello", ETHANOL))
    gc.collect()
    assert [state() for state in states] == [None] * len(states)


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
        _allocate(KvLayout.rows(spec), 10**6)


@pytest.mark.parametrize(
    "spoil",
    [
        np.asfortranarray,
        lambda e: e.astype(np.float64),
        lambda e: e[:, :-1].copy(),
        lambda e: np.repeat(e, 2, axis=1)[:, ::2],
        lambda e: e[:0],
    ],
    ids=["column order", "float64", "too narrow", "strided", "empty"],
)
def test_embeddings_of_another_layout_are_refused_since_the_graph_reads_addresses(
    engine: Engine, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    prompt = engine.prepare("Hello", ETHANOL)
    with pytest.raises(KernelArgumentError, match="embeddings are"):
        engine.first_logits(dataclasses.replace(prompt, embeddings=spoil(prompt.embeddings)))


@pytest.mark.parametrize("in_chat", [False, True])
def test_another_thread_can_cancel_a_stream(engine: Engine, monkeypatch: pytest.MonkeyPatch, in_chat: bool) -> None:
    chat = engine.chat()
    stream = (chat if in_chat else engine).stream("Hello", ETHANOL, max_new_tokens=200)
    inside, go_on = threading.Event(), threading.Event()
    original = OnnxState.step

    def slow_step(self: OnnxState, token: int) -> np.ndarray:
        inside.set()
        assert go_on.wait(10)
        return original(self, token)

    monkeypatch.setattr(OnnxState, "step", slow_step)
    pieces: list[Piece] = []
    ended: list[bool] = []

    def read() -> None:
        pieces.extend(stream)
        ended.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(10)
    stream.close()
    go_on.set()
    reader.join(10)
    assert ended == [True]
    assert len(pieces) <= 2
    assert chat.turns == []
    with pytest.raises(ClosedError):
        _ = stream.answer


def test_a_stream_that_was_asked_for_can_be_finished_after_the_engine_was_closed(tiny_bundle_fp32: Path) -> None:
    engine = Engine.load(tiny_bundle_fp32)
    stream = engine.stream("Hello", ETHANOL, max_new_tokens=5)
    engine.close()
    assert len([piece for piece in stream if piece.token_id is not None]) == 5


def test_of_two_open_answers_of_a_chat_only_the_first_finished_is_remembered(engine: Engine) -> None:
    chat = engine.chat()
    one, two = chat.stream("One", max_new_tokens=3), chat.stream("Two", max_new_tokens=3)
    next(one), next(two)
    list(one)
    with pytest.raises(ClosedError, match="went on while this answer was streaming"):
        list(two)
    assert [turn.question for turn in chat.turns] == ["One"]


def test_a_relative_path_outlives_a_change_of_folder(tiny_bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_bundle_fp32.parent)
    with Engine.load(tiny_bundle_fp32.name) as engine:
        monkeypatch.chdir("/")
        assert len(engine.prepare("Hello", ETHANOL)) > 0


def test_waiting_between_pieces_is_not_part_of_the_time_to_first_token(engine: Engine) -> None:
    stream = engine.stream("Hello", ETHANOL, max_new_tokens=2)
    before = time.perf_counter()
    while time.perf_counter() - before < 0.05:
        pass
    list(stream)
    timings = stream.answer.timings
    assert timings.ttft >= timings.prepare + timings.prefill
    assert timings.ttft < timings.prepare + timings.prefill + 0.05


def test_a_chat_counts_only_the_new_inputs_featurizing(engine: Engine) -> None:
    chat = engine.chat()
    chat.ask("Hello", ETHANOL, max_new_tokens=1)
    assert chat.ask("And now?", max_new_tokens=1).timings.featurize == 0


def test_too_little_memory_is_not_called_a_corrupt_bundle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Arena:
        def run(self, *arguments: object) -> None:
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")

    engine._encoders.release()
    monkeypatch.setattr(encoders, "open_session", lambda *_, **__: Arena())
    with pytest.raises(PlatformError, match="too little memory to run the molecule encoder"):
        engine.prepare("Hello", Molecule.from_smiles("CCCCCCCCCCF"))
