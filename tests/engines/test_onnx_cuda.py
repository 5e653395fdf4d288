"""ONNX Runtime's CUDA provider: what is missing is named, nothing runs on the processor instead, and how it is fed.

The provider itself is played by the one for processors, on a GPU that is this machine's memory.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import biomedgpt_edge.cuda
from biomedgpt_edge import Engine, encoders_gpu, ort_cuda
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cuda import Stream
from biomedgpt_edge.decoder import onnx_cuda
from biomedgpt_edge.decoder.kv_cache import KvLayout
from biomedgpt_edge.decoder.onnx_cuda import CudaDecoder
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import PlatformError, PromptTooLongError
from biomedgpt_edge.ort_session import Signature, open_session
from engine_answers import ANSWERS, IBUPROFEN, LARGE_PROTEIN, PROTEIN, SIZE, random_logits, random_rows
from fake_gpu import FakeCuda, Status, array_at

SPEC = Bundle.open(DEMO_BUNDLE).manifest.decoder
KV_BYTES = KvLayout.half_rows(SPEC).bytes(SPEC.context)
PLAIN = "-1"


def load(**options: Any) -> Engine:
    return Engine.load(device="cuda", threads=1, **options)


# --- what is missing --------------------------------------------------------------------------------------------------


def test_an_onnxruntime_without_the_provider_is_named_with_the_one_to_install() -> None:
    assert not ort_cuda.has_provider()
    assert (ort_cuda.built_with(), ort_cuda.cuda_libraries()) == ("", [])
    with pytest.raises(
        PlatformError, match=rf"this onnxruntime \({ort.__version__}\) has no CUDA provider\..*biomedgpt-edge\[cuda\]"
    ) as caught:
        load()
    assert "CPUExecutionProvider" in str(caught.value.seen)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, set[str]], None]:
    """Plays an onnxruntime with the provider, built with a CUDA version, on a machine that has some libraries."""

    def play(version: str, there: set[str]) -> None:
        def opened(name: str) -> object:
            if name not in there:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return object()

        monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
        monkeypatch.setattr(ort_cuda.build_and_package_info, "cuda_version", version, raising=False)
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
        monkeypatch.setattr(ort_cuda, "ctypes", SimpleNamespace(CDLL=opened))

    return play


@pytest.mark.parametrize("version", ["12.8", "13.0"])
def test_missing_libraries_are_named_with_what_brings_them(
    provider: Callable[[str, set[str]], None], version: str, capfd: pytest.CaptureFixture[str]
) -> None:
    major = version.partition(".")[0]
    provider(version, {"libcuda.so.1", f"libcudart.so.{major}", f"libcublas.so.{major}", f"libcublasLt.so.{major}"})
    libraries = {library.name: library for library in ort_cuda.cuda_libraries()}
    assert libraries["libcuda.so.1"].error == ""
    assert "No such file" in libraries["libcudnn.so.9"].error
    with pytest.raises(
        PlatformError,
        match=rf"libraries are missing: .*libcudnn\.so\.9 \(nvidia-cudnn-cu{major}\).*biomedgpt-edge\[cuda\]",
    ) as caught:
        load()
    assert isinstance(caught.value.seen, list)
    assert set(caught.value.seen) == {name for name, library in libraries.items() if library.error}
    assert "libcuda.so.1" not in caught.value.seen
    assert capfd.readouterr() == ("", "")


def test_a_missing_driver_is_named_as_a_library(provider: Callable[[str, set[str]], None]) -> None:
    provider("13.0", set(ort_cuda._LIBRARIES[13]) - {"libcuda.so.1"})
    with pytest.raises(PlatformError, match=r"libraries are missing: libcuda\.so\.1 \(the NVIDIA driver\)\."):
        load()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.cudaErrorInsufficientDriver, "no NVIDIA driver, or one that is too old for this CUDA"),
        (Status.cudaErrorNoDevice, "no NVIDIA GPU"),
    ],
)
def test_an_old_driver_and_a_missing_gpu_are_named_where_all_libraries_are_there(
    provider: Callable[[str, set[str]], None], gpu: FakeCuda, cache: Path, status: Status, words: str
) -> None:
    provider("13.0", set(ort_cuda._LIBRARIES[13]))
    gpu.refused["cudaGetDeviceCount"] = status
    with pytest.raises(PlatformError, match=f"this machine has {words}: {status.name}"):
        load()
    assert not (cache / "portable").exists()


def test_a_session_on_the_processor_is_an_error_and_no_answer(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = dict[str, Any]()

    def opened(path: Path, **options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(ort_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(ort_cuda, "open_session", opened)
    stream = Stream()
    with pytest.raises(PlatformError, match=r"does not run decoder\.onnx on the GPU") as caught:
        ort_cuda.open_cuda_session(
            tmp_path / "decoder.onnx", inputs={}, outputs={}, stream=stream.handle, cuda_graphs=True
        )
    assert caught.value.seen == ["CPUExecutionProvider"]
    assert given["provider"] == (
        "CUDAExecutionProvider",
        {"device_id": "0", "user_compute_stream": str(stream.handle), "enable_cuda_graph": "1"},
    )


def test_a_provider_that_does_not_start_gives_no_session_on_the_processor(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime does it: without the provider it would take the one for processors."""
    bundle = Bundle.open(DEMO_BUNDLE)
    assert bundle.manifest.molecule_encoder is not None
    inputs, outputs = encoders_gpu.molecule_signature(bundle.manifest.molecule_encoder)
    monkeypatch.setattr(ort_cuda, "require_cuda", lambda: None)
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(PlatformError, match="does not run all of molecule_encoder"),
    ):
        ort_cuda.open_cuda_session(
            bundle.file("molecule_encoder.onnx"), inputs=inputs, outputs=outputs, stream=Stream().handle
        )


