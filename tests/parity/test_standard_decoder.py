"""A decoder in operators of ONNX alone computes what its first graph computes, on static KV caches, and so does CUDA's.

The graphs run on ONNX Runtime's CPU provider; new KV caches hold garbage (see ``standard_runner``).
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_graphs_decoder import CONFIGS, POSITIONS, ROWS, Case, assert_close, build, oracle
from test_int4_ops_graph import MOLECULES, QUESTION, Shifted
from test_reference import CASES, NEW_TOKENS, REFERENCE, read_inputs, relative_difference

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.base import Decoder
from biomedgpt_edge.decoder.graph import ChosenGraph
from biomedgpt_edge.decoder.kv_cache import KeyValues
from biomedgpt_edge.decoder.onnx import OnnxDecoder
from biomedgpt_edge.decoder.static_kv import StaticState
from biomedgpt_edge.engine import DEMO_BUNDLE, PreparedPrompt
from biomedgpt_edge.errors import ClosedError, KernelArgumentError, PromptTooLongError
from biomedgpt_edge.manifest import PORTABLE, DecoderSpec
from biomedgpt_edge.onnx_header import STANDARD_OPERATORS, read_header
from biomedgpt_edge.portable import derived_data, derived_graph, of_decoder, of_standard
from biomedgpt_edge.splice import EmbeddingTable
from biomedgpt_export.errors import ModelConfigError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.builder import CONTRIB, STANDARD_OPSET, GraphBuilder
from biomedgpt_export.graphs.cuda import write_cuda
from biomedgpt_export.graphs.decoder import build_decoder
from biomedgpt_export.graphs.linear import ACCURACY_LEVELS, Linears, Precision
from biomedgpt_export.graphs.matrices import HEAD
from biomedgpt_export.graphs.standard import Element, Standard, write_standard
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.layouts import GpuGraphs, write_gpu_graphs, write_in_records, write_standard_graph
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize.int4 import Int4Weight
from biomedgpt_export.quantize.rtn import RoundToNearest
from standard_runner import Cache, CountingRunner, OrtRunner, RunnerDecoder, open_exact

# By precision of activations, how far from float32, relative to the largest logit.
TOLERANCES: Mapping[Element, float] = {"fp32": 2e-5, "fp16": 1e-2}
IDS = np.random.default_rng(2).integers(0, ROWS, POSITIONS)


@dataclass
class Built:
    """A decoder's first graph, with transformers' model, and the standard one made of it."""

    case: Case
    graph: Path
    written: Standard
    decoder: RunnerDecoder

    @property
    def runner(self) -> OrtRunner:
        return self.decoder.runner

    @property
    def embeddings(self) -> np.ndarray:
        """Of ``IDS``."""
        found: np.ndarray = self.case.table[IDS]
        return found

    def open(self, capacity: int = POSITIONS, start: KeyValues | None = None) -> StaticState:
        return self.decoder.open(capacity, start)


Builds = Callable[..., Built]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Each of them once; to be read only."""
    known = dict[tuple[str, Precision, Element], Built]()

    def make(name: str, precision: Precision = "fp32", element: Element = "fp32") -> Built:
        key = name, precision, element
        if key not in known:
            folder = tmp_path_factory.mktemp("standard")
            case = build(folder, CONFIGS[name], precision)
            graph = folder / "decoder-standard.onnx"
            written = write_standard(folder / "decoder.onnx", graph, element=element)
            runner = OrtRunner(graph, case.spec)
            known[key] = Built(case, graph, written, RunnerDecoder(runner, case.spec, EmbeddingTable(case.table)))
        return known[key]

    return make


# --- as transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_at_all_positions_are_those_of_transformers(built: Builds, name: str) -> None:
    one = built(name)
    embeddings = np.random.default_rng(1).standard_normal((POSITIONS, one.case.spec.hidden_size)).astype(np.float32)
    found = one.runner.run(one.runner.new_cache(), embeddings, 0, np.arange(POSITIONS))
    assert_close(found, one.case.expected(embeddings))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("split", [(1,), (9, 8), (5, 1, 11)])
def test_prefill_in_pieces_and_steps_through_the_cache_change_nothing(
    built: Builds, name: str, split: tuple[int, ...]
) -> None:
    one = built(name)
    expected, ends = one.case.expected(one.embeddings), list(itertools.accumulate(split))
    with one.open() as state:
        for start, end in itertools.pairwise([0, *ends]):
            assert_close(state.prefill(one.embeddings[start:end]), expected[end - 1])
        for position in range(ends[-1], POSITIONS):
            assert_close(state.step(int(IDS[position])), expected[position])
        assert state.length == POSITIONS


@pytest.mark.parametrize("name", CONFIGS)
def test_several_steps_at_once_give_the_logits_of_each(built: Builds, name: str) -> None:
    one = built(name)
    expected = one.case.expected(one.embeddings)
    with one.open() as state:
        state.prefill(one.embeddings[:14])
        for start, end in itertools.pairwise([14, 15, 23, 40]):
            assert_close(state.steps(IDS[start:end].tolist()), expected[start:end])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_cut_off_is_forgotten(built: Builds, name: str) -> None:
    one = built(name)
    other = np.concatenate([IDS[:11], (IDS[11:] + 1) % ROWS])
    expected = one.case.expected(one.case.table[other])
    with one.open() as state:
        state.prefill(one.embeddings)
        state.truncate(11)
        assert_close(state.prefill(one.case.table[other[11:30]]), expected[29])
        state.truncate(29)
        assert_close(state.steps(other[29:34].tolist()), expected[29:34])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_begins_where_another_one_was(built: Builds, name: str) -> None:
    one = built(name)
    expected = one.case.expected(one.embeddings)
    with one.open() as first:
        first.prefill(one.embeddings[:20])
        start = first.key_values()
        assert (start.positions, start.array.shape) == (20, one.decoder.kv.stacked(20))
        with one.open(POSITIONS, start) as second:
            assert second.length == 20
            np.testing.assert_array_equal(second.key_values().array, start.array)
            assert_close(second.prefill(one.embeddings[20:33]), expected[32])
            # Each has a cache of its own.
            assert_close(first.step(int(IDS[20])), expected[20])
            assert_close(second.step(int(IDS[33])), expected[33])


