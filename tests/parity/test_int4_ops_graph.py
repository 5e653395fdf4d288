"""A graph with our own int4 operators holds the matrices of the one with MatMulNBits, and gives the same answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from biomedgpt_edge import Engine, Molecule, _native
from biomedgpt_edge.decoder.kv_cache import kv_layout
from biomedgpt_edge.decoder.onnx import OnnxState
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_edge.manifest import RECORDS
from biomedgpt_edge.onnx_header import INT4_DOMAIN, read_header
from biomedgpt_export.errors import ModelConfigError
from biomedgpt_export.graphs.builder import CONTRIB, PAGE, GraphBuilder
from biomedgpt_export.graphs.int4_ops import Replaced, write_portable, write_with_int4_ops
from biomedgpt_export.graphs.linear import ACCURACY_LEVELS, Linears
from biomedgpt_export.graphs.matrices import HEAD
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.int4 import Int4Weight, pack_nibbles
from biomedgpt_export.quantize.rtn import RoundToNearest

COLUMNS, ROWS = 96, 40


def session_of(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    register_int4_ops(options)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


# --- the decoder of the demo bundle -----------------------------------------------------------------------------------

QUESTION = "Please describe this molecule."
MOLECULES = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "ethanol": "CCO",
    "glucose": "OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O",
    "nicotine": "CN1CCC[C@H]1c1cccnc1",
}
TOKENS = 48
# Steps of an answer where two tokens are so close, in logits, that rounding decides. This bundle has none among these.
NEAR_TIES: dict[str, set[int]] = {}
NEAR_TIE = 0.02


@pytest.fixture(scope="module")
def source(portable_demo: Path) -> Path:
    """The decoder of the demo with ONNX Runtime's operators."""
    return portable_demo / "decoder.onnx"


@pytest.fixture(scope="module")
def demo(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Replaced]:
    path = tmp_path_factory.mktemp("own") / "decoder.onnx"
    return path, write_with_int4_ops(source, path)


def test_every_product_is_replaced(demo: tuple[Path, Replaced]) -> None:
    path, replaced = demo
    layers = 6
    assert replaced == Replaced(linear=3 * layers + 1, gate_up=layers, kept=0)
    used = {name for _, name in read_header(path).operators}
    assert {"Int4Linear", "Int4GateUp", "CausalAttention"} <= used
    assert not used & {"MatMulNBits", "QuickGelu", "Cast", "GroupQueryAttention"}


def test_records_begin_on_pages_and_nothing_is_stored_twice(demo: tuple[Path, Replaced]) -> None:
    tensors = read_header(demo[0]).tensors
    records = [tensor for tensor in tensors if tensor.name.endswith(".records")]
    assert len(records) == demo[1].linear + demo[1].gate_up
    assert all(tensor.offset % PAGE == 0 for tensor in records)
    names = {tensor.name for tensor in onnx.load(str(demo[0]), load_external_data=False).graph.initializer}
    assert not [name for name in names if name.endswith((".weight_int4", ".scales"))]
    assert {"rope_cos", "layers.0.input_layernorm.weight"} <= names


def test_records_hold_the_bits_of_the_bundle(source: Path, demo: tuple[Path, Replaced]) -> None:
    mine, theirs = StoredWeights(demo[0]), StoredWeights(source)
    qkv = theirs.int4("layers.0.qkv_proj")
    assert_holds(mine.array("layers.0.qkv_proj.records"), qkv)
    both = mine.array("layers.3.gate_proj+layers.3.up_proj.records")
    for part, name in enumerate(("gate", "up")):
        assert_holds(both[part::2], theirs.int4(f"layers.3.{name}_proj"))


def assert_holds(records: Any, weight: Int4Weight) -> None:
    values = np.empty(weight.packed.flatten(1).shape, np.uint8)
    scales = np.empty(tuple(weight.scales.shape), np.float16)
    panels = np.ascontiguousarray(records).reshape(len(records), -1)
    _native.int4_unpack(values, scales, panels, weight.group_size)
    np.testing.assert_array_equal(values, weight.packed.flatten(1).numpy())
    np.testing.assert_array_equal(scales, weight.scales.numpy())


def test_the_same_graph_is_always_the_same_bytes(source: Path, demo: tuple[Path, Replaced], tmp_path: Path) -> None:
    write_with_int4_ops(source, tmp_path / "decoder.onnx")
    for name in ("decoder.onnx", "decoder.data"):
        assert (tmp_path / name).read_bytes() == (demo[0].parent / name).read_bytes()


