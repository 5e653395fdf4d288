"""Sampling: greedy and ties, exact distributions against a plain reference, and every option's range."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from biomedgpt_edge.errors import BioMedGPTError, OptionError
from biomedgpt_edge.sampling import GenerationOptions, Sampler

Logits = npt.NDArray[np.float32]


def logits(*values: float) -> Logits:
    return np.array(values, np.float32)


def distribution(scores: Logits, **options: Any) -> dict[int, float]:
    """The tokens that a sampler draws among."""
    handed: list[dict[int, float]] = []

    sampler = Sampler(GenerationOptions(**{"temperature": 1.0, **options}), len(scores))
    original = sampler._distribution

    def recording(penalized: Logits) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
        tokens, weights = original(penalized)
        named = range(len(weights)) if tokens is None else tokens.tolist()
        handed.append(dict(zip(named, (weights / weights.sum()).tolist(), strict=True)))
        return tokens, weights

    sampler._distribution = recording  # type: ignore[method-assign]
    sampler.choose(scores)
    return handed[0]


def reference(scores: Logits, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict[int, float]:
    """Sort by likelihood (equal ones by number), keep k, softmax, keep until p is reached, normalize."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[: top_k or None]
    best = float(scores[order[0]])
    weights = [math.exp((float(scores[token]) - best) / temperature) for token in order]
    chances = [weight / math.fsum(weights) for weight in weights]
    kept, total = 0, 0.0
    while kept < len(order) and (kept == 0 or top_p == 1.0 or total < top_p):
        total += chances[kept]
        kept += 1
    return {token: chance / math.fsum(chances[:kept]) for token, chance in zip(order[:kept], chances, strict=False)}


SCORES = st.lists(
    st.one_of(st.sampled_from([-2.0, 0.0, 1.5]), st.floats(-20, 20, width=32)), min_size=1, max_size=12
).map(lambda values: np.array(values, np.float32))


class TestGreedy:
    def test_takes_the_largest(self) -> None:
        assert Sampler(GenerationOptions(), 4).choose(logits(0, 3, 1, 2)) == 1

    def test_of_equal_ones_takes_the_lowest(self) -> None:
        assert Sampler(GenerationOptions(), 4).choose(logits(0, 3, 3, 3)) == 1
        assert Sampler(GenerationOptions(), 3).choose(logits(0, 0, 0)) == 0

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 5.0, "top_k": 9, "top_p": 0.9}])
    def test_never_takes_a_row_beyond_the_vocabulary(self, options: dict[str, Any]) -> None:
        sampler = Sampler(GenerationOptions(seed=1, **options), 3)
        scores = logits(0, 0, 0, 99, np.nan, np.inf)
        assert {sampler.choose(scores) for _ in range(50)} <= {0, 1, 2}

    def test_leaves_the_logits_as_they_are(self) -> None:
        scores = logits(1, 2, -3)
        scores.setflags(write=False)
        sampler = Sampler(GenerationOptions(temperature=0.5, top_k=2, top_p=0.9, repetition_penalty=2.0), 3)
        for _ in range(3):
            sampler.choose(scores)
        assert scores.tolist() == [1, 2, -3]

    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"top_k": 1, "temperature": 1.0}],
    )
    @pytest.mark.parametrize("bad", [[0, np.nan, 5], [0, np.inf, 5], [-np.inf] * 3])
    def test_logits_that_are_no_numbers_are_an_error(self, options: dict[str, Any], bad: list[float]) -> None:
        with pytest.raises(BioMedGPTError, match=r"largest logit is (nan|inf|-inf).*verify"):
            Sampler(GenerationOptions(**options), 3).choose(logits(*bad))

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1e-300}, {"repetition_penalty": 9}])
    def test_a_token_ruled_out_by_minus_infinity_is_never_taken(self, options: dict[str, Any]) -> None:
        sampler = Sampler(GenerationOptions(seed=3, **options), 3)
        assert {sampler.choose(logits(-np.inf, 0, -np.inf)) for _ in range(20)} == {1}


