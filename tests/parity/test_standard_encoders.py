"""Encoders in operators of ONNX alone compute what transformers' ESM and their first graphs compute; so do CUDA's.

All of them run on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from test_graphs_esm import CONFIGS, SEQUENCES
from test_graphs_esm import oracle as esm_oracle
from test_graphs_gin import MOLECULES
from test_graphs_gin import oracle as gin_oracle

from biomedgpt_edge import Molecule
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.inputs import Protein
from biomedgpt_edge.molecule_graph import dense
from biomedgpt_edge.onnx_header import STANDARD_OPERATORS, read_header
from biomedgpt_edge.portable import derived_graph, of_standard
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export.graphs.builder import CONTRIB, GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig, GinConfig
from biomedgpt_export.graphs.cuda import write_cuda
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.gin import build_gin
from biomedgpt_export.graphs.linear import GraphPrecision, Linears, Precision
from biomedgpt_export.graphs.matrices import esm_matrices
from biomedgpt_export.graphs.standard import Element, Standard, write_standard
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.rtn import RoundToNearest
from standard_runner import open_exact

# By precision of activations, how far features may be from those in float32, relative to the largest one.
TOLERANCES: Mapping[Element, float] = {"fp32": 2e-5, "fp16": 1e-2}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the largest of what is expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def ids_and_positions(sequence: str) -> dict[str, np.ndarray]:
    ids = residue_ids(sequence)[np.newaxis]
    return {"residue_ids": ids, "position_ids": np.arange(ids.shape[1])[np.newaxis]}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# --- proteins ---------------------------------------------------------------------------------------------------------


@dataclass
class Esm:
    """A graph, and transformers' model with the matrices that it stores, in float32."""

    path: Path
    model: transformers.EsmModel
    opened: dict[str, ort.InferenceSession]

    def expected(self, sequence: str) -> np.ndarray:
        """Features in front of the final LayerNorm, ``[L + 2, hidden]``."""
        ids, given = torch.from_numpy(residue_ids(sequence))[None], list[torch.Tensor]()
        hook = self.model.encoder.emb_layer_norm_after.register_forward_pre_hook(
            lambda module, inputs: given.append(inputs[0])
        )
        with torch.inference_mode():
            self.model(ids, attention_mask=torch.ones_like(ids))
        hook.remove()
        found: np.ndarray = given[0][0].numpy()
        return found

    def standard(self, element: Element) -> ort.InferenceSession:
        """The standard graph, which is written once."""
        if element not in self.opened:
            target = self.path.with_name(f"{element}.onnx")
            write_standard(self.path, target, element=element)
            self.opened[element] = open_exact(target)
        return self.opened[element]

    def cuda(self) -> ort.InferenceSession:
        if "cuda" not in self.opened:
            target = self.path.with_name("cuda.onnx")
            write_cuda(self.path, target)
            self.opened["cuda"] = open_exact(target)
        return self.opened["cuda"]


