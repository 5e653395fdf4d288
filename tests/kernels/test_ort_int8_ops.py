"""The int8 operators inside ONNX Runtime: the bits of the kernel, and every way to build a graph wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from biomedgpt_edge import _native, int4_ops
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_edge.onnx_header import INT4_DOMAIN, INT8_INPUTS
from int4_matrices import Array, aligned

ROWS, COLUMNS, OUTPUTS = 19, 300, 70
OPERATORS = [name for _, name in INT8_INPUTS]
REFUSED = (Fail, InvalidArgument, RuntimeException)


@pytest.fixture(scope="module")
def records() -> Array:
    rng = np.random.default_rng(1)
    packed = aligned(_native.int8_records_shape(OUTPUTS, COLUMNS))
    scales, biases = (rng.standard_normal(OUTPUTS).astype(np.float32) for _ in range(2))
    _native.int8_pack(packed, rng.integers(-127, 128, (OUTPUTS, COLUMNS)).astype(np.int8), scales / 100, biases)
    return packed


@pytest.fixture(scope="module")
def x() -> Array:
    return np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture(scope="module")
def residual() -> Array:
    return np.random.default_rng(3).standard_normal((ROWS, OUTPUTS)).astype(np.float32)


def session(
    operator: str,
    records: Array,
    *,
    threads: int = 1,
    x_shape: list[Any] | None = None,
    computed: bool = False,
    **attributes: int,
) -> ort.InferenceSession:
    inputs = ["x", "records", "residual"][: INT8_INPUTS[INT4_DOMAIN, operator]]
    chosen = {"N": OUTPUTS, "K": COLUMNS} | attributes
    nodes = [helper.make_node(operator, inputs, ["y"], domain=INT4_DOMAIN, **chosen)]
    floats = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)]
    if len(inputs) == 3:
        floats.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, None))
    initializers = [numpy_helper.from_array(records, "records")]
    if computed:
        floats.append(helper.make_tensor_value_info("records", TensorProto.UINT8, records.shape))
    graph = helper.make_graph(
        nodes, "int8", floats, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(INT4_DOMAIN, int4_ops.OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register_int4_ops(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(operator: str, x: Array, residual: Array) -> dict[str, Array]:
    return {"x": x, "residual": residual} if operator == "Int8LinearAdd" else {"x": x}


def expected(operator: str, x: Array, records: Array, residual: Array) -> Array:
    y = np.empty((len(x), OUTPUTS), np.float32)
    added = residual if operator == "Int8LinearAdd" else None
    _native.int8_linear(y, x, records, added, gelu=operator == "Int8LinearGelu")
    return y


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_operators_give_the_bits_of_the_kernel(
    operator: str, threads: int, x: Array, records: Array, residual: Array
) -> None:
    (y,) = session(operator, records, threads=threads).run(None, feeds(operator, x, residual))
    np.testing.assert_array_equal(y, expected(operator, x, records, residual))


@pytest.mark.parametrize("operator", OPERATORS)
def test_leading_dimensions_are_kept_and_may_be_empty(operator: str, x: Array, records: Array, residual: Array) -> None:
    opened = session(operator, records, x_shape=["batch", "rows", COLUMNS])
    assert opened.get_outputs()[0].shape == ["batch", "rows", OUTPUTS]
    (y,) = opened.run(None, feeds(operator, np.stack([x, 2 * x]), np.stack([residual, residual])))
    np.testing.assert_array_equal(y[1], expected(operator, 2 * x, records, residual))
    empty = feeds(operator, np.zeros((3, 0, COLUMNS), np.float32), np.zeros((3, 0, OUTPUTS), np.float32))
    assert opened.run(None, empty)[0].shape == (3, 0, OUTPUTS)


@pytest.mark.parametrize(
    "attributes", [{"N": 97}, {"N": 64}, {"K": 321}, {"K": 256}, {"N": 0}, {"K": -1}, {"K": 2**40}]
)
def test_sizes_that_contradict_the_records_are_refused(records: Array, attributes: dict[str, int]) -> None:
    with pytest.raises(REFUSED, match=r"Int8Linear: (records|weights): got"):
        session("Int8Linear", records, **attributes)


def test_records_of_another_shape_are_refused(records: Array) -> None:
    for wrong in (records[:2], records[:, :-1], records.reshape(1, -1), records.reshape(-1), records[np.newaxis]):
        with pytest.raises(REFUSED, match="records: got uint8"):
            session("Int8Linear", np.ascontiguousarray(wrong))


def test_records_that_may_change_are_refused(records: Array) -> None:
    with pytest.raises(REFUSED, match="records: got an input that may change"):
        session("Int8Linear", records, computed=True)


def test_an_input_of_another_width_is_refused_when_it_runs(records: Array, x: Array, residual: Array) -> None:
    for wrong in (x[:, 1:], x[0, 0]):
        with pytest.raises(REFUSED, match=r"x: got float32 .*, expected float32 \[..., 300\]"):
            session("Int8Linear", records).run(None, {"x": np.ascontiguousarray(wrong)})


def test_a_residual_of_another_shape_is_refused_when_it_runs(records: Array, x: Array, residual: Array) -> None:
    for wrong in (residual[1:], residual[:, 1:], residual[np.newaxis]):
        with pytest.raises(REFUSED, match=r"residual: got float32 .*, expected float32 \[19, 70\]"):
            session("Int8LinearAdd", records).run(None, {"x": x, "residual": np.ascontiguousarray(wrong)})
