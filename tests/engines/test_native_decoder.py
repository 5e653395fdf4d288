"""The decoder on our own CUDA kernels, emulated: logits, answers, what is refused, and what the binding takes."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from biomedgpt_edge import Engine, _native
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.decoder.cuda import NativeDecoder
from biomedgpt_edge.decoder.kv_cache import KeyValues
from biomedgpt_edge.decoder.onnx import OnnxDecoder
from biomedgpt_edge.errors import ClosedError, KernelArgumentError, OptionError, PlatformError, PromptTooLongError
from biomedgpt_edge.inputs import Molecule
from biomedgpt_edge.onnx_header import read_header
from biomedgpt_edge.sampling import GenerationOptions, Sampler
from biomedgpt_export import synthesize
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize.int4 import Int4Weight
from biomedgpt_export.quantize.rtn import RoundToNearest
from emulated_engine import counted
from engine_answers import BENZENE, SIZE
from int4_matrices import Matrix, interleaved, random_matrix

Array = np.ndarray[Any, Any]
CudaDecoder = type[Any]
# How far logits may be from those in float64, relative to the largest: activations and keys and values are halves.
TOLERANCE = 4e-3
CONTEXT = 96
ETHANOL = Molecule.from_smiles("CCO")


def silent(line: str) -> None:
    pass


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a model has that others have not."""

    heads: int = 4
    kv_heads: int = 4
    inner: int = 128
    biases: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


PLAIN = "heads of 64"
SHAPES = {
    PLAIN: Shape(),
    "heads of 128, groups of 64": Shape(2, 2, 192, options={"group_size": 64}),
    "grouped queries, groups of 32": Shape(8, 2, 160, options={"group_size": 32}),
    "attention biases, a width of no whole groups": Shape(8, 4, 344, biases=True),
    "head and embeddings of eight bits": Shape(options={"lm_head": "int8", "embeddings": "int8"}),
}
HIDDEN, PIECES = 256, 400

Bundles = Callable[[str], Bundle]


def checkpoint(folder: Path, shape: Shape) -> Path:
    """One of two layers, wide enough for attention to be uneven and logits to be far from each other."""
    scale = replace(synthesize.SCALES["tiny"], hidden=HIDDEN, heads=shape.heads, ffn=shape.inner, pieces=PIECES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthesize.SCALES, "of a test", scale)
        synthesize.synthesize(folder, scale="of a test", seed=0, report=silent)
    (config,) = folder.glob("text_ckpts/*/config.json")
    fields = json.loads(config.read_text())
    fields |= {"num_key_value_heads": shape.kv_heads, "attention_bias": shape.biases}
    config.write_text(json.dumps(fields))
    (file,) = folder.glob("fusion_ckpts/*.pth")
    state, random = torch.load(file, weights_only=True), torch.Generator().manual_seed(1)
    for key in [key for key in state if key.startswith("llm.") and key.endswith("proj.weight")]:
        rows, columns = state[key].shape
        if "k_proj" in key or "v_proj" in key:
            rows = rows // shape.heads * shape.kv_heads
        state[key] = torch.randn(rows, columns, generator=random) * 1.5 / columns**0.5
        if shape.biases and "self_attn" in key:
            state[key.replace("weight", "bias")] = torch.randn(rows, generator=random) * 0.3
    head = state["llm.lm_head.weight"]
    state["llm.lm_head.weight"] = torch.randn(head.shape, generator=random) * 3 / HIDDEN**0.5
    torch.save(state, file)
    return folder


def exported(folder: Path, shape: Shape) -> Bundle:
    source = Layout.locate(checkpoint(folder / "release", shape), without=["molecule", "protein"])
    options = ExportOptions(source, folder / "bundle", "int4", quantizer="rtn", proof="none", **shape.options)
    export_bundle(options, silent)
    return Bundle.open(options.out)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """By name of its shape, each made once; to be read only."""

    @cache
    def made(name: str) -> Bundle:
        return exported(tmp_path_factory.mktemp("native"), SHAPES[name])

    return made


