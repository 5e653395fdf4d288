"""int8 weights in groups: levels and scales, and what ONNX Runtime computes with them."""

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
from biomedgpt_export.graphs.linear import Activations, Linears
from biomedgpt_export.graphs.matrices import HEAD
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.int4 import group_bytes, group_size_for, grouped
from biomedgpt_export.quantize.int8_groups import Int8GroupWeight, nearest_int8_groups

SMALLEST_HALF = 2.0**-24


def weights(rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


# --- levels -----------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 400),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-7, 1e-5, 1e-3, 0.05, 1.0, 300.0]),
)
def test_every_value_is_within_half_a_step_of_a_scale_hardly_larger_than_needed(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    weight = weights(rows, columns, seed, scale)
    quantized = nearest_int8_groups(weight)
    size = group_size_for(columns)
    assert (quantized.group_size, quantized.columns) == (size, columns)
    assert quantized.packed.shape == (rows, -(-columns // size), size)
    assert (quantized.packed.dtype, quantized.scales.dtype) == (torch.uint8, torch.float16)
    assert quantized.dequantize().shape == weight.shape
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= quantized.steps() * 0.5001).all())
    needed = grouped(weight, size).abs().amax(-1) / 127
    assert bool((quantized.scales.float() <= needed * (1 + 2.0**-10) + SMALLEST_HALF).all())


@given(rows=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_what_lies_on_the_levels_is_kept_exactly(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (rows, groups, 128), generator=generator).float()
    values[..., 0] = 127
    scales = 2.0 ** torch.randint(-10, 3, (rows, groups, 1), generator=generator)
    weight = (values * scales).flatten(1)
    quantized = nearest_int8_groups(weight)
    assert torch.equal(quantized.dequantize(), weight)
    assert torch.equal(quantized.packed.float() - 128, values)


def test_columns_beyond_the_width_and_groups_of_zeros_hold_zero() -> None:
    weight = weights(3, 200)
    weight[1, 64:128] = 0
    quantized = nearest_int8_groups(weight)
    assert quantized.packed.flatten(1)[:, 200:].unique().tolist() == [128]
    assert not quantized.dequantize()[1, 64:128].any()
    assert torch.isfinite(quantized.dequantize()).all()


def test_the_bytes_of_the_seven_billion_models_head() -> None:
    assert [group_bytes(32_007, 4096, 128, bits) for bits in (4, 8)] == [67_598_784, 133_149_120]


# --- in ONNX Runtime --------------------------------------------------------------------------------------------------


def graph_of(folder: Path, weight: torch.Tensor, activations: Activations) -> Path:
    rows, columns = weight.shape
    graph = GraphBuilder(folder / f"{activations}.onnx")
    graph.input("x", TensorProto.FLOAT, ["n", columns])
    linears = Linears("int4", activations=activations, lm_head="int8")
    graph.node("Identity", [linears.emit(graph, "x", HEAD, weight)], "y")
    graph.output("y", TensorProto.FLOAT, ["n", rows])
    graph.save()
    assert linears.int8_group_size == group_size_for(columns)
    assert linears.padded == [HEAD] * (columns % linears.int8_group_size != 0)
    return graph.path


def run(path: Path, source: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": source.numpy()})[0]
    return result


def rounded(source: torch.Tensor, size: int) -> torch.Tensor:
    """Activations to the nearest of 255 levels of their group, as the operator does where it computes in int8."""
    groups = grouped(source, size)
    steps = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / steps).round() * steps).flatten(1)[:, : source.shape[1]]


# The head's 32,007 rows, like those of the tiny model, are no multiple of what a processor computes at once.
@pytest.mark.parametrize(
    ("rows", "columns"), [(1001, 64), (1001, 128), (7, 96), (33, 100), (17, 300), (39, 1024), (19, 4096)]
)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_the_graph_multiplies_by_the_weights_that_are_read_back_from_it(
    tmp_path: Path, rows: int, columns: int, tokens: int
) -> None:
    weight, source = weights(rows, columns), weights(tokens, columns, 1, 1.0)
    weight[3] = 0
    exact = graph_of(tmp_path, weight, "fp32")
    stored = StoredWeights(exact)
    assert torch.equal(stored.linear(HEAD), nearest_int8_groups(weight).dequantize())
    assert torch.equal(stored.step(HEAD), nearest_int8_groups(weight).steps())
    expected = (source.double() @ stored.linear(HEAD).double().T).numpy()
    largest = np.abs(expected).max()
    np.testing.assert_allclose(run(exact, source), expected, rtol=0, atol=2e-6 * largest)
    # Where a value lies between two levels, either may be taken.
    quantized = (rounded(source, group_size_for(columns)).double() @ stored.linear(HEAD).double().T).numpy()
    np.testing.assert_allclose(run(graph_of(tmp_path, weight, "int8"), source), quantized, rtol=0, atol=2e-3 * largest)


def test_every_level_reaches_the_product(tmp_path: Path) -> None:
    weight = torch.arange(-127, 129).clamp(max=127).reshape(2, 128).float() * 0.25
    weight[1, 0] = 127 * 0.25
    source = torch.eye(128)
    for activations in ("fp32", "int8"):
        path = graph_of(tmp_path, weight, activations)
        np.testing.assert_allclose(run(path, source), weight.T.numpy(), rtol=1e-6, atol=0)


def test_extreme_values_saturate_nowhere(tmp_path: Path) -> None:
    weight = torch.ones(24, 256)
    weight[12:] = -1
    source = torch.ones(3, 256)
    expected = (source @ nearest_int8_groups(weight).dequantize().T).numpy()
    np.testing.assert_allclose(run(graph_of(tmp_path, weight, "int8"), source), expected, rtol=1e-5)


def test_other_layers_of_that_model_are_int4(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int4 needs a quantizer"):
        Linears("int4", lm_head="int8").emit(GraphBuilder(tmp_path / "g.onnx"), "x", "layers.0.o_proj", weights(8, 32))


def test_zero_is_stored_as_the_middle() -> None:
    packed = torch.full((1, 1, 32), 128, dtype=torch.uint8)
    packed[0, 0, :3] = torch.tensor([0, 127, 255], dtype=torch.uint8)
    weight = Int8GroupWeight(packed, torch.full((1, 1), 0.5, dtype=torch.float16), 4, 32).dequantize()
    assert weight.tolist() == [[-64.0, -0.5, 63.5, 0.0]]
