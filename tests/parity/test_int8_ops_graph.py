"""A protein encoder with our own int8 operators holds the matrices of the one with DynamicQuantizeMatMul."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import test_graphs_esm as esm
import torch
from onnx import TensorProto

from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_edge.onnx_header import INT8_INPUTS, read_header
from biomedgpt_edge.onnx_products import contradictions
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export.graphs.builder import CONTRIB, PAGE, GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.int8_ops import has_int8_products, write_portable_int8, write_with_int8_ops
from biomedgpt_export.graphs.linear import GraphPrecision, Linears
from biomedgpt_export.graphs.matrices import esm_matrices
from biomedgpt_export.graphs.stored import StoredWeights

CONFIG = esm.config(hidden_size=72, intermediate_size=200)
SEQUENCE = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"


def written(folder: Path, of: EsmConfig, precision: GraphPrecision) -> Path:
    graph, state = GraphBuilder(folder / f"{precision}.onnx"), esm.oracle(of).state_dict()
    build_esm(graph, of, lambda key: state[key], Linears(precision), lambda line: None)
    graph.save()
    return graph.path


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("esm"), CONFIG, "int8")


@pytest.fixture(scope="module")
def records(portable: Path) -> Path:
    (portable.parent / "records").mkdir()
    target = portable.parent / "records" / portable.name
    assert write_with_int8_ops(portable, target) == 6 * CONFIG.layers
    return target


def features(graph: Path, sequence: str = SEQUENCE, threads: int = 1) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    register_int4_ops(options)
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"residue_ids": residue_ids(sequence)[np.newaxis]})[0][0]
    return result


def operators(graph: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(graph), load_external_data=False).graph.node]


def test_bias_gelu_and_residual_are_parts_of_the_operators(records: Path) -> None:
    used = operators(records)
    counts = {name: used.count(name) for _, name in INT8_INPUTS}
    assert counts == {
        "Int8Linear": 3 * CONFIG.layers,
        "Int8LinearGelu": CONFIG.layers,
        "Int8LinearAdd": 2 * CONFIG.layers,
    }
    assert not {"Add", "Gelu", "DynamicQuantizeMatMul"} & set(used)


def test_records_hold_the_bits_of_the_graph_and_begin_on_pages(portable: Path, records: Path) -> None:
    theirs, ours = StoredWeights(portable), StoredWeights(records)
    for name in esm_matrices(CONFIG):
        assert ours.int8(name)
        assert torch.equal(ours.linear(name), theirs.linear(name))
        assert torch.equal(ours.linear(name, slice(3, 9)), theirs.linear(name)[3:9])
        assert torch.equal(ours.step(name), theirs.step(name))
        np.testing.assert_array_equal(ours.int8_records(name)[1], theirs.array(f"{name}.bias"))
    places = [tensor for tensor in read_header(records).tensors if tensor.name.endswith(".records_int8")]
    assert len(places) == 6 * CONFIG.layers
    assert all(tensor.offset % PAGE == 0 for tensor in places)


def test_what_is_turned_back_has_the_same_nodes_and_tensors(portable: Path, records: Path, tmp_path: Path) -> None:
    write_portable_int8(records, tmp_path / "back.onnx")
    theirs, back = (onnx.load(str(path), load_external_data=False).graph for path in (portable, tmp_path / "back.onnx"))
    assert list(back.node) == list(theirs.node)
    stored, expected = StoredWeights(tmp_path / "back.onnx"), StoredWeights(portable)
    names = {tensor.name for tensor in theirs.initializer}
    assert {tensor.name for tensor in back.initializer} == names
    for name in names:
        np.testing.assert_array_equal(stored.array(name), expected.array(name))


def test_features_are_as_close_to_fp32_as_those_of_the_portable_graph(portable: Path, records: Path) -> None:
    expected = features(written(records.parent, CONFIG, "fp32"))

    def mean_distance(graph: Path) -> float:
        found = features(graph)
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        return float(np.mean(1 - (found * expected).sum(1) / lengths))

    # Rounding by row instead of by tensor: the weights' rounding, which both have, is most of it.
    assert mean_distance(records) <= 1.1 * mean_distance(portable) < 0.01


def test_any_number_of_threads_gives_the_same_bits(records: Path) -> None:
    np.testing.assert_array_equal(features(records, threads=1), features(records, threads=2))


def test_the_header_declares_what_the_records_hold(records: Path) -> None:
    header = read_header(records)
    assert {product.operator for product in header.products} == set(INT8_INPUTS)
    assert not list(contradictions(header))


def test_only_int8_graphs_have_something_to_replace(portable: Path, records: Path, tmp_path: Path) -> None:
    assert has_int8_products(portable)
    assert has_int8_products(records)
    assert not has_int8_products(written(tmp_path, CONFIG, "fp32"))


def test_what_several_nodes_read_is_not_taken_into_an_operator(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(40, 72, generator=generator), torch.randn(40, generator=generator)
    graph = GraphBuilder(tmp_path / "graph.onnx")
    graph.input("x", TensorProto.FLOAT, ["rows", 72])
    linears = Linears("int8")
    summed = linears.emit(graph, "x", "with_bias", weight, bias)
    bare = linears.emit(graph, "x", "without_bias", weight)
    graph.node("Add", [bare, summed], "both")
    graph.node("Gelu", [summed], "gelu", domain=CONTRIB)
    for name in ("gelu", "both"):
        graph.output(name, TensorProto.FLOAT, ["rows", 40])
    graph.save()
    assert write_with_int8_ops(graph.path, tmp_path / "own.onnx") == 1
    assert operators(tmp_path / "own.onnx") == ["Int8Linear", "DynamicQuantizeMatMul", "Add", "Gelu"]
