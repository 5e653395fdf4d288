"""Speculation changes no token, whatever is proposed, and stops where it does not pay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge import Answer, Chat, Engine, Molecule
from biomedgpt_edge.decoder.base import Embeddings, KeyValues, Logits
from biomedgpt_edge.decoder.onnx import OnnxState
from biomedgpt_edge.generate import Generation, Timings, generate
from biomedgpt_edge.prompt import Turn
from biomedgpt_edge.sampling import GenerationOptions
from biomedgpt_edge.speculation import DRAFT, Balance, PromptLookup, Speculation

SOFT = -1


class Table:
    """A row-invariant decoder: the logits behind a token are a random function of the last ``order`` tokens."""

    def __init__(self, vocabulary: int, order: int, seed: int) -> None:
        self.logits = (
            np.random.default_rng(seed).standard_normal((*[vocabulary] * order, vocabulary)).astype(np.float32)
        )
        self.order = order
        self.eos_id = vocabulary - 1
        self.ids: list[int] = []
        self.capacity = 0
        self.rows: list[int] = []

    def __len__(self) -> int:
        return len(self.logits)

    def open(self, capacity: int) -> Table:
        self.capacity = capacity
        return self

    @property
    def length(self) -> int:
        return len(self.ids)

    def reserve(self, positions: int) -> None:
        assert positions <= self.capacity

    def prefill(self, embeddings: Embeddings) -> Logits:
        self.ids += embeddings[:, 0].astype(int).tolist()
        return self._behind()

    def step(self, token: int) -> Logits:
        return self.steps([token])[0]

    def steps(self, tokens: Sequence[int]) -> Logits:
        assert len(self.ids) + len(tokens) <= self.capacity
        self.rows.append(len(tokens))
        found = []
        for token in tokens:
            self.ids.append(token)
            found.append(self._behind())
        return np.stack(found)

    def _behind(self) -> Logits:
        last = [0] * self.order + self.ids
        logits: Logits = self.logits[tuple(last[-self.order :])]
        return logits

    def truncate(self, length: int) -> None:
        del self.ids[length:]

    def key_values(self) -> KeyValues:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def answer(table: Table, prompt: list[int], options: GenerationOptions, *, speculate: bool) -> Generation:
    table.ids, table.rows = [], []
    result = Generation(Timings())
    lookup = PromptLookup(prompt) if speculate else None
    embeddings = np.array(prompt, np.float32)[:, np.newaxis]
    list(generate(table.open, embeddings, options, table, result, lookup))  # type: ignore[arg-type]
    return result


@given(st.integers(2, 12), st.integers(1, 2), st.integers(0, 10**6), st.integers(1, 60), st.data())
def test_tokens_are_those_of_single_steps(
    vocabulary: int, order: int, seed: int, limit: int, data: st.DataObject
) -> None:
    table = Table(vocabulary, order, seed)
    prompt = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=20))
    drawn = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    options = GenerationOptions(max_new_tokens=limit, temperature=drawn, seed=seed, repetition_penalty=1.0 + drawn)
    plain = answer(table, prompt, options, speculate=False)
    ahead = answer(table, prompt, options, speculate=True)
    assert (ahead.token_ids, ahead.finish) == (plain.token_ids, plain.finish)
    assert (ahead.timings.steps, ahead.timings.new_tokens) == (plain.timings.steps, plain.timings.new_tokens)
    assert max(table.rows, default=1) <= 1 + DRAFT
    assert ahead.timings.accepted <= ahead.timings.drafted
    assert len(table.rows) == ahead.timings.steps - ahead.timings.accepted


def test_an_answer_that_repeats_itself_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Balance, "wanted", lambda self: True)
    table = Table(5, 1, seed=0)
    table.logits[...] = np.eye(5, dtype=np.float32)[[1, 2, 3, 0, 0]]
    result = answer(table, [0], GenerationOptions(max_new_tokens=61), speculate=True)
    assert result.token_ids == [1, 2, 3, 0] * 15 + [1]
    assert len(table.rows) < 20


def test_what_was_not_chosen_is_taken_back_before_the_next_call() -> None:
    table = Table(6, 1, seed=1).open(100)
    lookup = PromptLookup([1, 2, 3, 4, 1])
    table.ids = [1, 2, 3, 4, 1]
    ahead = Speculation(table, lookup, steps=50)
    ahead._balance.stepped(1.0)
    for token, ids in ((2, [1, 2, 3, 4, 1, 2, 3, 4, 1]), (3, [1, 2, 3, 4, 1, 2, 3, 4, 1])):
        ahead.step(token)
        assert table.ids[:9] == ids
    np.testing.assert_array_equal(ahead.step(5), table.logits[5])
    assert table.ids[:8] == [1, 2, 3, 4, 1, 2, 3, 5]
    assert ahead.accepted == 1
    ahead.settle()
    assert table.ids == [1, 2, 3, 4, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("ids", "count", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 9, [3, 4, 1, 2]),
        ([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 1, [9]),
        ([2, 3, 5, 2, 3, 6, 2, 3], 1, [6]),
        ([1, 2, 3], 3, []),
        ([1, 1], 3, []),
        ([SOFT, SOFT, 5, SOFT, SOFT], 3, []),
        ([1, 2, SOFT, 4, 1, 2], 3, []),
        ([1, 2, 3, SOFT, 4, 1, 2], 3, [3]),
        ([], 3, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_what_followed_the_last_tokens_is_proposed(ids: list[int], count: int, draft: list[int]) -> None:
    assert PromptLookup(ids).draft(count) == draft


def calls(cost_of_row: float, tokens: int, steps: int = 1000) -> tuple[int, int]:
    """Calls with and without proposed tokens, where each call with eight rows gives ``tokens`` and a row more costs."""
    balance, several, single = Balance(), 0, 0
    while several * tokens + single < steps:
        if balance.wanted():
            balance.speculated(1 + cost_of_row * DRAFT, tokens)
            several += 1
        else:
            balance.stepped(1.0)
            single += 1
    return several, single


def test_speculation_that_pays_goes_on_and_one_that_does_not_stops() -> None:
    assert calls(cost_of_row=0.05, tokens=4)[1] == 1
    for tokens in (1, 3):
        several, single = calls(cost_of_row=0.5, tokens=tokens)
        assert several < 15
        assert single > 900
    assert calls(cost_of_row=0.5, tokens=6)[1] == 1


def test_it_is_off_where_rows_depend_on_each_other_unless_asked_for(
    portable_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Balance, "wanted", lambda self: self._step is not None)
    rows: list[int] = []
    original = OnnxState.steps

    def recording(self: OnnxState, tokens: Sequence[int]) -> Logits:
        rows.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(OnnxState, "steps", recording)
    with Engine.load(portable_demo, threads=1, verify="sizes") as engine:
        plain = again(engine)
        assert set(rows) == {1}
        ahead = again(engine, speculate=True)
        assert max(rows) > 1
        # Tokens are not compared: here a row depends on the number of rows, and a near tie may fall otherwise.
        assert ahead.timings.accepted > 0
        monkeypatch.setattr(engine._loaded().decoder, "tile", 1)
        for speculate, most in ((None, 1 + DRAFT), (False, 1)):
            rows.clear()
            answer = again(engine, speculate=speculate)
            assert max(rows) == most
        assert answer.token_ids == plain.token_ids


def again(engine: Engine, **options: bool | None) -> Answer:
    """A question that was answered before in the same conversation, so that its answer repeats what stands there."""
    question, molecule = "Please describe this molecule.", Molecule.from_smiles("CC(=O)Oc1ccccc1C(=O)O")
    known = "This is a small molecule with one ring, which is aromatic. It contains these groups: carboxylic acid."
    chat = Chat(engine, turns=[Turn(question, (molecule,), known)])
    return chat.ask(question, molecule, max_new_tokens=60, **options)  # type: ignore[arg-type]
