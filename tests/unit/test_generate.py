"""The decode loop and the text of an answer, over a decoder that plays back a script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from biomedgpt_edge.decoder.base import Embeddings, KeyValues, Logits
from biomedgpt_edge.errors import BioMedGPTError
from biomedgpt_edge.generate import PREFILL_CHUNK, AnswerText, Generation, Timings, generate
from biomedgpt_edge.sampling import Choice, GenerationOptions, Sampler
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.synthesize import train_tokenizer

PIECES = 400
PROMPT = np.zeros((5, 8), np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(PIECES))
    return Tokenizer(path)


class Script:
    """A decoder whose likeliest tokens are those of a script; it remembers what was asked of it."""

    def __init__(self, tokens: list[int], *, fail_at: int | None = None) -> None:
        self.tokens = tokens
        self.fail_at = fail_at
        self.capacity = 0
        self.reserved = 0
        self.chunks: list[int] = []
        self.stepped: list[int] = []
        self.opened = 0
        self.closed = 0

    def open(self, capacity: int) -> Script:
        self.capacity = capacity
        self.opened += 1
        return self

    @property
    def length(self) -> int:
        return sum(self.chunks) + len(self.stepped)

    def reserve(self, positions: int) -> None:
        self.reserved = positions

    def _logits(self, index: int) -> Logits:
        if index == self.fail_at:
            raise RuntimeError("the decoder broke")
        # The row of [PAD] is the largest of all and must never be taken.
        scores = np.zeros(PIECES + 1, np.float32)
        scores[[self.tokens[index], PIECES]] = [5.0, 9.0]
        return scores

    def prefill(self, embeddings: Embeddings) -> Logits:
        self.chunks.append(len(embeddings))
        return self._logits(0)

    def step(self, token: int) -> Logits:
        self.stepped.append(token)
        return self._logits(len(self.stepped))

    def steps(self, tokens: Sequence[int]) -> Logits:
        return np.stack([self.step(token) for token in tokens])

    def truncate(self, length: int) -> None:
        del self.stepped[length - sum(self.chunks) :]

    def key_values(self) -> KeyValues:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(script: Script, tokenizer: Tokenizer, limit: int = 4) -> tuple[Iterator[int], Generation]:
    result = Generation(Timings())
    options = GenerationOptions(max_new_tokens=limit)
    return generate(script.open, PROMPT, options, tokenizer, result), result


class TestGenerate:
    def test_ends_at_eos_which_is_no_part_of_the_answer(self, tokenizer: Tokenizer) -> None:
        script = Script([300, 301, tokenizer.eos_id, 302])
        tokens, result = run(script, tokenizer)
        assert list(tokens) == result.token_ids == [300, 301]
        assert result.finish == "eos"
        assert script.stepped == [300, 301]
        assert (result.timings.new_tokens, result.timings.steps) == (2, 2)

    def test_ends_after_max_new_tokens_and_keeps_the_last(self, tokenizer: Tokenizer) -> None:
        script = Script([300, 301, 302, 303, 304])
        tokens, result = run(script, tokenizer)
        assert list(tokens) == [300, 301, 302, 303]
        assert result.finish == "length"
        assert script.stepped == [300, 301, 302], "the last token needs no step"

    def test_one_token_takes_one_prefill_and_no_step(self, tokenizer: Tokenizer) -> None:
        script = Script([300])
        tokens, result = run(script, tokenizer, limit=1)
        assert list(tokens) == [300]
        assert (script.chunks, script.stepped, result.timings.tpot) == ([5], [], None)
        assert result.timings.ttft > 0

    def test_eos_at_once_is_an_empty_answer(self, tokenizer: Tokenizer) -> None:
        tokens, result = run(Script([tokenizer.eos_id]), tokenizer)
        assert list(tokens) == []
        assert result.finish == "eos"

    def test_asks_for_room_for_the_prompt_and_the_whole_answer(self, tokenizer: Tokenizer) -> None:
        script = Script([tokenizer.eos_id])
        list(run(script, tokenizer, limit=7)[0])
        assert script.capacity == len(PROMPT) + 7

    def test_nothing_runs_before_the_first_token_is_asked_for(self, tokenizer: Tokenizer) -> None:
        script = Script([300])
        tokens, _ = run(script, tokenizer)
        assert script.opened == 0
        next(tokens)
        assert (script.opened, script.closed) == (1, 0)

    def test_closing_it_early_closes_the_state_and_keeps_what_came(self, tokenizer: Tokenizer) -> None:
        script = Script([300, 301, 302, 303])
        tokens, result = run(script, tokenizer)
        assert [next(tokens), next(tokens)] == [300, 301]
        tokens.close()  # type: ignore[attr-defined]
        assert script.closed == 1
        assert result.token_ids == [300, 301]

    def test_dropping_it_closes_the_state(self, tokenizer: Tokenizer) -> None:
        script = Script([300, 301])
        tokens, _ = run(script, tokenizer)
        next(tokens)
        del tokens
        assert script.closed == 1

    @pytest.mark.parametrize("fail_at", [0, 1])
    def test_an_error_of_the_decoder_closes_the_state(self, tokenizer: Tokenizer, fail_at: int) -> None:
        script = Script([300, 301], fail_at=fail_at)
        with pytest.raises(RuntimeError, match="the decoder broke"):
            list(run(script, tokenizer)[0])
        assert script.closed == 1

    def test_nan_closes_the_state(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        script = Script([300])
        monkeypatch.setattr(script, "_logits", lambda index: np.full(PIECES + 1, np.nan, np.float32))
        with pytest.raises(BioMedGPTError, match="nan"):
            list(run(script, tokenizer)[0])
        assert script.closed == 1

    def test_the_end_closes_the_state_once(self, tokenizer: Tokenizer) -> None:
        script = Script([300, tokenizer.eos_id])
        list(run(script, tokenizer)[0])
        assert (script.opened, script.closed) == (1, 1)


class TestPrefill:
    def chunks(self, tokenizer: Tokenizer, positions: int, there: int = 0) -> list[int]:
        script = Script([tokenizer.eos_id])
        script.chunks = [there] if there else []
        prompt, result = np.zeros((positions, 8), np.float32), Generation(Timings())
        list(generate(script.open, prompt, GenerationOptions(), tokenizer, result))
        assert (script.reserved, result.timings.cached_tokens) == (positions, there)
        return script.chunks[1:] if there else script.chunks

    @given(st.integers(1, 2000), st.integers(0, 2000))
    def test_chunks_are_short_and_cover_the_rest_of_the_prompt(
        self, tokenizer: Tokenizer, positions: int, there: int
    ) -> None:
        assume(there < positions)
        chunks = self.chunks(tokenizer, positions, there)
        assert sum(chunks) == positions - there
        assert max(chunks) <= PREFILL_CHUNK
        assert chunks == [1] or min(chunks) > 1, "a single position is computed as a step would be"
        assert all(size % (PREFILL_CHUNK // 2) == 0 for size in chunks[:-1])

    def test_room_for_the_whole_prompt_is_made_at_once(self, tokenizer: Tokenizer) -> None:
        assert self.chunks(tokenizer, 600) == [256, 256, 88]
        assert self.chunks(tokenizer, 513) == [256, 128, 129]

    def test_a_long_prompt_can_be_cancelled_between_chunks(self, tokenizer: Tokenizer) -> None:
        script, result = Script([300]), Generation(Timings())
        original = script.prefill

        def cancelled_meanwhile(embeddings: Embeddings) -> Logits:
            result.cancelled.set()
            return original(embeddings)

        script.prefill = cancelled_meanwhile  # type: ignore[method-assign]
        prompt = np.zeros((2000, 8), np.float32)
        assert list(generate(script.open, prompt, GenerationOptions(), tokenizer, result)) == []
        assert (script.chunks, script.closed, result.token_ids) == ([PREFILL_CHUNK], 1, [])


class Spelled:
    """A tokenizer whose tokens are given texts, for answers cut at any place."""

    def __init__(self, texts: list[str], end: str = "") -> None:
        self.texts, self.end = texts, end

    def stream(self) -> Spelled:
        return self

    def push(self, token: int) -> str:
        return self.texts[token]

    def flush(self) -> str:
        return self.end


def answered(texts: list[str], stop: tuple[str, ...] = (), end: str = "") -> tuple[list[str], bool]:
    """The pieces given out, as the engine asks for them."""
    answer = AnswerText(Spelled(texts, end), stop)  # type: ignore[arg-type]
    pieces = []
    for token in range(len(texts)):
        pieces.append(answer.push(token))
        if answer.stopped:
            return pieces, True
    return [*pieces, answer.finish()], answer.stopped


def expected_text(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Letter by letter: the first stop text to be complete ends the answer; of two, the longer."""
    for end in range(1, len(text) + 1):
        whole = [mark for mark in stop if text[:end].endswith(mark)]
        if whole:
            return text[: end - max(map(len, whole))].strip(), True
    return text.strip(), False


