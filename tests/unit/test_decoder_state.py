"""One sequence of the ONNX decoder: growing, cutting, several tokens in a call, beginning where another one stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge import Engine
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.kv_cache import KV_ELEMENTS, KeyValues, KvElement
from biomedgpt_edge.decoder.onnx import GROWTH, TILE, OnnxDecoder, OnnxState
from biomedgpt_edge.errors import BioMedGPTError, ClosedError, KernelArgumentError, OptionError
from biomedgpt_edge.generate import prefill
from biomedgpt_edge.manifest import RECORDS
from biomedgpt_edge.splice import TokenPart, splice
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.relayout import relayout

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
        np.testing.assert_array_equal(cut.array, cache.array)


def test_a_long_prompt_in_chunks_gives_the_same_bits_as_in_one_call(decoder: OnnxDecoder) -> None:
    embeddings = rows(decoder, 513)
    with decoder.open(513) as chunked, decoder.open(513) as whole:
        *_, last = prefill(chunked, embeddings)
        np.testing.assert_array_equal(last, whole.prefill(embeddings))
        np.testing.assert_array_equal(chunked.key_values().array, whole.key_values().array)


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
        np.testing.assert_array_equal(third.key_values().array, start.array)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kv: KeyValues(20, kv.array[1:]),
        lambda kv: KeyValues(20, kv.array.astype(np.float64)),
        lambda kv: KeyValues(20, kv.array[:, :, :, 1:]),
        lambda kv: KeyValues(20, kv.array[0]),
        lambda kv: KeyValues(19, kv.array),
    ],
    ids=["a layer too few", "float64", "narrow heads", "one layer", "another length"],
)
def test_keys_and_values_of_another_decoder_are_refused(
    decoder: OnnxDecoder, spoil: Callable[[KeyValues], KeyValues]
) -> None:
    with decoder.open(20) as state:
        state.prefill(rows(decoder, 20))
        start = state.key_values()
    with pytest.raises(KernelArgumentError, match="keys and values are float"):
        decoder.open(20, spoil(start))


# --- decoders in records, whose rows depend on nothing beside them ----------------------------------------------------


@pytest.fixture(scope="module")
def records(tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 bundle with our own operators."""
    source, out = tiny_bundles("int4"), tmp_path_factory.mktemp("records") / "bundle"
    if Bundle.open(source).manifest.decoder.layout == RECORDS:
        return source
    relayout(source, out, "records", lambda line: None)
    return out


@pytest.fixture(scope="module", params=KV_ELEMENTS)
def own(request: pytest.FixtureRequest, records: Path) -> OnnxDecoder:
    return OnnxDecoder(Bundle.open(records), threads=2, kv_cache=request.param)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_position_has_the_same_bits_however_calls_are_cut(own: OnnxDecoder, data: st.DataObject) -> None:
    assert own.tile == 1
    embeddings = rows(own, 200)
    whole, _ = in_calls(own, embeddings, [200])
    ends = data.draw(st.sets(st.integers(1, 199), max_size=40))
    logits, _ = in_calls(own, embeddings, [*sorted(ends), 200])
    np.testing.assert_array_equal(logits, whole)


def test_a_head_that_our_operators_do_not_compute_takes_whole_tiles(tiny_checkpoint: Path, tmp_path: Path) -> None:
    layout, out = Layout.locate(tiny_checkpoint), tmp_path / "bundle"
    export_bundle(ExportOptions(layout, out, quantizer="rtn", lm_head="int8", proof="none"), lambda line: None)
    bundle = Bundle.open(out)
    assert bundle.manifest.decoder.layout == RECORDS
    assert OnnxDecoder(bundle, threads=2).tile == TILE


def test_a_cache_that_would_become_another_one_is_refused_before_anything_is_written(own: OnnxDecoder) -> None:
    with own.open(64) as state:
        state.prefill(rows(own, 20))
        before = {name: buffer.copy() for name, buffer in state._cache.items()}
        state._advance(1)
        logits = np.empty((1, own.spec.vocabulary), np.float32)
        embeddings, positions = rows(own, 1), np.zeros(1, np.int64)
        binding = state._bind(embeddings, positions, logits)
        keys = state._cache["key.0"]
        binding.bind_output("present_value.0", "cpu", 0, keys.dtype, keys.shape, keys.ctypes.data)
        with pytest.raises(BioMedGPTError, match="memory that overlaps"):
            state._run(binding)
        for name, buffer in before.items():
            np.testing.assert_array_equal(state._cache[name], buffer)