class TestDrawing:
    @given(
        SCORES,
        st.sampled_from([0.1, 0.7, 1.0, 3.0]),
        st.integers(0, 14),
        st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    )
    def test_has_exactly_the_reference_distribution(
        self, scores: Logits, temperature: float, top_k: int, top_p: float
    ) -> None:
        whole = reference(scores, temperature=temperature, top_k=top_k)
        # Where a sum meets p to the last digit, rounding decides whether one token more is kept.
        assume(top_p == 1.0 or all(abs(total - top_p) > 1e-9 for total in accumulate(whole.values())))
        expected = reference(scores, temperature=temperature, top_k=top_k, top_p=top_p)
        got = distribution(scores, temperature=temperature, top_k=top_k, top_p=top_p)
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, abs=1e-12)

    def test_top_k_keeps_exactly_k_and_of_equal_ones_the_lowest(self) -> None:
        assert distribution(logits(1, 2, 2, 2, 0), top_k=2).keys() == {1, 2}
        assert distribution(logits(2, 1, 1, 5), top_k=3).keys() == {0, 1, 3}
        assert distribution(logits(1, 1, 1), top_k=9).keys() == {0, 1, 2}

    def test_top_k_of_one_is_greedy_also_among_equal_ones(self) -> None:
        scores = np.zeros(1000, np.float32)
        scores[[17, 400, 999]] = 4
        assert distribution(scores, top_k=1) == {17: 1.0}

    def test_top_p_keeps_the_token_that_reaches_it(self) -> None:
        scores = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
        assert distribution(scores, top_p=0.4).keys() == {0}
        assert distribution(scores, top_p=0.6).keys() == {0, 1}
        assert distribution(scores, top_p=0.76).keys() == {0, 1, 2}
        assert distribution(scores, top_p=0.999).keys() == {0, 1, 2, 3}
        assert distribution(scores, top_p=0.6) == pytest.approx({0: 2 / 3, 1: 1 / 3})

    def test_top_p_counts_within_top_k(self) -> None:
        scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
        assert distribution(scores, top_k=2, top_p=0.55).keys() == {0}

    @pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-3])
    def test_the_smallest_temperatures_are_greedy(self, temperature: float) -> None:
        chances = distribution(logits(-30, 29, 30, -3e38), temperature=temperature)
        assert chances[2] == pytest.approx(1.0)
        assert sum(chances.values()) == pytest.approx(1.0)

    def test_the_largest_temperature_is_nearly_even(self) -> None:
        assert distribution(logits(0, 1, 2), temperature=100.0) == pytest.approx(
            dict.fromkeys(range(3), 1 / 3), abs=0.01
        )

    def test_a_seed_gives_the_same_tokens_again(self) -> None:
        def drawn(seed: int | None) -> list[int]:
            sampler = Sampler(GenerationOptions(temperature=1.0, seed=seed), 1000)
            return [sampler.choose(np.zeros(1000, np.float32)) for _ in range(20)]

        assert drawn(7) == drawn(7) != drawn(8)
        assert drawn(None) != drawn(None)

    def test_draws_follow_their_chances(self) -> None:
        sampler = Sampler(GenerationOptions(temperature=1.0, seed=11), 3)
        scores = np.log(np.array([0.7, 0.3, 1e-9], np.float32))
        drawn = [sampler.choose(scores) for _ in range(2000)]
        assert drawn.count(0) / 2000 == pytest.approx(0.7, abs=0.04)
        assert drawn.count(2) == 0