def test_every_position_of_the_context_has_its_own_rotation(built: Builds) -> None:
    one = built("plain")
    context = one.case.spec.context
    embeddings = np.random.default_rng(4).standard_normal((context, one.case.spec.hidden_size)).astype(np.float32)
    found = one.runner.run(one.runner.new_cache(), embeddings, 0, np.arange(context))
    assert_close(found, one.case.expected(embeddings))


def test_logits_are_computed_at_the_positions_asked_for(built: Builds) -> None:
    one = built("plain")
    wanted = np.array([5, 0, 5, 39])
    found = one.runner.run(one.runner.new_cache(), one.embeddings, 0, wanted)
    assert_close(found, one.case.expected(one.embeddings)[wanted])


# --- what a cache holds beside what was written -----------------------------------------------------------------------


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize("name", ["plain", "grouped with bias"])
def test_what_a_new_cache_holds_changes_no_bit(built: Builds, name: str, element: Element) -> None:
    one = built(name, "int4", element)
    found = []
    for clear in (False, True):
        cache, runs = one.runner.new_cache(), []
        for array in cache.values():
            assert np.abs(array).min() >= 100
            array *= not clear
        for start, end in itertools.pairwise([0, 7, 8, 30]):
            runs.append(one.runner.run(cache, one.embeddings[start:end], start, np.arange(end - start)))
        found.append(np.concatenate(runs))
    np.testing.assert_array_equal(*found)


class _Unmasked(OrtRunner):
    """Everybody attends to ``more`` positions than there are."""

    more = 1

    def inputs(self, embeddings: Any, start: int, wanted: Any) -> Mapping[str, Any]:
        given = dict(super().inputs(embeddings, start, wanted))
        seen = np.arange(given["mask"].shape[-1]) <= given["position_ids"].reshape(-1, 1) + self.more
        return {**given, "mask": np.where(seen, 0, given["mask"]).astype(given["mask"].dtype)}


def test_a_mask_that_shows_one_position_too_many_is_noticed_here(built: Builds) -> None:
    one = built("plain")
    runner, expected = _Unmasked(one.graph, one.case.spec), one.case.expected(one.embeddings)
    for more, same in ((0, True), (1, False)):
        runner.more = more
        found = runner.run(runner.new_cache(), one.embeddings[:13], 0, np.array([12]))
        error = np.abs(found - expected[12]).max() / np.abs(expected[12]).max()
        assert error < 2e-5 if same else error > 0.1


def test_nothing_is_written_but_the_new_positions(built: Builds) -> None:
    one = built("grouped queries")
    cache = one.runner.new_cache()
    before: Cache = {name: array.copy() for name, array in cache.items()}
    one.runner.run(cache, one.embeddings[:9], 20, np.array([0]))
    for name, array in cache.items():
        np.testing.assert_array_equal(np.delete(array, np.s_[20:29], 2), np.delete(before[name], np.s_[20:29], 2))
        assert (np.abs(array[:, :, 20:29]) < 100).all()


# --- a state ----------------------------------------------------------------------------------------------------------


def test_more_positions_than_there_are_in_a_cache_are_refused(built: Builds) -> None:
    one = built("plain")
    context = one.case.spec.context
    before = one.runner.caches
    with pytest.raises(PromptTooLongError, match=f"may take {context + 1} positions; KV caches on the GPU have 64"):
        one.open(context + 1)
    assert one.runner.caches == before
    with one.open(10) as state:
        state.prefill(one.embeddings[:8])
        expected = state.key_values().array
        with pytest.raises(ValueError, match="11 positions do not fit a KV cache of 10"):
            state.prefill(one.embeddings[8:11])
        with pytest.raises(ValueError, match="11 positions do not fit a KV cache of 10"):
            state.reserve(11)
        state.reserve(10)
        # What was refused has changed nothing.
        assert state.length == 8
        np.testing.assert_array_equal(state.key_values().array, expected)


def test_a_cache_is_given_back_once_and_not_used_afterwards(built: Builds) -> None:
    one = built("plain")
    before = one.runner.caches
    with one.open() as state:
        state.prefill(one.embeddings[:3])
        assert one.runner.caches == before + 1
    state.close()
    assert one.runner.caches == before
    for use in (lambda: state.step(0), lambda: state.reserve(1), state.key_values):
        with pytest.raises(ClosedError):
            use()


def test_a_state_that_is_dropped_gives_its_cache_back(built: Builds) -> None:
    one = built("plain")
    before = one.runner.caches
    state = one.open()
    state.prefill(one.embeddings[:3])
    assert one.runner.caches == before + 1
    del state
    gc.collect()
    assert one.runner.caches == before


