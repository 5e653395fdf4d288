"""The int8 op against float64 NumPy, on every path this machine can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError
from int4_matrices import aligned

Array = npt.NDArray[Any]
PATHS = _native.int8_paths()


@dataclass(frozen=True)
class Matrix:
    """int8 values [N, K], float32 scales and biases [N]."""

    values: Array
    scales: Array
    biases: Array

    @property
    def records(self) -> Array:
        records = aligned(_native.int8_records_shape(*self.values.shape))
        _native.int8_pack(records, self.values, self.scales, self.biases)
        return records


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> Matrix:
    values = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales, biases = (rng.standard_normal(rows).astype(np.float32) for _ in range(2))
    return Matrix(values, scales * np.float32(0.01), biases)


def product(x: Array, matrix: Matrix, **options: Any) -> Array:
    y = np.full((len(x), len(matrix.values)), np.nan, np.float32)
    _native.int8_linear(y, x, matrix.records, **options)
    return y


def assert_product(y: Array, x: Array, matrix: Matrix) -> None:
    """Off by half a step of each row's activations, and four roundings of float32."""
    weights = matrix.values * matrix.scales.astype(np.float64)[:, np.newaxis]
    half_a_step = np.abs(x).max(1, initial=0, keepdims=True).astype(np.float64) / 127 * (0.5 + 1e-4)
    rounded = half_a_step * np.abs(weights).sum(1)
    exact = x.astype(np.float64) @ weights.T + matrix.biases
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weights).T + np.abs(matrix.biases)
    assert (np.abs(y - exact) <= 1e-30 + rounded + (magnitude + rounded) * 4 * 2.0**-24).all()


def test_paths_are_best_first_and_supported() -> None:
    cpu = _native.cpu_features()
    assert PATHS[-1] == "portable"
    assert ("avx2" in PATHS) == (cpu["avx2"] and cpu["fma"])
    order = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "portable")
    for name in set(order) & cpu.keys():
        assert (name in PATHS) <= cpu[name]
    assert [name for name in order if name in PATHS] == PATHS


def test_the_shape_of_records_is_that_of_whole_panels_and_steps_of_columns() -> None:
    assert _native.int8_records_shape(32, 64) == (1, 32 * 64 + 256)
    assert _native.int8_records_shape(33, 65) == (2, 32 * 128 + 256)
    with pytest.raises(KernelArgumentError, match=r"weights: got int8 \[0, 1\]"):
        _native.int8_records_shape(0, 1)
    with pytest.raises(KernelArgumentError, match=r"weights: got int8 \[1, 131073\], expected .* 131072 columns"):
        _native.int8_records_shape(1, 2**17 + 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 64), (45, 130)])
def test_unpacking_gives_back_what_was_packed(rows: int, columns: int) -> None:
    matrix = random_matrix(np.random.default_rng(1), rows, columns)
    values = np.zeros_like(matrix.values)
    scales, biases = np.zeros_like(matrix.scales), np.zeros_like(matrix.biases)
    _native.int8_unpack(values, scales, biases, matrix.records)
    np.testing.assert_array_equal(values, matrix.values)
    np.testing.assert_array_equal(scales, matrix.scales)
    np.testing.assert_array_equal(biases, matrix.biases)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.one_of(st.integers(0, 40), st.sampled_from([64, 257, 600])),
    outputs=st.sampled_from([1, 31, 32, 33, 100, 320]),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([1024, 1025, 2112])),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    gelu=st.booleans(),
    residual=st.booleans(),
)
def test_every_path_agrees_with_float64(
    seed: int, rows: int, outputs: int, columns: int, spread: float, gelu: bool, residual: bool
) -> None:
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, outputs, columns)
    x = (rng.standard_normal((rows, columns)) * np.exp(spread * rng.standard_normal(columns))).astype(np.float32)
    added = rng.standard_normal((rows, outputs)).astype(np.float32) if residual else None
    options = {"gelu": gelu, "residual": added}
    # The portable path takes long for all but small products.
    paths = PATHS if rows * outputs * columns < 2**24 else PATHS[:-1]
    results = [product(x, matrix, threads=1 + i % 2, path=path, **options) for i, path in enumerate(paths)]
    if not gelu:
        assert_product(results[0] if added is None else results[0] - added.astype(np.float64), x, matrix)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_rows_are_the_same_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(2)
    matrix = random_matrix(rng, 200, 384)
    x = rng.standard_normal((70, 384)).astype(np.float32)
    together = product(x, matrix, threads=2)
    for row in range(70):
        np.testing.assert_array_equal(product(x[row : row + 1], matrix), together[row : row + 1])