FRAGMENTS = st.lists(st.text("ab# \n", max_size=4), max_size=10)
STOPS = st.lists(st.text("ab# \n", min_size=1, max_size=4), max_size=3).map(tuple)


class TestAnswerText:
    @given(FRAGMENTS, STOPS, st.sampled_from(["", "\ufffd", "\ufffd\ufffd"]))
    @example(["a#", "#", "# b"], ("###",), "")
    @example(["abab", "ab#"], ("abab#",), "")
    @example(["ab#a"], ("b#a", "#"), "")
    @example(["a", " ", "\n", "#", "##"], ("\n###",), "")
    @example(["\n\n", "###"], ("\n\n###",), "")
    @example([" ", "\n", "a"], ("\n",), "")
    @example(["a ", "#", " b"], ("###",), "")
    def test_the_pieces_join_to_the_text_up_to_the_first_complete_stop(
        self, fragments: list[str], stop: tuple[str, ...], end: str
    ) -> None:
        pieces, stopped = answered(fragments, stop, end)
        assert ("".join(pieces), stopped) == expected_text("".join(fragments) + end, stop)

    @given(FRAGMENTS, STOPS)
    def test_what_is_given_out_never_has_to_be_taken_back(self, fragments: list[str], stop: tuple[str, ...]) -> None:
        pieces, _ = answered(fragments, stop)
        final, _ = expected_text("".join(fragments), stop)
        given_out = ""
        for piece in pieces:
            given_out += piece
            assert final.startswith(given_out)
            assert given_out == given_out.strip()

    @given(FRAGMENTS, STOPS)
    def test_where_the_tokens_end_does_not_matter(self, fragments: list[str], stop: tuple[str, ...]) -> None:
        whole = "".join(fragments)
        assert "".join(answered(fragments, stop)[0]) == "".join(answered(list(whole), stop)[0])
        assert "".join(answered(fragments, stop)[0]) == "".join(answered([whole], stop)[0])

    def test_a_stop_text_is_held_back_while_it_may_come(self) -> None:
        assert answered(["It is", " #", "#", "# H"], ("###",)) == (["It is", "", "", ""], True)
        assert answered(["It is", " #", "#", "1"], ("###",)) == (["It is", "", "", " ##1", ""], False)

    def test_of_overlapping_stop_texts_the_first_to_be_complete_counts(self) -> None:
        assert "".join(answered(["abcdef"], ("abcdef", "cd"))[0]) == "ab"
        assert "".join(answered(["ab", "cd", "ef"], ("abcdef", "cd"))[0]) == "ab"
        assert "".join(answered(["xabc"], ("bc", "abc"))[0]) == "x"

    def test_a_stop_text_in_front_gives_an_empty_answer(self) -> None:
        assert answered([" ", "#", "##"], ("###",)) == (["", "", ""], True)

    def test_the_beginning_of_a_stop_text_at_the_end_is_text(self) -> None:
        assert answered(["It is ##"], ("###",)) == (["It is", " ##"], False)

    def test_white_space_comes_only_with_what_follows_it(self) -> None:
        assert answered([" ", " It", " ", "\n", "is", " "]) == (["", "It", "", "", " \nis", "", ""], False)

    def test_an_unfinished_character_comes_at_the_end(self) -> None:
        assert answered(["It "], end="\ufffd") == (["It", " \ufffd"], False)

    def test_nothing_comes_after_a_stop(self) -> None:
        answer = AnswerText(Spelled(["a#", "b"], "c"), ("#",))  # type: ignore[arg-type]
        assert [answer.push(0), answer.push(1), answer.finish()] == ["a", "", ""]

    @given(st.lists(st.one_of(st.integers(0, PIECES - 1), st.integers(3, 258)), max_size=16))
    def test_over_real_tokens_the_pieces_join_to_the_decoded_text(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        answer = AnswerText(tokenizer, ())
        pieces = [answer.push(token) for token in ids]
        assert "".join([*pieces, answer.finish()]) == tokenizer.decode(ids).strip()

    @pytest.mark.parametrize("stop", ["###", "é", "😀", "</s>"])
    def test_a_stop_text_is_found_whatever_tokens_spell_it(self, tokenizer: Tokenizer, stop: str) -> None:
        for ids in (
            tokenizer.encode(f"It is {stop} so"),
            [tokenizer._model.PieceToId(f"<0x{value:02X}>") for value in f"It is {stop} so".encode()],
        ):
            answer = AnswerText(tokenizer, (stop,))
            pieces = [answer.push(token) for token in ids]
            assert "".join([*pieces, answer.finish()]) == "It is"
            assert answer.stopped


# --- decoders that choose by themselves -------------------------------------------------------------------------------


class ChoosingScript(Script):
    """A script that chooses its tokens where it was asked to, and remembers how."""

    def __init__(self, tokens: list[int], *, largest: float = 5.0) -> None:
        super().__init__(tokens)
        self.largest = largest
        self.choices: list[Choice] = []

    def step_chosen(self, token: int, choice: Choice) -> tuple[int, float]:
        self.stepped.append(token)
        self.choices.append(choice)
        return self.tokens[len(self.stepped)], self.largest


def test_a_decoder_that_chooses_is_asked_for_no_logits_behind_the_prompt(tokenizer: Tokenizer) -> None:
    script, result = ChoosingScript([7, 8, 9, 10]), Generation(Timings())
    tokens = list(generate(script.open, PROMPT, GenerationOptions(max_new_tokens=4), tokenizer, result))
    assert tokens == [7, 8, 9, 10]
    assert script.stepped == [7, 8, 9]
    assert script.choices == [Choice(0.0, 0, 1.0, 0.0)] * 3
    assert result.timings.steps == 3


def test_its_draws_take_the_numbers_that_draws_from_logits_take(tokenizer: Tokenizer) -> None:
    options = GenerationOptions(max_new_tokens=4, temperature=0.5, top_k=3, top_p=0.75, seed=11)
    script = ChoosingScript([7, 7, 7, 7])
    list(generate(script.open, PROMPT, options, tokenizer, Generation(Timings())))
    numbers = np.random.default_rng(11).random(4)
    # The first of them went into the token behind the prompt.
    assert [choice.uniform for choice in script.choices] == list(numbers[1 : 1 + len(script.choices)])
    assert {choice[:3] for choice in script.choices} == {(2.0, 3, 0.75)}


def test_a_penalty_needs_logits(tokenizer: Tokenizer) -> None:
    script = ChoosingScript([7, 8, 9])
    options = GenerationOptions(max_new_tokens=3, repetition_penalty=1.5)
    assert list(generate(script.open, PROMPT, options, tokenizer, Generation(Timings()))) == [7, 8, 9]
    assert script.choices == []


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), float("-inf")])
def test_what_it_chose_among_no_numbers_is_an_error(largest: float, tokenizer: Tokenizer) -> None:
    script = ChoosingScript([7, 8], largest=largest)
    with pytest.raises(BioMedGPTError, match="largest logit is"):
        list(generate(script.open, PROMPT, GenerationOptions(max_new_tokens=2), tokenizer, Generation(Timings())))


@given(temperature=st.floats(0, 100), seed=st.integers(0, 2**32))
@example(temperature=5e-324, seed=0)
def test_choices_are_numbers_that_a_kernel_takes(temperature: float, seed: int) -> None:
    choice = Sampler(GenerationOptions(temperature=temperature, seed=seed), 10).choice()
    assert choice is not None
    assert np.isfinite(np.float32(choice.inverse_temperature))
    assert 0 <= choice.uniform < 1
    assert (choice.inverse_temperature == 0) == (temperature == 0)
