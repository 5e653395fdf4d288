"""Prompts that are put together on the GPU for our own decoder: arrays there, splice and encoders on one stream.

The kernels are emulated, and ONNX Runtime's CUDA provider is played by the one for processors: the GPU's memory is this
machine's. What a real one adds, queues that run behind the host, is not seen here.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from biomedgpt_edge import Engine, Molecule, Protein, _native, encoders_gpu, ort_cuda
from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.suite import Plan, Suite
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.decoder.cuda import NativeDecoder
from biomedgpt_edge.embedding import HostEmbedder
from biomedgpt_edge.embedding_gpu import GpuEmbedder
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.encoders_gpu import NativeEncoders
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import ClosedError, KernelArgumentError, OptionError, PlatformError
from biomedgpt_edge.ort_session import Signature, open_session
from biomedgpt_edge.splice import FeaturePart, TokenPart
from emulated_engine import counted
from engine_answers import BENZENE, IBUPROFEN, PROTEIN, SIZE

Array = np.ndarray[Any, Any]
PROBED = Limits(2**31, {"one stream": 3e10}, {"int8 portable": 1e12, "fp32 portable": 1e11})
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def demo(kernels: None) -> Iterator[Engine]:
    with Engine.load(device="native", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def decoder(demo: Engine) -> NativeDecoder:
    assert isinstance(demo.decoder, NativeDecoder)
    return demo.decoder


@pytest.fixture(scope="module")
def processor() -> Iterator[Engine]:
    with Engine.load(threads=1) as engine:
        yield engine


def random_rows(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def downloaded(array: Any) -> Array:
    found = np.empty(array.shape, array.dtype)
    array.download(found)
    return found


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 5), (4, 0)])
def test_what_is_brought_there_comes_back(decoder: NativeDecoder, shape: tuple[int, ...], dtype: str) -> None:
    given = random_rows(*shape, dtype=dtype)
    array = decoder.array(shape, dtype)
    array.upload(given)
    assert (array.shape, array.dtype, array.nbytes, len(array)) == (shape, given.dtype, given.nbytes, len(given))
    np.testing.assert_array_equal(downloaded(array), given)
    columns = f", {shape[1]}" if len(shape) == 2 else ""
    assert repr(array) == f"CudaArray({dtype} [{shape[0]}{columns}])"


def test_slices_of_rows_are_views(decoder: NativeDecoder) -> None:
    given = random_rows(6, 4)
    array = decoder.array((6, 4))
    array.upload(given)
    for slices in ((slice(1, 4),), (slice(2, None), slice(1, 3)), (slice(-2, None),), (slice(5, 2),), (slice(0, 99),)):
        view, expected = array, given
        for rows in slices:
            view, expected = view[rows], expected[rows]
        np.testing.assert_array_equal(downloaded(view), expected)
    array[1:3].upload(np.zeros((2, 4), np.float32))
    given[1:3] = 0
    np.testing.assert_array_equal(downloaded(array), given)
    with pytest.raises(KernelArgumentError, match="rows: got a step of 2, expected rows that follow one another"):
        array[::2]


def test_rows_are_copied_within_the_gpu(decoder: NativeDecoder) -> None:
    first, second, given = decoder.array((6, 4)), decoder.array((2, 4)), random_rows(6, 4)
    first.upload(given)
    second.copy_from(first[3:5])
    np.testing.assert_array_equal(downloaded(second), given[3:5])
    for other in (first, decoder.array((2, 4), "float16")):
        with pytest.raises(
            KernelArgumentError, match=r"from: got float.*expected float32 \[2, 4\] of the same decoder"
        ):
            second.copy_from(other)
    for begin in (2, 3, 4):
        with pytest.raises(KernelArgumentError, match="from: got rows that are partly these"):
            first[3:5].copy_from(first[begin : begin + 2])
    first[3:5].copy_from(first[1:3])
    np.testing.assert_array_equal(downloaded(first)[3:5], given[1:3])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 3), "float32", "shape: got tuple, expected a tuple of one or two lengths"),
        ([2, 3], "float32", "shape: got list"),
        ((), "float32", "shape: got tuple"),
        ((-1, 4), "float32", "shape: got -1"),
        ((2**30, 1), "float16", "shape: got 1073741824, expected 0 to 2\\^30 - 1"),
        ((2**70,), "float16", "a number beyond 64 bits"),
        ((1.5,), "float32", "shape: got float"),
        ((4,), "int8", "dtype: got int8, expected float32 or float16"),
        ((4,), np.float32, "dtype: got type"),
    ],
)
def test_no_such_array(decoder: NativeDecoder, shape: Any, dtype: Any, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        decoder.array(shape, dtype)


def test_an_array_beyond_the_memory_is_refused_with_sizes(decoder: NativeDecoder) -> None:
    with pytest.raises(PlatformError, match=r"4611686009837453316 bytes for an array on .*: out of memory"):
        decoder.array((2**30 - 1, 2**30 - 1))
    with pytest.raises(PlatformError, match=r"1099511627776 bytes for an array"):
        decoder.array((2**20, 2**18))


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((2, 4), np.float32),
        np.zeros((3, 5), np.float32),
        np.zeros((3, 4), np.float64),
        np.zeros((3, 4), np.float16),
        np.zeros(12, np.float32),
        np.zeros((4, 3), np.float32).T,
        [[0.0] * 4] * 3,
    ],
)
def test_only_arrays_of_the_same_kind_are_copied(decoder: NativeDecoder, given: Any) -> None:
    array = decoder.array((3, 4))
    array.upload(np.ones((3, 4), np.float32))
    for copy in (array.upload, array.download):
        with pytest.raises(KernelArgumentError):
            copy(given)
    assert (downloaded(array) == 1).all()


def test_nothing_is_written_over_what_is_read_only(decoder: NativeDecoder) -> None:
    array, target = decoder.array((3,)), np.zeros(3, np.float32)
    array.upload(np.ones(3, np.float32))
    target.setflags(write=False)
    with pytest.raises(KernelArgumentError, match="read-only"):
        array.download(target)
    assert not target.any()


def test_other_libraries_read_them_in_place(decoder: NativeDecoder) -> None:
    array, given = decoder.array((5, 3)), random_rows(5, 3)
    array.upload(given)
    assert array.__dlpack_device__() == (1, 0), "where it is emulated, the memory is this machine's"
    seen = torch.from_dlpack(array[1:4])
    np.testing.assert_array_equal(np.from_dlpack(array), given)
    np.testing.assert_array_equal(seen.numpy(), given[1:4])
    seen[0] = 7
    assert (downloaded(array)[1] == 7).all()
    with pytest.raises(BufferError, match="a copy of this array cannot be exported"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="cannot be exported to another device"):
        array.__dlpack__(dl_device=(2, 0))
    array.__dlpack__(dl_device=(1, 0), max_version=(1, 1))


def test_memory_outlives_its_array_as_long_as_somebody_looks_at_it(emulated_decoder: type[Any]) -> None:
    decoder = NativeDecoder(Bundle.open(DEMO_BUNDLE), context=64, native=emulated_decoder)
    array, given = decoder.array((64, 32)), random_rows(64, 32)
    array.upload(given)
    seen, unused, part = torch.from_dlpack(array), array.__dlpack__(), array[32:]
    gone = weakref.ref(decoder)
    del decoder, array
    gc.collect()
    assert gone() is None
    np.testing.assert_array_equal(seen.numpy(), given)
    np.testing.assert_array_equal(downloaded(part), given[32:])
    del unused


def test_an_array_of_another_decoder_is_nothing_to_read(decoder: NativeDecoder, emulated_decoder: type[Any]) -> None:
    hidden = decoder.spec.hidden_size
    other = NativeDecoder(Bundle.open(DEMO_BUNDLE), context=64, native=emulated_decoder)
    with decoder.open(8) as state:
        for strange in (other.array((4, hidden)), decoder.array((4, hidden), "float16")):
            with pytest.raises(KernelArgumentError):
                state.prefill(strange)
        assert state.length == 0


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_logits_behind_rows_on_the_gpu_are_those_behind_the_same_rows_here(decoder: NativeDecoder) -> None:
    given = random_rows(12, decoder.spec.hidden_size) * 0.02
    rows = decoder.array(given.shape)
    rows.upload(given)
    with decoder.open(13) as here, decoder.open(13) as there:
        # Two calls, and the second begins within the array.
        for begin, end in ((0, 9), (9, 12)):
            np.testing.assert_array_equal(there.prefill(rows[begin:end]), here.prefill(given[begin:end]))
        np.testing.assert_array_equal(there.step(5), here.step(5))


def test_rows_are_those_of_the_processor(decoder: NativeDecoder, processor: Engine) -> None:
    bundle = processor.bundle
    host = HostEmbedder(bundle.embeddings, threads=1, allow_16bit=False)
    gpu = GpuEmbedder(decoder, allow_16bit=False)
    features = processor._encoders.encode(PROTEIN)
    there = decoder.array(features.shape)
    there.upload(features)
    protein, molecule = bundle.protein_projection, bundle.molecule_projection
    assert protein is not None
    assert molecule is not None
    parts = [
        TokenPart(np.array([3, 1, 500], np.int64)),
        TokenPart(np.array([], np.int64)),
        FeaturePart(features, protein),
        FeaturePart(there, protein),
        FeaturePart(processor._encoders.encode(BENZENE), molecule),
    ]
    for part in parts:
        expected, rows = host.new(len(part)), gpu.new(len(part))
        host.write(part, expected)
        gpu.write(part, rows)
        gpu.wait()
        np.testing.assert_array_equal(gpu.to_host(rows), expected)
        own = gpu.copy(rows)
        gpu.fill(rows, gpu.from_host(np.zeros_like(expected)))
        assert not gpu.to_host(rows).any()
        np.testing.assert_array_equal(gpu.to_host(own), expected)


def test_what_does_not_fit_a_splice_is_refused_as_on_the_processor(decoder: NativeDecoder, processor: Engine) -> None:
    gpu, projection = GpuEmbedder(decoder, allow_16bit=False), processor.bundle.protein_projection
    assert projection is not None
    with pytest.raises(KernelArgumentError, match="ids"):
        gpu.write(TokenPart(np.array([10**6], np.int64)), gpu.new(1))
    with pytest.raises(KernelArgumentError):
        gpu.write(FeaturePart(np.zeros((2, 5), np.float32), projection), gpu.new(2))
    with pytest.raises(KernelArgumentError):
        gpu.write(TokenPart(np.array([3], np.int64)), gpu.new(2))
    for out, segments, rounded in ((None, (), False), (gpu.new(1), 5, False), (gpu.new(1), (), 1)):
        with pytest.raises(KernelArgumentError):
            decoder.splice(out, segments, allow_16bit=rounded)  # type: ignore[arg-type]


def test_a_prompt_is_shown_as_an_array_of_this_machine(demo: Engine, processor: Engine) -> None:
    found, expected = (engine.prepare(SIZE, BENZENE) for engine in (demo, processor))
    assert isinstance(found.embeddings, np.ndarray)
    np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    np.testing.assert_array_equal(demo.chat().prepare(SIZE, BENZENE).embeddings, expected.embeddings)
    assert int(demo.first_logits(found).argmax()) == int(processor.first_logits(expected).argmax())


def test_stages_of_a_prompt_are_waited_for_when_they_are_timed(kernels: None) -> None:
    waits = list[str]()
    wait = GpuEmbedder.wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuEmbedder, "wait", lambda self: (waits.append("waited"), wait(self))[1])
        plan = Plan(DEMO_BUNDLE, 1, 1, ("encode", "splice"), device="native", encoders="cpu")
        result = Suite(plan, lambda line: None, probing=lambda threads, size: PROBED).run()
    assert (result["method"]["device"], result["method"]["encoders"]) == ("native", "cpu")
    assert waits


def test_soft_tokens_stay_on_the_gpu(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    molecule = Molecule.from_smiles("OCCO")
    first = demo.ask(SIZE, molecule, max_new_tokens=1)
    monkeypatch.setattr(demo._encoders, "encode", lambda item: pytest.fail("it was read already"))
    again = demo.ask(SIZE, molecule, max_new_tokens=1)
    assert (again.token_ids, again.timings.encode) == (first.token_ids, 0)


def test_soft_tokens_are_kept_on_disk_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path))
    shown = []
    for reads in (1, 0):
        with Engine.load(device="native", threads=1, keep_soft_tokens=True) as engine:
            seen, encode = list[object](), engine._encoders.encode
            monkeypatch.setattr(engine._encoders, "encode", lambda item, e=encode, s=seen: (s.append(item), e(item))[1])
            shown.append(engine.prepare(SIZE, BENZENE).embeddings)
            assert len(seen) == reads
    np.testing.assert_array_equal(*shown)
    with Engine.load(threads=1, keep_soft_tokens=True) as engine:
        assert engine._soft_tokens.get(engine.prepare("?").text, (1, 1)) is None
        engine.prepare(SIZE, BENZENE)
    assert len(list((tmp_path / "soft_tokens").iterdir())) == 2, "bits of another device are others"


def test_what_all_prompts_begin_with_is_brought_to_the_gpu_once(decoder: NativeDecoder) -> None:
    with decoder.open(20) as state:
        state.prefill(random_rows(16, decoder.spec.hidden_size))
        start, expected = state.key_values(), state.step(3)
    native: Any = decoder._native
    written = list[Any]()
    real, native.write_cache = native.write_cache, lambda cache, rows: (written.append(rows), real(cache, rows))
    try:
        for _ in range(2):
            with decoder.open(20, start) as state:
                np.testing.assert_array_equal(state.step(3), expected)
        assert written[0] is written[1]
        other = start.array.copy()
        with decoder.open(20, type(start)(start.positions, other)):
            assert written[2] is not written[0]
        del start, state, other
        gc.collect()
        with decoder.open(20) as state:
            state.prefill(random_rows(9, decoder.spec.hidden_size))
            kept = state.key_values()
        with decoder.open(20, kept):
            left = [there for _, there in decoder._starts]
            assert not any(there is written[index] for there in left for index in (0, 2)), "nobody has these any more"
    finally:
        del native.write_cache


def test_soft_tokens_that_do_not_fit_are_made_anew_the_next_time(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(rows: object) -> object:
        raise PlatformError("an array takes 10 bytes, and 9 are free.")

    monkeypatch.setattr(demo._embedder, "copy", full)
    molecule = Molecule.from_smiles("OCCCO")
    expected = demo.prepare(SIZE, molecule)
    again = demo.prepare(SIZE, molecule)
    np.testing.assert_array_equal(again.embeddings, expected.embeddings)
    assert again.timings.encode > 0


def test_one_kv_cache_waits_for_the_next_answer(emulated_decoder: type[Any]) -> None:
    decoder = NativeDecoder(Bundle.open(DEMO_BUNDLE), context=64, native=emulated_decoder)
    given = random_rows(9, decoder.spec.hidden_size) * 0.02
    with decoder.open(64) as state:
        expected = state.prefill(given)
    for turn in range(2):
        if turn:
            decoder.trim()
            decoder.trim()
        # What an earlier sequence left behind is nothing to this one.
        with decoder.open(64) as first, decoder.open(64) as second:
            np.testing.assert_array_equal(first.prefill(given), expected)
            np.testing.assert_array_equal(second.prefill(given), expected)


# --- encoders on the same stream --------------------------------------------------------------------------------------


class PlayedSession:
    """A session of the provider for processors, whose binding takes addresses of the GPU's memory, which is here."""

    def __init__(self, real: ort.InferenceSession, lock: Callable[[], Any]) -> None:
        self._real = real
        self._lock = lock
        self.bound: list[tuple[str, str, tuple[int, ...]]] = []
        self.options: list[str] = []

    def io_binding(self) -> PlayedSession:
        self._binding = self._real.io_binding()
        self.bound.clear()
        return self

    def bind_cpu_input(self, name: str, array: Array) -> None:
        self._require_lock()
        self._binding.bind_cpu_input(name, array)

    def bind_output(self, name: str, device: str, number: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        self.bound.append((name, device, tuple(shape)))
        self._binding.bind_output(name, "cpu", number, dtype, shape, address)

    def run_with_iobinding(self, binding: PlayedSession, options: ort.RunOptions) -> None:
        assert binding is self
        self.options.append(options.get_run_config_entry("disable_synchronize_execution_providers"))
        self._require_lock()
        self._real.run_with_iobinding(self._binding)

    def _require_lock(self) -> None:
        taken = list[bool]()
        other = threading.Thread(target=lambda: taken.append(self._lock().acquire(blocking=False)))
        other.start()
        other.join()
        assert taken == [False], "a capture of the decoder's would take this into its graph"


class Played:
    """The provider: its sessions by name of their graphs, and what they were opened with."""

    def __init__(self) -> None:
        self.sessions = dict[str, PlayedSession]()
        self.streams = list[int]()
        self.engine: Engine | None = None

    def lock(self) -> Any:
        assert self.engine is not None
        assert isinstance(self.engine.decoder, NativeDecoder)
        return self.engine.decoder.lock

    def open(
        self, path: Path, *, inputs: Signature, outputs: Signature, stream: int, cuda_graphs: bool = False
    ) -> PlayedSession:
        assert not cuda_graphs
        self.streams.append(stream)
        real = open_session(path, threads=1, inputs=inputs, outputs=outputs)
        self.sessions[path.stem] = PlayedSession(real, self.lock)
        return self.sessions[path.stem]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    provider = Played()
    monkeypatch.setattr(ort_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(encoders_gpu, "open_cuda_session", provider.open)
    return provider


@pytest.mark.parametrize("found", [True, False])
def test_features_of_encoders_on_the_gpu_are_never_brought_here(
    played: Played, processor: Engine, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    # Asked for, or found: an onnxruntime with the provider is reason enough.
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: found)
    with Engine.load(device="native", threads=1, encoders="auto" if found else "cuda") as engine:
        played.engine = engine
        assert isinstance(engine._encoders, NativeEncoders)
        for item, tolerance in ((IBUPROFEN, 1e-5), (PROTEIN, 0.02)):
            exact = Encoders(engine.bundle, threads=1).encode(item)
            features = engine._encoders.encode(item)
            assert isinstance(features, type(engine._embedder.new(1)))
            np.testing.assert_allclose(downloaded(features), exact, atol=tolerance * float(np.abs(exact).max()))
        assert set(played.sessions) == {"molecule_encoder", "protein_encoder-cuda"}
        assert played.streams == [engine.decoder.stream] * 2  # type: ignore[attr-defined]
        for session in played.sessions.values():
            ((_, device, shape),) = session.bound
            assert device == "cuda"
            assert shape[-2:] == (exact.shape if len(shape) == 3 else (IBUPROFEN.n_soft_tokens, shape[-1]))
            assert set(session.options) == {"1"}, "the next kernel is in the same stream: nobody waits"
        atoms = engine._encoders
        for _ in range(64):
            atoms.encode(BENZENE)
        assert played.sessions["molecule_encoder"].options.count("0") == 1, "what runs leave behind is freed at times"
        answers = [asked.ask(SIZE, BENZENE, max_new_tokens=1).token_ids for asked in (engine, processor)]
        assert answers[0] == answers[1]
        assert counted(engine).caches == 0


def test_a_closed_engine_gives_the_gpus_memory_back(played: Played) -> None:
    engine = Engine.load(device="native", threads=1, encoders="cuda")
    played.engine = engine
    stream = engine.stream(SIZE, BENZENE, max_new_tokens=2)
    gone = weakref.ref(engine.decoder)
    engine.close()
    engine.close()
    played.engine = None
    assert len(list(stream)) >= 2, "what has begun can be finished"
    del stream
    gc.collect()
    assert gone() is None
    with pytest.raises(ClosedError):
        engine.prepare(SIZE, BENZENE)


def test_encoders_that_were_closed_open_again(played: Played) -> None:
    with Engine.load(device="native", threads=1, encoders="cuda", low_memory=True) as engine:
        played.engine = engine
        for smiles in ("C", "CC"):
            engine.prepare(SIZE, Molecule.from_smiles(smiles))
    assert len(played.streams) == 2


def test_without_the_provider_the_processor_reads(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: False)
    with Engine.load(device="native", threads=1) as engine:
        assert not isinstance(engine._encoders, NativeEncoders)
        engine.prepare(SIZE, BENZENE)
    assert not played.sessions


def test_without_graphs_for_the_provider_the_processor_reads_and_who_asks_for_the_gpu_is_told(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    assert bundle.manifest.protein_encoder is not None
    encoder = replace(bundle.manifest.protein_encoder, cuda=None)
    older = replace(bundle, manifest=replace(bundle.manifest, protein_encoder=encoder))
    monkeypatch.setattr(Bundle, "open", lambda path: older)
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
    with Engine.load(device="native", threads=1, verify="sizes") as engine:
        assert not isinstance(engine._encoders, NativeEncoders)
    with (
        Engine.load(device="native", threads=1, verify="sizes", encoders="cuda") as engine,
        pytest.raises(OptionError, match="holds no graphs for the CUDA provider"),
    ):
        engine.prepare("?", Protein.from_sequence("MKT"))


def test_the_processor_reads_where_that_is_asked_for(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
    with Engine.load(device="native", threads=1, encoders="cpu") as engine:
        assert not isinstance(engine._encoders, NativeEncoders)
        engine.prepare(SIZE, BENZENE)
    assert not played.sessions


def test_who_lacks_a_library_of_the_provider_is_told_of_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise PlatformError("libraries are missing: libcudnn.so.9.", remedy="Install it.")

    monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
    monkeypatch.setattr(ort_cuda, "require_cuda", lacking)
    with pytest.raises(PlatformError, match=r"libcudnn.*Install it\. Or let the processor read.*--encoders cpu"):
        Engine.load(device="native", threads=1)


def test_encoders_that_were_asked_for_and_are_not_there_are_an_error_before_the_decoder_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "CudaDecoder", lambda *arguments: pytest.fail("gigabytes were read"))
    with pytest.raises(PlatformError, match=r"this onnxruntime .* has no CUDA provider"):
        Engine.load(device="native", threads=1, encoders="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": "cuda"}, "encoders is 'cuda', and device is 'cpu', whose encoders run where its decoder does"),
        ({"device": "cuda", "encoders": "cpu"}, "encoders is 'cpu', and device is 'cuda'"),
        ({"device": "native", "encoders": "gpu"}, "encoders is 'gpu'"),
    ],
)
def test_encoders_that_do_not_go_with_a_device(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Engine.load(threads=1, **options)


def test_the_command_line_has_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert edge(["ask", "--encoders", "cuda", "Hello"]) == 3
    assert "whose encoders run where its decoder does" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        edge(["ask", "--encoders", "gpu", "Hello"])
