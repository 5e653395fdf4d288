"""Tensors of graphs in standard operators, made of those that a bundle holds for ONNX Runtime's own.

Engines such as TensorRT take matrices as ``[K, N]``: a blocked DequantizeLinear along axis 0, then MatMul. What a
tensor is made of, its name says:

* ``<layer>.weight_int4_kn``: int4 ``[K, N]``, two's complement, two neighbours of a row per byte, the even one in the
  low nibble (TensorProto.INT4 of ONNX); ``<layer>.weight_int8_kn``: int8 ``[K, N]``. N may be larger than the layer's
  number of rows, and K is that of its groups: what is beyond holds zeros.
* ``<layer>.scales_kn.<rows>x<groups>``: float16 ``[blocks, N]`` of as many rows and groups, each of which may be
  several blocks.
* ``<layer>.weight_half``: float16 ``[K, N]``, dequantized, where groups have zero points of their own.
* ``<name>.half``: the float32 tensor ``<name>``, rounded to float16.
* Any other name is that of a tensor which is stored so already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .tensor_names import INT8_VALUES, SCALES, VALUES, ZERO_POINTS

INT4_KN, INT8_KN, SCALES_KN = ".weight_int4_kn", ".weight_int8_kn", ".scales_kn"
WEIGHT_HALF, HALF = ".weight_half", ".half"
_SIZE = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})", re.ASCII)
# Nibbles and bytes that stand for zero, where a matrix has no zero points of its own.
_ZERO_INT4, _ZERO_INT8 = 8, 128

Bytes = npt.NDArray[np.uint8]


def sources(name: str) -> tuple[str, ...]:
    """The tensors that ``name`` is made of; the last of several may be absent."""
    layer, size = _scales_name(name)
    if size is not None:
        return (layer + SCALES,)
    for suffix, parts in (
        (INT4_KN, (VALUES,)),
        (INT8_KN, (INT8_VALUES,)),
        (WEIGHT_HALF, (VALUES, SCALES, ZERO_POINTS)),
        (HALF, ("",)),
    ):
        if name.endswith(suffix):
            return tuple(name.removesuffix(suffix) + part for part in parts)
    return (name,)


def standard_bytes(name: str, shape: tuple[int, ...], parts: Sequence[Bytes | None]) -> Bytes:
    """The bytes of the tensor ``name``, whose dimensions are ``shape``.

    Args:
        parts: the bytes of its :func:`sources`, as far as there are such tensors; for how those lie, see
            :mod:`biomedgpt_edge.portable`.

    Raises:
        ValueError: these are not as many as such a tensor is made of.
    """
    first, *others = parts
    if first is None:
        raise ValueError(f"there is nothing to make {name} of")
    _, size = _scales_name(name)
    if len(shape) != 2 and (size is not None or name.endswith((INT4_KN, INT8_KN, WEIGHT_HALF))):
        raise ValueError(f"{name} is no matrix")
    if name.endswith(INT4_KN):
        return packed_int4(_filled(_nibbles(first.reshape(-1, shape[0] // 2)), shape[1], _ZERO_INT4))
    if name.endswith(INT8_KN):
        levels = _filled(first.reshape(-1, shape[0]), shape[1], _ZERO_INT8)
        return _bytes((levels ^ np.uint8(_ZERO_INT8)).T)
    if size is not None:
        return _scales(first, size, *shape)
    if name.endswith(WEIGHT_HALF):
        by_group, zero_points = (*others, None)[:2]
        if by_group is None:
            raise ValueError(f"there are no scales for {name}")
        return _half(_dequantized(first, by_group, zero_points, shape[1])[:, : shape[0]].T)
    if name.endswith(HALF):
        return _half(first.view(np.float32))
    return first


def packed_int4(levels: npt.NDArray[np.uint8]) -> Bytes:
    """Nibbles uint8 ``[N, K]`` in which 8 is zero, as int4 ``[K, N]``: uint8 ``[ceil(K * N / 2)]``."""
    # Flipping the highest bit turns "value + 8" into two's complement.
    flat = (np.ascontiguousarray(levels.T) ^ np.uint8(_ZERO_INT4)).reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    packed: Bytes = flat[0::2] | (flat[1::2] << 4)
    return packed


def _filled(rows: npt.NDArray[Any], count: int, value: float) -> npt.NDArray[Any]:
    """``[count, ...]``: the rows, and then such that hold ``value``."""
    if len(rows) > count:
        raise ValueError(f"{len(rows)} rows do not fit {count}")
    return np.concatenate([rows, np.full((count - len(rows), *rows.shape[1:]), value, rows.dtype)])


def _half(values: npt.NDArray[np.float32]) -> Bytes:
    with np.errstate(over="ignore"):  # an export refuses what is infinite then
        return _bytes(values.astype(np.float16))


def _scales_name(name: str) -> tuple[str, str | None]:
    """The layer and the size in a name of scales; no size in any other name."""
    layer, found, size = name.rpartition(f"{SCALES_KN}.")
    return (layer, size) if found and "." not in size else (name, None)


def _scales(stored: Bytes, size: str, blocks: int, columns: int) -> Bytes:
    """float16 ``[blocks, columns]`` of ``[rows, groups]``, whose ``size`` is "<rows>x<groups>"."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{size!r} is no number of rows and groups")
    rows, groups = int(match[1]), int(match[2])
    if blocks % groups or rows > columns:
        raise ValueError(f"{rows} x {groups} scales do not fill {blocks} x {columns}")
    by_block = np.repeat(stored.view(np.float16).reshape(rows, groups), blocks // groups, axis=1)
    return _bytes(_filled(by_block, columns, 0).T)


def _nibbles(by_row: Bytes) -> npt.NDArray[np.uint8]:
    """uint8 ``[rows, columns]`` of ``[rows, columns / 2]``, which holds two neighbouring columns per byte."""
    nibbles = np.empty((len(by_row), 2 * by_row.shape[1]), np.uint8)
    nibbles[:, 0::2] = by_row & 15
    nibbles[:, 1::2] = by_row >> 4
    return nibbles


def _dequantized(packed: Bytes, scales: Bytes, zero_points: Bytes | None, rows: int) -> npt.NDArray[np.float32]:
    """float32 ``[rows, columns]``, columns of the last group that are padding included."""
    by_group = scales.view(np.float16).astype(np.float32).reshape(rows, -1)
    groups = by_group.shape[1]
    levels = _nibbles(packed.reshape(rows, -1)).reshape(rows, groups, -1).astype(np.float32)
    if zero_points is None:
        levels -= _ZERO_INT4
    else:
        levels -= _nibbles(zero_points.reshape(rows, -1))[:, :groups, np.newaxis]
    return (levels * by_group[:, :, np.newaxis]).reshape(rows, -1)


def _bytes(array: npt.NDArray[np.generic]) -> Bytes:
    flat: Bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat
