"""The int4 operators inside ONNX Runtime: against NumPy and MatMulNBits, and every way to build a graph wrongly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from biomedgpt_edge import int4_ops
from biomedgpt_edge.errors import PlatformError
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_edge.onnx_header import INT4_DOMAIN
from int4_matrices import Array, Matrix, assert_product, interleaved, random_matrix

OPSETS = [helper.make_opsetid(*opset) for opset in (("", 18), (INT4_DOMAIN, int4_ops.OPSET), ("com.microsoft", 1))]
ROWS, COLUMNS, OUTPUTS, GROUP = 5, 300, 70, 128


def records_of(matrix: Matrix) -> Array:
    return matrix.records.reshape(-1, matrix.scales.shape[1], 16 * matrix.group + 64)


def model_of(
    *nodes: onnx.NodeProto, initializers: dict[str, Array], x_shape: list[Any] | None, inputs: list[Any] | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "int4",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x_shape), *(inputs or [])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def linear_model(matrix: Matrix, x_shape: list[Any] | None, op: str = "Int4Linear", **changed: Any) -> onnx.ModelProto:
    attributes = {"N": len(matrix.scales), "K": COLUMNS} | changed
    node = helper.make_node(op, ["x", "records"], ["y"], domain=INT4_DOMAIN, **attributes)
    return model_of(node, initializers={"records": records_of(matrix)}, x_shape=x_shape)


def session(model: onnx.ModelProto | Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register_int4_ops(options)
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def matrix() -> Matrix:
    return random_matrix(np.random.default_rng(1), OUTPUTS, COLUMNS, GROUP)


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_agrees_with_float64(x: Array, group: int, threads: int) -> None:
    matrix = random_matrix(np.random.default_rng(3), OUTPUTS, COLUMNS, group)
    (y,) = session(linear_model(matrix, ["rows", COLUMNS]), threads).run(None, {"x": x})
    assert_product(y, x, matrix)


def test_leading_dimensions_are_kept_and_may_be_empty(matrix: Matrix, x: Array) -> None:
    opened = session(linear_model(matrix, ["batch", "rows", COLUMNS]))
    assert opened.get_outputs()[0].shape == ["batch", "rows", OUTPUTS]
    (y,) = opened.run(None, {"x": np.stack([x, 2 * x])})
    np.testing.assert_array_equal(y[1], 2 * y[0])
    assert_product(y[0], x, matrix)
    (nothing,) = opened.run(None, {"x": np.zeros((3, 0, COLUMNS), np.float32)})
    assert nothing.shape == (3, 0, OUTPUTS)


def test_gate_up_is_silu_of_one_times_the_other(x: Array) -> None:
    rng = np.random.default_rng(4)
    gate, up = (random_matrix(rng, OUTPUTS, COLUMNS, GROUP) for _ in range(2))
    records = interleaved(gate, up).reshape(6, 3, -1)
    node = helper.make_node("Int4GateUp", ["x", "records"], ["y"], domain=INT4_DOMAIN, N=OUTPUTS, K=COLUMNS)
    opened = session(model_of(node, initializers={"records": records}, x_shape=["rows", COLUMNS]))
    assert opened.get_outputs()[0].shape == ["rows", OUTPUTS]
    (y,) = opened.run(None, {"x": x})
    of_gate, of_up = (
        session(linear_model(one, ["rows", COLUMNS])).run(None, {"x": x})[0].astype(np.float64) for one in (gate, up)
    )
    np.testing.assert_allclose(y, of_gate / (1 + np.exp(-of_gate)) * of_up, rtol=2.0**-21)


def test_linear_agrees_with_matmulnbits(x: Array) -> None:
    # Where K is made of whole groups, both quantize activations in the same groups, and to the same eight bits but for
    # how ties are rounded.
    matrix, whole = random_matrix(np.random.default_rng(5), OUTPUTS, 256, GROUP), np.ascontiguousarray(x[:, :256])
    (ours,) = session(linear_model(matrix, ["rows", 256], K=256)).run(None, {"x": whole})
    node = helper.make_node(
        "MatMulNBits",
        ["x", "values", "scales"],
        ["y"],
        domain="com.microsoft",
        K=256,
        N=OUTPUTS,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    initializers = {
        "values": matrix.values.reshape(OUTPUTS, 2, GROUP // 2),
        "scales": matrix.scales.astype(np.float32).reshape(-1),
    }
    (theirs,) = session(model_of(node, initializers=initializers, x_shape=["rows", 256])).run(None, {"x": whole})
    spread = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 0.01 * spread


def external_model(matrix: Matrix, folder: Path, offset: int) -> Path:
    """A model whose records lie in ``weights.bin``, from byte ``offset`` on."""
    model = linear_model(matrix, ["rows", COLUMNS])
    records = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(bytes(offset) + records.raw_data)
    entries = {"location": "weights.bin", "offset": str(offset), "length": str(len(records.raw_data))}
    records.ClearField("raw_data")
    records.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        records.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_weights_are_read_from_an_external_file(matrix: Matrix, x: Array, tmp_path: Path) -> None:
    opened = session(external_model(matrix, tmp_path, 8192))
    (y,) = opened.run(None, {"x": x})
    assert_product(y, x, matrix)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("weights.bin")]
    assert mapped


def test_records_that_are_mapped_between_cache_lines_are_refused(matrix: Matrix, tmp_path: Path) -> None:
    with pytest.raises(RuntimeException, match="records: got misaligned data, expected an address that is a multiple"):
        session(external_model(matrix, tmp_path, 8192 + 32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"N": 32}, "records: got uint8 [3, 3, 2112], expected uint8 [1, 3, 2112] for N = 32 and K = 300"),
        ({"K": 256}, "records: got uint8 [3, 3, 2112], expected uint8 [3, 2, 2112]"),
        ({"K": 0}, "weights: got int4 [70, 0]"),
        ({"N": -1}, "weights: got int4 [-1, 300]"),
        ({"N": -(2**63)}, "weights: got int4 [-9223372036854775808, 300]"),
        ({"K": 2**63 - 1}, "weights: got int4 [70, 9223372036854775807]"),
        ({"op": "Int4GateUp"}, "expected uint8 [6, 3, 2112]"),
    ],
)
def test_records_that_do_not_fit_are_refused(matrix: Matrix, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeException) as caught:
        session(linear_model(matrix, ["rows", None], **changed))
    assert message in str(caught.value)
    assert f"{changed.get('op', 'Int4Linear')}: " in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 6336), (9, 3, 704), (3, 3, 2111), (3, 3, 0), ()])
def test_records_of_another_layout_are_refused(matrix: Matrix, shape: tuple[int, ...]) -> None:
    model = linear_model(matrix, ["rows", COLUMNS])
    records = np.zeros(shape, np.uint8)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(records, "records"))
    with pytest.raises(RuntimeException, match=r"for groups of 128, 64 or 32 columns"):
        session(model)


@pytest.mark.parametrize("shape", [(0, 3, 2112), (3, 0, 2112), (2, 3, 2112)])
def test_records_of_another_matrix_are_refused(matrix: Matrix, shape: tuple[int, ...]) -> None:
    model = linear_model(matrix, ["rows", COLUMNS])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(shape, np.uint8), "records"))
    with pytest.raises(RuntimeException, match=r"expected uint8 \[3, 3, 2112\] for N = 70 and K = 300"):
        session(model)


def test_more_dimensions_than_any_tensor_needs_are_refused(matrix: Matrix) -> None:
    model = linear_model(matrix, ["rows", COLUMNS])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((1,) * 9, np.uint8), "records"))
    with pytest.raises(RuntimeException, match="records: got 9 dimensions, expected at most 8"):
        session(model)
    opened = session(linear_model(matrix, None))
    with pytest.raises(InvalidArgument, match="x: got 9 dimensions, expected at most 8"):
        opened.run(None, {"x": np.zeros((*(1,) * 8, COLUMNS), np.float32)})


def test_a_missing_attribute_is_refused(matrix: Matrix) -> None:
    node = helper.make_node("Int4Linear", ["x", "records"], ["y"], domain=INT4_DOMAIN, K=COLUMNS)
    model = model_of(node, initializers={"records": records_of(matrix)}, x_shape=["rows", COLUMNS])
    with pytest.raises(RuntimeException, match="No attribute with name:'N'"):
        session(model)


def test_records_must_be_constant(matrix: Matrix) -> None:
    node = helper.make_node("Int4Linear", ["x", "records"], ["y"], domain=INT4_DOMAIN, N=OUTPUTS, K=COLUMNS)
    given = helper.make_tensor_value_info("records", onnx.TensorProto.UINT8, [3, 3, 2112])
    with pytest.raises(RuntimeException, match="expected an initializer that nothing overrides"):
        session(model_of(node, initializers={}, x_shape=["rows", COLUMNS], inputs=[given]))
    with pytest.raises(RuntimeException, match="expected an initializer that nothing overrides"):
        session(model_of(node, initializers={"records": records_of(matrix)}, x_shape=["rows", COLUMNS], inputs=[given]))


def test_an_input_of_another_width_is_refused(matrix: Matrix) -> None:
    opened = session(linear_model(matrix, ["rows", None]))
    with pytest.raises(InvalidArgument, match=r"x: got float32 \[2, 299\], expected float32 \[\.\.\., 300\]"):
        opened.run(None, {"x": np.zeros((2, 299), np.float32)})


def test_the_shape_of_x_need_not_be_known_beforehand(matrix: Matrix, x: Array) -> None:
    (y,) = session(linear_model(matrix, None)).run(None, {"x": x[np.newaxis]})
    assert y.shape == (1, ROWS, OUTPUTS)


def test_the_operators_may_be_registered_with_many_sessions(matrix: Matrix, x: Array) -> None:
    model = linear_model(matrix, ["rows", COLUMNS])
    results = [session(model).run(None, {"x": x})[0] for _ in range(3)]
    np.testing.assert_array_equal(results[0], results[2])


def test_the_operators_are_refused_twice_in_one_session(matrix: Matrix) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for _ in range(2):
        register_int4_ops(options)
    model = linear_model(matrix, ["rows", COLUMNS])
    with pytest.raises(Fail, match="Domain already set in registry"):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_one_session_may_run_in_several_threads_at_once(matrix: Matrix, x: Array) -> None:
    opened = session(linear_model(matrix, ["rows", COLUMNS]), threads=2)
    prompts = [np.tile(x, (1 + i % 8, 1)) * np.float32(i) for i in range(64)]
    alone = [opened.run(None, {"x": prompt})[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: opened.run(None, {"x": prompt})[0], prompts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_library_that_cannot_be_loaded_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int4_ops, "LIBRARY", tmp_path / "absent.so")
    with pytest.raises(PlatformError, match=r"the operators for records cannot be used with ONNX Runtime .*absent\.so"):
        register_int4_ops(ort.SessionOptions())