def test_more_keys_and_values_than_a_state_has_room_for_are_refused(built: Builds) -> None:
    one = built("plain")
    with one.open() as state:
        state.prefill(one.embeddings[:8])
        start = state.key_values()
    before = one.runner.caches
    with pytest.raises(ValueError, match="8 positions do not fit a KV cache of 5"):
        one.open(5, start)
    assert one.runner.caches == before


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array[:, :, :-1],
        lambda array: array[:-1],
        lambda array: array[:, :1],
        lambda array: array[..., :-1],
        lambda array: array.astype(np.float16),
    ],
    ids=["a position", "an array", "a head", "an element", "half"],
)
def test_keys_and_values_of_another_decoder_are_refused_and_leave_no_cache(
    built: Builds, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    one = built("plain")
    with one.open() as state:
        state.prefill(one.embeddings[:6])
        start = state.key_values()
    before = one.runner.caches
    with pytest.raises(KernelArgumentError, match=r"this decoder has float32\[4, 4, 6, 16\]"):
        one.open(POSITIONS, KeyValues(6, change(start.array)))
    assert one.runner.caches == before


@pytest.mark.parametrize(
    "embeddings",
    [np.zeros((0, 48), np.float32), np.zeros((3, 47), np.float32), np.zeros((3, 48)), np.zeros((1, 3, 48), np.float32)],
    ids=["none", "narrow", "float64", "3-D"],
)
def test_embeddings_of_another_shape_are_refused(built: Builds, embeddings: np.ndarray) -> None:
    with built("plain").open() as state:
        with pytest.raises(KernelArgumentError, match=r"the decoder reads float32\[T, 48\]"):
            state.prefill(embeddings)
        assert state.length == 0


def test_a_state_is_cut_to_what_it_has(built: Builds) -> None:
    one = built("plain")
    with one.open() as state:
        state.prefill(one.embeddings[:6])
        for length in (-1, 7):
            with pytest.raises(ValueError, match=f"of 6 positions cannot be cut to {length}"):
                state.truncate(length)
        state.truncate(6)
        state.truncate(0)
        assert (state.length, state.key_values().array.shape[2]) == (0, 0)
        assert_close(state.prefill(one.embeddings), one.case.expected(one.embeddings)[-1])


# --- as the first graph -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_stored_in_fewer_bits_gives_the_logits_of_the_first_graph(
    built: Builds, name: str, precision: Precision, element: Element
) -> None:
    one = built(name, precision, element)
    with one.case.open(POSITIONS) as state:
        expected = state.logits(one.embeddings, np.arange(POSITIONS))
    cache = one.runner.new_cache()
    runs = [
        one.runner.run(cache, one.embeddings[start:end], start, np.arange(end - start))
        for start, end in itertools.pairwise([0, 13, 14, POSITIONS])
    ]
    assert_close(np.concatenate(runs), expected, TOLERANCES[element])
    layers = one.case.spec.layers
    assert one.written == Standard(int4=(5 * layers + 1) * (precision == "int4"))


@pytest.mark.parametrize(
    ("name", "precision"), [("grouped queries", "fp32"), ("three layers, odd widths", "int4"), ("tied head", "fp16")]
)
def test_the_reference_evaluator_of_onnx_computes_the_same(built: Builds, name: str, precision: Precision) -> None:
    one = built(name, precision)
    onnx.checker.check_model(str(one.graph), full_check=True)
    cache, wanted = one.runner.new_cache(), np.arange(12)
    feeds = {**one.runner.inputs(one.embeddings[:12], 0, wanted), **{f"past_{k}": v for k, v in cache.items()}}
    model = onnx.load(str(one.graph))
    names = [value.name for value in model.graph.output]
    evaluated = dict(zip(names, ReferenceEvaluator(model).run(names, feeds), strict=True))
    assert_close(one.runner.run(cache, one.embeddings[:12], 0, wanted), evaluated.pop("logits"))
    assert evaluated.keys() == {f"present_{name}" for name in cache}
    for name, array in cache.items():
        assert_close(array[:, :, :12], evaluated[f"present_{name}"][:, :, :12])


# --- the reference checkpoint in int4 ---------------------------------------------------------------------------------


def with_exact_activations(source: Path, folder: Path) -> Path:
    """A copy of a graph whose MatMulNBits do not round activations to eight bits."""
    folder.mkdir()
    path, model = folder / source.name, onnx.load(str(source), load_external_data=False)
    changed = [
        attribute for node in model.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"
    ]
    assert changed
    for attribute in changed:
        attribute.i = ACCURACY_LEVELS["fp32"]
    path.write_bytes(model.SerializeToString())
    shutil.copyfile(source.with_suffix(".data"), path.with_suffix(".data"))
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """One whose decoder is the first graph, in float32, and one whose decoder is the standard graph in float32."""
    folder = tmp_path_factory.mktemp("reference")
    layout = Layout.locate(REFERENCE)
    options = ExportOptions(
        layout,
        folder / "bundle",
        "int4",
        quantizer="rtn",
        decoder_layout="portable",
        proof="none",
        protein_encoder="fp16",
    )
    export_bundle(options, lambda line: None)
    bundle = Bundle.open(options.out)
    source, spec = bundle.file("decoder.onnx"), bundle.manifest.decoder
    exact = with_exact_activations(source, folder / "exact")
    first = OnnxDecoder(bundle, threads=1, graph=ChosenGraph(exact, PORTABLE))
    assert write_standard(source, folder / "standard.onnx", element="fp32") == Standard(int4=11)
    second = RunnerDecoder(OrtRunner(folder / "standard.onnx", spec), spec, bundle.embeddings)
    return Engine(bundle, first, threads=1), Engine(bundle, second, threads=1)


