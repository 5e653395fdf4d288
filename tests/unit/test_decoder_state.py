"""One sequence of the ONNX decoder: growing, cutting, several tokens in a call, beginning where another one stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.base import KeyValues
from biomedgpt_edge.decoder.onnx import GROWTH, TILE, OnnxDecoder
from biomedgpt_edge.errors import ClosedError, KernelArgumentError
from biomedgpt_edge.generate import prefill
from biomedgpt_edge.splice import TokenPart, splice

POSITIONS = 600


def opened(path: Path, threads: int = 1) -> OnnxDecoder:
    return OnnxDecoder(Bundle.open(path), threads=threads)


def rows(decoder: OnnxDecoder, count: int = POSITIONS) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, len(decoder.table.rows) - 1, count)
    return splice([TokenPart(ids)], decoder.table, threads=1)


@pytest.fixture(scope="module")
def decoder(tiny_bundle_fp32: Path) -> OnnxDecoder:
    return opened(tiny_bundle_fp32)


def in_calls(decoder: OnnxDecoder, embeddings: np.ndarray, ends: list[int]) -> tuple[np.ndarray, KeyValues]:
    """Logits of all positions, and the KV cache, computed in calls that end at ``ends``."""
    with decoder.open(len(embeddings)) as state:
        logits = [state.logits(embeddings[a:b], np.arange(b - a)) for a, b in pairwise([0, *ends])]
        return np.concatenate(logits), state.key_values()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_calls_that_end_at_tiles_change_no_bit(
    tiny_bundles: Callable[[str], Path], precision: str, threads: int
) -> None:
    decoder = opened(tiny_bundles(precision), threads)
    embeddings = rows(decoder)
    whole, cache = in_calls(decoder, embeddings, [POSITIONS])
    for ends in (
        [TILE, POSITIONS],
        [256, 512, POSITIONS],
        [16 * TILE, 17 * TILE, POSITIONS],
        [POSITIONS - 8, POSITIONS],
    ):
        logits, cut = in_calls(decoder, embeddings, ends)
        np.testing.assert_array_equal(logits, whole)
        np.testing.assert_array_equal(cut, cache)


def test_a_long_prompt_in_chunks_gives_the_same_bits_as_in_one_call(decoder: OnnxDecoder) -> None:
    embeddings = rows(decoder, 513)
    with decoder.open(513) as chunked, decoder.open(513) as whole:
        *_, last = prefill(chunked, embeddings)
        np.testing.assert_array_equal(last, whole.prefill(embeddings))
        np.testing.assert_array_equal(chunked.key_values(), whole.key_values())


def test_room_grows_with_what_is_used_and_no_further_than_the_capacity(decoder: OnnxDecoder) -> None:
    embeddings = rows(decoder)
    with decoder.open(GROWTH + 10) as state, decoder.open(GROWTH + 10) as roomy:
        roomy.reserve(GROWTH + 10)
        state.prefill(embeddings[:20])
        assert {buffer.shape[2] for buffer in state._cache.values()} == {GROWTH}
        state.prefill(embeddings[20:GROWTH])
        roomy.prefill(embeddings[:20])
        roomy.prefill(embeddings[20:GROWTH])
        for token in range(10):
            np.testing.assert_array_equal(state.step(token), roomy.step(token))
        assert {buffer.shape[2] for buffer in state._cache.values()} == {GROWTH + 10}
        with pytest.raises(ValueError, match=f"{GROWTH + 11} positions do not fit"):
            state.step(0)
        assert state.length == GROWTH + 10


def test_several_tokens_in_one_call_are_as_many_rows_of_a_prefill(decoder: OnnxDecoder) -> None:
    tokens = [5, 9, 5, 30]
    embeddings = splice([TokenPart(np.array(tokens))], decoder.table, threads=1)
    with decoder.open(40) as state, decoder.open(40) as other:
        state.prefill(rows(decoder, 20))
        other.prefill(rows(decoder, 20))
        found = state.steps(tokens)
        assert found.shape == (4, decoder.spec.vocabulary)
        np.testing.assert_array_equal(found, other.logits(embeddings, np.arange(4)))
        assert state.length == 24


def test_what_was_cut_off_leaves_no_trace(decoder: OnnxDecoder) -> None:
    with decoder.open(40) as state, decoder.open(40) as fresh:
        for one in (state, fresh):
            one.prefill(rows(decoder, 20))
        state.steps([7, 8, 9])
        state.truncate(20)
        np.testing.assert_array_equal(state.step(3), fresh.step(3))
        assert state.length == 21
    for length in (-1, 22):
        with pytest.raises(ValueError, match=f"cannot be cut to {length}"):
            fresh.truncate(length)


def test_a_state_begins_where_another_one_stopped(decoder: OnnxDecoder) -> None:
    embeddings = rows(decoder, 60)
    with decoder.open(100) as first:
        first.prefill(embeddings[:47])
        start = first.key_values()
        expected = first.prefill(embeddings[47:])
    with decoder.open(60, start) as second:
        assert second.length == 47
        np.testing.assert_array_equal(second.prefill(embeddings[47:]), expected)
    with decoder.open(60, start) as third:
        np.testing.assert_array_equal(third.key_values(), start)


@pytest.mark.parametrize(
    "spoil",
    [lambda kv: kv[1:], lambda kv: kv.astype(np.float64), lambda kv: kv[:, :, :, 1:], lambda kv: kv[0]],
    ids=["a layer too few", "float64", "narrow heads", "one layer"],
)
def test_keys_and_values_of_another_decoder_are_refused(
    decoder: OnnxDecoder, spoil: Callable[[KeyValues], KeyValues]
) -> None:
    with decoder.open(20) as state:
        state.prefill(rows(decoder, 20))
        start = state.key_values()
    with pytest.raises(KernelArgumentError, match="keys and values are float"):
        decoder.open(20, spoil(start))


def test_a_closed_state_says_so(decoder: OnnxDecoder) -> None:
    state = decoder.open(20)
    state.close()
    state.close()
    with pytest.raises(ClosedError):
        state.step(3)
