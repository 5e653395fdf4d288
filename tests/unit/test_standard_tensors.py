"""Tensors of standard graphs: they hold the numbers of those that a bundle holds, and hold nothing that contradicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_edge.manifest import PAGE
from biomedgpt_edge.portable import derived_data
from biomedgpt_edge.standard_tensors import packed_int4, sources, standard_bytes
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.quantize.int4 import GROUP_SIZES, Int4Weight, pack, pack_nibbles
from biomedgpt_export.quantize.int8_groups import Int8GroupWeight

Bytes = npt.NDArray[np.uint8]
ROWS, GROUPS, SIZES = st.integers(1, 20), st.integers(1, 4), st.sampled_from(GROUP_SIZES)
SEEDS = st.integers(0, 999)


def int4_weight(rows: int, groups: int, size: int, seed: int, *, zero_points: bool = False) -> Int4Weight:
    """Every level, and scales of either sign."""
    random = torch.Generator().manual_seed(seed)
    packed = pack(torch.randint(-8, 8, (rows, groups, size), generator=random))
    scales = torch.randn(rows, groups, generator=random).half()
    points = torch.randint(0, 16, (rows, groups + groups % 2), generator=random).byte()
    return Int4Weight(packed, scales, groups * size, size, pack_nibbles(points) if zero_points else None)


def raw(tensor: torch.Tensor) -> Bytes:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def read(data: Bytes, kind: int, *shape: int) -> np.ndarray:
    """As the onnx package reads it."""
    return np.asarray(numpy_helper.to_array(TensorProto(data_type=kind, dims=shape, raw_data=data.tobytes())))


def scales_of(scales: torch.Tensor, blocks: int, columns: int) -> np.ndarray:
    """float32 ``[blocks, columns]`` of what is stored by row and group."""
    name = f"layer.scales_kn.{scales.shape[0]}x{scales.shape[1]}"
    data = standard_bytes(name, (blocks, columns), [raw(scales)])
    return read(data, TensorProto.FLOAT16, blocks, columns).astype(np.float32)


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What ONNX's blocked DequantizeLinear along axis 0 gives of ``[K, N]`` and ``[blocks, N]``."""
    result: np.ndarray = values.astype(np.float32) * np.repeat(scales, len(values) // len(scales), axis=0)
    return result


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.qkv_proj.weight_int4_kn", ("layers.0.qkv_proj.weight_int4",)),
        ("lm_head.weight_int8_kn", ("lm_head.weight_int8",)),
        ("layers.0.o_proj.scales_kn.64x2", ("layers.0.o_proj.scales",)),
        ("down.weight_half", ("down.weight_int4", "down.scales", "down.zero_points")),
        ("layers.0.query.bias.half", ("layers.0.query.bias",)),
        ("layers.0.query.scales.half", ("layers.0.query.scales",)),
        ("rope_cos", ("rope_cos",)),
        ("layers.0.query.weight_int8", ("layers.0.query.weight_int8",)),
        ("", ("",)),
    ],
)
def test_what_a_tensor_is_made_of_its_name_says(name: str, expected: tuple[str, ...]) -> None:
    assert sources(name) == expected


def test_any_other_tensor_is_what_is_stored() -> None:
    stored = np.arange(12, dtype=np.uint8)
    assert standard_bytes("rope_cos", (3,), [stored]) is stored


# --- int4 -------------------------------------------------------------------------------------------------------------


