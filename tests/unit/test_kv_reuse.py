"""Keys and values that outlive an answer: taken over, they change no bit; they are keyed, checked and freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge import Chat, Engine, Molecule, Protein
from biomedgpt_edge.decoder.base import Logits
from biomedgpt_edge.decoder.onnx import TILE, OnnxDecoder, OnnxState
from biomedgpt_edge.kv_reuse import Positions, reusable
from biomedgpt_edge.prompt import MoleculeSegment, TokenSegment

ASPIRIN = Molecule.from_smiles("CC(=O)Oc1ccccc1C(=O)O")
ETHANOL = Molecule.from_smiles("CCO")
PROTEIN = Protein.from_sequence("MKTAYIAKQR")
QUESTION = "Please describe this molecule."


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device cache of its own, that does not exist yet."""
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def engine(cache: Path) -> Iterator[Engine]:
    with Engine.load(threads=1, verify="sizes") as engine:
        yield engine


@pytest.fixture(params=["records", "portable"])
def either(request: pytest.FixtureRequest, cache: Path, portable_demo: Path) -> Iterator[Engine]:
    """In tiles of one position, and of several."""
    with Engine.load(portable_demo if request.param == "portable" else None, threads=1, verify="sizes") as engine:
        yield engine


@pytest.fixture
def first_logits(monkeypatch: pytest.MonkeyPatch) -> list[Logits]:
    """The last logits of each prefill, in order."""
    seen: list[Logits] = []
    original = OnnxState.prefill

    def recording(self: OnnxState, embeddings: np.ndarray) -> Logits:
        seen.append(original(self, embeddings).copy())
        return seen[-1]

    monkeypatch.setattr(OnnxState, "prefill", recording)
    return seen


# --- the template's beginnings ----------------------------------------------------------------------------------------


# Positions in front of what a question adds, and those of them in whole tiles.
@pytest.mark.parametrize(
    ("inputs", "all_known", "in_tiles"),
    [([ASPIRIN], 17, TILE), ([PROTEIN], 17, TILE), ([], 15, 0)],
    ids=["molecule", "protein", "less than a tile"],
)
def test_a_known_beginning_changes_no_bit(
    either: Engine, first_logits: list[Logits], inputs: list[Molecule | Protein], all_known: int, in_tiles: int
) -> None:
    engine, known = either, all_known if either.decoder.tile == 1 else in_tiles
    prompt = engine.prepare(QUESTION, *inputs)
    expected = engine.first_logits(prompt)
    for _ in range(2):
        timings = engine.ask(QUESTION, *inputs, max_new_tokens=4).timings
        assert (timings.cached_tokens, timings.prompt_tokens) == (known, len(prompt))
        np.testing.assert_array_equal(first_logits[-1], expected)


def test_a_beginning_is_computed_once_per_engine_and_once_per_box(cache: Path, first_logits: list[Logits]) -> None:
    with Engine.load(threads=1, verify="sizes") as engine:
        tokens = engine.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids
        computed = len(first_logits)
        engine.ask(QUESTION, ETHANOL, max_new_tokens=3)
        assert len(first_logits) == computed + 1
    with Engine.load(threads=1, verify="sizes") as engine:
        assert engine.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids == tokens
        assert len(first_logits) == computed + 2
        assert (engine.prefix_counts.found, engine.prefix_counts.absent) == (1, 0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer", "a folder"])
def test_a_damaged_beginning_is_made_again_and_counted(cache: Path, damage: str) -> None:
    with Engine.load(threads=1, verify="sizes") as engine:
        tokens = engine.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids
    (path,) = (cache / "prefixes").iterdir()
    whole = path.read_bytes()
    changed = {
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "cut": whole[:-4],
        "empty": b"",
        "longer": whole + b"\0",
    }
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(changed[damage])
    with Engine.load(threads=1, verify="sizes") as engine:
        assert engine.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids == tokens
        assert engine.prefix_counts.found == 0
        assert engine.prefix_counts.damaged == (damage != "a folder")
    assert damage == "a folder" or path.read_bytes() == whole


def test_another_bundle_engine_or_number_of_threads_has_files_of_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads, identity in ((1, ""), (2, ""), (1, "onnxruntime 0.0")):
        with Engine.load(threads=threads, verify="sizes") as engine:
            if identity:
                monkeypatch.setattr(engine._loaded().decoder, "identity", identity)
            engine.ask(QUESTION, ASPIRIN, max_new_tokens=1)
    assert len(list((cache / "prefixes").iterdir())) == 3


def test_nothing_of_a_question_is_written(cache: Path) -> None:
    """The files after many questions are those after one, byte for byte."""

    def written(*questions: str) -> dict[str, bytes]:
        with Engine.load(threads=1, verify="sizes") as engine:
            for question in questions:
                engine.ask(question, ASPIRIN, max_new_tokens=2)
                engine.chat().ask(question, ETHANOL, max_new_tokens=2)
        return {path.name: path.read_bytes() for path in (cache / "prefixes").iterdir()}

    assert written("Hello") == written("Is CCO toxic?", "And CCN? " * 30)
    assert (cache / "prefixes").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (cache / "prefixes").iterdir()} == {0o600}