@dataclass
class Turn:
    """What both answered, and how far apart their first logits were."""

    difference: float
    tokens: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def turns(engines: tuple[Engine, Engine]) -> dict[tuple[int, int], Turn]:
    """Of all cases, by case and turn."""
    found = {}
    for case, fields in enumerate(CASES):
        chats = [engine.chat(raw=True) for engine in engines]
        for index, turn in enumerate(fields["turns"]):
            inputs = read_inputs(fields) if index == 0 else []
            first, second = (chat.engine.first_logits(chat.prepare(turn["question"], *inputs)) for chat in chats)
            answers = [chat.ask(turn["question"], *inputs, max_new_tokens=NEW_TOKENS) for chat in chats]
            difference = relative_difference(second, first)
            found[case, index] = Turn(difference, [answer.token_ids for answer in answers])
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_turn_of_the_reference_gets_the_same_answer(turns: dict[tuple[int, int], Turn], case: int) -> None:
    for index in range(len(CASES[case]["turns"])):
        turn = turns[case, index]
        assert turn.difference < 1e-4
        first, second = turn.tokens
        assert first == second
        assert first


def test_all_turns_were_compared(turns: dict[tuple[int, int], Turn]) -> None:
    assert list(turns) == [(case, index) for case, fields in enumerate(CASES) for index in range(len(fields["turns"]))]
    assert (len(CASES), len(turns)) == (30, 32)
    # Most answers end with the last token that was asked for: none is empty or a single one.
    lengths = [len(turn.tokens[0]) for turn in turns.values()]
    assert sum(length == NEW_TOKENS for length in lengths) > 25


# --- the packaged demo in float16 -------------------------------------------------------------------------------------

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ"
QUESTIONS: dict[str, tuple[str, Molecule | Protein]] = {
    **{name: (QUESTION, Molecule.from_smiles(smiles)) for name, smiles in MOLECULES.items()},
    "groups": ("Which functional groups does this molecule contain?", Molecule.from_smiles(MOLECULES["nicotine"])),
    "protein": ("What are the subcellular locations of this protein?", Protein.from_sequence(PROTEIN)),
}
TOKENS = 48
# Steps of an answer where two tokens are so close, in logits, that rounding decides. This bundle has none among these.
NEAR_TIES: dict[str, set[int]] = {}
NEAR_TIE = 0.02


@dataclass
class Demo:
    """Decoders of the packaged bundle: the exact one, and those in float16 by what they are for."""

    engine: Engine
    exact: Decoder
    halves: Mapping[str, Decoder]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    bundle = Bundle.open(DEMO_BUNDLE)
    spec, table, own = bundle.manifest.decoder, bundle.embeddings, of_decoder(bundle)
    assert own is not None
    assert spec.cuda is not None
    portable, standard = derived_graph(own, "once"), derived_graph(of_standard(bundle)[0], "once")
    exact = with_exact_activations(portable, tmp_path_factory.mktemp("demo") / "exact")
    runners = {"standard": OrtRunner(standard, spec), "cuda": CountingRunner(portable.with_name(spec.cuda), spec)}
    halves = {name: RunnerDecoder(runner, spec, table) for name, runner in runners.items()}
    assert all(decoder.kv.element == "fp16" for decoder in halves.values())
    with Engine.load(DEMO_BUNDLE, threads=1) as engine:
        yield Demo(engine, OnnxDecoder(bundle, threads=1, graph=ChosenGraph(exact, PORTABLE)), halves)


def greedy(decoder: Decoder, prompt: PreparedPrompt, eos: int) -> tuple[list[int], np.ndarray]:
    """Tokens, EOS included, and the logits ``[tokens, vocabulary]`` that they were chosen by."""
    with decoder.open(len(prompt) + TOKENS) as state:
        logits = [state.prefill(prompt.embeddings).copy()]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < TOKENS and tokens[-1] != eos:
            logits.append(state.step(tokens[-1]).copy())
            tokens.append(int(logits[-1].argmax()))
    return tokens, np.array(logits)


def forced(decoder: Decoder, prompt: PreparedPrompt, tokens: list[int]) -> np.ndarray:
    """Logits of the same tokens, so that one near tie does not hide what comes after it."""
    with decoder.open(len(prompt) + TOKENS) as state:
        return np.array([state.prefill(prompt.embeddings).copy(), *(state.step(token).copy() for token in tokens[:-1])])


