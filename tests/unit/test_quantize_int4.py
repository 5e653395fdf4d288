"""int4 weights: the layout, round-to-nearest and its error, and what ONNX Runtime computes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from biomedgpt_export.graphs.builder import CONTRIB, GraphBuilder
from biomedgpt_export.quantize.int4 import GROUP_SIZES, Int4Weight, group_size_for, grouped, pack
from biomedgpt_export.quantize.rtn import RoundToNearest

WIDTHS = st.integers(32, 400)


def weights(rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def steps(weight: torch.Tensor, quantized: Int4Weight) -> torch.Tensor:
    """Error of each value in units of its group's step, ``[N, groups, group_size]``."""
    error = grouped((quantized.dequantize() - weight).abs(), quantized.group_size)
    return error / quantized.scales.float().abs().clamp(min=1e-30).unsqueeze(-1)


# --- layout -----------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.sampled_from(GROUP_SIZES), seed=st.integers(0, 999))
def test_packing_loses_nothing(rows: int, groups: int, size: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, groups, size), generator=torch.Generator().manual_seed(seed))
    packed = pack(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, groups, size // 2)
    ones = torch.ones(rows, groups, dtype=torch.float16)
    for columns in (groups * size, groups * size - 5):
        unpacked = Int4Weight(packed, ones, columns, size).dequantize()
        assert torch.equal(unpacked, values.flatten(1)[:, :columns].float())


def test_the_even_column_is_the_low_nibble_and_eight_stands_for_zero() -> None:
    values = torch.zeros(1, 1, 32, dtype=torch.int64)
    values[0, 0, :4] = torch.tensor([-8, 7, 1, 0])
    assert pack(values)[0, 0].tolist() == [0xF0, 0x89, *[0x88] * 14]


@pytest.mark.parametrize(
    ("columns", "size"),
    [(32, 32), (33, 32), (64, 64), (96, 32), (128, 128), (192, 64), (344, 32), (384, 128), (2560, 128), (11008, 128)],
)
def test_the_largest_group_that_divides_the_width_is_used(columns: int, size: int) -> None:
    assert group_size_for(columns) == size
    assert RoundToNearest().quantize("w", weights(1, columns)).group_size == size


@given(columns=WIDTHS)
def test_columns_beyond_the_width_hold_zero(columns: int) -> None:
    quantized = RoundToNearest().quantize("w", weights(3, columns))
    groups = -(-columns // quantized.group_size)
    assert quantized.packed.shape == (3, groups, quantized.group_size // 2)
    assert quantized.scales.shape == (3, groups)
    whole = Int4Weight(quantized.packed, quantized.scales, groups * quantized.group_size, quantized.group_size)
    assert quantized.dequantize().shape == (3, columns)
    assert not whole.dequantize()[:, columns:].any()


# --- round to nearest -------------------------------------------------------------------------------------------------


@given(columns=WIDTHS, seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 0.05, 1.0, 300.0]))
def test_an_error_is_half_a_step_but_for_the_far_end_of_the_other_side(columns: int, seed: int, scale: float) -> None:
    weight = weights(4, columns, seed, scale)
    quantized = RoundToNearest().quantize("w", weight)
    error = steps(weight, quantized)
    levels = grouped(weight, quantized.group_size) / quantized.scales.float().unsqueeze(-1)
    # Sixteen levels have no middle: -8 has no counterpart, so values above 7.5 steps are cut to 7. The scale itself is
    # rounded to fp16, which moves the extreme value by up to 8 * 2^-11 steps.
    slack = 8 * 2.0**-11
    assert (error[levels <= 7.5] <= 0.5 + slack).all()
    assert (error <= 1 + slack).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_magnitude_is_met_within_the_rounding_of_its_scale_whatever_its_sign(sign: float) -> None:
    weight = weights(2, 64).clamp(-0.1, 0.1)
    weight[:, 7] = 0.777 * sign
    quantized = RoundToNearest().quantize("w", weight)
    assert (torch.sign(quantized.scales) == -sign).all()
    torch.testing.assert_close(quantized.dequantize()[:, 7], weight[:, 7], rtol=2.0**-11, atol=0)


def test_values_on_the_grid_are_exact() -> None:
    values = torch.arange(-8, 8).repeat(4, 8).float()
    weight = values * 0.25
    assert torch.equal(RoundToNearest().quantize("w", weight).dequantize(), weight)


def test_a_group_of_zeros_stays_zero_and_disturbs_no_other() -> None:
    weight = weights(3, 256)
    weight[1, 128:] = 0
    weight[2] = 0
    dequantized = RoundToNearest().quantize("w", weight).dequantize()
    assert torch.isfinite(dequantized).all()
    assert not dequantized[1, 128:].any()
    assert not dequantized[2].any()
    assert torch.equal(dequantized[0], RoundToNearest().quantize("w", weight[:1]).dequantize()[0])


def test_an_outlier_costs_its_own_group_alone() -> None:
    weight = weights(1, 256)
    plain = RoundToNearest().quantize("w", weight).dequantize()
    weight[0, 3] = 100.0
    spoiled = RoundToNearest().quantize("w", weight).dequantize()
    assert torch.equal(spoiled[:, 128:], plain[:, 128:])
    assert spoiled[0, 3] == 100.0
    assert not spoiled[0, 4:128].any()


def test_values_too_small_for_a_scale_in_fp16_become_zero() -> None:
    dequantized = RoundToNearest().quantize("w", torch.full((1, 32), 1e-9)).dequantize()
    assert torch.equal(dequantized, torch.zeros(1, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_every_stored_dtype_are_quantized_from_their_exact_values(dtype: torch.dtype) -> None:
    weight = weights(4, 128).to(dtype)
    one, other = RoundToNearest().quantize("w", weight), RoundToNearest().quantize("w", weight.float())
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scales, other.scales)


def test_the_same_weights_always_give_the_same_bytes() -> None:
    one, other = (RoundToNearest().quantize("w", weights(8, 200)) for _ in range(2))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scales, other.scales)


# --- in ONNX Runtime --------------------------------------------------------------------------------------------------


def product(folder: Path, quantized: Int4Weight, source: np.ndarray, level: int) -> np.ndarray:
    graph = GraphBuilder(folder / f"{quantized.columns}-{quantized.group_size}-{level}.onnx")
    graph.input("x", TensorProto.FLOAT, ["rows", quantized.columns])
    packed = graph.tensor("packed", quantized.packed.numpy())
    scales = graph.tensor("scales", quantized.scales.float().flatten().numpy())
    rows = quantized.packed.shape[0]
    attributes = {"K": quantized.columns, "N": rows, "bits": 4, "block_size": quantized.group_size}
    graph.node("MatMulNBits", ["x", packed, scales], "y", domain=CONTRIB, accuracy_level=level, **attributes)
    graph.output("y", TensorProto.FLOAT, ["rows", rows])
    graph.save()
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": source})[0]
    return result


@pytest.mark.parametrize("columns", [32, 40, 64, 96, 100, 128, 200, 256, 344, 384, 400])
@pytest.mark.parametrize("tokens", [1, 5])
def test_onnx_runtime_reads_the_layout_as_the_reference_unpacker_does(
    tmp_path: Path, columns: int, tokens: int
) -> None:
    source = weights(tokens, columns, 1, 1.0).numpy()
    weight = weights(24, columns)
    weight[3] = 0
    quantized = RoundToNearest().quantize("w", weight)
    expected = source.astype(np.float64) @ quantized.dequantize().double().numpy().T
    np.testing.assert_allclose(product(tmp_path, quantized, source, 1), expected, rtol=0, atol=2e-6)
    # Level 4 quantizes the activations to int8: close, and not the same.
    fast = product(tmp_path, quantized, source, 4)
    assert np.abs(fast - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_every_level_and_the_sign_of_the_scale_reach_the_product(tmp_path: Path, size: int) -> None:
    values = (torch.arange(size) % 16 - 8).repeat(2, 2, 1)
    scales = torch.tensor([[0.5, -0.25], [-2.0, 1.0]], dtype=torch.float16)
    quantized = Int4Weight(pack(values), scales, 2 * size, size)
    source = np.eye(2 * size, dtype=np.float32)
    np.testing.assert_array_equal(product(tmp_path, quantized, source, 1), quantized.dequantize().numpy().T)
