"""Four-bit matrices, as MatMulNBits' arrays and as records, and what int4 must make of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from biomedgpt_edge import _native

Array = np.ndarray[Any, Any]
ALIGNMENT = 64


@dataclass(frozen=True)
class Matrix:
    """Weights [N, K] in groups: values uint8 [N, groups * group / 2], scales float16 [N, groups]."""

    values: Array
    scales: Array
    group: int

    @property
    def records(self) -> Array:
        """uint8 [panels, bytes of a panel], at an address that is a multiple of 64."""
        rows, groups = self.scales.shape
        panels, _, record_bytes = _native.int4_records_shape(rows, groups * self.group, self.group)
        records = aligned((panels, groups * record_bytes))
        _native.int4_pack(records, self.values, self.scales, self.group)
        return records

    @property
    def weights(self) -> Array:
        """float64 [N, groups * group]."""
        nibbles = np.stack([self.values & 15, self.values >> 4], axis=-1).reshape(len(self.values), -1)
        return (nibbles.astype(np.float64) - 8) * np.repeat(self.scales.astype(np.float64), self.group, axis=1)


def aligned(shape: tuple[int, int]) -> Array:
    raw = np.zeros(shape[0] * shape[1] + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + shape[0] * shape[1]].reshape(shape)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, group: int) -> Matrix:
    groups = -(-columns // group)
    values = rng.integers(0, 256, (rows, groups * group // 2), dtype=np.uint8)
    return Matrix(values, rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16), group)


def interleaved(gate: Matrix, up: Matrix) -> Array:
    """The records of both, panels by turns."""
    both = np.stack([gate.records, up.records], axis=1)
    records = aligned((2 * len(both), both.shape[-1]))
    records[...] = both.reshape(records.shape)
    return records


def quantized(x: Array, group: int) -> Array:
    """``x`` float32 [rows, K] as eight bits and a scale per group can say it: float64 [rows, groups * group]."""
    groups = -(-x.shape[1] // group)
    padded = np.pad(x, ((0, 0), (0, groups * group - x.shape[1]))).reshape(len(x), groups, group)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    steps = (largest / np.float32(127)).astype(np.float64)
    return (np.rint(padded * inverse) * steps).reshape(len(x), groups * group)


def assert_product(actual: Array, x: Array, matrix: Matrix) -> None:
    """Off by rounding alone: of float32, for the products and sums of the groups, relative to their magnitudes."""
    exact = quantized(x, matrix.group)
    magnitude = np.abs(exact) @ np.abs(matrix.weights).T
    allowed = (matrix.scales.shape[1] + 4) * 2.0**-24 * magnitude + 1e-30
    assert (np.abs(actual - exact @ matrix.weights.T) <= allowed).all()