@pytest.mark.parametrize("kind", ["standard", "cuda"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_in_float16_the_demo_chooses_the_same_tokens(demo: Demo, name: str, kind: str) -> None:
    prompt = demo.engine.prepare(*QUESTIONS[name])
    tokens, expected = greedy(demo.exact, prompt, demo.engine.bundle.tokenizer.eos_id)
    found = forced(demo.halves[kind], prompt, tokens)
    assert len(tokens) > 4
    assert 0 < np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    ties = {
        step: float(expected[step, token] - expected[step, found[step].argmax()])
        for step, token in enumerate(tokens)
        if found[step].argmax() != token
    }
    assert ties.keys() <= NEAR_TIES.get(name, set()), f"tokens differ at steps, and by logits, {ties}"
    assert all(gap < NEAR_TIE for gap in ties.values())


@pytest.mark.parametrize("kind", ["standard", "cuda"])
def test_in_float16_prompts_may_be_cut_and_caches_handed_on(demo: Demo, kind: str) -> None:
    prompt, decoder = demo.engine.prepare(*QUESTIONS["protein"]), demo.halves[kind]
    tokens, expected = greedy(demo.exact, prompt, -1)
    with decoder.open(len(prompt)) as first:
        first.prefill(prompt.embeddings[:17])
        start = first.key_values()
    with decoder.open(len(prompt) + TOKENS, start) as state:
        state.prefill(prompt.embeddings[17:30])
        state.truncate(20)
        found = [state.prefill(prompt.embeddings[20:]).copy(), *state.steps(tokens[:9])]
    assert_close(np.array(found), expected[:10], 1e-2)


def test_the_packaged_graph_is_what_is_written_today(demo: Demo, portable_demo: Path, tmp_path: Path) -> None:
    bundle = demo.engine.bundle
    assert (portable_demo / "decoder-standard.onnx").read_bytes() == bundle.file("decoder-standard.onnx").read_bytes()
    # And its data, which is derived, what is written from the portable graph.
    assert write_standard(portable_demo / "decoder.onnx", tmp_path / "standard.onnx") == Standard(int4=31)
    derived = derived_graph(of_standard(bundle)[0], "once").with_suffix(".data")
    assert (tmp_path / "standard.data").read_bytes() == derived.read_bytes()


# --- structure --------------------------------------------------------------------------------------------------------


class _Nodes:
    """A graph's nodes by what they give, and its weights by their names."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path), load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.by_output = {output: node for node in self.nodes for output in node.output}

    def of(self, *operators: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in operators]

    def integers(self, name: str) -> list[int]:
        found: list[int] = numpy_helper.to_array(self.weights[name]).tolist()
        return found

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# Bundles in float32 have no graphs for GPUs.
@pytest.mark.parametrize(
    ("precision", "element"),
    [("fp32", "fp32"), ("fp16", "fp32"), ("fp16", "fp16"), ("int4", "fp32"), ("int4", "fp16")],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_operators_are_those_of_onnx_alone(built: Builds, name: str, precision: Precision, element: Element) -> None:
    one = built(name, precision, element)
    nodes = _Nodes(one.graph)
    assert [(opset.domain, opset.version) for opset in nodes.model.opset_import] == [("", 24)] == [("", STANDARD_OPSET)]
    assert {node.domain for node in nodes.nodes} == {""}
    assert read_header(one.graph).operators <= STANDARD_OPERATORS
    # None of them is there for nothing.
    used = {name for node in nodes.nodes for name in node.input} | {value.name for value in nodes.model.graph.output}
    assert all(used & set(node.output) for node in nodes.nodes)
    assert nodes.weights.keys() <= used


@pytest.mark.parametrize("element", TOLERANCES)
def test_every_int4_product_is_a_blocked_dequantization_and_a_product(built: Builds, element: Element) -> None:
    one = built("three layers, odd widths", "int4", element)
    nodes, sizes = _Nodes(one.graph), sizes_of_products(one.graph.with_name("decoder.onnx"))
    assert len(sizes) == one.written.int4 == 16
    found = {}
    for node in nodes.of("DequantizeLinear"):
        values = nodes.weights[node.input[0]]
        layer = node.input[0].removesuffix(".weight_int4_kn")
        rows, columns, group_size = sizes[layer]
        groups, filled = -(-columns // group_size), -(-rows // 8) * 8
        blocks = max(2, groups)
        assert values.data_type == TensorProto.INT4
        assert list(values.dims) == [groups * group_size, filled]
        assert attributes(node) == {"axis": 0, "block_size": groups * group_size // blocks}
        scales = nodes.by_output[node.input[1]].input[0] if element == "fp32" else node.input[1]
        assert nodes.weights[scales].data_type == TensorProto.FLOAT16
        assert list(nodes.weights[scales].dims) == [blocks, filled]
        assert len(node.input) == 2, "the zero is the middle"
        (product,) = nodes.readers(node.output[0])
        assert (product.op_type, product.input[1]) == ("MatMul", node.output[0])
        found[layer] = product
    assert found.keys() == sizes.keys()
    for layer, product in found.items():
        rows, columns, group_size = sizes[layer]
        source, readers = nodes.by_output.get(product.input[0]), nodes.readers(product.output[0])
        padded = -columns % group_size
        assert (source is not None and source.op_type == "Pad") == bool(padded)
        if padded:
            assert source is not None
            assert nodes.integers(source.input[1]) == [0, 0, 0, 0, 0, padded]
            assert attributes(source).get("mode", b"constant") == b"constant"
            assert len(source.input) == 2, "with zeros"
        assert [node.op_type == "Slice" for node in readers] == [rows % 8 != 0]
        if rows % 8:
            assert [nodes.integers(name) for name in readers[0].input[1:]] == [[0], [rows], [2]]
    # Of this model: 52 and 77 columns, 77 and 50 rows; but for the queries' none of all that.
    assert sum(bool(-columns % size) for _, columns, size in sizes.values()) == 4 * 3 + 1
    assert sum(rows % 8 != 0 for rows, *_ in sizes.values()) == 4 * 3 + 1


def sizes_of_products(source: Path) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and group size of the MatMulNBits of a graph, by layer."""
    model = onnx.load(str(source), load_external_data=False)
    found = [(node.input[1], attributes(node)) for node in model.graph.node if node.op_type == "MatMulNBits"]
    return {name.removesuffix(".weight_int4"): (of["N"], of["K"], of["block_size"]) for name, of in found}


@pytest.mark.parametrize("element", TOLERANCES)
def test_the_cache_is_static_and_the_mask_reaches_every_attention(built: Builds, element: Element) -> None:
    one = built("grouped with bias", "int4", element)
    nodes, spec = _Nodes(one.graph), one.case.spec
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[element]
    graph = nodes.model.graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    cache = [1, spec.kv_heads, spec.context, spec.head_size]
    names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("key", "value")]
    for name in names:
        for side in ("past", "present"):
            assert values[f"{side}_{name}"].elem_type == kind
            assert [size.dim_value for size in values[f"{side}_{name}"].shape.dim] == cache
        scatter = nodes.by_output[f"present_{name}"]
        assert (scatter.op_type, attributes(scatter)) == ("TensorScatter", {"axis": 2})
        assert (scatter.input[0], scatter.input[2]) == (f"past_{name}", "write_indices")
        # What is attended to is the beginning of what was just written.
        (cut,) = nodes.readers(f"present_{name}")
        assert cut.op_type == "Slice"
        assert [nodes.integers(cut.input[index]) for index in (1, 3)] == [[0], [2]]
        length = nodes.by_output[cut.input[2]]
        assert (length.op_type, list(length.input), attributes(length)) == ("Shape", ["mask"], {"start": -1})
        (attention,) = nodes.readers(cut.output[0])
        assert attention.op_type == "Attention"
        assert attention.input[1 if name.startswith("key") else 2] == cut.output[0]
    attentions = nodes.of("Attention")
    assert len(attentions) == spec.layers
    assert all((node.input[3], attributes(node)) == ("mask", {}) for node in attentions)
    assert values["mask"].elem_type == kind
    for name in ("position_ids", "write_indices", "logit_positions"):
        assert values[name].elem_type == TensorProto.INT64
    assert values["inputs_embeds"].elem_type == values["logits"].elem_type == TensorProto.FLOAT
    assert values.keys() == {"inputs_embeds", "logit_positions", "position_ids", "write_indices", "mask", "logits"} | {
        f"{side}_{name}" for name in names for side in ("past", "present")
    }


def test_tables_of_rotations_stay_in_float32_and_all_else_is_in_sixteen_bits(built: Builds) -> None:
    nodes = _Nodes(built("attention bias", "int4", "fp16").graph)
    kinds = {name: tensor.data_type for name, tensor in nodes.weights.items()}
    assert {name for name, kind in kinds.items() if kind == TensorProto.FLOAT} == {"rope_cos", "rope_sin"}
    assert set(kinds.values()) == {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT4, TensorProto.INT64}
    assert {"layers.0.qkv_proj.bias.half", "layers.1.o_proj.bias.half"} <= kinds.keys()


def test_the_same_source_gives_the_same_bytes(built: Builds, tmp_path: Path) -> None:
    one = built("three layers, odd widths", "int4", "fp16")
    write_standard(one.graph.with_name("decoder.onnx"), tmp_path / one.graph.name)
    for suffix in (".onnx", ".data"):
        assert (tmp_path / one.graph.name).with_suffix(suffix).read_bytes() == one.graph.with_suffix(
            suffix
        ).read_bytes()


# --- products of other kinds ------------------------------------------------------------------------------------------

COLUMNS, WIDE = 93, 45


def written(path: Path, add: Callable[[GraphBuilder, str], str], width: int = WIDE) -> Path:
    """A graph of what ``add`` makes of the input ``x`` [1, n, COLUMNS]."""
    graph = GraphBuilder(path)
    source = graph.input("x", TensorProto.FLOAT, [1, "n", COLUMNS])
    graph.node("Identity", [add(graph, source)], "y")
    graph.output("y", TensorProto.FLOAT, [1, "n", width])
    graph.save()
    return path


def matrix(rows: int = WIDE) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.1


def product(path: Path) -> np.ndarray:
    (found,) = open_exact(path).run(None, {"x": given()})
    assert found.shape[:2] == (1, 7)
    result: np.ndarray = found[0]
    return result


def given() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 7, COLUMNS)).astype(np.float32)


