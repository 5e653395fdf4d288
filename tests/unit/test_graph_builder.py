"""The graph builder: weights stream to one file, are found where the graph says, and the bytes are always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

from biomedgpt_edge.onnx_header import INT4_DOMAIN, read_header
from biomedgpt_export.graphs.builder import CONTRIB, INLINE_BYTES, LINE, PAGE, GraphBuilder
from biomedgpt_export.graphs.linear import Linears
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.rtn import RoundToNearest
from support import bounded_memory

ARRAYS = {
    "scalar": np.array(3, np.int64),
    "below": np.arange(INLINE_BYTES // 4 - 1, dtype=np.float32),
    "at": np.arange(INLINE_BYTES // 4, dtype=np.float32),
    "odd": np.arange(1501, dtype=np.uint8),
    "page": np.arange(16 * PAGE // 4, dtype=np.float32).reshape(64, -1),
    "half": np.arange(600, dtype=np.float16).reshape(3, 200),
    "transposed": np.arange(600, dtype=np.float32).reshape(20, 30).T,
}


def build(folder: Path) -> GraphBuilder:
    folder.mkdir(exist_ok=True)
    graph = GraphBuilder(folder / "graph.onnx")
    for name, array in ARRAYS.items():
        graph.tensor(name, array)
    graph.input("x", TensorProto.FLOAT, ["n"])
    graph.node("Relu", ["x"], "y")
    graph.output("y", TensorProto.FLOAT, ["n"])
    graph.save()
    return graph


def test_every_tensor_is_read_back_as_it_was_given(tmp_path: Path) -> None:
    model = onnx.load(str(build(tmp_path / "a").path))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_graph_is_valid_onnx_and_runs(tmp_path: Path) -> None:
    path = build(tmp_path / "a").path
    onnx.checker.check_model(str(path), full_check=True)
    (result,) = ort.InferenceSession(str(path)).run(None, {"x": np.array([-1, 2], np.float32)})
    assert result.tolist() == [0, 2]


def test_small_tensors_are_inline_and_large_ones_start_on_a_page(tmp_path: Path) -> None:
    places = {tensor.name: tensor.offset for tensor in read_header(build(tmp_path / "a").path).tensors}
    assert places.keys() == ARRAYS.keys() - {"scalar", "below"}
    assert all(offset % LINE == 0 for offset in places.values())
    assert places["page"] % PAGE == 0


def test_a_tensor_that_is_to_be_mapped_lies_outside_on_a_page_however_small(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    graph.tensor("before", np.zeros(INLINE_BYTES, np.uint8))
    graph.tensor("mapped", np.zeros(1, np.uint8), mapped=True)
    graph.save()
    assert {tensor.name: tensor.offset for tensor in read_header(graph.path).tensors} == {"before": 0, "mapped": PAGE}


@pytest.mark.parametrize("domain", [CONTRIB, INT4_DOMAIN])
def test_our_own_operators_are_imported_only_where_they_are_used(tmp_path: Path, domain: str) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    graph.node("Any", ["x"], "y", domain=domain)
    graph.save()
    opsets = onnx.load(str(graph.path)).opset_import
    assert [opset.domain for opset in opsets] == (["", CONTRIB] if domain == CONTRIB else ["", CONTRIB, INT4_DOMAIN])


def test_the_same_graph_is_always_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name)
    for file in ("graph.onnx", "graph.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_tensor_added_twice_is_stored_once(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    for _ in range(2):
        assert graph.tensor("w", np.zeros(1000, np.float32)) == "w"
    graph.save()
    assert len(read_header(graph.path).tensors) == 1
    assert (tmp_path / "graph.data").stat().st_size == 4000


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "graph.data").write_text("mine")
    with pytest.raises(FileExistsError):
        GraphBuilder(tmp_path / "graph.onnx")
    assert (tmp_path / "graph.data").read_text() == "mine"


def test_only_outputs_of_the_last_node_can_be_renamed(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    graph.node("Relu", ["x"], "a")
    graph.node("Relu", ["a"], "b")
    with pytest.raises(ValueError, match="not the last node"):
        graph.rename_outputs("a", ["c"])
    graph.close()


def test_weights_are_not_kept_in_memory(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    with bounded_memory(4 << 20):
        for i in range(32):
            graph.tensor(f"w{i}", np.zeros(1 << 18, np.float32))
        graph.close()


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("columns", [64, 100])
def test_a_linear_layer_computes_with_the_weights_that_are_stored(tmp_path: Path, precision: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, columns, generator=generator), torch.randn(48, generator=generator)
    linears = Linears(precision, RoundToNearest() if precision == "int4" else None)  # type: ignore[arg-type]
    graph = GraphBuilder(tmp_path / "graph.onnx")
    graph.input("x", TensorProto.FLOAT, ["n", columns])
    graph.node("Identity", [linears.emit(graph, "x", "layer", weight, bias)], "y")
    graph.output("y", TensorProto.FLOAT, ["n", 48])
    graph.save()
    stored = StoredWeights(graph.path).linear("layer")
    tolerance = {"fp32": 0.0, "fp16": 2e-3, "int4": 0.45}[precision]
    assert (stored - weight).abs().max() <= tolerance
    source = torch.randn(3, columns, generator=generator)
    (result,) = ort.InferenceSession(str(graph.path)).run(None, {"x": source.numpy()})
    expected = (source @ stored.T + bias).numpy()
    # int4 layers quantize activations to int8 on a CPU.
    np.testing.assert_allclose(result, expected, atol=0.3 if precision == "int4" else 1e-4)


def test_int4_layers_are_counted_by_group_size_and_padding_is_noted(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    linears = Linears("int4", RoundToNearest())
    for name, columns in (("a", 128), ("b", 256), ("c", 64), ("d", 100)):
        linears.emit(graph, "x", name, torch.zeros(8, columns))
    graph.close()
    assert linears.group_sizes == {128: 8 * 384, 64: 8 * 64, 32: 8 * 100}
    assert linears.padded == ["d"]


def test_int4_without_a_quantizer_is_a_programming_error(tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "graph.onnx")
    with pytest.raises(ValueError, match="quantizer"):
        Linears("int4").emit(graph, "x", "a", torch.zeros(8, 32))
    graph.close()
