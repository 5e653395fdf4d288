"""int8 weights: levels, scales, and what ONNX Runtime computes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.linear import Linears
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.int8 import QMAX, QMAX_PRODUCT, nearest_int8


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 999))
@pytest.mark.parametrize("largest", [QMAX, QMAX_PRODUCT])
def test_every_value_is_within_half_a_step_and_each_row_uses_its_whole_range(
    rows: int, columns: int, seed: int, largest: int
) -> None:
    weight = weights(rows, columns, seed)
    quantized = nearest_int8(weight, largest)
    assert quantized.values.dtype == torch.int8
    assert quantized.values.abs().amax(1).tolist() == [largest] * rows
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= quantized.steps() * 0.5001).all())


def test_a_row_of_zeros_stays_zero() -> None:
    weight = weights(3, 8)
    weight[1] = 0
    quantized = nearest_int8(weight, QMAX)
    assert quantized.scales[1] == 0
    assert torch.equal(quantized.dequantize()[1], torch.zeros(8))


def test_two_products_of_extreme_values_fit_in_sixteen_bits() -> None:
    assert 2 * 255 * QMAX_PRODUCT <= np.iinfo(np.int16).max < 2 * 255 * QMAX


def layer(folder: Path, weight: torch.Tensor, bias: torch.Tensor | None) -> Path:
    graph = GraphBuilder(folder / "graph.onnx")
    graph.input("x", TensorProto.FLOAT, ["rows", weight.shape[1]])
    graph.node("Identity", [Linears("int8").emit(graph, "x", "layer", weight, bias)], "y")
    graph.output("y", TensorProto.FLOAT, ["rows", weight.shape[0]])
    graph.save()
    return graph.path


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_graph_multiplies_by_the_dequantized_weights_and_rounds_activations_to_eight_bits(
    tmp_path: Path, rows: int
) -> None:
    weight, bias = weights(96, 160), torch.randn(96, generator=torch.Generator().manual_seed(1))
    path = layer(tmp_path, weight, bias)
    x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(2))
    found = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    # What the operator is defined to do with activations: one scale and one zero point for all of them.
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
    expected = rounded @ StoredWeights(path).linear("layer").T + bias
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)
    assert torch.equal(StoredWeights(path).linear("layer"), nearest_int8(weight, QMAX_PRODUCT).dequantize())