class Reordered:
    """Weights whose columns are stored in another order."""

    name = "reordered"

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        plain = RoundToNearest().quantize(key, weight[:, order])
        return Int4Weight(plain.packed, plain.scales, plain.columns, plain.group_size, None, order.int())


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize(
    ("linears", "layer", "expected"),
    [
        (Linears("int4", RoundToNearest()), "layer", Standard(int4=1)),
        (Linears("int4", RoundToNearest(), lm_head="int8"), HEAD, Standard(int8=1)),
        (Linears("int4", Shifted()), "layer", Standard(plain=["layer"])),
        (Linears("int4", Reordered()), "layer", Standard(int4=1)),
        (Linears("int8"), "layer", Standard(int8=1)),
        (Linears("fp16"), "layer", Standard()),
        (Linears("fp32"), "layer", Standard()),
    ],
    ids=["int4", "int8 in groups", "zero points", "in another order", "int8", "fp16", "fp32"],
)
def test_a_product_is_that_with_the_matrix_that_is_stored(
    tmp_path: Path, linears: Linears, layer: str, expected: Standard, element: Element
) -> None:
    def add(graph: GraphBuilder, source: str) -> str:
        return linears.emit(graph, source, layer, matrix(), torch.arange(WIDE) * 0.1)

    source = written(tmp_path / "graph.onnx", add)
    assert write_standard(source, tmp_path / "standard.onnx", element=element) == expected
    stored = StoredWeights(source).linear(layer).double().numpy()
    exact = given()[0].astype(np.float64) @ stored.T + np.arange(WIDE) * 0.1
    # What has zero points is float16 in any case.
    tolerance = 1e-3 if expected.plain and element == "fp32" else TOLERANCES[element]
    assert_close(product(tmp_path / "standard.onnx"), exact, tolerance)
    assert {domain for domain, _ in read_header(tmp_path / "standard.onnx").operators} == {""}