def test_the_number_of_threads_changes_no_bit(own: OnnxDecoder, records: Path) -> None:
    other = OnnxDecoder(Bundle.open(records), threads=1, kv_cache=own.kv.element)
    np.testing.assert_array_equal(in_calls(own, rows(own, 100), [100])[0], in_calls(other, rows(own, 100), [100])[0])


def test_steps_a_prefill_and_several_steps_at_once_agree(own: OnnxDecoder) -> None:
    tokens = np.random.default_rng(1).integers(3, 900, 30)
    embeddings = splice([TokenPart(tokens)], own.table, threads=1)
    with own.open(GROWTH + 30) as state:
        state.prefill(rows(own, GROWTH - 10))  # so that room grows on the way
        start = state.key_values()
        expected = state.logits(embeddings, np.arange(30))
        state.truncate(GROWTH - 10)
        singly = np.stack([state.step(int(token)).copy() for token in tokens])
    with own.open(GROWTH + 30, start) as state:
        together = np.concatenate([state.steps([int(t) for t in part]).copy() for part in np.split(tokens, [8, 15])])
    np.testing.assert_array_equal(singly, expected)
    np.testing.assert_array_equal(together, expected)


def test_a_cache_of_fewer_bytes_is_smaller_and_almost_the_same(records: Path) -> None:
    decoders = {name: OnnxDecoder(Bundle.open(records), threads=1, kv_cache=name) for name in KV_ELEMENTS}
    sizes = {name: one.kv.bytes(160) for name, one in decoders.items()}
    spec = decoders["fp32"].spec
    numbers = 2 * spec.layers * spec.kv_heads * 160
    assert sizes == {
        "fp32": numbers * spec.head_size * 4,
        "fp16": numbers * spec.head_size * 2,
        "int8": numbers * (spec.head_size + 4),
    }
    assert all(one.kv.bytes_per_position * 160 == sizes[name] for name, one in decoders.items())
    found = {name: in_calls(one, rows(one, 160), [160])[0] for name, one in decoders.items()}
    scale = np.abs(found["fp32"]).max()
    assert 0 < np.abs(found["fp16"] - found["fp32"]).max() < 0.1 * scale
    assert 0 < np.abs(found["int8"] - found["fp32"]).max() < 0.3 * scale


def test_weights_that_will_be_mapped_are_read_ahead(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []

    def recording(file: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length) == (0, 0), "the whole file"
        read.append((os.readlink(f"/proc/self/fd/{file}"), advice))

    monkeypatch.setattr(os, "posix_fadvise", recording)
    opened(records)
    assert read == [(str((records / "decoder.data").resolve()), os.POSIX_FADV_WILLNEED)]


def test_prefault_runs_a_token_before_anything_else(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = OnnxState.steps

    def recording(self: OnnxState, tokens: Sequence[int]) -> np.ndarray:
        seen.append(tuple(tokens))
        return original(self, tokens)

    monkeypatch.setattr(OnnxState, "steps", recording)
    with Engine.load(records, threads=1, verify="sizes"):
        assert seen == []
    with Engine.load(records, threads=1, verify="sizes", prefault=True) as engine:
        assert seen == [(engine.bundle.tokenizer.bos_id,)]


def test_a_portable_decoder_stores_fp32_alone(tiny_bundle_fp32: Path) -> None:
    bundle = Bundle.open(tiny_bundle_fp32)
    assert OnnxDecoder(bundle, threads=1, kv_cache="fp32").kv.element == "fp32"
    with pytest.raises(OptionError, match="kv_cache is 'fp8'"):
        OnnxDecoder(bundle, threads=1, kv_cache="fp8")  # type: ignore[arg-type]
    others: list[KvElement] = ["fp16", "int8"]
    for name in others:
        with pytest.raises(OptionError, match=f"kv_cache is '{name}', and the decoder is portable"):
            OnnxDecoder(bundle, threads=1, kv_cache=name)


def test_a_closed_state_says_so(decoder: OnnxDecoder) -> None:
    state = decoder.open(20)
    state.close()
    state.close()
    with pytest.raises(ClosedError):
        state.step(3)