def test_a_cache_that_cannot_be_written_costs_the_beginning_and_nothing_else(cache: Path) -> None:
    cache.write_text("in the way")
    with Engine.load(threads=1, verify="sizes") as engine:
        assert engine.ask(QUESTION, ASPIRIN, max_new_tokens=2).timings.cached_tokens >= TILE


def test_a_prompt_that_begins_otherwise_is_computed_whole(engine: Engine) -> None:
    ids = engine.prepare(QUESTION, ASPIRIN).token_ids
    prefixes = engine._loaded()
    assert prefixes.covered(ids) >= TILE
    changed = ids.copy()
    changed[3] += 1
    assert prefixes.covered(changed) == 0


# --- conversations ----------------------------------------------------------------------------------------------------

TURNS = [(QUESTION, [ASPIRIN]), ("And how many rings does it have?", []), ("And this one?", [ETHANOL]), ("Why?", [])]


def test_turns_that_take_over_their_beginnings_say_what_fresh_ones_would(
    engine: Engine, first_logits: list[Logits]
) -> None:
    chat = engine.chat()
    for number, (question, inputs) in enumerate(TURNS):
        prompt = chat.prepare(question, *inputs)
        expected = engine.first_logits(prompt)
        fresh = Chat(engine, turns=list(chat.turns)).ask(question, *inputs, max_new_tokens=24)
        answer = chat.ask(question, *inputs, max_new_tokens=24)
        np.testing.assert_array_equal(first_logits[-1], expected)
        assert answer.token_ids == fresh.token_ids
        assert (answer.timings.cached_tokens > fresh.timings.cached_tokens) == (number > 0)


def test_a_molecule_in_the_place_of_another_is_read(engine: Engine, first_logits: list[Logits]) -> None:
    first, second = (Molecule.from_smiles(smiles) for smiles in ("CCCCCCCCCCCCCCCCCCCCO", "CCCCCCCCCCCCCCCCCCCCN"))
    chat = engine.chat()
    chat.ask(QUESTION, first, max_new_tokens=2)
    chat.turns.clear()
    expected = engine.first_logits(chat.prepare(QUESTION, second))
    chat.ask(QUESTION, second, max_new_tokens=2)
    np.testing.assert_array_equal(first_logits[-1], expected)


def test_a_cancelled_answer_leaves_what_was_read_to_the_next(engine: Engine) -> None:
    chat = engine.chat()
    with chat.stream(QUESTION, ASPIRIN) as stream:
        next(stream)
    answer = chat.ask(QUESTION, ASPIRIN, max_new_tokens=3)
    assert answer.token_ids == engine.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids
    assert answer.timings.cached_tokens > engine.ask(QUESTION, ASPIRIN, max_new_tokens=1).timings.cached_tokens