@pytest.mark.parametrize("element", TOLERANCES)
def test_weights_with_zero_points_become_float16(tmp_path: Path, element: Element) -> None:
    source = written(
        tmp_path / "graph.onnx", lambda graph, x: Linears("int4", Shifted()).emit(graph, x, "layer", matrix())
    )
    written_so = write_standard(source, tmp_path / "standard.onnx", element=element)
    assert written_so == Standard(plain=["layer"])
    nodes, stored = _Nodes(tmp_path / "standard.onnx"), StoredWeights(tmp_path / "standard.onnx")
    assert not nodes.of("DequantizeLinear")
    weight = nodes.weights["layer.weight_half"]
    assert (weight.data_type, list(weight.dims)) == (TensorProto.FLOAT16, [COLUMNS, WIDE])
    halves = StoredWeights(source).linear("layer").half().numpy().T
    np.testing.assert_array_equal(stored.array("layer.weight_half"), halves)
    # Rounding the weights is all that is lost.
    if element == "fp32":
        exact = given()[0].astype(np.float64) @ halves.astype(np.float64)
        assert_close(product(tmp_path / "standard.onnx"), exact)


def test_a_matrix_of_one_group_gets_two_blocks_of_scales(tmp_path: Path) -> None:
    source = written(
        tmp_path / "graph.onnx",
        lambda graph, x: Linears("int4", RoundToNearest()).emit(
            graph,
            graph.node("Gather", [x, graph.tensor("some", np.arange(32))], "cut", axis=-1),
            "layer",
            matrix()[:, :32],
        ),
    )
    write_standard(source, tmp_path / "standard.onnx", element="fp32")
    nodes, stored = _Nodes(tmp_path / "standard.onnx"), StoredWeights(tmp_path / "standard.onnx")
    (node,) = nodes.of("DequantizeLinear")
    assert attributes(node) == {"axis": 0, "block_size": 16}
    first, second = stored.array(f"layer.scales_kn.{WIDE}x1")
    np.testing.assert_array_equal(first, second)
    assert (first[:WIDE] != 0).all()
    assert not first[WIDE:].any()
    exact = given()[0][:, :32].astype(np.float64) @ StoredWeights(source).linear("layer").double().numpy().T
    assert_close(product(tmp_path / "standard.onnx"), exact)


# --- where the first graph lies in records ----------------------------------------------------------------------------


class SomeShifted:
    """Zero points of their own in some layers alone, which stay as they are beside records."""

    name = "some"

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        return (Shifted() if "down_proj" in key else RoundToNearest()).quantize(key, weight)


def test_data_is_derived_from_records_and_from_what_stays_beside_them(tmp_path: Path) -> None:
    of = CONFIGS["plain"]
    model, source, own = oracle(of, 0), tmp_path / "built_decoder.onnx", tmp_path / "decoder.onnx"
    graph, linears = GraphBuilder(source), Linears("int4", SomeShifted(), activations="int8", lm_head="int8")
    build_decoder(graph, of, ROWS, lambda key: model.state_dict()[key], linears, lambda line: None)
    graph.save()
    _, portable = write_in_records(source, own)
    lines = list[str]()
    written_so = write_gpu_graphs(source, own, portable, lines.append)
    assert lines == ["decoder: in 16 bits for TensorRT: layers.0.down_proj, layers.1.down_proj"]
    assert written_so.cuda == "decoder-cuda.onnx"
    standard = written_so.standard
    assert standard is not None
    assert sorted(path.name for path in tmp_path.iterdir() if "-" in path.name) == [
        "decoder-cuda.onnx",
        "decoder-portable.onnx",
        "decoder-standard.onnx",
    ]
    for described in (portable, standard):
        data = np.concatenate(list(derived_data(own, tmp_path / described.graph)))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (described.data_size, described.data_sha256)
        (tmp_path / described.data).write_bytes(data)
    embeddings = model.model.embed_tokens.weight.detach().numpy()[IDS]
    spec = DecoderSpec("", 2, 48, 80, 4, 4, 16, ROWS, of.context, of.rope_base, of.norm_eps)
    exact = with_exact_activations(source, tmp_path / "exact")
    runners = {
        "exact": CountingRunner(exact, spec),
        "standard": OrtRunner(tmp_path / standard.graph, spec),
        "cuda": CountingRunner(tmp_path / "decoder-cuda.onnx", spec),
    }
    assert [runner.kv.element for runner in runners.values()] == ["fp32", "fp16", "fp16"]
    runs = [runner.run(runner.new_cache(), embeddings, 0, np.arange(POSITIONS)) for runner in runners.values()]
    for found in runs[1:]:
        assert_close(found, runs[0], 1e-2)


def test_a_part_that_has_no_standard_graph_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path / "graph.onnx", lambda graph, x: in_relu(graph, x, "Sin"), COLUMNS)
    before, lines = sorted(tmp_path.iterdir()), list[str]()
    assert write_standard_graph(path, path, lines.append) is None
    assert lines == [
        "no standard graph for TensorRT: graph.onnx has ONNX's Sin (strange), for which there is no standard operator "
        "here."
    ]
    assert sorted(tmp_path.iterdir()) == before