class TestRepetitionPenalty:
    @pytest.mark.parametrize("penalty", [0.5, 1.0, 1.5, 100.0])
    def test_equals_that_of_transformers_over_the_generated_tokens(self, penalty: float) -> None:
        from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

        processor = RepetitionPenaltyLogitsProcessor(penalty)
        sampler = Sampler(GenerationOptions(repetition_penalty=penalty), 16)
        rng = np.random.default_rng(5)
        generated: list[int] = []
        for _ in range(12):
            scores = rng.normal(size=16).astype(np.float32)
            expected = torch.from_numpy(scores.copy())[None]
            if generated:
                expected = processor(torch.tensor([generated]), expected)
            np.testing.assert_array_equal(sampler._penalized(scores), expected[0].numpy())
            generated.append(sampler.choose(scores))
            assert generated[-1] == int(expected.argmax())

    def test_counts_a_token_once_however_often_it_came(self) -> None:
        sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 2)
        assert [sampler.choose(logits(8, 1)) for _ in range(5)] == [0] * 5

    def test_is_exact_at_its_ends(self) -> None:
        for penalty in (0.01, 100.0):
            sampler = Sampler(GenerationOptions(repetition_penalty=penalty), 3)
            for _ in range(5):
                sampler.choose(logits(-1e30, 0, -1e30))


class TestOptions:
    def test_the_default_is_greedy(self) -> None:
        options = GenerationOptions()
        assert (options.max_new_tokens, options.temperature, options.top_k, options.top_p) == (256, 0.0, 0, 1.0)
        assert (options.repetition_penalty, options.seed, options.stop) == (1.0, None, ())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("max_new_tokens", value) for value in (0, -1, 2**20 + 1, 1.0, "9", True, None, math.nan)),
            *(("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf, "1", None, True)),
            *(("top_k", value) for value in (-1, 2**24 + 1, 1.5, "1", None, False)),
            *(("top_p", value) for value in (0.0, -1, 1.01, math.nan, "1", None, True)),
            *(("repetition_penalty", value) for value in (0.0, -1, 0.009, 100.1, math.nan, math.inf, "1", None)),
            *(("seed", value) for value in (-1, 2**64, 1.0, "1", True)),
        ],
    )
    def test_a_value_outside_its_range_is_refused_by_name(self, name: str, value: object) -> None:
        with pytest.raises(OptionError, match=f"^{name} is ") as caught:
            GenerationOptions(**{name: value})  # type: ignore[arg-type]
        assert caught.value.remedy.startswith("Give a ")
        assert "at most" in str(caught.value.limit)
        json.dumps(caught.value.as_dict())

    @pytest.mark.parametrize("stop", ["###", ("",), ["a", ""], (1,), None, (b"x",), {"###": 1}])
    def test_stop_must_be_texts_that_are_not_empty(self, stop: object) -> None:
        with pytest.raises(OptionError, match="stop is"):
            GenerationOptions(stop=stop)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "options",
        [
            {"max_new_tokens": 1}, {"max_new_tokens": 2**20}, {"max_new_tokens": np.int64(5)},
            {"temperature": 0}, {"temperature": 100}, {"temperature": np.float32(0.5)},
            {"top_k": 2**24}, {"top_p": 1}, {"top_p": 1e-9}, {"repetition_penalty": 0.01},
            {"repetition_penalty": 100}, {"seed": 0}, {"seed": 2**64 - 1}, {"stop": ("###", "\n")},
        ],
    )  # fmt: skip
    def test_the_ends_of_every_range_are_allowed(self, options: dict[str, Any]) -> None:
        Sampler(GenerationOptions(**options), 3).choose(logits(1, 2, 3))


def test_stop_texts_may_come_as_a_list() -> None:
    assert GenerationOptions(stop=["###"]) == GenerationOptions(stop=("###",))


def test_a_draw_is_that_of_numpy() -> None:
    scores = np.random.default_rng(0).standard_normal(2000).astype(np.float32) * 3
    for options in ({}, {"top_p": 0.9}, {"top_k": 40}):
        sampler = Sampler(GenerationOptions(temperature=0.8, seed=3, **options), len(scores))  # type: ignore[arg-type]
        theirs = np.random.default_rng(3)
        tokens, weights = sampler._distribution(scores)
        tokens, chances = np.arange(len(weights)) if tokens is None else tokens, weights / weights.sum()
        drawn = [sampler.choose(scores) for _ in range(100)]
        assert drawn == [int(theirs.choice(tokens, p=chances)) for _ in range(100)]