def test_a_failed_turn_keeps_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OnnxState, token: int) -> Logits:
        raise RuntimeError("the decoder broke")

    chat = engine.chat()
    with monkeypatch.context() as patch:
        patch.setattr(OnnxState, "step", fails)
        with pytest.raises(RuntimeError, match="the decoder broke"):
            chat.ask(QUESTION, ASPIRIN, max_new_tokens=3)
    assert chat._conversation is not None
    assert chat._conversation._kept is None


@pytest.mark.parametrize("way", ["release", "drop", "close the engine"])
def test_memory_is_freed_with_the_chat_and_on_request(cache: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    states: list[weakref.ref[OnnxState]] = []
    original = OnnxDecoder.open

    def recording(self: OnnxDecoder, *arguments: object) -> OnnxState:
        state = original(self, *arguments)  # type: ignore[arg-type]
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(OnnxDecoder, "open", recording)
    engine = Engine.load(threads=1, verify="sizes")
    chat = engine.chat()
    tokens = chat.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids
    assert len([state for state in states if state() is not None]) == 1
    if way == "release":
        chat.release()
    elif way == "drop":
        del chat
    else:
        decoder = weakref.ref(engine._loaded().decoder)
        engine.close()
        assert decoder() is None, "a chat keeps no model"
    gc.collect()
    assert [state() for state in states] == [None] * len(states)
    if way == "release":
        chat.turns.clear()
        assert chat.ask(QUESTION, ASPIRIN, max_new_tokens=3).token_ids == tokens


def test_two_open_answers_of_a_chat_have_states_of_their_own(engine: Engine) -> None:
    chat = engine.chat()
    alone = [engine.ask(question, max_new_tokens=5).token_ids for question in ("One", "Two")]
    one, two = chat.stream("One", max_new_tokens=5), chat.stream("Two", max_new_tokens=5)
    pieces = list(zip(one, two, strict=False))
    assert len(pieces) >= 2
    assert [tuple(pair[n].token_id for pair in pieces[:5])[:2] for n in (0, 1)] == [ids[:2] for ids in alone]


# --- what may be taken over -------------------------------------------------------------------------------------------


def positions_of(*parts: list[int] | Molecule) -> Positions:
    segments = [MoleculeSegment(p) if isinstance(p, Molecule) else TokenSegment(np.array(p, np.int64)) for p in parts]
    ids = [np.full(len(s), -1) if isinstance(s, MoleculeSegment) else s.ids for s in segments]
    return Positions.of(segments, np.concatenate([np.array(part, np.int64) for part in ids]))


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (([1, 2, 3],), ([1, 2, 4],), 2),
        (([1, 2, 3],), ([1, 2],), 2),
        (([1, 2],), ([3],), 0),
        (([1], ETHANOL, [2]), ([1], ETHANOL, [2, 5]), 5),
        (([1], ETHANOL, [2]), ([1], Molecule.from_smiles("OCC"), [2]), 1),
        (([1], ETHANOL, [2]), ([1], ASPIRIN, [2]), 1),
        (([1], ETHANOL, [2], ASPIRIN), ([1], ETHANOL, [2], ETHANOL), 5),
        (([1], ETHANOL), ([1, 7], ETHANOL), 1),
        (([1, 2], ETHANOL), ([1, 2],), 2),
    ],
)
def test_what_two_prompts_have_in_common(one: tuple[object, ...], other: tuple[object, ...], common: int) -> None:
    first, second = positions_of(*one), positions_of(*other)  # type: ignore[arg-type]
    assert first.common(second) == second.common(first) == common


@given(st.integers(0, 400), st.integers(1, 400), st.sampled_from([1, 2, 16]))
def test_what_is_taken_over_ends_at_a_tile_and_leaves_a_call(common: int, total: int, tile: int) -> None:
    kept = reusable(common, total, tile)
    assert kept % tile == 0
    assert kept <= common
    assert kept == 0 or total - kept >= (1 if tile == 1 else 2)
    assert kept + tile > min(common, total - 2)