@given(columns=st.integers(1, 9), rows=st.integers(1, 9), seed=SEEDS)
def test_packed_nibbles_are_int4_of_onnx_transposed(columns: int, rows: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 16, (rows, columns), np.uint8)
    packed = packed_int4(levels)
    assert packed.shape == (-(-rows * columns // 2),)
    found = read(packed, TensorProto.INT4, columns, rows)
    np.testing.assert_array_equal(found.astype(np.int64), levels.T.astype(np.int64) - 8)


def test_the_even_one_is_the_low_nibble_and_what_is_left_over_is_zero() -> None:
    # Of one column: -8, 7, 1, 0 and -1.
    assert packed_int4(np.array([[0], [15], [9], [8], [7]], np.uint8)).tolist() == [0x78, 0x01, 0x0F]


@given(rows=ROWS, groups=GROUPS, size=SIZES, seed=SEEDS, more=st.integers(0, 9))
def test_int4_matrices_dequantize_to_what_is_stored(rows: int, groups: int, size: int, seed: int, more: int) -> None:
    weight = int4_weight(rows, groups, size, seed)
    shape = groups * size, rows + more
    data = standard_bytes("layer.weight_int4_kn", shape, [raw(weight.packed)])
    assert len(data) == -(-shape[0] * shape[1] // 2)
    values, scales = read(data, TensorProto.INT4, *shape), scales_of(weight.scales, groups, rows + more)
    np.testing.assert_array_equal(dequantized(values, scales)[:, :rows], weight.dequantize().T.numpy())
    # Filled rows hold zeros, and so do their scales.
    assert not values[:, rows:].astype(np.int8).any()
    assert not scales[:, rows:].any()


@given(rows=ROWS, groups=GROUPS, blocks=st.integers(1, 4), seed=SEEDS)
def test_a_group_may_be_several_blocks_with_the_same_scale(rows: int, groups: int, blocks: int, seed: int) -> None:
    weight = int4_weight(rows, groups, 32, seed)
    shape = groups * 32, rows
    values = read(standard_bytes("x.weight_int4_kn", shape, [raw(weight.packed)]), TensorProto.INT4, *shape)
    # 32 columns are not so many blocks of three.
    several = blocks if 32 % blocks == 0 else 2
    found = dequantized(values, scales_of(weight.scales, groups * several, rows))
    np.testing.assert_array_equal(found, weight.dequantize().T.numpy())


@given(rows=ROWS, groups=GROUPS, size=SIZES, seed=SEEDS, cut=st.integers(0, 31), points=st.booleans())
def test_matrices_with_zero_points_are_rounded_to_float16_once(
    rows: int, groups: int, size: int, seed: int, cut: int, points: bool
) -> None:
    weight = int4_weight(rows, groups, size, seed, zero_points=points)
    parts = [raw(weight.packed), raw(weight.scales), None if weight.zero_points is None else raw(weight.zero_points)]
    # Columns that fill up the last group are left out.
    columns = groups * size - cut
    found = read(standard_bytes("x.weight_half", (columns, rows), parts), TensorProto.FLOAT16, columns, rows)
    np.testing.assert_array_equal(found, weight.dequantize()[:, :columns].half().T.numpy())


# --- int8 -------------------------------------------------------------------------------------------------------------


@given(rows=ROWS, groups=GROUPS, size=SIZES, seed=SEEDS, more=st.integers(0, 9))
def test_int8_matrices_in_groups_dequantize_to_what_is_stored(
    rows: int, groups: int, size: int, seed: int, more: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, groups, size), generator=random).byte()
    weight = Int8GroupWeight(packed, torch.randn(rows, groups, generator=random).half(), groups * size, size)
    shape = groups * size, rows + more
    data = standard_bytes("lm_head.weight_int8_kn", shape, [raw(packed)])
    values = read(data, TensorProto.INT8, *shape)
    found = dequantized(values, scales_of(weight.scales, groups, rows + more))
    np.testing.assert_array_equal(found[:, :rows], weight.dequantize().T.numpy())
    assert not values[:, rows:].any()


def test_all_bytes_become_the_numbers_that_they_stand_for() -> None:
    data = standard_bytes("x.weight_int8_kn", (256, 1), [np.arange(256, dtype=np.uint8)])
    assert data.view(np.int8).tolist() == list(range(-128, 128))


# --- halves -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=20))
def test_halves_are_the_nearest_float16(numbers: list[float]) -> None:
    stored = np.array(numbers, np.float32)
    found = standard_bytes("gain.half", stored.shape, [stored.view(np.uint8)]).view(np.float16)
    np.testing.assert_array_equal(found, torch.from_numpy(stored).half().numpy())


def test_halves_of_what_came_in_two_dimensions_lie_in_the_same_order() -> None:
    table = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    found = standard_bytes("table.half", (5, 7), [table.reshape(-1).view(np.uint8)])
    np.testing.assert_array_equal(read(found, TensorProto.FLOAT16, 5, 7), table.astype(np.float16))


# --- what contradicts -------------------------------------------------------------------------------------------------

FOUR_BY_64 = raw(int4_weight(4, 2, 32, 0).packed)
FOUR_BY_2 = raw(int4_weight(4, 2, 32, 0).scales)
# Name, shape and sources.
MALFORMED: dict[str, tuple[str, tuple[int, ...], list[Bytes | None]]] = {
    "fewer rows than there are": ("x.weight_int4_kn", (64, 3), [FOUR_BY_64]),
    "columns that do not divide": ("x.weight_int4_kn", (60, 4), [FOUR_BY_64]),
    "a single column": ("x.weight_int4_kn", (1, 4), [FOUR_BY_64]),
    "no column": ("x.weight_int4_kn", (0, 4), [FOUR_BY_64]),
    "one dimension": ("x.weight_int4_kn", (64,), [FOUR_BY_64]),
    "no dimension": ("x.weight_int4_kn", (), [FOUR_BY_64]),
    "int8 of fewer rows": ("x.weight_int8_kn", (64, 1), [FOUR_BY_64]),
    "int8 with columns that do not divide": ("x.weight_int8_kn", (60, 4), [FOUR_BY_64]),
    "int8 of one dimension": ("x.weight_int8_kn", (64,), [FOUR_BY_64]),
    "scales of more rows": ("x.scales_kn.5x2", (2, 8), [FOUR_BY_2]),
    "scales of more groups": ("x.scales_kn.4x3", (3, 8), [FOUR_BY_2]),
    "scales for fewer columns": ("x.scales_kn.4x2", (2, 3), [FOUR_BY_2]),
    "scales of no groups": ("x.scales_kn.4x0", (2, 4), [FOUR_BY_2]),
    "scales of no size": ("x.scales_kn.", (2, 4), [FOUR_BY_2]),
    "scales of a word": ("x.scales_kn.4xtwo", (2, 4), [FOUR_BY_2]),
    "scales of one number": ("x.scales_kn.8", (2, 4), [FOUR_BY_2]),
    "scales of three numbers": ("x.scales_kn.4x2x1", (2, 4), [FOUR_BY_2]),
    "scales of an odd number of bytes": ("x.scales_kn.4x2", (2, 4), [FOUR_BY_2[:-1]]),
    "no scales": ("x.weight_half", (64, 4), [FOUR_BY_64, None, None]),
    "scales of other rows": ("x.weight_half", (64, 5), [FOUR_BY_64, FOUR_BY_2, None]),
    "zero points of other rows": ("x.weight_half", (64, 4), [FOUR_BY_64, FOUR_BY_2, FOUR_BY_2[:3]]),
    "a float16 matrix of one dimension": ("x.weight_half", (64,), [FOUR_BY_64, FOUR_BY_2, None]),
    "halves of three bytes": ("x.half", (1,), [FOUR_BY_2[:3]]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_names_and_sizes_that_contradict_what_is_stored_are_errors(case: str) -> None:
    name, shape, parts = MALFORMED[case]
    # What portable.derived_data turns into a typed error.
    with pytest.raises((ValueError, IndexError, ZeroDivisionError)):
        standard_bytes(name, shape, parts)


@given(
    name=st.sampled_from(["x.weight_int4_kn", "x.weight_int8_kn", "x.scales_kn.4x2", "x.weight_half", "x.half", "x"]),
    shape=st.tuples(st.integers(0, 130), st.integers(0, 20)),
    sizes=st.tuples(*[st.integers(1, 300)] * 3),
)
def test_whatever_the_sizes_are_it_is_made_or_refused(
    name: str, shape: tuple[int, int], sizes: tuple[int, int, int]
) -> None:
    parts = [np.zeros(size, np.uint8) for size in sizes[: len(sources(name))]]
    try:
        data = standard_bytes(name, shape, list(parts))
    except (ValueError, IndexError, ZeroDivisionError):
        return
    assert data.dtype == np.uint8
    assert data.ndim == 1


# --- as a box derives them --------------------------------------------------------------------------------------------


def stored_graph(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    graph = GraphBuilder(path)
    for name, array in tensors.items():
        graph.tensor(name, array, mapped=True)
    graph.save()
    return path


def placed(path: Path, name: str, kind: int, shape: tuple[int, ...], length: int) -> Path:
    """A graph that places one tensor so."""
    graph = GraphBuilder(path, standard=True)
    graph.tensor(name, np.zeros(length, np.uint8), mapped=True, kind=kind, shape=shape)
    graph.save()
    path.with_suffix(".data").unlink()
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    weight = int4_weight(4, 2, 32, 0)
    tensors: dict[str, Any] = {
        "x.weight_int4": weight.packed.numpy(),
        "x.scales": weight.scales.numpy(),
        "gain": np.arange(8, dtype=np.float32),
    }
    return stored_graph(tmp_path / "own.onnx", tensors)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "expected"),
    [
        ("gain", TensorProto.FLOAT, (8,), lambda: np.arange(8, dtype=np.float32)),
        ("gain.half", TensorProto.FLOAT16, (8,), lambda: np.arange(8, dtype=np.float16)),
        ("x.scales_kn.4x2", TensorProto.FLOAT16, (2, 4), lambda: int4_weight(4, 2, 32, 0).scales.T.numpy()),
        ("x.weight_half", TensorProto.FLOAT16, (64, 4), lambda: int4_weight(4, 2, 32, 0).dequantize().half().T.numpy()),
    ],
)
def test_what_is_derived_is_what_the_name_says(
    own: Path, tmp_path: Path, name: str, kind: int, shape: tuple[int, ...], expected: Callable[[], np.ndarray]
) -> None:
    array = expected()
    graph = placed(tmp_path / "standard.onnx", name, kind, shape, array.nbytes)
    (_, data) = derived_data(own, graph)
    np.testing.assert_array_equal(read(data, kind, *shape), array)


@pytest.mark.parametrize(
    ("name", "shape", "length", "what"),
    [
        ("x.weight_int4_kn", (62, 4), 124, "cannot be made of what the bundle holds"),
        ("x.weight_int4_kn", (64, 3), 96, "cannot be made of what the bundle holds"),
        ("x.weight_int4_kn", (64, 4), 64, "places 64 bytes of 'x.weight_int4_kn'"),
        ("x.scales_kn.3x2", (2, 3), 12, "cannot be made of what the bundle holds"),
        ("x.scales_kn.4x0", (2, 4), 16, "cannot be made of what the bundle holds"),
        ("x.weight_half", (64, 3), 384, "cannot be made of what the bundle holds"),
        ("y.weight_int4_kn", (64, 4), 128, "and own.onnx has no tensor"),
        ("gain.weight_half", (64, 4), 512, "and own.onnx has no tensor"),
        ("y.half", (8,), 16, "and own.onnx has no tensor"),
        ("y", (8,), 16, "and own.onnx has no tensor"),
        (".half", (8,), 16, "and own.onnx has no tensor"),
        ("gain.half.half", (8,), 16, "and own.onnx has no tensor"),
    ],
)
def test_a_graph_that_places_what_cannot_be_made_is_refused_by_name(
    own: Path, tmp_path: Path, name: str, shape: tuple[int, ...], length: int, what: str
) -> None:
    graph = placed(tmp_path / "standard.onnx", name, TensorProto.FLOAT16, shape, length)
    with pytest.raises(BundleCorruptError, match=what):
        list(derived_data(own, graph))


def test_tensors_follow_each_other_on_pages(own: Path, tmp_path: Path) -> None:
    graph = GraphBuilder(tmp_path / "standard.onnx", on_pages=True, standard=True)
    for name, kind, shape, length in (
        ("gain.half", TensorProto.FLOAT16, (8,), 16),
        ("x.weight_int4_kn", TensorProto.INT4, (64, 4), 128),
        ("gain", TensorProto.FLOAT, (8,), 32),
    ):
        graph.tensor(name, np.zeros(length, np.uint8), mapped=True, kind=kind, shape=shape)
    graph.save()
    data = np.concatenate(list(derived_data(own, graph.path)))
    assert len(data) == 2 * PAGE + 32
    assert data[:16].view(np.float16).tolist() == data[2 * PAGE :].view(np.float32).tolist() == list(range(8))
    assert data[PAGE : PAGE + 128].any()
    assert not data[16:PAGE].any()
    assert not data[PAGE + 128 : 2 * PAGE].any()