# --- what is refused --------------------------------------------------------------------------------------------------


def in_relu(graph: GraphBuilder, source: str, op: str, domain: str = "", **more: Any) -> str:
    graph.node("Relu", [source], "before")
    return graph.node(op, ["before"], "strange", domain=domain, **more)


@pytest.mark.parametrize(
    ("op", "domain", "more", "what"),
    [
        ("Sin", "", {}, r"has ONNX's Sin \(strange\), for which there is no standard operator"),
        ("FastGelu", CONTRIB, {}, r"has com\.microsoft's FastGelu \(strange\), for which"),
        ("Relu", CONTRIB, {}, r"has com\.microsoft's Relu \(strange\), for which"),
        ("QuickGelu", CONTRIB, {"alpha": 1.702}, r"strange is a QuickGelu, and no SiLU"),
        ("Cast", "", {"to": TensorProto.DOUBLE}, r"has ONNX's Cast \(strange\), for which"),
        ("GroupQueryAttention", CONTRIB, {"num_heads": 3}, r"strange is no attention of a decoder"),
        ("MultiHeadAttention", CONTRIB, {"num_heads": 3}, r"before is no linear layer with a bias"),
    ],
)
def test_what_no_standard_operator_computes_is_refused_by_name_and_leaves_no_file(
    tmp_path: Path, op: str, domain: str, more: dict[str, Any], what: str
) -> None:
    path = written(tmp_path / "graph.onnx", lambda graph, x: in_relu(graph, x, op, domain, **more), COLUMNS)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelConfigError, match=what):
        write_standard(path, tmp_path / "standard.onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_operators_of_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"decoder\.onnx has biomedgpt's Int4Linear \(layers\.0\."):
        write_standard(DEMO_BUNDLE / "decoder.onnx", tmp_path / "standard.onnx")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    path = written(tmp_path / "graph.onnx", lambda graph, x: Linears("fp16").emit(graph, x, "layer", matrix()))
    (tmp_path / "standard.data").write_text("mine")
    with pytest.raises(FileExistsError):
        write_standard(path, tmp_path / "standard.onnx")
    assert (tmp_path / "standard.data").read_text() == "mine"
    assert not (tmp_path / "standard.onnx").exists()


@pytest.mark.parametrize("value", [65505.0, -1e9])
def test_values_that_float16_does_not_hold_are_refused_by_name_and_leave_no_file(tmp_path: Path, value: float) -> None:
    def add(graph: GraphBuilder, source: str) -> str:
        gain = np.where(np.arange(COLUMNS) == 3, value, 65504).astype(np.float32)
        return graph.node("Mul", [source, graph.tensor("gain", gain)], "scaled")

    path = written(tmp_path / "graph.onnx", add, COLUMNS)
    before, lines = sorted(tmp_path.iterdir()), list[str]()
    with pytest.raises(ModelConfigError, match=r"gain of graph\.onnx holds values beyond float16"):
        write_standard(path, tmp_path / "standard.onnx")
    assert write_gpu_graphs(path, path, None, lines.append) == GpuGraphs()
    assert lines == ["no graphs for GPUs: gain of graph.onnx holds values beyond float16."]
    assert sorted(tmp_path.iterdir()) == before
    # In float32 it is a number like any other.
    write_standard(path, tmp_path / "standard.onnx", element="fp32")
    expected = given()[0] * np.where(np.arange(COLUMNS) == 3, value, 65504).astype(np.float32)
    np.testing.assert_array_equal(product(tmp_path / "standard.onnx"), expected)


# --- the graph for the CUDA provider ----------------------------------------------------------------------------------


def test_the_cuda_graph_of_the_demo_computes_in_float16_over_the_portable_data(demo: Demo, tmp_path: Path) -> None:
    bundle = demo.engine.bundle
    write_cuda(bundle.file("decoder-portable.onnx"), tmp_path / "decoder-cuda.onnx")
    assert (tmp_path / "decoder-cuda.onnx").read_bytes() == bundle.file("decoder-cuda.onnx").read_bytes()
    own = of_decoder(bundle)
    assert own is not None
    portable, cuda = derived_graph(own, "once"), bundle.file("decoder-cuda.onnx")
    theirs, ours = _Nodes(portable), _Nodes(cuda)
    assert {name: tensor.SerializeToString() for name, tensor in theirs.weights.items()} == {
        name: tensor.SerializeToString() for name, tensor in ours.weights.items()
    }
    counted = Counter((node.domain, node.op_type) for node in theirs.nodes if node.op_type != "Cast")
    assert counted == Counter((node.domain, node.op_type) for node in ours.nodes if node.op_type != "Cast")
    assert not any("accuracy_level" in attributes(node) for node in ours.nodes)
    assert {attributes(node)["to"] for node in theirs.of("Cast")} == {TensorProto.FLOAT}
    wide = [node for node in ours.of("Cast") if attributes(node)["to"] == TensorProto.FLOAT]
    assert [list(node.output) for node in wide] == [["logits"]]
    values = (*ours.model.graph.input, *ours.model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    halves = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT16}
    assert halves == {name for name in kinds if name.startswith(("past_", "present_"))}
    assert len(halves) == 4 * 6
    assert kinds["inputs_embeds"] == kinds["logits"] == TensorProto.FLOAT
