"""The int4 op against float64 NumPy, on every path this machine can run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError
from int4_matrices import Array, Matrix, aligned, assert_product, interleaved, random_matrix

PATHS = _native.int4_paths()
GROUPS = (128, 64, 32)


def product(x: Array, matrix: Matrix, **options: Any) -> Array:
    y = np.full((len(x), len(matrix.scales)), np.nan, np.float32)
    _native.int4_linear(y, x, matrix.records, matrix.group, **options)
    return y


def test_paths_are_best_first_and_supported() -> None:
    cpu = _native.cpu_features()
    assert PATHS[-1] == "portable"
    assert ("avx2" in PATHS) == (cpu["avx2"] and cpu["fma"] and cpu["f16c"])
    for name in ("avx512_vnni", "avx_vnni", "neon_i8mm", "neon_dotprod"):
        assert (name in PATHS) <= cpu[name]
    order = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "portable")
    assert [name for name in order if name in PATHS] == PATHS


def test_the_shape_of_records_is_that_of_whole_panels_and_groups() -> None:
    assert _native.int4_records_shape(32, 256, 128) == (1, 2, 2112)
    assert _native.int4_records_shape(33, 257, 64) == (2, 5, 1088)
    assert _native.int4_records_shape(1, 1, 32) == (1, 1, 576)
    with pytest.raises(KernelArgumentError, match="group: got 48, expected 128, 64 or 32"):
        _native.int4_records_shape(32, 256, 48)
    with pytest.raises(KernelArgumentError, match=r"weights: got int4 \[32, 16777217\]"):
        _native.int4_records_shape(32, 2**24 + 1, 32)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 32, 45])
def test_unpacking_gives_back_what_was_packed(rows: int, group: int) -> None:
    matrix = random_matrix(np.random.default_rng(1), rows, 3 * group, group)
    values, scales = np.zeros_like(matrix.values), np.zeros_like(matrix.scales)
    _native.int4_unpack(values, scales, matrix.records, group)
    np.testing.assert_array_equal(values, matrix.values)
    np.testing.assert_array_equal(scales.view(np.uint16), matrix.scales.view(np.uint16))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.one_of(st.integers(0, 20), st.sampled_from([31, 33, 64, 257])),
    outputs=st.sampled_from([1, 31, 32, 33, 100]),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([512, 640, 1024])),
    group=st.sampled_from(GROUPS),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_every_path_agrees_with_float64(
    seed: int, rows: int, outputs: int, columns: int, group: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, outputs, columns, group)
    x = (rng.standard_normal((rows, columns)) * np.exp(spread * rng.standard_normal(columns))).astype(np.float32)
    results = [product(x, matrix, threads=1 + i % 2, path=path) for i, path in enumerate(PATHS)]
    assert_product(results[0], x, matrix)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_rows_are_the_same_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(2)
    matrix = random_matrix(rng, 200, 384, 128)
    x = rng.standard_normal((70, 384)).astype(np.float32)
    together = product(x, matrix, threads=2)
    for row in range(70):
        np.testing.assert_array_equal(product(x[row : row + 1], matrix), together[row : row + 1])


@pytest.mark.parametrize("path", PATHS)
def test_gate_up_is_silu_times_up(path: str) -> None:
    rng = np.random.default_rng(3)
    gate, up = (random_matrix(rng, 75, 256, 64) for _ in range(2))
    x = rng.standard_normal((19, 256)).astype(np.float32)
    y = np.full((19, 75), np.nan, np.float32)
    _native.int4_gate_up(y, x, interleaved(gate, up), 64, path=path)
    of_gate, of_up = (product(x, matrix, path=path).astype(np.float64) for matrix in (gate, up))
    np.testing.assert_allclose(y, of_gate / (1 + np.exp(-of_gate)) * of_up, rtol=2.0**-21, atol=1e-30)


@pytest.mark.parametrize("path", PATHS)
def test_activations_are_rounded_to_nearest_and_ties_to_even(path: str) -> None:
    x = np.zeros((2, 64), np.float32)
    x[0, :5] = [127, 0.5, 1.5, -2.5, -127]
    values, scales, zero_terms = np.ones((2, 64), np.int8), np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)
    _native.int4_quantize(values, scales, zero_terms, x, 32, path)
    assert values[0, :6].tolist() == [127, 0, 2, -2, -127, 0]
    np.testing.assert_array_equal(scales, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(zero_terms, [[0, 0], [0, 0]])


class Call:
    """A valid call, one argument of which a test replaces."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {
            "y": np.full((2, 40), 7, np.float32),
            "x": np.ones((2, 64), np.float32),
            "records": random_matrix(np.random.default_rng(4), 40, 64, 32).records,
            "group": 32,
        }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.ones((2, 64)), "x: got float64 [2, 64], expected float32 [rows, K]"),
        ("x", np.ones(64, np.float32), "x: got float32 [64]"),
        ("x", np.ones((3, 64), np.float32), "y: got float32 [2, 40] where [3, 40] is needed"),
        ("x", np.ones((2, 65), np.float32), "records: got 2304 bytes"),
        ("x", np.ones((2, 128), np.float32)[:, ::2], "x: got float32 [2, 64], not contiguous"),
        ("y", np.ones((2, 65), np.float32), "records: got 2304 bytes"),
        ("y", np.ones((2, 40), np.float16), "y: got float16"),
        ("records", aligned((2, 1153))[:, :1152], "records: got uint8 [2, 1152], not contiguous"),
        ("records", aligned((1, 2305)).reshape(-1)[1:].reshape(2, 1152), "records: got misaligned data"),
        ("records", aligned((2, 1152)).view(np.int8), "records: got int8"),
        ("group", 16, "group: got 16, expected 128, 64 or 32"),
        ("group", True, "group: got bool"),
        ("threads", 0, "threads: got 0"),
        ("path", "avx9", 'path: got "avx9"'),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Any, message: str) -> None:
    call = Call()
    y = call.arguments["y"]
    call.arguments[name] = value
    with pytest.raises(KernelArgumentError) as caught:
        _native.int4_linear(**call.arguments)
    assert caught.value.message.startswith(message)
    assert y.min() == y.max() == 7


def test_the_call_that_they_change_is_valid() -> None:
    _native.int4_linear(**Call().arguments)


def test_packing_refuses_records_of_another_size() -> None:
    matrix = random_matrix(np.random.default_rng(5), 40, 64, 32)
    with pytest.raises(KernelArgumentError, match=r"records: got uint8 \[1, 1152\] where \[2, 1152\] is needed"):
        _native.int4_pack(aligned((1, 1152)), matrix.values, matrix.scales, 32)
    with pytest.raises(KernelArgumentError, match=r"values: got uint8 \[40, 32\] where \[40, 64\] is needed"):
        _native.int4_pack(aligned((2, 1152)), matrix.values, matrix.scales, 64)