class Reference:
    """Llama in float64, with the weights that a bundle stores and the rotation that its manifest names."""

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.manifest.decoder
        self._stored = StoredWeights(bundle.file(self._spec.graph))
        self._matrices = dict[str, Array]()

    def logits(self, embeddings: Array) -> Array:
        """Of every position, float64 [T, rows]."""
        spec, x = self._spec, embeddings.astype(np.float64)
        before = "layers.0.input_layernorm"
        for index in range(spec.layers):
            layer = f"layers.{index}"
            x = x + self._linear(f"{layer}.o_proj", self._attended(layer, self._normed(before, x)))
            normed = self._normed(f"{layer}.post_attention_layernorm", x)
            gate, up = (self._linear(f"{layer}.{name}_proj", normed) for name in ("gate", "up"))
            x = x + self._linear(f"{layer}.down_proj", gate / (1 + np.exp(-gate)) * up)
            before = f"{layer}.next_layernorm"
        return self._linear("lm_head", self._normed(before, x))

    def _normed(self, name: str, x: Array) -> Array:
        gain = self._stored.array(f"{name}.weight").astype(np.float64)
        normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + self._spec.norm_eps) * gain
        return normed

    def _linear(self, name: str, x: Array) -> Array:
        if name not in self._matrices:
            self._matrices[name] = self._stored.linear(name).double().numpy()
        product: Array = x @ self._matrices[name].T
        if self._spec.attention_bias and name.endswith(("qkv_proj", "o_proj")):
            product += self._stored.array(f"{name}.bias")
        return product

    def _attended(self, layer: str, x: Array) -> Array:
        spec, count = self._spec, len(x)
        queries, kv = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        parts = np.split(self._linear(f"{layer}.qkv_proj", x), [queries, queries + kv], axis=1)
        q, k, v = (part.reshape(count, -1, spec.head_size).swapaxes(0, 1) for part in parts)
        q, k = self._rotated(q), self._rotated(k)
        k, v = (np.repeat(part, spec.heads // spec.kv_heads, axis=0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(spec.head_size)
        weights = np.exp(np.where(np.tri(count, dtype=bool), scores, -np.inf))
        attended: Array = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(count, queries)
        return attended

    def _rotated(self, x: Array) -> Array:
        half = self._spec.head_size // 2
        frequencies = self._spec.rope_base ** (-np.arange(half) / half)
        angles = np.arange(x.shape[1])[:, np.newaxis] * frequencies
        one, other = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def assert_near(found: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@dataclass
class Case:
    """A bundle on the kernels, a text for it, and the logits behind each of its tokens."""

    bundle: Bundle
    decoder: NativeDecoder
    tokens: list[int]
    embeddings: Array
    expected: Array


Cases = Callable[[str], Case]


@pytest.fixture(scope="module")
def cases(bundles: Bundles, emulated_decoder: CudaDecoder) -> Cases:
    @cache
    def made(name: str) -> Case:
        bundle = bundles(name)
        tokens = np.random.default_rng(3).integers(0, PIECES, 48).tolist()
        embeddings = bundle.embeddings.lookup(tokens)
        decoder = NativeDecoder(bundle, native=emulated_decoder, context=CONTEXT)
        return Case(bundle, decoder, tokens, embeddings, Reference(bundle).logits(embeddings))

    return made


@pytest.fixture
def plain(cases: Cases) -> Case:
    return cases(PLAIN)


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_float64(cases: Cases, name: str) -> None:
    case = cases(name)
    with case.decoder.open(40) as state:
        found = [state.prefill(case.embeddings[:17]), *state.steps(case.tokens[17:20]), state.step(case.tokens[20])]
        assert state.length == 21
    assert_near(np.stack(found), case.expected[16:21])


@pytest.mark.parametrize("ends", [(33, 48), (2, 11, 12), (1, 2, 3)], ids=lambda ends: " ".join(map(str, ends)))
def test_a_prompt_may_come_in_any_pieces(plain: Case, ends: tuple[int, ...]) -> None:
    with plain.decoder.open(48) as state:
        for start, end in itertools.pairwise([0, *ends]):
            assert_near(state.prefill(plain.embeddings[start:end]), plain.expected[end - 1])
        assert state.length == ends[-1]


def test_a_prompt_may_come_as_tokens(plain: Case) -> None:
    with plain.decoder.open(48) as state:
        found = [state.step(plain.tokens[0]), *state.steps(plain.tokens[1:9]), *state.steps(plain.tokens[9:11])]
    assert_near(np.stack(found), plain.expected[:11])


def test_logits_are_computed_at_the_positions_asked_for(plain: Case) -> None:
    wanted = np.array([5, 0, 5, 15, 3])
    with plain.decoder.open(16) as state:
        found = plain.decoder.run(state.cache, plain.embeddings[:16], 0, wanted)
    assert_near(found, plain.expected[wanted])


def test_pieces_of_more_than_eight_positions_give_the_same_bits_however_a_prompt_is_cut(plain: Case) -> None:
    found = []
    for ends in ((24,), (9, 24)):
        with plain.decoder.open(24) as state:
            for start, end in itertools.pairwise([0, *ends]):
                logits = state.prefill(plain.embeddings[start:end])
            found.append((logits, state.key_values().array))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_several_tokens_in_one_call_are_as_many_steps(plain: Case) -> None:
    with plain.decoder.open(24) as state, plain.decoder.open(24) as other:
        for one in (state, other):
            one.prefill(plain.embeddings[:4])
        together = state.steps(plain.tokens[4:7])
        singly = np.stack([other.step(token) for token in plain.tokens[4:7]])
        assert state.length == other.length == 7
    assert_near(together, singly.astype(np.float64), 1e-3)


def test_greedy_tokens_are_those_of_the_processor_but_for_near_ties(plain: Case) -> None:
    decided = 0
    with plain.decoder.open(40) as state, OnnxDecoder(plain.bundle, threads=1).open(40) as other:
        ours, theirs = state.prefill(plain.embeddings[:20]), other.prefill(plain.embeddings[:20]).copy()
        for _ in range(7):
            # So far activations of eight bits, to which it rounds, move each of two logits.
            runner_up, best = np.sort(theirs)[-2:]
            if best - runner_up > 2 * 0.03 * np.abs(theirs).max():
                decided += 1
                assert ours.argmax() == theirs.argmax()
            token = int(theirs.argmax())
            ours, theirs = state.step(token), other.step(token).copy()
    assert decided >= 4


# --- sequences --------------------------------------------------------------------------------------------------------


def test_what_was_cut_off_leaves_no_trace(plain: Case) -> None:
    with plain.decoder.open(24) as state, plain.decoder.open(24) as untouched:
        for one in (state, untouched):
            one.prefill(plain.embeddings[:5])
        state.steps([7, 8, 9])
        state.truncate(5)
        np.testing.assert_array_equal(state.step(3), untouched.step(3))
        state.truncate(4)
        assert_near(state.steps(plain.tokens[4:6]), plain.expected[4:6])
        for length in (-1, 7):
            with pytest.raises(ValueError, match=f"cannot be cut to {length}"):
                state.truncate(length)


def test_a_state_begins_where_another_one_stopped(plain: Case) -> None:
    decoder, spec = plain.decoder, plain.bundle.manifest.decoder
    with decoder.open(48) as first:
        first.prefill(plain.embeddings[:11])
        start = first.key_values()
        expected = first.prefill(plain.embeddings[11:20])
    assert start.array.dtype == np.float16
    assert start.array.shape == decoder.kv.stacked(11) == (2 * spec.layers, spec.kv_heads, 11, spec.head_size)
    assert np.isfinite(start.array).all()
    # As arrays come from a file.
    start.array.flags.writeable = False
    with decoder.open(20, start) as second:
        assert second.length == 11
        np.testing.assert_array_equal(second.key_values().array, start.array)
        np.testing.assert_array_equal(second.prefill(plain.embeddings[11:20]), expected)


def test_a_state_of_nothing_has_no_keys_and_values(plain: Case) -> None:
    with plain.decoder.open(20) as state:
        nothing = state.key_values()
    with plain.decoder.open(20, nothing) as state:
        assert (nothing.positions, state.length) == (0, 0)


def test_two_sequences_side_by_side_know_nothing_of_each_other(plain: Case) -> None:
    with plain.decoder.open(24) as one, plain.decoder.open(24) as other:
        one.prefill(plain.embeddings[:5])
        other.prefill(plain.embeddings[20:28])
        for position in (5, 6):
            assert_near(one.step(plain.tokens[position]), plain.expected[position])
            other.step(position)


def test_two_threads_at_once_get_what_each_gets_alone(plain: Case) -> None:
    def answer() -> None:
        with plain.decoder.open(24) as state:
            found.append(np.stack([state.step(token) for token in range(2)]))

    found = list[Array]()
    answer()
    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def test_a_cache_is_given_back_when_its_state_is_closed_or_dropped(plain: Case) -> None:
    state, dropped = plain.decoder.open(20), plain.decoder.open(20)
    caches = [state.cache, dropped.cache]
    state.close()
    state.close()
    del dropped
    gc.collect()
    for given_back in caches:
        with pytest.raises(KernelArgumentError, match=f"cache: got {given_back}, expected one that is there"):
            plain.decoder.read(given_back, 1)
    for use in (lambda: state.step(0), lambda: state.reserve(1), state.key_values):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kv: KeyValues(9, kv.array[1:]),
        lambda kv: KeyValues(9, kv.array.astype(np.float32)),
        lambda kv: KeyValues(8, kv.array),
    ],
    ids=["an array too few", "float32", "another length"],
)
def test_keys_and_values_of_another_decoder_are_refused(plain: Case, spoil: Callable[[KeyValues], KeyValues]) -> None:
    start = KeyValues(9, np.zeros(plain.decoder.kv.stacked(9), np.float16))
    with pytest.raises(KernelArgumentError, match="keys and values are float"):
        plain.decoder.open(20, spoil(start))


def test_what_does_not_fit_is_refused_and_changes_nothing(plain: Case) -> None:
    with pytest.raises(PromptTooLongError, match=f"may take {CONTEXT + 1} positions.* {CONTEXT}"):
        plain.decoder.open(CONTEXT + 1)
    with plain.decoder.open(12) as state:
        for too_many in (lambda: state.reserve(13), lambda: state.prefill(plain.embeddings[:13])):
            with pytest.raises(ValueError, match="13 positions do not fit a KV cache of 12"):
                too_many()
        for strange in (plain.embeddings[:0], plain.embeddings[:3].astype(np.float64), plain.embeddings[:3, 1:]):
            with pytest.raises(KernelArgumentError, match=rf"the decoder reads float32\[T, {HIDDEN}\]"):
                state.prefill(strange)
        for token in (-1, PIECES + 1, 2**40):
            with pytest.raises(KernelArgumentError, match=f"token: got {token}, expected 0 to {PIECES}"):
                state.step(token)
        with pytest.raises(KernelArgumentError, match="wanted: got 9, expected at most 8"):
            state.steps([3] * 9)
        assert state.length == 0
        assert_near(state.prefill(plain.embeddings[:9]), plain.expected[8])


# --- whole engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(kernels: None) -> Iterator[Engine]:
    """The packaged demo on it."""
    with Engine.load(device="native", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def processor() -> Iterator[Engine]:
    with Engine.load(threads=1) as engine:
        yield engine


def test_the_demos_logits_are_those_of_float64(demo: Engine) -> None:
    embeddings = demo.prepare("Why?").embeddings[:9]
    assert isinstance(demo.decoder, NativeDecoder)
    with demo.decoder.open(9) as state:
        found = state.prefill(embeddings)
    assert_near(found, Reference(demo.bundle).logits(embeddings)[-1])


def test_a_question_is_answered_as_on_the_processor(demo: Engine, processor: Engine) -> None:
    expected = processor.ask(SIZE, ETHANOL, max_new_tokens=3)
    answer = demo.ask(SIZE, ETHANOL, max_new_tokens=3)
    assert (answer.token_ids, answer.text, answer.finish) == (expected.token_ids, expected.text, expected.finish)
    # What the template begins with, in whole tiles.
    assert answer.timings.cached_tokens == 16


def test_a_conversation_streams_and_takes_over_what_was_computed(demo: Engine, processor: Engine) -> None:
    expected = processor.chat()
    expected.ask(SIZE, BENZENE, max_new_tokens=3)
    chat, native = demo.chat(), counted(demo)
    stream = chat.stream(SIZE, BENZENE, max_new_tokens=3)
    pieces = list(stream)
    assert tuple(piece.token_id for piece in pieces if piece.token_id is not None) == stream.answer.token_ids
    assert "".join(piece.text for piece in pieces) == stream.answer.text == expected.turns[0].answer
    # The conversation keeps its KV cache.
    assert native.caches == 1
    native.rows.clear()
    second = chat.ask("Why?", max_new_tokens=2)
    assert second.token_ids == expected.ask("Why?", max_new_tokens=2).token_ids
    assert second.timings.cached_tokens == 32
    assert native.rows == [second.timings.prompt_tokens - 32, 1]
    chat.release()
    assert native.caches == 0


def test_an_engine_takes_the_models_context_and_its_encoders_stay_on_the_processor(
    demo: Engine, processor: Engine
) -> None:
    assert counted(demo).capacity == demo.bundle.manifest.decoder.context
    assert "csrc/decoder" in demo.decoder.identity
    assert demo._encoders.identity == processor._encoders.identity
    with pytest.raises(PromptTooLongError, match="the model reads"):
        demo.ask(SIZE, ETHANOL, max_new_tokens=demo.bundle.manifest.decoder.context)


@pytest.mark.usefixtures("kernels")
def test_one_token_is_run_before_loading_ends_where_that_is_asked_for(bundles: Bundles) -> None:
    for prefault in (False, True):
        with Engine.load(bundles(PLAIN).path, device="native", threads=1, prefault=prefault) as engine:
            assert counted(engine).rows == [1] * prefault
            assert counted(engine).caches == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_compiled", lambda: False)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_compiled", lambda: True)
    monkeypatch.setattr(_native, "cuda_device_count", lambda: 0)


NO_KERNELS = "this installation has no CUDA kernels: there was no CUDA compiler where it was built."
NO_GPU = "there is no NVIDIA GPU that CUDA can use."


@pytest.mark.usefixtures("without_kernels")
def test_a_build_without_kernels_says_so_and_how_to_get_some() -> None:
    with pytest.raises(PlatformError) as caught:
        Engine.load(device="native")
    assert caught.value.message == NO_KERNELS
    assert "where nvcc is on the PATH, or use --device cuda or tensorrt" in caught.value.remedy


@pytest.mark.usefixtures("without_gpu")
def test_a_machine_without_a_gpu_is_named_with_where_to_look() -> None:
    with pytest.raises(PlatformError) as caught:
        Engine.load(device="native")
    assert caught.value.message == NO_GPU
    assert "nvidia-smi" in caught.value.remedy
    assert "--device cpu" in caught.value.remedy


@pytest.mark.parametrize(("missing", "message"), [("without_kernels", NO_KERNELS), ("without_gpu", NO_GPU)])
def test_on_the_command_line_it_is_one_line_and_the_exit_code_of_the_platform(
    missing: str, message: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(missing)
    assert edge(["ask", "--device", "native", "Hello"]) == PlatformError.exit_code == 5
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.out == ""


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("name", "value"), [("decoder", "portable"), ("decoder", "records"), ("kv_cache", "fp16"), ("memory_limit", "6GiB")]
)
def test_options_of_the_processor_are_refused_before_anything_is_loaded(name: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is .*, and device is 'native', on which it does not apply") as e:
        Engine.load(device="native", **{name: value})  # type: ignore[arg-type]
    assert e.value.remedy == f"Leave {name} out, or use the device cpu."


@pytest.mark.usefixtures("kernels")
def test_a_portable_bundle_is_refused_with_how_to_lay_it_out(portable_demo: Path) -> None:
    with pytest.raises(OptionError, match="does not lie in records, which the kernels for GPUs read") as caught:
        Engine.load(portable_demo, device="native")
    assert (caught.value.seen, caught.value.limit) == ("portable", "records-1")
    assert "biomedgpt-export relayout B --decoder-layout records" in caught.value.remedy


@pytest.mark.parametrize("context", [2049, 0, -1, 2**70, True])
def test_a_context_that_the_model_has_not_is_refused(
    bundles: Bundles, emulated_decoder: CudaDecoder, context: int
) -> None:
    with pytest.raises(OptionError, match=rf"context is {context}\. Leave it out for the model's own") as caught:
        NativeDecoder(bundles(PLAIN), native=emulated_decoder, context=context)
    assert caught.value.limit == "1 to 2048"


def test_a_small_model_whose_norms_lie_in_the_graph_file_is_read_as_well(
    tiny_bundle: Path, emulated_decoder: CudaDecoder
) -> None:
    bundle = Bundle.open(tiny_bundle)
    header = read_header(bundle.file(bundle.manifest.decoder.graph))
    assert "layers.0.input_layernorm.weight" in header.inside
    decoder, tokens = NativeDecoder(bundle, native=emulated_decoder, context=64), [5, 9, 3, 7]
    with decoder.open(64) as ours, Engine.load(tiny_bundle, threads=1).decoder.open(64) as theirs:
        found, expected = ours.steps(tokens).copy(), theirs.steps(tokens)
    # The processor's activations have eight bits.
    assert np.abs(found - expected).max() <= 0.04 * np.abs(expected).max()


def test_a_bundle_of_other_precision_is_refused_with_the_export_that_helps(
    tiny_bundle_fp16: Path, emulated_decoder: CudaDecoder
) -> None:
    with pytest.raises(OptionError, match=r"\(fp16\) does not lie in records") as caught:
        NativeDecoder(Bundle.open(tiny_bundle_fp16), native=emulated_decoder)
    assert "biomedgpt-export bundle --precision int4" in caught.value.remedy


class Changed(RoundToNearest):
    """Zero points or an order of their own in one layer, which both say nothing new."""

    layer, what = "", ""

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        if self.layer not in key:
            return super().quantize(key, weight)
        if self.what == "order":
            order = torch.arange(weight.shape[1]).flip(0)
            return replace(super().quantize(key, weight[:, order]), order=order.int())
        plain = super().quantize(key, weight)
        eights = torch.full((len(plain.packed), -(-plain.packed.shape[1] // 2)), 0x88, dtype=torch.uint8)
        return replace(plain, zero_points=eights)


@pytest.mark.parametrize(
    ("layer", "what", "words"),
    [
        ("layers.1.down_proj", "zero points", r"its layers\.1\.down_proj do not lie in records"),
        ("layers.1.up_proj", "zero points", r"its layers\.1\.gate_proj and layers\.1\.up_proj do not lie in records"),
        ("lm_head", "zero points", "its lm_head do not lie in records"),
        ("layers.0.o_proj", "order", r"its graph holds layers\.0\.o_proj\.order"),
    ],
)
def test_matrices_that_the_kernels_do_not_multiply_are_refused_by_name(
    layer: str, what: str, words: str, tmp_path: Path, emulated_decoder: CudaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Changed, "layer", layer)
    monkeypatch.setattr(Changed, "what", what)
    monkeypatch.setattr("biomedgpt_export.exporter.RoundToNearest", Changed)
    bundle = exported(tmp_path, Shape())
    with pytest.raises(OptionError, match=words) as caught:
        NativeDecoder(bundle, native=emulated_decoder)
    assert caught.value.remedy == "Use --device cuda, tensorrt or cpu."


def test_heads_of_another_size_are_refused(tmp_path: Path, emulated_decoder: CudaDecoder) -> None:
    bundle = exported(tmp_path, Shape(16, 16))
    with pytest.raises(OptionError, match="head_size: got 16, expected 32, 64 or 128"):
        NativeDecoder(bundle, native=emulated_decoder)


# --- the binding ------------------------------------------------------------------------------------------------------

WIDTH, VOCABULARY, CHOOSABLE, PLACES = 32, 300, 290, 64
GREEDY = (0.0, 0, 1.0, 0.0)
Model = dict[str, Any]


def small_model(layers: int = 1) -> Model:
    """Two heads that share keys and values. Rows 150 and on of its LM head are those in front of them once more."""
    rng, heads, kv_heads, size, inner = np.random.default_rng(0), 2, 1, 32, 40

    def matrix(rows: int, columns: int) -> tuple[Any, ...]:
        return (random_matrix(rng, rows, columns, WIDTH).records, rows, columns, WIDTH, 4, None)

    def gains() -> Array:
        return rng.normal(1, 0.1, WIDTH).astype(np.float32)

    def layer() -> tuple[Any, ...]:
        gate, up = (random_matrix(rng, inner, WIDTH, WIDTH) for _ in range(2))
        return (
            gains(),
            matrix((heads + 2 * kv_heads) * size, WIDTH),
            (*matrix(WIDTH, heads * size)[:5], rng.normal(0, 0.1, WIDTH).astype(np.float32)),
            gains(),
            (interleaved(gate, up), inner, WIDTH, WIDTH, 4, None),
            matrix(WIDTH, inner),
        )

    half = random_matrix(rng, VOCABULARY // 2, WIDTH, WIDTH)
    head = Matrix(np.concatenate([half.values] * 2), np.concatenate([half.scales] * 2), WIDTH)
    angles = np.arange(PLACES)[:, np.newaxis] * 1e4 ** (-np.arange(size // 2) / (size // 2))
    return {
        "hidden": WIDTH,
        "intermediate": inner,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "epsilon": 1e-6,
        "choosable": CHOOSABLE,
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "final_norm": gains(),
        "embeddings": rng.integers(-127, 128, (VOCABULARY, WIDTH)).astype(np.int8),
        "embedding_scales": rng.uniform(0.005, 0.02, VOCABULARY).astype(np.float32),
        "head": (head.records, VOCABULARY, WIDTH, WIDTH, 4, None),
        "layers": tuple(layer() for _ in range(layers)),
    }


@pytest.fixture(scope="module")
def small(emulated_decoder: CudaDecoder) -> Any:
    return emulated_decoder(small_model(), PLACES)


@pytest.fixture
def sequence(small: Any) -> Iterator[int]:
    """A cache."""
    made = small.new_cache()
    yield made
    small.free_cache(made)


def logits_of(decoder: Any, sequence: int, tokens: list[int], start: int = 0) -> Array:
    """Behind each of at most eight tokens."""
    logits, count = np.empty((len(tokens), VOCABULARY), np.float32), len(tokens)
    decoder.run([sequence] * count, list(range(start, start + count)), tokens, list(range(count)), logits)
    return logits


def test_it_says_what_it_runs_on_and_takes(small: Any) -> None:
    assert small.device == "the emulation of a GPU"
    assert small.capacity == PLACES
    assert small.cache_bytes == 2 * PLACES * 32 * 2
    assert small.bytes > sum(part.nbytes for part in small_model()["layers"][0][1:3] for part in part[:1])


def test_a_model_that_leaves_no_memory_is_refused_with_sizes(emulated_decoder: CudaDecoder) -> None:
    model = small_model()
    positions = 2**20 - 1
    angles = np.zeros((positions, 16), np.float32)
    model |= {"rope_cos": angles, "rope_sin": angles, "layers": model["layers"] * 8}
    with pytest.raises(
        PlatformError,
        match=r"the decoder takes \d+ bytes for weights, \d+ for activations and 1073740800 for a KV cache of "
        rf"{positions} positions, and 1073741824 are free on the emulation of a GPU",
    ):
        emulated_decoder(model, positions)


def test_greedy_choices_are_the_largest_logits_and_of_equal_ones_the_first(small: Any, sequence: int) -> None:
    tokens = [3, 44, 299, 0, 17, 17, 150, 8]
    logits = np.empty((8, VOCABULARY), np.float32)
    chosen = small.run([sequence] * 8, list(range(8)), tokens, list(range(8)), logits, [GREEDY] * 8)
    np.testing.assert_array_equal(logits[:, :150], logits[:, 150:])
    assert [token for token, _ in chosen] == logits[:, :CHOOSABLE].argmax(1).tolist()
    assert [largest for _, largest in chosen] == logits[:, :CHOOSABLE].max(1).tolist()
    # Without logits, and of some rows.
    again = small.run([sequence] * 8, list(range(8)), tokens, [6, 1, 6], None, [GREEDY] * 3)
    assert again == [chosen[6], chosen[1], chosen[6]]


def test_what_cannot_be_chosen_is_not_chosen(emulated_decoder: CudaDecoder) -> None:
    for choosable in (1, 2, VOCABULARY):
        decoder = emulated_decoder({**small_model(), "choosable": choosable}, PLACES)
        logits, sequence = np.empty((1, VOCABULARY), np.float32), decoder.new_cache()
        for choice in (GREEDY, (0.01, 0, 1.0, 0.999)):
            ((token, largest),) = decoder.run([sequence], [0], [5], [0], logits, [choice])
            assert token < choosable
            assert largest == logits[0, :choosable].max()


def test_a_logit_that_is_no_number_is_no_token(small: Any, sequence: int) -> None:
    for value in (np.nan, np.inf):
        x = np.full((1, WIDTH), value, np.float32)
        for choice in (GREEDY, (1.0, 5, 0.5, 0.5)):
            ((token, largest),) = small.run([sequence], [0], x, [0], None, [choice])
            assert token == -1
            assert not np.isfinite(largest)
    # The cache holds what that left, which the next run of the position writes over.
    assert np.isfinite(logits_of(small, sequence, [3, 4])).all()


# Temperature, top-k and top-p. The logits come in pairs of equal ones, so that odd numbers of them cut one.
OPTIONS = [
    (1.0, 0, 1.0),
    (100.0, 0, 1.0),
    (1e-6, 0, 1.0),
    (1.0, 1, 1.0),
    (2.0, 7, 1.0),
    (0.3, 10_000, 1.0),
    (3.0, 0, 0.37),
    (2.0, 0, 1e-6),
    (1.5, 31, 0.83),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), OPTIONS)
def test_draws_are_those_of_the_sampler(
    small: Any, sequence: int, temperature: float, top_k: int, top_p: float
) -> None:
    # Looking for a threshold takes the emulation its time.
    seed, count = 11, 8 if (top_k, top_p) == (0, 1.0) else 4
    uniform = np.random.default_rng(seed).random(count)
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sampler, logits, rows = Sampler(options, CHOOSABLE), np.empty((count, VOCABULARY), np.float32), [*range(count)]
    choices = [(1 / temperature, top_k, top_p, number) for number in uniform.tolist()]
    chosen = small.run([sequence] * count, rows, list(range(40, 40 + count)), rows, logits, choices)
    assert [token for token, _ in chosen] == [sampler.choose(row) for row in logits]
    assert [largest for _, largest in chosen] == logits[:, :CHOOSABLE].max(1).tolist()


def test_a_draw_stands_for_a_place_in_the_sum_of_what_is_kept(small: Any, sequence: int) -> None:
    uniform = [0.0, 0.03, 0.25, 0.5, 0.75, 0.9, 0.99, 1 - 2**-24]
    logits = np.empty((8, VOCABULARY), np.float32)
    choices = [(0.5, 0, 1.0, number) for number in uniform]
    chosen = small.run([sequence], [0], [9], [0] * 8, logits, choices)
    weights = np.exp(logits[0, :CHOOSABLE].astype(np.float64) / 2)
    expected = np.searchsorted(weights.cumsum(), np.array(uniform) * weights.sum(), side="right")
    assert [token for token, _ in chosen] == expected.tolist()


def test_a_chain_is_as_many_steps(small: Any, sequence: int) -> None:
    uniform = np.random.default_rng(0).random(6).tolist()
    for choices in ([GREEDY] * 6, [(1.0, 0, 1.0, number) for number in uniform]):
        singly, token = list[tuple[int, float]](), 7
        for position, choice in enumerate(choices):
            singly += small.run([sequence], [position], [token], [0], None, [choice])
            token = singly[-1][0]
        assert len({token for token, _ in singly}) > 2
        values = read(small, sequence, 6)
        # The first chain is not captured yet, the second is.
        for _ in range(2):
            other = small.new_cache()
            assert small.run_chain(other, 0, 7, choices) == singly
            np.testing.assert_array_equal(read(small, other, 6), values)
            small.free_cache(other)


def test_chains_of_one_sequence_go_on_where_the_last_one_stopped(small: Any, sequence: int) -> None:
    whole = small.run_chain(sequence, 0, 7, [GREEDY] * 5)
    first = small.run_chain(sequence, 0, 7, [GREEDY] * 2)
    assert [*first, *small.run_chain(sequence, 2, first[-1][0], [GREEDY] * 3)] == whole
    # Up to the last position of a cache.
    assert len(small.run_chain(sequence, PLACES - 1, 7, [GREEDY])) == 1


def test_rows_of_several_sequences_in_one_call_are_what_each_is_alone(small: Any, sequence: int) -> None:
    other = small.new_cache()
    logits_of(small, sequence, [3, 4, 5])
    logits_of(small, other, [6])
    alone = np.concatenate([logits_of(small, sequence, [9], 3), logits_of(small, other, [10], 1)])
    for caches in (1, 2):
        for _ in range(2):
            together = np.empty((caches, VOCABULARY), np.float32)
            rows = list(range(caches))
            small.run([sequence, other][:caches], [3, 1][:caches], [9, 10][:caches], rows, together)
            np.testing.assert_array_equal(together, alone[:caches])
    small.free_cache(other)


def read(decoder: Any, sequence: int, positions: int) -> Array:
    values = np.empty((2, positions * 32), np.float16)
    decoder.read_cache(sequence, values)
    return values


def test_the_first_positions_of_a_cache_are_read_and_written(small: Any, sequence: int) -> None:
    expected = logits_of(small, sequence, [3, 4, 5, 6])
    values = read(small, sequence, 3)
    other = small.new_cache()
    small.write_cache(other, values)
    np.testing.assert_array_equal(read(small, other, 3), values)
    np.testing.assert_allclose(logits_of(small, other, [6], 3)[0], expected[3], rtol=1e-3, atol=1e-3)
    assert read(small, other, 0).shape == (2, 0)
    small.free_cache(other)


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [float("nan"), -5.0, 0.0, 1e300, True])
def test_an_epsilon_that_no_norm_has_is_refused(emulated_decoder: CudaDecoder, epsilon: float) -> None:
    with pytest.raises(KernelArgumentError, match="epsilon: got "):
        emulated_decoder(small_model() | {"epsilon": epsilon}, PLACES)


def test_bits_are_not_taken_for_their_last_ones(emulated_decoder: CudaDecoder) -> None:
    model = small_model()
    head = (*model["head"][:4], 2**32 + 4, None)
    with pytest.raises(KernelArgumentError, match=r"bits: got 4294967300, expected 4 or 8"):
        emulated_decoder(model | {"head": head}, PLACES)


@pytest.mark.parametrize("cache", [True, 1.0, None, 2**70, 77])
def test_only_caches_that_are_there_are_taken(small: Any, cache: Any) -> None:
    rows = np.zeros((2 * 2 * 1, 32), np.float16)
    for call in (
        lambda: small.free_cache(cache),
        lambda: small.read_cache(cache, rows),
        lambda: small.write_cache(cache, rows),
        lambda: small.run_chain(cache, 0, 1, [GREEDY]),
    ):
        with pytest.raises(KernelArgumentError):
            call()


@pytest.mark.parametrize("given", [None, (), "x", 3])
def test_what_is_no_list_is_refused_by_its_name(small: Any, sequence: int, given: Any) -> None:
    with pytest.raises(KernelArgumentError, match=r"choices: got .* expected a list"):
        small.run([sequence], [0], [1], [0], None, given)
    with pytest.raises(KernelArgumentError, match=r"caches: got .* expected a list"):
        small.run(given, [0], [1], [0], None, [GREEDY])


@pytest.mark.parametrize("key", small_model())
def test_a_model_without_an_entry_is_refused_by_its_name(emulated_decoder: CudaDecoder, key: str) -> None:
    model = small_model()
    del model[key]
    with pytest.raises(KernelArgumentError, match=f"{key}: got nothing, expected an entry of the model"):
        emulated_decoder(model, PLACES)


Place = tuple[str | int, ...]


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """What a model is made of, tuples among it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in items:
        yield (*path, key), item
        yield from leaves(item, (*path, key))


def changed(value: Any, path: Place, new: Any) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: changed(value[key], rest, new)}
    return tuple(changed(item, rest, new) if index == key else item for index, item in enumerate(value))


PARTS = dict(leaves(small_model()))
OTHER_ARRAYS = {
    "one element too few": lambda array: array[:-1].copy(),
    "one too many": lambda array: np.concatenate([array, array[:1]]),
    "none": lambda array: array[:0].copy(),
    "another type": lambda array: array.astype(np.float64),
    "not contiguous": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "a dimension too many": lambda array: array[np.newaxis],
    "swapped bytes": lambda array: array.astype(">f4"),
    "misaligned": lambda array: (
        np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
        if array.itemsize > 1
        else array[1:]
    ),
}


@pytest.mark.parametrize("how", OTHER_ARRAYS)
@pytest.mark.parametrize(
    "path", [path for path, part in PARTS.items() if isinstance(part, np.ndarray)], ids=lambda p: ".".join(map(str, p))
)
def test_arrays_of_another_shape_type_or_layout_are_refused(
    emulated_decoder: CudaDecoder, path: Place, how: str
) -> None:
    model, spoilt = small_model(), OTHER_ARRAYS[how](PARTS[path])
    with pytest.raises(KernelArgumentError):
        emulated_decoder(changed(model, path, spoilt), PLACES)


NUMBERS = st.integers(max_value=-1) | st.integers(min_value=2**20) | st.sampled_from([0, 2**31, 2**32, 2**63, 2**200])
STRANGE = st.one_of(
    st.booleans(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.just(object()),
    st.just({}),
    st.lists(st.integers(), max_size=2),
    st.tuples(st.integers(), st.none()),
    arrays.arrays(arrays.scalar_dtypes() | st.just(np.dtype(object)), arrays.array_shapes(min_dims=0, max_side=3)),
)


@settings(max_examples=300)
@given(path=st.sampled_from(list(PARTS)), value=STRANGE | NUMBERS | st.floats() | st.none())
def test_whatever_else_stands_in_a_model_is_refused(emulated_decoder: CudaDecoder, path: Place, value: Any) -> None:
    # Any number is an epsilon, and there may be no bias.
    assume(path != ("epsilon",) or not isinstance(value, (int, float)))
    assume(value is not None or path[-1] != 5 or len(path) == 3)
    with pytest.raises(KernelArgumentError):
        emulated_decoder(changed(small_model(), path, value), PLACES)


@pytest.mark.parametrize("capacity", [0, -1, PLACES + 1, 2**31, 2**64, True, 1.0, None, "64"])
def test_a_capacity_beyond_the_rotation_or_that_is_no_number_is_refused(
    emulated_decoder: CudaDecoder, capacity: Any
) -> None:
    with pytest.raises(KernelArgumentError, match="capacity: got "):
        emulated_decoder(small_model(), capacity)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": ()}, "layers: got 0, expected 1 to 1023"),
        ({"layers": small_model()["layers"] * 1024}, "layers: got 1024, expected 1 to 1023"),
        ({"kv_heads": 3}, "heads: got 2, expected a multiple of kv_heads"),
        ({"head_size": 16, "rope_cos": np.zeros((64, 8), np.float32), "rope_sin": np.zeros((64, 8), np.float32)},
         "head_size: got 16, expected 32, 64 or 128"),
        ({"choosable": VOCABULARY + 1}, "choosable: got 301, expected 1 to the 300 rows of the head"),
        ({"embedding_scales": None}, "embedding_scales: got nothing, expected an array for an int8 table"),
        ({"embeddings": np.zeros((VOCABULARY, WIDTH), np.float16)}, "embedding_scales: got an array"),
        ({"intermediate": 41}, r"layers\[0\]\.gate_up\.rows: got 40, expected 41"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_each_other_are_refused(emulated_decoder: CudaDecoder, change: Model, words: str) -> None:
    with pytest.raises(KernelArgumentError, match=words):
        emulated_decoder({**small_model(), **change}, PLACES)


def test_a_layer_of_eight_bits_is_refused(emulated_decoder: CudaDecoder) -> None:
    records = np.zeros(_native.int8_head_shape(WIDTH, 40, WIDTH), np.uint8)
    down = (records, WIDTH, 40, WIDTH, 8, None)
    with pytest.raises(KernelArgumentError, match=r"layers\[0\]\.bits: got 8, expected 4: eight bits are for the head"):
        emulated_decoder(changed(small_model(), ("layers", 0, 5), down), PLACES)


def call(sequence: int, **changes: Any) -> dict[str, Any]:
    """The arguments of a call of two rows, which is valid without changes."""
    given = {
        "caches": [sequence] * 2,
        "positions": [0, 1],
        "x": [3, 4],
        "wanted": [1, 0],
        "logits": np.zeros((2, VOCABULARY), np.float32),
        "choices": [(1.0, 0, 1.0, 0.5), GREEDY],
    }
    return given | changes


@pytest.fixture(scope="module")
def fuzzed(small: Any) -> Iterator[Callable[..., None]]:
    """Makes a call that has to be refused; at the end, nothing has changed."""
    sequence = small.new_cache()
    before, first = small.run(**call(sequence)), read(small, sequence, 2)

    def refused(match: str | None = None, /, **changes: Any) -> None:
        with pytest.raises(KernelArgumentError, match=match):
            small.run(**call(sequence, **changes))

    yield refused
    np.testing.assert_array_equal(read(small, sequence, 2), first)
    assert small.run(**call(sequence)) == before
    small.free_cache(sequence)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caches": [77, 77]}, "cache: got 77, expected one that is there"),
        ({"caches": [0, 0]}, "cache: got 0, expected one that is there"),
        ({"caches": [1]}, "positions: got 2, expected 1"),
        ({"positions": [0, 0]}, "position: got 0, expected each position once"),
        ({"positions": [0, -1]}, "position: got -1, expected 0 to 63"),
        ({"positions": [0, PLACES]}, "position: got 64, expected 0 to 63"),
        ({"positions": [0, 1, 2]}, "positions: got 3, expected 2"),
        (
            {"caches": [], "positions": [], "x": [], "wanted": [], "logits": None, "choices": []},
            "rows: got 0, expected 1 to 256",
        ),
        ({"x": [3]}, "tokens: got 1, expected 2"),
        ({"x": [3, VOCABULARY]}, "token: got 300, expected 0 to 299"),
        ({"x": [-1, 3]}, "token: got -1, expected 0 to 299"),
        ({"x": (3, 4)}, "x: got tuple"),
        ({"x": np.zeros((1, WIDTH), np.float32)}, r"x: got float32 \[1, 32\] where \[2, 32\] is needed"),
        ({"x": np.zeros((WIDTH, 2), np.float32).T}, r"x: got float32 \[2, 32\], not contiguous"),
        ({"wanted": [0, 2]}, "wanted: got 2, expected 0 to 1"),
        ({"wanted": [-1, 0]}, "wanted: got -1, expected 0 to 1"),
        ({"wanted": [0] * 9, "logits": None}, "wanted: got 9, expected at most 8"),
        ({"wanted": [0]}, r"logits: got float32 \[2, 300\] where \[1, 300\] is needed"),
        ({"logits": None, "choices": []}, "logits: got nothing, expected an array"),
        ({"logits": np.broadcast_to(np.zeros(300, np.float32), (2, 300))}, "logits: got .*not contiguous"),
        ({"logits": np.frombuffer(bytes(2400), np.float32).reshape(2, 300)}, "logits: got .*read-only"),
        ({"logits": np.zeros((2, 300))}, r"logits: got float64 \[2, 300\]"),
        ({"choices": [GREEDY]}, "choices: got 1, expected one for each wanted row, or none"),
        ({"choices": [GREEDY, GREEDY[:3]]}, "choices: got tuple, expected"),
        ({"choices": [GREEDY, list(GREEDY)]}, "choices: got list, expected"),
    ],
)
def test_a_call_that_cannot_be_made_is_refused_by_the_arguments_name(
    fuzzed: Callable[..., None], changes: dict[str, Any], words: str
) -> None:
    fuzzed(words, **changes)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        *((0, value, "inverse_temperature: got ") for value in (-1.0, NAN, INFINITE, 1e39, True, None, "1", 2**70)),
        *((1, value, "top_k: got ") for value in (-1, 2**31, 2**32, -(2**32), 2**70, 1.0, True, None, NAN)),
        *((2, value, "top_p: got ") for value in (0.0, -0.5, 1.0001, NAN, INFINITE, True, None)),
        *((3, value, "uniform: got ") for value in (-0.1, 1.0, NAN, INFINITE, True, None, "0.5")),
    ],
)
def test_a_choice_out_of_range_is_refused(fuzzed: Callable[..., None], place: int, value: Any, words: str) -> None:
    choice = tuple(value if index == place else good for index, good in enumerate((1.0, 0, 1.0, 0.5)))
    fuzzed(words, choices=[GREEDY, choice])


def test_more_rows_than_a_call_takes_or_of_several_sequences_in_a_prompt_are_refused(small: Any) -> None:
    one, other = small.new_cache(), small.new_cache()
    x = np.zeros((9, WIDTH), np.float32)
    for caches, positions in (
        ([one] * 8 + [other], range(9)),
        ([one] * 9, [*range(8), 9]),
        ([one] * 9, range(9, 0, -1)),
    ):
        with pytest.raises(KernelArgumentError, match="rows: got 9, expected at most 8, or positions of one cache"):
            small.run(caches, list(positions), x, [], None)
    with pytest.raises(KernelArgumentError, match="rows: got 257, expected 1 to 256"):
        small.run([one] * 257, list(range(257)), [3] * 257, [], None)
    for made in (one, other):
        small.free_cache(made)


@settings(max_examples=200)
@given(
    name=st.sampled_from(["caches", "positions", "x", "wanted", "choices"]),
    value=STRANGE | NUMBERS | st.floats() | st.none(),
    second=st.booleans(),
)
def test_whatever_else_stands_in_a_list_is_refused(
    fuzzed: Callable[..., None], name: str, value: Any, second: bool
) -> None:
    values = [*call(1)[name]]
    assume(type(value) is not int or not 0 <= value <= 1)
    values[second] = value
    fuzzed(**{name: values})


@settings(max_examples=100)
@given(name=st.sampled_from(["x", "logits"]), value=STRANGE | st.floats() | st.integers())
def test_whatever_else_is_given_as_an_array_is_refused(fuzzed: Callable[..., None], name: str, value: Any) -> None:
    fuzzed(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": 77}, "cache: got 77, expected one that is there"),
        ({"cache": -1}, "cache: got -1, expected one that is there"),
        ({"position": -1}, "position: got -1, expected 0 to 60"),
        ({"position": 61}, "position: got 61, expected 0 to 60"),
        ({"position": -(2**63)}, "position: got -9223372036854775808"),
        ({"token": -1}, "token: got -1, expected 0 to 299"),
        ({"token": VOCABULARY}, "token: got 300, expected 0 to 299"),
        ({"choices": []}, "choices: got 0, expected 1 to 256"),
        ({"choices": [GREEDY] * 257}, "choices: got 257, expected 1 to 256"),
        ({"choices": [(0.0, 0, NAN, 0.5)]}, "top_p: got nan"),
        ({"choices": [None]}, "choices: got NoneType"),
    ],
)
def test_a_chain_that_cannot_be_run_is_refused(small: Any, sequence: int, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelArgumentError, match=words):
        small.run_chain(**{"cache": sequence, "position": 0, "token": 3, "choices": [GREEDY] * 4, **changes})


def test_a_chain_needs_an_embedding_for_all_that_may_be_chosen(emulated_decoder: CudaDecoder) -> None:
    model = small_model()
    fewer = {"embeddings": model["embeddings"][:200], "embedding_scales": model["embedding_scales"][:200]}
    decoder = emulated_decoder({**model, **fewer}, PLACES)
    with pytest.raises(KernelArgumentError, match="choosable: got 290, expected at most the tokens of the table"):
        decoder.run_chain(decoder.new_cache(), 0, 3, [GREEDY])


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 33), np.float16),
        np.zeros((1, 32), np.float16),
        np.zeros((3, 32), np.float16),
        np.zeros((2, 32), np.float32),
        np.zeros((2, 64), np.float16)[:, ::2],
        np.zeros(64, np.float16),
        np.zeros((2, (PLACES + 1) * 32), np.float16),
        None,
        [[0.0]],
    ],
    ids=["no whole positions", "a row too few", "too many", "float32", "strided", "1-D", "too long", "None", "a list"],
)
def test_keys_and_values_of_another_shape_are_refused(small: Any, sequence: int, rows: Any) -> None:
    for use in (small.read_cache, small.write_cache):
        with pytest.raises(KernelArgumentError):
            use(sequence, rows)


def test_keys_and_values_are_not_read_into_what_is_read_only(small: Any, sequence: int) -> None:
    values = np.zeros((2, 32), np.float16)
    values.flags.writeable = False
    with pytest.raises(KernelArgumentError, match=r"to: got .*read-only"):
        small.read_cache(sequence, values)
    small.write_cache(sequence, values)


def test_a_cache_that_was_freed_or_never_made_is_not_used(small: Any) -> None:
    freed, values = small.new_cache(), np.zeros((2, 32), np.float16)
    small.free_cache(freed)
    for unknown in (freed, 0, -1, 2**62):
        for use in (
            lambda cache: small.run(**call(cache)),
            lambda cache: small.run_chain(cache, 0, 3, [GREEDY]),
            lambda cache: small.read_cache(cache, values),
            lambda cache: small.write_cache(cache, values),
        ):
            with pytest.raises(KernelArgumentError, match=f"cache: got {unknown}, expected one that is there"):
                use(unknown)
    # The number of one is given to no other.
    assert small.new_cache() > freed


# --- a head of eight bits ---------------------------------------------------------------------------------------------

VALUES, SCALES = np.full((40, 96), 129, np.uint8), np.ones((40, 3), np.float16)
RECORDS = np.zeros(_native.int8_head_shape(40, 70, 32), np.uint8)


def test_rows_beyond_the_last_are_those_of_zeros() -> None:
    records = RECORDS.copy()
    _native.int8_head_pack(records, VALUES, SCALES, 32)
    panel, record = RECORDS.shape[0], 32 * (32 + 2)
    assert records.shape == (panel, 3 * record) == (2, 3264)
    last = records[1].reshape(3, record)
    values, scales = last[:, : 32 * 32].reshape(3, 8, 32, 4), last[:, 32 * 32 :].copy().view(np.float16)
    # Eight of the 32 rows of the second panel are there; 128 stands for zero.
    assert (values[:, :, :8] == 129).all()
    assert (values[:, :, 8:] == 128).all()
    assert (scales == np.where(np.arange(32) < 8, 1, 0)).all()


@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [
        *((rows, 70, 32) for rows in (0, -1, 2**24 + 1, 2**62, 2**64, True, 40.0, None)),
        *((40, columns, 32) for columns in (0, -1, 2**62, "70")),
        *((40, 70, group) for group in (0, -32, 16, 96, 2**62, None)),
    ],
)
def test_a_head_of_impossible_size_has_no_records(rows: Any, columns: Any, group: Any) -> None:
    with pytest.raises(KernelArgumentError):
        _native.int8_head_shape(rows, columns, group)


@pytest.mark.parametrize(
    "changes",
    [
        *({"group": group} for group in (64, 0, -32, True, None)),
        *({"values": values} for values in (VALUES[:, 1:], VALUES[:39], VALUES.view(np.int8), VALUES.T, None)),
        *({"scales": scales} for scales in (SCALES[:39], SCALES[:0], SCALES[:, :0], SCALES.astype(np.float32))),
        *({"records": records} for records in (RECORDS[:1], RECORDS[:, 1:], np.broadcast_to(RECORDS[:1], (2, 3264)))),
        {"records": np.frombuffer(bytes(2 * 3264), np.uint8).reshape(2, 3264)},
    ],
)
def test_what_does_not_make_records_of_a_head_is_refused(changes: dict[str, Any]) -> None:
    given = {"records": RECORDS.copy(), "values": VALUES, "scales": SCALES, "group": 32} | changes
    with pytest.raises(KernelArgumentError):
        _native.int8_head_pack(**given)