@pytest.mark.parametrize("path", PATHS)
def test_gelu_is_that_of_torch(path: str) -> None:
    torch = pytest.importorskip("torch")
    # One column, whose rows are exact: y takes every value of a fine scale.
    values = np.linspace(-9, 9, 100_001, dtype=np.float32)[:, np.newaxis]
    matrix = Matrix(np.array([[127]], np.int8), np.array([1 / 127], np.float32), np.zeros(1, np.float32))
    plain, found = product(values, matrix, path=path), product(values, matrix, path=path, gelu=True)
    expected = torch.nn.functional.gelu(torch.from_numpy(plain).double()).numpy()
    assert (np.abs(found - expected) <= np.abs(plain) * 2.0**-22).all()


@pytest.mark.parametrize("path", PATHS)
def test_activations_are_rounded_to_nearest_and_ties_to_even(path: str) -> None:
    x = np.zeros((2, 70), np.float32)
    x[0, :5] = [127, 0.5, 1.5, -2.5, -127]
    values, scales = np.ones((2, 128), np.int8), np.ones(2, np.float32)
    _native.int8_quantize(values, scales, x, path)
    assert values[0, :6].tolist() == [127, 0, 2, -2, -127, 0]
    assert not values[0, 5:].any()
    assert not values[1].any()
    np.testing.assert_array_equal(scales, [1, 0])


class Call:
    """A valid call, one argument of which a test replaces."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {
            "y": np.full((2, 40), 7, np.float32),
            "x": np.ones((2, 70), np.float32),
            "records": random_matrix(np.random.default_rng(4), 40, 70).records,
            "residual": np.ones((2, 40), np.float32),
        }


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("y", np.ones((3, 40), np.float32), r"y: got .* where \[2, 40\] is needed"),
        ("y", np.ones((2, 80), np.float32)[:, ::2], "y: got .* not contiguous"),
        ("x", np.ones((2, 70)), "x: got float64"),
        ("x", np.ones((2, 200), np.float32), r"records: got 8704 bytes, expected 16896 for \[40, 200\]"),
        ("records", np.zeros((2, 4352), np.int8), "records: got int8"),
        ("records", aligned((2, 4416))[:, 64:], "records: got .* not contiguous"),
        ("residual", np.ones((2, 41), np.float32), r"residual: got .* where \[2, 40\] is needed"),
        ("residual", np.ones((2, 40)), "residual: got float64"),
        ("gelu", 1, "gelu: got int"),
        ("threads", 0, "threads: got 0, expected 1 to"),
        ("path", "avx9", 'path: got "avx9", expected "auto"'),
    ],
)
def test_what_it_cannot_compute_is_refused_and_nothing_written(argument: str, value: Any, reason: str) -> None:
    call = Call()
    y = call.arguments["y"]
    with pytest.raises(KernelArgumentError, match=reason):
        _native.int8_linear(**call.arguments | {argument: value})
    assert (y == 7).all()


def test_packing_refuses_what_no_records_hold() -> None:
    matrix = random_matrix(np.random.default_rng(5), 40, 70)
    with pytest.raises(KernelArgumentError, match=r"records: got .* where \[2, 4352\] is needed"):
        _native.int8_pack(aligned((2, 2304)), matrix.values, matrix.scales, matrix.biases)
    with pytest.raises(KernelArgumentError, match=r"scales: got .* where \[40\] is needed"):
        _native.int8_pack(aligned((2, 4352)), matrix.values, matrix.scales[:39], matrix.biases)
    matrix.values[39, 69] = -128
    with pytest.raises(KernelArgumentError, match="values: got -128, expected -127 to 127"):
        _native.int8_pack(aligned((2, 4352)), matrix.values, matrix.scales, matrix.biases)
