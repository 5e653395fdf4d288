"""The decoder and encoders as TensorRT engines, on a GPU that is this machine's memory: all but the kernels."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import biomedgpt_edge.cuda
from biomedgpt_edge import Engine, Molecule
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.kv_cache import KeyValues, KvLayout
from biomedgpt_edge.decoder.tensorrt import TensorRtDecoder
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import (
    ClosedError,
    KernelArgumentError,
    OptionError,
    PlatformError,
    PromptTooLongError,
)
from biomedgpt_edge.tensorrt import build
from engine_answers import ANSWERS, IBUPROFEN, LARGE_PROTEIN, PROTEIN, SIZE, STRUCTURE, random_logits, random_rows
from fake_gpu import FakeCuda, FakeTensorRt, Status

CONTEXT = Bundle.open(DEMO_BUNDLE).manifest.decoder.context
KV_BYTES = KvLayout.half_rows(Bundle.open(DEMO_BUNDLE).manifest.decoder).bytes(CONTEXT)


def load(**options: Any) -> Engine:
    return Engine.load(device="tensorrt", threads=1, **options)


def decoder_of(engine: Engine) -> TensorRtDecoder:
    decoder = engine.decoder
    assert isinstance(decoder, TensorRtDecoder)
    return decoder


def rows(decoder: TensorRtDecoder, count: int) -> np.ndarray:
    return random_rows(decoder.table, count)


@pytest.fixture(scope="module")
def engines_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device cache for all tests that need engines, and not how they came there."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def trt(gpu: FakeCuda, engines_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A GPU with TensorRT whose engines have been built."""
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(engines_folder))
    api = FakeTensorRt(gpu, engines_folder / "graphs" / tmp_path.name, "tensorrt").install(monkeypatch)
    build.engines_for(build.plan_engines(Bundle.open(DEMO_BUNDLE), build.find_target()), "once", lambda line: None)
    api.built.clear()
    return api