@pytest.fixture(scope="module")
def engine(portable_demo: Path) -> Iterator[Engine]:
    with Engine.load(portable_demo, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with activations in float32, which both others round to eight bits."""
    path = tmp_path_factory.mktemp("exact") / "decoder.onnx"
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = ACCURACY_LEVELS["fp32"]
    path.write_bytes(model.SerializeToString())
    shutil.copyfile(source.with_suffix(".data"), path.with_suffix(".data"))
    return path


Logits = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def answers(
    engine: Engine, source: Path, exact: Path, demo: tuple[Path, Replaced]
) -> dict[str, tuple[list[int], Logits, Logits, Logits]]:
    """By molecule: MatMulNBits' greedy tokens, and the logits [tokens, vocabulary] of it, our operators and float32.

    All go on with the same tokens, so that one near tie does not hide what comes after it.
    """
    sessions = [session_of(path) for path in (source, demo[0], exact)]
    return {name: answer(engine, sessions, smiles) for name, smiles in MOLECULES.items()}


def answer(
    engine: Engine, sessions: list[ort.InferenceSession], smiles: str
) -> tuple[list[int], Logits, Logits, Logits]:
    prompt = engine.prepare(QUESTION, Molecule.from_smiles(smiles))
    spec, table = engine.bundle.manifest.decoder, engine.bundle.embeddings
    ours = replace(spec, layout=RECORDS)
    states = [
        OnnxState(session, of, kv_layout(of, of.layout, None), table, len(prompt) + TOKENS)
        for session, of in zip(sessions, (spec, ours, spec), strict=True)
    ]
    logits = [[state.prefill(prompt.embeddings).copy()] for state in states]
    tokens = [int(logits[0][0].argmax())]
    while len(tokens) < TOKENS and tokens[-1] != engine.bundle.tokenizer.eos_id:
        for state, of_state in zip(states, logits, strict=True):
            of_state.append(state.step(tokens[-1]).copy())
        tokens.append(int(logits[0][-1].argmax()))
    theirs, own, exact = (np.array(of_state) for of_state in logits)
    return tokens, theirs, own, exact


@pytest.mark.parametrize("name", MOLECULES)
def test_greedy_tokens_are_the_same_but_at_near_ties(answers: dict[str, Any], name: str) -> None:
    tokens, theirs, ours, _ = answers[name]
    ties = {
        step: float(theirs[step, token] - theirs[step, ours[step].argmax()])
        for step, token in enumerate(tokens)
        if ours[step].argmax() != token
    }
    assert ties.keys() <= NEAR_TIES.get(name, set()), f"tokens differ at steps, and by logits, {ties}"
    assert all(gap < NEAR_TIE for gap in ties.values())


def test_the_operators_are_as_close_to_float32_activations_as_matmulnbits(answers: dict[str, Any]) -> None:
    # Both round activations to the same eight bits, but for sums that differ in the last bits; what that turns over
    # grows from layer to layer until logits differ by as much as the rounding itself makes them differ.
    def error(which: int) -> float:
        return float(np.mean([np.mean((found[which] - found[3]) ** 2) for found in answers.values()]))

    assert 0.8 < error(2) / error(1) < 1.25


# --- any graph --------------------------------------------------------------------------------------------------------


def written(path: Path, add: Callable[[GraphBuilder, str], str], width: int = ROWS) -> Path:
    """A graph of what ``add`` makes of the input ``x`` [n, COLUMNS]."""
    graph = GraphBuilder(path)
    source = graph.input("x", TensorProto.FLOAT, ["n", COLUMNS])
    graph.node("Identity", [add(graph, source)], "y")
    graph.output("y", TensorProto.FLOAT, ["n", width])
    graph.save()
    return path


def matrix(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def assert_same_results(one: Path, other: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, COLUMNS)).astype(np.float32)
    (expected,), (actual,) = (session_of(path).run(None, {"x": x}) for path in (one, other))
    assert np.abs(actual - expected).max() < 0.02 * np.abs(expected).max()


def test_biases_and_a_head_of_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    def add(graph: GraphBuilder, source: str) -> str:
        linears = Linears("int4", RoundToNearest(), activations="int8", lm_head="int8")
        first = linears.emit(graph, source, "layer", matrix(1, COLUMNS), torch.ones(COLUMNS))
        return linears.emit(graph, first, HEAD, matrix(2))

    path = written(tmp_path / "graph.onnx", add)
    assert write_with_int4_ops(path, tmp_path / "own.onnx") == Replaced(linear=1, gate_up=0, kept=1)
    assert {(INT4_DOMAIN, "Int4Linear"), (CONTRIB, "MatMulNBits"), ("", "Add")} <= read_header(
        tmp_path / "own.onnx"
    ).operators
    assert_same_results(path, tmp_path / "own.onnx")


class Shifted:
    """Weights with zero points other than 8."""

    name = "shifted"

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        plain = RoundToNearest().quantize(key, weight)
        points = torch.full((len(weight), plain.packed.shape[1] + plain.packed.shape[1] % 2), 7, dtype=torch.uint8)
        return Int4Weight(plain.packed, plain.scales, plain.columns, plain.group_size, pack_nibbles(points))


@pytest.mark.parametrize(
    "linears",
    [
        Linears("int4", Shifted(), activations="int8"),
        Linears("int4", RoundToNearest(), activations="fp32"),
        Linears("fp16"),
    ],
    ids=["zero points", "fp32 activations", "fp16"],
)
def test_a_graph_without_a_product_for_the_operators_is_refused(tmp_path: Path, linears: Linears) -> None:
    path = written(tmp_path / "graph.onnx", lambda graph, source: linears.emit(graph, source, "layer", matrix(1)))
    with pytest.raises(ModelConfigError, match=r"graph\.onnx has no int4 product with zero point 8, int8 activations"):
        write_with_int4_ops(path, tmp_path / "own.onnx")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "graph.data", path]


def gated(
    graph: GraphBuilder, source: str, *, alpha: float = 1.0, up_source: str = "", gate_again: bool = False
) -> str:
    linears = Linears("int4", RoundToNearest(), activations="int8")
    gate = linears.emit(graph, source, "gate", matrix(1))
    up = linears.emit(graph, up_source or source, "up", matrix(2))
    silu = graph.node("QuickGelu", [gate], "silu", domain=CONTRIB, alpha=alpha)
    product = graph.node("Mul", [silu, up], "gated")
    return graph.node("Add", [product, gate], "sum") if gate_again else product


def test_a_gate_and_an_up_projection_become_one_operator(tmp_path: Path) -> None:
    path = written(tmp_path / "graph.onnx", gated)
    assert write_with_int4_ops(path, tmp_path / "own.onnx") == Replaced(linear=0, gate_up=1, kept=0)
    assert_same_results(path, tmp_path / "own.onnx")


def test_a_graph_that_is_turned_back_holds_the_matrices_and_gives_the_results_that_it_had(tmp_path: Path) -> None:
    def add(graph: GraphBuilder, source: str) -> str:
        linears = Linears("int4", RoundToNearest(), activations="int8", lm_head="int8")
        widened = linears.emit(graph, gated(graph, source), "wide", torch.eye(COLUMNS, ROWS), torch.ones(COLUMNS))
        return linears.emit(graph, widened, HEAD, matrix(2))

    path = written(tmp_path / "graph.onnx", add)
    write_with_int4_ops(path, tmp_path / "own.onnx")
    write_portable(tmp_path / "own.onnx", tmp_path / "back.onnx")
    graphs = [StoredWeights(tmp_path / f"{name}.onnx") for name in ("graph", "own", "back")]
    for name in ("gate", "up", "wide"):
        first, *others = (stored.int4(name) for stored in graphs)
        assert all(first.same_as(other) for other in others), name
        rows = slice(3, 33)
        assert graphs[0].int4(name, rows).same_as(graphs[1].int4(name, rows))
    x = np.random.default_rng(0).standard_normal((5, COLUMNS)).astype(np.float32)
    before, after = (session_of(one).run(None, {"x": x})[0] for one in (path, tmp_path / "back.onnx"))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("changed", [{"alpha": 1.702}, {"gate_again": True}, {"up_source": "other"}])
def test_what_is_not_silu_of_one_times_the_other_stays_apart(tmp_path: Path, changed: dict[str, Any]) -> None:
    def add(graph: GraphBuilder, source: str) -> str:
        graph.node("Relu", [source], "other")
        return gated(graph, source, **changed)

    path = written(tmp_path / "graph.onnx", add)
    assert write_with_int4_ops(path, tmp_path / "own.onnx") == Replaced(linear=2, gate_up=0, kept=0)
    assert_same_results(path, tmp_path / "own.onnx")


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    path = written(tmp_path / "graph.onnx", gated)
    (tmp_path / "own.data").write_text("mine")
    with pytest.raises(FileExistsError):
        write_with_int4_ops(path, tmp_path / "own.onnx")
    assert (tmp_path / "own.data").read_text() == "mine"