Graphs = Callable[..., Esm]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Each of them once; to be read only."""
    known = dict[tuple[str, GraphPrecision], Esm]()

    def made(name: str, precision: GraphPrecision = "fp32") -> Esm:
        key = name, precision
        if key not in known:
            of, model = CONFIGS[name], esm_oracle(CONFIGS[name])
            path = tmp_path_factory.mktemp("esm") / "protein_encoder.onnx"
            graph = GraphBuilder(path)
            linears = Linears(precision, RoundToNearest() if precision == "int4" else None)
            build_esm(graph, of, lambda key: model.state_dict()[key], linears, lambda line: None)
            graph.save()
            with torch.no_grad():
                store_what_the_graph_stores(model, of, path)
            known[key] = Esm(path, model, {})
        return known[key]

    return made


def store_what_the_graph_stores(model: transformers.EsmModel, of: EsmConfig, path: Path) -> None:
    stored, state = StoredWeights(path), model.state_dict()
    for matrix in esm_matrices(of).values():
        (key,) = matrix.keys
        state[key].copy_(stored.linear(matrix.name))


def features(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = session.run(None, dict(feeds))[0][0]
    assert found.dtype == np.float32
    return found


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_transformers_with_the_weights_that_are_stored(
    graphs: Graphs, name: str, precision: GraphPrecision, element: Element
) -> None:
    one = graphs(name, precision)
    for sequence in SEQUENCES:
        found = features(one.standard(element), ids_and_positions(sequence))
        assert error(found, one.expected(sequence)) < TOLERANCES[element], len(sequence)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unquantized_graph_gives_what_transformers_gives_behind_the_final_norm(graphs: Graphs, name: str) -> None:
    # The whole model as it came, so that nothing above hangs on what is put into it.
    one, model = graphs(name), esm_oracle(CONFIGS[name])
    for sequence in SEQUENCES:
        ids = torch.from_numpy(residue_ids(sequence))[None]
        found = torch.from_numpy(features(one.standard("fp32"), ids_and_positions(sequence)))
        with torch.inference_mode():
            expected = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            normed = model.encoder.emb_layer_norm_after(found)
        assert error(normed.numpy(), expected.numpy()) < 2e-5


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("name", ["plain", "four layers, odd inner width"])
def test_features_are_those_of_the_first_graph(graphs: Graphs, name: str, precision: GraphPrecision) -> None:
    one = graphs(name, precision)
    session = open_exact(one.path)
    for sequence in SEQUENCES:
        feeds = ids_and_positions(sequence)
        expected = features(session, {"residue_ids": feeds["residue_ids"]})
        assert error(features(one.standard("fp32"), feeds), expected) < 5e-6


@pytest.mark.parametrize(("name", "precision"), [("plain", "fp32"), ("four layers, odd inner width", "int4")])
def test_the_reference_evaluator_of_onnx_computes_the_same(
    graphs: Graphs, name: str, precision: GraphPrecision
) -> None:
    one = graphs(name, precision)
    session, path = one.standard("fp32"), one.path.with_name("fp32.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    feeds = ids_and_positions(SEQUENCES[1])
    (evaluated,) = ReferenceEvaluator(onnx.load(str(path))).run(None, feeds)
    assert error(features(session, feeds), evaluated[0]) < 2e-5


def test_a_position_is_where_it_is_said_to_be(graphs: Graphs) -> None:
    # Rotations are relative: what is shifted as a whole stays what it is, and what is turned round does not.
    one, feeds = graphs("plain"), ids_and_positions(SEQUENCES[1])
    session, positions = one.standard("fp32"), feeds["position_ids"]
    plain = features(session, feeds)
    assert error(features(session, {**feeds, "position_ids": positions + 7}), plain) < 1e-4
    assert error(features(session, {**feeds, "position_ids": positions[:, ::-1].copy()}), plain) > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cuda_graph_computes_the_same_in_float16(graphs: Graphs, name: str, precision: GraphPrecision) -> None:
    one = graphs(name, precision)
    for sequence in SEQUENCES:
        found = features(one.cuda(), {"residue_ids": residue_ids(sequence)[np.newaxis]})
        assert 0 < error(found, one.expected(sequence)) < 1e-2, len(sequence)


@pytest.mark.parametrize("element", TOLERANCES)
@pytest.mark.parametrize(
    ("precision", "written"),
    [("fp32", Standard()), ("fp16", Standard()), ("int8", Standard(int8=12)), ("int4", Standard(int4=12))],
)
def test_it_has_operators_of_onnx_alone_and_no_product_of_other_kinds(
    graphs: Graphs, tmp_path: Path, precision: GraphPrecision, written: Standard, element: Element
) -> None:
    one, path = graphs("plain", precision), tmp_path / "standard.onnx"
    assert write_standard(one.path, path, element=element) == written
    header, model = read_header(path), onnx.load(str(path), load_external_data=False)
    assert header.operators <= STANDARD_OPERATORS
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == written.int4 + written.int8
    # Groups of 32 columns, or one scale per output.
    int4, int8 = (TensorProto.INT4, {"axis": 0, "block_size": 32}), (TensorProto.INT8, {"axis": 1})
    for node in dequantized:
        assert (kinds[node.input[0]], attributes(node)) == (int4 if precision == "int4" else int8)
    wide = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    assert (wide == {"rope_cos", "rope_sin"}) == (element == "fp16")
    assert [(value.name, value.type.tensor_type.elem_type) for value in model.graph.input] == [
        ("residue_ids", TensorProto.INT64),
        ("position_ids", TensorProto.INT64),
    ]
    assert [(value.name, value.type.tensor_type.elem_type) for value in model.graph.output] == [
        ("residue_features", TensorProto.FLOAT)
    ]


def test_the_cuda_graph_multiplies_int8_without_rounding_activations(graphs: Graphs) -> None:
    one = graphs("plain", "int8")
    one.cuda()
    counted = {
        name: [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
        for name, path in (("own", one.path), ("cuda", one.path.with_name("cuda.onnx")))
    }
    products = counted["own"].count("DynamicQuantizeMatMul")
    assert products == 12
    assert counted["cuda"].count("DequantizeLinear") == counted["cuda"].count("MatMul") == products
    assert "DynamicQuantizeMatMul" not in counted["cuda"]
    # Over the same data: nothing else was written.
    assert {tensor.location for tensor in read_header(one.path.with_name("cuda.onnx")).tensors} == {
        "protein_encoder.data"
    }
    assert not one.path.with_name("cuda.data").exists()


def test_the_same_source_gives_the_same_bytes(graphs: Graphs, tmp_path: Path) -> None:
    one = graphs("plain", "int4")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_standard(one.path, tmp_path / name / "standard.onnx")
    for name in ("standard.onnx", "standard.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- molecules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "width"), [(1, 8), (2, 30), (5, 300), (3, 65)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features_of_atoms_are_those_of_the_first_graph(
    tmp_path: Path, layers: int, width: int, precision: Precision
) -> None:
    model = gin_oracle(layers, width)
    path = tmp_path / "molecule_encoder.onnx"
    graph = GraphBuilder(path)
    build_gin(graph, GinConfig(layers, width), lambda key: model.state_dict()[key], Linears(precision))
    graph.save()
    elements: tuple[Element, ...] = ("fp32", "fp16")
    for element in elements:
        assert write_standard(path, tmp_path / f"{element}.onnx", element=element) == Standard()
        assert read_header(tmp_path / f"{element}.onnx").operators <= STANDARD_OPERATORS
    own, wide, half = (open_exact(tmp_path / name) for name in (path.name, "fp32.onnx", "fp16.onnx"))
    for smiles in MOLECULES:
        feeds = vars(dense(Molecule.from_smiles(smiles).graph))
        expected, same, rounded = (session.run(None, feeds)[0] for session in (own, wide, half))
        assert error(same, expected) < 1e-6, smiles
        assert error(rounded, expected) < 1e-2, smiles
        assert rounded.dtype == np.float32


def test_what_is_rounded_to_float16_is_rounded(tmp_path: Path) -> None:
    # Were activations in float32 after all, features would be nearer than float16 can be.
    model = gin_oracle(2, 30)
    graph = GraphBuilder(tmp_path / "molecule_encoder.onnx")
    build_gin(graph, GinConfig(2, 30), lambda key: model.state_dict()[key], Linears("fp16"))
    graph.save()
    write_standard(graph.path, tmp_path / "standard.onnx")
    kinds = {tensor.data_type for tensor in onnx.load(str(tmp_path / "standard.onnx")).graph.initializer}
    assert kinds == {TensorProto.FLOAT16}
    feeds = vars(dense(Molecule.from_smiles(MOLECULES[3]).graph))
    expected, rounded = (open_exact(path).run(None, feeds)[0] for path in (graph.path, tmp_path / "standard.onnx"))
    assert error(rounded, expected) > 1e-5


# --- the packaged demo ------------------------------------------------------------------------------------------------

SEQUENCE = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(DEMO_BUNDLE)


def test_packaged_encoders_give_the_features_of_the_first_graphs(demo: Bundle) -> None:
    sessions = {one.part: open_exact(derived_graph(one, "once")) for one in of_standard(demo)}
    assert sessions.keys() == {"decoder", "molecule encoder", "protein encoder"}
    encoders = Encoders(demo, threads=1)
    for smiles in MOLECULES[2:]:
        molecule = Molecule.from_smiles(smiles)
        (found,) = sessions["molecule encoder"].run(None, vars(dense(molecule.graph)))
        assert error(found, encoders.encode(molecule)) < 1e-2
    expected = encoders.encode(Protein.from_sequence(SEQUENCE))
    assert error(features(sessions["protein encoder"], ids_and_positions(SEQUENCE)), expected) < 1e-2
    cuda = open_exact(demo.file("protein_encoder-cuda.onnx"))
    assert error(features(cuda, {"residue_ids": residue_ids(SEQUENCE)[np.newaxis]}), expected) < 1e-2
    assert (CONTRIB, "MatMulNBits") in read_header(demo.file("protein_encoder-cuda.onnx")).operators


@pytest.mark.parametrize("name", ["molecule_encoder-standard.onnx", "protein_encoder-standard.onnx"])
def test_packaged_graphs_are_what_is_written_today(demo: Bundle, portable_demo: Path, name: str) -> None:
    assert (portable_demo / name).read_bytes() == demo.file(name).read_bytes()


def test_the_packaged_graph_for_cuda_is_what_is_written_today(demo: Bundle, tmp_path: Path) -> None:
    name = "protein_encoder-cuda.onnx"
    write_cuda(demo.file("protein_encoder.onnx"), tmp_path / name)
    assert (tmp_path / name).read_bytes() == demo.file(name).read_bytes()