@pytest.fixture
def fresh(gpu: FakeCuda, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A GPU with TensorRT, and no engines."""
    return FakeTensorRt(gpu, tmp_path / "graphs", "tensorrt").install(monkeypatch)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        cuda = FakeCuda()
        patch.setattr(biomedgpt_edge.cuda, "runtime", lambda: cuda)
        FakeTensorRt(cuda, tmp_path_factory.mktemp("graphs"), "tensorrt").install(patch)
        with load() as loaded:
            yield loaded


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_those_of_the_processor(engine: Engine, name: str, expected: Callable[[str], object]) -> None:
    assert ANSWERS[name](engine) == expected(name)


def test_logits_are_near_those_of_the_processor(engine: Engine, expected_logits: np.ndarray) -> None:
    scale = float(np.abs(expected_logits).max())
    np.testing.assert_allclose(random_logits(engine), expected_logits, atol=0.03 * scale)


def test_features_are_those_of_the_processor_in_float16(trt: FakeTensorRt) -> None:
    with load() as engine:
        for item in (IBUPROFEN, PROTEIN, LARGE_PROTEIN):
            exact = Encoders(engine.bundle, threads=1).encode(item)
            features = engine._encoders.encode(item)
            assert features.shape == exact.shape
            assert features.dtype == np.float32
            np.testing.assert_allclose(features, exact, atol=0.02 * float(np.abs(exact).max()))


def test_features_outlast_the_next_input(trt: FakeTensorRt) -> None:
    with load() as engine:
        features = engine._encoders.encode(PROTEIN)
        before = features.copy()
        engine._encoders.encode(LARGE_PROTEIN)
        np.testing.assert_array_equal(features, before)


# --- sequences --------------------------------------------------------------------------------------------------------


def test_several_tokens_in_one_call_are_as_many_steps(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with decoder.open(40) as state, decoder.open(40) as other:
        for one in (state, other):
            one.prefill(rows(decoder, 20))
        together = state.steps([5, 9, 5, 30])
        singly = np.stack([other.step(token) for token in (5, 9, 5, 30)])
        assert state.length == other.length == 24
    np.testing.assert_allclose(together, singly, atol=0.02 * float(np.abs(singly).max()))


def test_what_was_cut_off_leaves_no_trace(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with decoder.open(40) as state, decoder.open(40) as untouched:
        for one in (state, untouched):
            one.prefill(rows(decoder, 20))
        state.steps([7, 8, 9])
        state.truncate(20)
        np.testing.assert_array_equal(state.step(3), untouched.step(3))
        for length in (-1, 22):
            with pytest.raises(ValueError, match=f"cannot be cut to {length}"):
                state.truncate(length)


def test_a_state_begins_where_another_one_stopped(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    embeddings = rows(decoder, 60)
    with decoder.open(100) as first:
        first.prefill(embeddings[:47])
        start = first.key_values()
        expected = first.prefill(embeddings[47:])
    assert start.array.dtype == np.float16
    assert start.array.shape == decoder.kv.stacked(47)
    with decoder.open(60, start) as second:
        assert second.length == 47
        np.testing.assert_array_equal(second.key_values().array, start.array)
        np.testing.assert_array_equal(second.prefill(embeddings[47:]), expected)


def test_a_state_of_nothing_has_no_keys_and_values(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with decoder.open(60) as state:
        nothing = state.key_values()
    with decoder.open(60, nothing) as state:
        assert (nothing.positions, state.length) == (0, 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kv: KeyValues(20, kv.array[1:]),
        lambda kv: KeyValues(20, kv.array.astype(np.float32)),
        lambda kv: KeyValues(19, kv.array),
    ],
    ids=["an array too few", "float32", "another length"],
)
def test_keys_and_values_of_another_decoder_are_refused_and_take_no_memory(
    trt: FakeTensorRt, spoil: Callable[[KeyValues], KeyValues]
) -> None:
    decoder = decoder_of(load())
    with decoder.open(20) as state:
        state.prefill(rows(decoder, 20))
        start = state.key_values()
    before = trt.cuda.used
    with pytest.raises(KernelArgumentError, match="keys and values are float"):
        decoder.open(20, spoil(start))
    assert trt.cuda.used == before


def test_what_does_not_fit_is_refused(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with pytest.raises(PromptTooLongError, match=f"{CONTEXT + 1:,} positions; KV caches on the GPU have {CONTEXT:,}"):
        decoder.open(CONTEXT + 1)
    with decoder.open(20) as state:
        with pytest.raises(ValueError, match="21 positions do not fit a KV cache of 20"):
            state.reserve(21)
        with pytest.raises(ValueError, match="21 positions do not fit a KV cache of 20"):
            state.prefill(rows(decoder, 21))
        with pytest.raises(KernelArgumentError, match=r"embeddings are float64\[3, 256\]"):
            state.prefill(rows(decoder, 3).astype(np.float64))
        assert state.length == 0
    state.close()
    with pytest.raises(ClosedError):
        state.step(3)
    with pytest.raises(ClosedError):
        state.key_values()


def test_single_tokens_have_a_profile_of_their_own_and_the_cache_is_attended_to_in_steps_of_256(
    trt: FakeTensorRt,
) -> None:
    decoder = decoder_of(load())
    with decoder.open(600) as state:
        state.prefill(rows(decoder, 200))
        state.prefill(rows(decoder, 56))
        state.steps([3, 4])
        state.step(5)
    shapes = [(profile, given["inputs_embeds"][1], given["mask"]) for profile, given in trt.engines["decoder"].runs]
    assert shapes == [
        (3, 200, (1, 1, 200, 256)),
        (1, 56, (1, 1, 56, 256)),
        (0, 2, (1, 1, 2, 512)),
        (0, 1, (1, 1, 1, 512)),
    ]


# --- KV caches on the GPU ---------------------------------------------------------------------------------------------


def test_one_cache_is_kept_for_the_next_answer_and_others_are_freed(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    before = trt.cuda.used
    states = [decoder.open(100) for _ in range(3)]
    assert trt.cuda.used == before + 3 * KV_BYTES
    caches = [state.cache for state in states]
    for state in states:
        state.close()
        state.close()
    assert trt.cuda.used == before + KV_BYTES
    with decoder.open(200) as again:
        assert again.cache is caches[0]
        assert trt.cuda.used == before + KV_BYTES


def test_two_sequences_have_caches_of_their_own(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    embeddings = rows(decoder, 40)
    with decoder.open(40) as alone:
        alone.prefill(embeddings[:20])
        expected = [alone.step(token) for token in range(5)]
    with decoder.open(40) as one, decoder.open(40) as other:
        one.prefill(embeddings[:20])
        other.prefill(embeddings[20:])
        for token in range(5):
            logits = one.step(token)
            assert not np.array_equal(other.step(token), logits)
            np.testing.assert_array_equal(logits, expected[token])


def test_a_used_cache_is_like_a_new_one(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with decoder.open(300) as first:
        expected = first.prefill(rows(decoder, 20))
        first.prefill(rows(decoder, 250))
    with decoder.open(300) as second:
        np.testing.assert_array_equal(second.prefill(rows(decoder, 20)), expected)


def test_all_memory_comes_back(trt: FakeTensorRt) -> None:
    engine = load()
    for name in ("a_molecule", "a_protein", "streams_in_turns"):
        ANSWERS[name](engine)
    engine.close()
    del engine
    gc.collect()
    assert (trt.cuda.allocated, trt.cuda.pinned, trt.cuda.graphs) == ({}, {}, {})


def test_encoders_leave_the_gpu_where_memory_is_low(trt: FakeTensorRt) -> None:
    with load(low_memory=True) as engine:
        before = trt.cuda.used
        prompt = engine.prepare(SIZE, IBUPROFEN)
        assert trt.cuda.used == before
        assert len(engine.prepare(SIZE, IBUPROFEN)) == len(prompt)
    with load() as engine:
        before = trt.cuda.used
        engine.prepare(SIZE, IBUPROFEN)
        assert trt.cuda.used > before


def test_what_prompts_begin_with_is_computed_once_on_a_machine(trt: FakeTensorRt, cache: Path) -> None:
    with load() as engine:
        answer = engine.ask(SIZE, IBUPROFEN, max_new_tokens=8)
        assert (engine.prefix_counts.absent, engine.prefix_counts.found) == (1, 0)
        prompt = len(engine.prepare(SIZE, IBUPROFEN))
    with load() as engine:
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=8).token_ids == answer.token_ids
        assert (engine.prefix_counts.absent, engine.prefix_counts.found) == (0, 1)
    _, first_run = trt.engines["decoder"].runs[0]
    assert answer.timings.cached_tokens == 16
    assert first_run["inputs_embeds"] == (1, prompt - 16, 256)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_the_second_step_of_a_kind_is_captured_and_launched_from_then_on(trt: FakeTensorRt) -> None:
    decoder, gpu = decoder_of(load()), trt.cuda
    with decoder.open(600) as state:
        state.prefill(rows(decoder, 248))
        seen = []
        for token in range(12):
            state.step(token)
            seen.append((gpu.captured, gpu.launched))
        # Behind 256 positions twice as many are attended to: another graph.
        assert seen == [(0, 0), *((1, n) for n in range(7)), (1, 6), *((2, n) for n in range(6, 9))]
        state.steps([5, 6])
        state.steps([5, 6])
        assert (gpu.captured, gpu.launched) == (3, 8)
        # The first run of a context of its own, before it is captured, is that of the step once more.
        assert len(trt.engines["decoder"].runs) == 1 + 12 + 2 + 3


def test_launched_steps_compute_what_plain_ones_do(trt: FakeTensorRt) -> None:
    plain = decoder_of(load())
    plain._session._capturing = False
    captured = decoder_of(load())
    with plain.open(300) as expected, captured.open(300) as state:
        for one, decoder in ((expected, plain), (state, captured)):
            one.prefill(rows(decoder, 240))
        for token in range(40):
            np.testing.assert_array_equal(state.step(token), expected.step(token))
    assert trt.cuda.launched == 36


def test_prompts_are_not_captured(trt: FakeTensorRt) -> None:
    decoder = decoder_of(load())
    with decoder.open(600) as state:
        for _ in range(4):
            state.prefill(rows(decoder, 20))
    assert trt.cuda.captured == 0


def test_graphs_go_with_their_cache_and_stay_with_a_kept_one(trt: FakeTensorRt) -> None:
    decoder, gpu = decoder_of(load()), trt.cuda
    states = [decoder.open(100), decoder.open(100)]
    for state in states:
        state.prefill(rows(decoder, 20))
        for token in range(3):
            state.step(token)
    assert (gpu.captured, len(gpu.graphs)) == (2, 2)
    for state in states:
        state.close()
    assert len(gpu.graphs) == 1
    before = gpu.launched
    with decoder.open(100) as kept, decoder.open(100) as new:
        for state in (kept, new):
            state.prefill(rows(decoder, 20))
        logits = kept.step(3)
        assert (gpu.captured, gpu.launched) == (2, before + 1)
        # Its memory may lie where that of the freed one lay, whose graph is not its own.
        np.testing.assert_array_equal(new.step(3), logits)
        assert gpu.captured == 2
        new.step(4)
        assert (gpu.captured, len(gpu.graphs)) == (3, 2)


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture"])
def test_without_graphs_steps_are_run_one_by_one_and_that_is_said_once(
    trt: FakeTensorRt, call: str, expected: Callable[[str], object], caplog: pytest.LogCaptureFixture
) -> None:
    trt.cuda.refused[call] = Status.cudaErrorStreamCaptureUnsupported
    with load() as engine:
        assert ANSWERS["a_chat"](engine) == expected("a_chat")
    assert (trt.cuda.captured, trt.cuda.launched) == (0, 0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("no CUDA graphs: CUDA cannot")
    assert "cudaErrorStreamCaptureUnsupported" in warnings[0]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_is_a_typed_error_with_its_reason(trt: FakeTensorRt) -> None:
    with load() as engine:
        trt.engines["decoder"].broken = True
        with pytest.raises(
            PlatformError, match=r"TensorRT 11\.0 cannot run an engine: an error of this fake\..*engines build --again"
        ):
            engine.ask(SIZE, IBUPROFEN)
        trt.engines["decoder"].broken = False
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=2).token_ids


def test_a_gpu_that_fails_is_a_typed_error_with_its_code(trt: FakeTensorRt) -> None:
    with load() as engine:
        trt.cuda.refused["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
        with pytest.raises(PlatformError, match=r"finish what was asked of the GPU: cudaErrorIllegalAddress.*doctor"):
            engine.ask(SIZE, IBUPROFEN)


def test_an_engine_that_cannot_be_loaded_is_a_typed_error(fresh: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_engine", lambda *arguments: arguments[3].write_bytes(b"of another version"))
    with pytest.raises(
        PlatformError, match=r"cannot load decoder\.engine: Error Code 1: .*engines build --again.*--device cuda"
    ):
        load()


def test_too_little_memory_for_another_sequence_is_a_typed_error_with_the_size(trt: FakeTensorRt) -> None:
    decoder, gpu = decoder_of(load()), trt.cuda
    with decoder.open(40) as state:
        state.prefill(rows(decoder, 20))
        expected = state.step(3)
        state.truncate(20)
        gpu.memory = gpu.used + KV_BYTES - 1
        with pytest.raises(
            PlatformError,
            match=rf"allocate {KV_BYTES // 2**20} MiB for a KV cache: cudaErrorMemoryAllocation\..*doctor",
        ):
            decoder.open(20)
        # The one that is there goes on.
        np.testing.assert_array_equal(state.step(3), expected)


def test_too_little_memory_to_load_is_a_typed_error_and_takes_none(trt: FakeTensorRt) -> None:
    trt.cuda.memory = 100_000
    with pytest.raises(PlatformError, match=r"CUDA cannot allocate \d+ MiB for .*: cudaErrorMemoryAllocation"):
        load()
    gc.collect()
    assert trt.cuda.allocated == {}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.cudaErrorInsufficientDriver, "no NVIDIA driver, or one that is too old"),
        (Status.cudaErrorNoDevice, "no NVIDIA GPU"),
    ],
)
def test_without_a_gpu_nothing_is_built(fresh: FakeTensorRt, status: Status, words: str) -> None:
    fresh.cuda.refused["cudaGetDeviceCount"] = status
    with pytest.raises(PlatformError, match=f"{words}.*{status.name}"):
        load()
    assert fresh.built == []


def test_a_molecule_that_is_larger_than_the_engine_is_a_typed_error(
    fresh: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "plan_engines", partial(build.plan_engines, context=160))
    with (
        load() as engine,
        pytest.raises(PromptTooLongError, match="161 atoms or residues; its engine was built for 160"),
    ):
        engine._encoders.encode(Molecule.from_smiles("C" * 161))


# --- engines ----------------------------------------------------------------------------------------------------------


def test_engines_that_are_not_there_are_built_once(fresh: FakeTensorRt, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="biomedgpt_edge"), load() as engine:
        tokens = engine.ask(SIZE, IBUPROFEN, max_new_tokens=4).token_ids
    assert fresh.built == ["decoder", "molecule_encoder", "protein_encoder"]
    assert "engines for Fake GPU (8.9), with TensorRT 11.0, 2,048 positions" in caplog.messages
    with load() as engine:
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=4).token_ids == tokens
    assert len(fresh.built) == 3


def test_engines_for_fewer_positions_are_used_and_bound_the_context(fresh: FakeTensorRt) -> None:
    plan = build.plan_engines(Bundle.open(DEMO_BUNDLE), build.find_target(), 160)
    build.engines_for(plan, "once", lambda line: None)
    with load() as engine:
        assert len(fresh.built) == 3
        assert decoder_of(engine).capacity == 160
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=4).token_ids
        with pytest.raises(PromptTooLongError) as caught:
            engine.ask(STRUCTURE, LARGE_PROTEIN)
        assert caught.value.limit == 160
        with pytest.raises(PromptTooLongError):
            engine.ask(SIZE, IBUPROFEN, max_new_tokens=160)


def test_one_token_is_run_before_loading_ends_where_that_is_asked_for(trt: FakeTensorRt) -> None:
    load()
    assert trt.engines["decoder"].runs == []
    load(prefault=True)
    assert len(trt.engines["decoder"].runs) == 1


# --- TensorRT for RTX -------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx(gpu: FakeCuda, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A GPU with TensorRT for RTX, and no engines."""
    return FakeTensorRt(gpu, tmp_path / "graphs", "tensorrt_rtx").install(monkeypatch)


def test_tensorrt_for_rtx_answers_with_graphs_of_its_own(rtx: FakeTensorRt, expected: Callable[[str], object]) -> None:
    with load() as engine:
        for name in ("a_chat", "streams_in_turns"):
            assert ANSWERS[name](engine) == expected(name)
    assert rtx.cuda.captured == 0
    for loaded in rtx.engines.values():
        assert loaded.settings is not None
        assert loaded.settings.cuda_graph_strategy is FakeTensorRt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def runtime_caches(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("engines/*/*.runtime.cache*")}


def test_compiled_kernels_are_kept_for_the_next_start(rtx: FakeTensorRt, cache: Path) -> None:
    with load() as engine:
        assert runtime_caches(cache) == {}
        engine.ask(SIZE, IBUPROFEN, max_new_tokens=4)
    kept = {"decoder.runtime.cache": b"kernels after ", "molecule_encoder.runtime.cache": b"kernels after "}
    assert runtime_caches(cache) == kept
    with load():
        assert rtx.engines["decoder"].settings is not None
        assert rtx.engines["decoder"].settings.read == b"kernels after "
    # What lies beside them is no reason to build engines again.
    assert len(rtx.built) == 3


def test_compiled_kernels_that_cannot_be_kept_are_compiled_again(rtx: FakeTensorRt, cache: Path) -> None:
    with load() as engine:
        (decoder,) = cache.glob("engines/*/decoder.engine")
        (decoder.parent / "decoder.runtime.cache.partial").mkdir()
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=4).token_ids
        assert not (decoder.parent / "decoder.runtime.cache").exists()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["tensorrt", "cuda"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("decoder", "portable"), ("decoder", "records"), ("kv_cache", "fp16"), ("memory_limit", "6GiB")],
)
def test_options_of_the_processor_are_refused_on_a_gpu(device: Any, name: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is .*, and device is '{device}', on which it does not apply.*Leave"):
        Engine.load(device=device, **{name: value})  # type: ignore[arg-type]


def test_a_device_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(OptionError, match=r"device is 'tpu'\. Give one of cpu, native, cuda, tensorrt") as caught:
        Engine.load(device="tpu")  # type: ignore[arg-type]
    assert caught.value.limit == "cpu, native, cuda, tensorrt"


@pytest.mark.parametrize("device", ["tensorrt", "cuda"])
def test_a_bundle_in_fp32_runs_on_the_processor_alone(
    fresh: FakeTensorRt, tiny_bundle_fp32: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biomedgpt_edge.ort_cuda.require_cuda", lambda: None)
    with pytest.raises(OptionError, match=r"holds no (graphs|standard graph).*precision int4 or fp16"):
        Engine.load(tiny_bundle_fp32, device=device)