# --- the provider, played ---------------------------------------------------------------------------------------------


class PlayedSession:
    """A session of the provider for processors that reads what the stream brought, when it is run.

    Attributes:
        runs: of each through a binding, the binding, the name of its CUDA graph and "total_sequence_length".
        spoiled: added to the logits of captured runs.
    """

    def __init__(self, gpu: FakeCuda, session: ort.InferenceSession, stream: int, spoiled: float) -> None:
        self._gpu = gpu
        self._session = session
        self._stream = stream
        self._spoiled = spoiled
        self.runs = list[tuple[int, str, int]]()

    def io_binding(self) -> Any:
        return Binding(self._session.io_binding())

    def run(self, outputs: list[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self._gpu.finish(self._stream)
        found: list[np.ndarray] = self._session.run(outputs, feeds)
        return found

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
        self._gpu.finish(self._stream)
        graph = options.get_run_config_entry("gpu_graph_id")
        total = int(array_at(binding.addresses["total_sequence_length"], (), np.int32))
        self.runs.append((id(binding), graph, total))
        self._session.run_with_iobinding(binding.real, options)
        if graph != PLAIN:
            shape = binding.shapes["logits"]
            array_at(binding.addresses["logits"], shape, np.float32)[...] += self._spoiled


class Binding:
    """What is bound on the GPU is bound as memory of this machine, which it is."""

    def __init__(self, real: ort.IOBinding) -> None:
        self.real = real
        self.addresses = dict[str, int]()
        self.shapes = dict[str, tuple[int, ...]]()

    def bind_input(self, *arguments: Any) -> None:
        self._bind(self.real.bind_input, *arguments)

    def bind_output(self, *arguments: Any) -> None:
        self._bind(self.real.bind_output, *arguments)

    def _bind(self, bind: Any, name: str, device: str, number: int, dtype: Any, shape: Any, address: int) -> None:
        # What a kernel reads on the processor, and all else.
        assert device == ("cpu" if name == "total_sequence_length" else "cuda")
        self.addresses[name], self.shapes[name] = address, tuple(shape)
        bind(name, "cpu", number, dtype, shape, address)


def play(patch: pytest.MonkeyPatch, gpu: FakeCuda, spoiled: float = 0.0) -> dict[str, PlayedSession]:
    """Takes the place of the provider; returns its sessions by the name of their graph."""
    sessions = dict[str, PlayedSession]()

    def opened(
        path: Path, *, inputs: Signature, outputs: Signature, stream: int, cuda_graphs: bool = False
    ) -> PlayedSession:
        real = open_session(path, threads=1, inputs=inputs, outputs=outputs)
        assert cuda_graphs == path.name.startswith("decoder")
        sessions[path.stem] = PlayedSession(gpu, real, stream, spoiled)
        return sessions[path.stem]

    patch.setattr(ort_cuda, "require_cuda", lambda: None)
    patch.setattr(onnx_cuda, "open_cuda_session", opened)
    patch.setattr(encoders_gpu, "open_cuda_session", opened)
    return sessions


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device cache for all tests, which keeps the portable graphs."""
    return tmp_path_factory.mktemp("derived")


@pytest.fixture
def sessions(gpu: FakeCuda, derived: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PlayedSession]:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(derived))
    return play(monkeypatch, gpu)


@pytest.fixture(scope="module")
def engine(derived: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDGPT_EDGE_CACHE", str(derived))
        cuda = FakeCuda()
        patch.setattr(biomedgpt_edge.cuda, "runtime", lambda: cuda)
        play(patch, cuda)
        with load() as loaded:
            yield loaded


def decoder_of(engine: Engine) -> CudaDecoder:
    decoder = engine.decoder
    assert isinstance(decoder, CudaDecoder)
    return decoder


def rows(decoder: CudaDecoder, count: int) -> np.ndarray:
    return random_rows(decoder.table, count)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_those_of_the_processor(engine: Engine, name: str, expected: Callable[[str], object]) -> None:
    assert ANSWERS[name](engine) == expected(name)


def test_logits_are_near_those_of_the_processor(engine: Engine, expected_logits: np.ndarray) -> None:
    scale = float(np.abs(expected_logits).max())
    np.testing.assert_allclose(random_logits(engine), expected_logits, atol=0.03 * scale)


def test_features_are_those_of_the_processor(sessions: dict[str, PlayedSession]) -> None:
    with load() as engine:
        for item, tolerance in ((IBUPROFEN, 1e-5), (PROTEIN, 0.02), (LARGE_PROTEIN, 0.02)):
            exact = Encoders(engine.bundle, threads=1).encode(item)
            features = engine._encoders.encode(item)
            assert (features.shape, features.dtype) == (exact.shape, np.float32)
            np.testing.assert_allclose(features, exact, atol=tolerance * float(np.abs(exact).max()))
    assert set(sessions) == {"decoder-cuda", "molecule_encoder", "protein_encoder-cuda"}


def test_a_state_begins_where_another_one_stopped(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    embeddings = rows(decoder, 60)
    with decoder.open(100) as first:
        first.prefill(embeddings[:47])
        start = first.key_values()
        expected = first.prefill(embeddings[47:])
    with decoder.open(60, start) as second:
        np.testing.assert_array_equal(second.key_values().array, start.array)
        np.testing.assert_array_equal(second.prefill(embeddings[47:]), expected)


def test_what_was_cut_off_leaves_no_trace(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    with decoder.open(40) as state, decoder.open(40) as untouched:
        for one in (state, untouched):
            one.prefill(rows(decoder, 20))
        state.steps([7, 8, 9])
        state.truncate(20)
        np.testing.assert_array_equal(state.step(3), untouched.step(3))


def test_logits_of_several_tokens_outlast_another_sequence(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    with decoder.open(40) as one, decoder.open(40) as other:
        for state in (one, other):
            state.prefill(rows(decoder, 20))
        found = one.steps([5, 9, 5])
        before = found.copy()
        other.steps([7, 8, 9, 10])
        np.testing.assert_array_equal(found, before)


def test_no_more_positions_than_the_model_has(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    with pytest.raises(PromptTooLongError, match=f"{SPEC.context + 1:,} positions"):
        decoder.open(SPEC.context + 1)


def test_what_prompts_begin_with_is_computed_once_on_a_machine(
    sessions: dict[str, PlayedSession], gpu: FakeCuda, cache: Path
) -> None:
    with load() as engine:
        answer = engine.ask(SIZE, IBUPROFEN, max_new_tokens=8)
        assert (engine.prefix_counts.absent, engine.prefix_counts.found) == (1, 0)
    with load() as engine:
        assert engine.ask(SIZE, IBUPROFEN, max_new_tokens=8).token_ids == answer.token_ids
        assert (engine.prefix_counts.absent, engine.prefix_counts.found) == (0, 1)
    assert answer.timings.cached_tokens == 16


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def runs_of(session: PlayedSession, since: int) -> list[tuple[str, int]]:
    return [(graph, total) for _, graph, total in session.runs[since:]]


def test_single_tokens_are_captured_over_the_whole_capacity_and_nothing_else_is(
    sessions: dict[str, PlayedSession],
) -> None:
    decoder = decoder_of(load())
    session = sessions["decoder-cuda"]
    with decoder.open(600) as state:
        since = len(session.runs)
        state.prefill(rows(decoder, 20))
        state.step(3)
        state.steps([4, 5])
        state.step(6)
        (graph,) = {graph for graph, _ in runs_of(session, since)} - {PLAIN}
        assert runs_of(session, since) == [(PLAIN, 20), (graph, SPEC.context), (PLAIN, 23), (graph, SPEC.context)]
        with decoder.open(600) as other:
            other.prefill(rows(decoder, 20))
            other.step(3)
    graphs = {graph for graph, _ in runs_of(session, since)} - {PLAIN}
    # A graph holds the addresses of one cache.
    assert len(graphs) == 2


def test_the_check_at_load_runs_the_same_steps_plainly_and_captured(sessions: dict[str, PlayedSession]) -> None:
    load()
    plain, captured = runs_of(sessions["decoder-cuda"], 0)[:4], runs_of(sessions["decoder-cuda"], 0)[4:]
    (graph,) = {graph for graph, _ in captured} - {PLAIN}
    assert plain == [(PLAIN, 3), (PLAIN, 4), (PLAIN, 5), (PLAIN, 6)]
    assert captured == [(PLAIN, 3), *3 * [(graph, SPEC.context)]]


def test_bindings_are_made_once_for_each_cache_and_number_of_tokens(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    session = sessions["decoder-cuda"]
    with decoder.open(600) as state, decoder.open(600) as other:
        since = len(session.runs)
        for one in (state, other):
            one.prefill(rows(decoder, 20))
            for token in range(4):
                one.step(token)
            for _ in range(2):
                one.steps([4, 5, 6])
        bindings = [binding for binding, _, _ in session.runs[since:]]
        for first in (0, 7):
            assert len(set(bindings[first + 1 : first + 5])) == 1
            assert len(set(bindings[first + 5 : first + 7])) == 1
        # Those of prompts are not kept, and their places in memory may be taken again.
        assert len({*bindings[1:7], *bindings[8:14]}) == 4


def test_bindings_and_graphs_go_with_their_cache(sessions: dict[str, PlayedSession]) -> None:
    decoder = decoder_of(load())
    states = [decoder.open(100), decoder.open(100)]
    for state in states:
        state.prefill(rows(decoder, 20))
        state.step(3)
    assert len(decoder._graphs) == 2
    kept, freed = (state.cache.number for state in states)
    for state in states:
        state.close()
    assert set(decoder._graphs) == {kept}
    assert {number for number, _, _ in decoder._bindings} == {kept}
    assert freed != kept
    with decoder.open(100), decoder.open(100) as new:
        new.prefill(rows(decoder, 20))
        new.step(3)
        # Wherever its memory lies, it is another one.
        assert new.cache.number not in (kept, freed)


@pytest.mark.parametrize("spoiled", [1.0, float("nan")])
def test_graphs_that_compute_something_else_are_not_used_and_that_is_said(
    gpu: FakeCuda,
    derived: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: Callable[[str], object],
    spoiled: float,
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(derived))
    sessions = play(monkeypatch, gpu, spoiled)
    with load() as engine:
        since = len(sessions["decoder-cuda"].runs)
        assert ANSWERS["a_chat"](engine) == expected("a_chat")
    assert {graph for graph, _ in runs_of(sessions["decoder-cuda"], since)} == {PLAIN}
    totals = [total for _, total in runs_of(sessions["decoder-cuda"], since)]
    assert max(totals) < SPEC.context
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("no CUDA graphs: a step as one differs by ")


def test_a_small_difference_is_none(
    gpu: FakeCuda, derived: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(derived))
    play(monkeypatch, gpu, 1e-4)
    assert decoder_of(load())._capturing
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# --- memory -----------------------------------------------------------------------------------------------------------


def test_one_cache_is_kept_for_the_next_answer_and_others_are_freed(
    sessions: dict[str, PlayedSession], gpu: FakeCuda
) -> None:
    decoder = decoder_of(load())
    # The check at load left one.
    before = gpu.used
    states = [decoder.open(100) for _ in range(3)]
    assert gpu.used == before + 2 * KV_BYTES
    for state in states:
        state.close()
    assert gpu.used == before


def test_all_memory_comes_back(sessions: dict[str, PlayedSession], gpu: FakeCuda) -> None:
    engine = load()
    ANSWERS["streams_in_turns"](engine)
    engine.close()
    del engine
    gc.collect()
    assert (gpu.allocated, gpu.pinned) == ({}, {})


def test_too_little_memory_for_another_sequence_is_a_typed_error_with_the_size(
    sessions: dict[str, PlayedSession], gpu: FakeCuda
) -> None:
    decoder = decoder_of(load())
    with decoder.open(40) as state:
        gpu.memory = gpu.used + KV_BYTES - 1
        with pytest.raises(
            PlatformError, match=rf"allocate {KV_BYTES // 2**20} MiB for a KV cache: cudaErrorMemoryAll"
        ):
            decoder.open(20)
        assert state.prefill(rows(decoder, 20)).shape == (SPEC.vocabulary,)


def test_a_gpu_that_fails_is_a_typed_error_with_its_code(sessions: dict[str, PlayedSession], gpu: FakeCuda) -> None:
    with load() as engine:
        gpu.refused["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
        with pytest.raises(PlatformError, match="finish what was asked of the GPU: cudaErrorIllegalAddress"):
            engine.ask(SIZE, IBUPROFEN)


def test_the_decoder_is_derived_once_and_encoders_where_they_are_needed(
    sessions: dict[str, PlayedSession], cache: Path
) -> None:
    with load() as engine:
        (graph,) = cache.glob("portable/*/*-cuda.onnx")
        assert graph.with_name("decoder-portable.data").exists()
        written = graph.stat().st_mtime_ns
        assert set(sessions) == {"decoder-cuda"}
        engine.ask(SIZE, PROTEIN, max_new_tokens=1)
        assert set(sessions) == {"decoder-cuda", "protein_encoder-cuda"}
    with load():
        assert graph.stat().st_mtime_ns == written
