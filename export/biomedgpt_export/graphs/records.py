"""Matrices in the layouts of csrc/int4 and csrc/int8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from biomedgpt_edge import _native

from ..quantize.int4 import GROUP_SIZES, Int4Weight
from ..quantize.int8 import Int8Weight

Records = npt.NDArray[np.uint8]


def records_bytes(rows: int, columns: int, group_size: int) -> int:
    """What a matrix takes, its last panel and group filled up."""
    panels, groups, size = _native.int4_records_shape(rows, columns, group_size)
    return panels * groups * size


def int8_records_bytes(_name: str, rows: int, columns: int) -> int:
    """What a matrix and its bias take, its last panel and its columns filled up."""
    panels, size = _native.int8_records_shape(rows, columns)
    return panels * size


def packed(weight: Int4Weight) -> Records:
    """uint8 ``[panels, groups, bytes of a record]``, see csrc/int4/int4.h; of weights with zero point 8."""
    shape = _native.int4_records_shape(len(weight.packed), weight.columns, weight.group_size)
    records = np.empty(shape, np.uint8)
    _native.int4_pack(
        records.reshape(len(records), -1), weight.packed.flatten(1).numpy(), weight.scales.numpy(), weight.group_size
    )
    return records


def unpacked(records: Records, rows: int, columns: int) -> Int4Weight:
    """The inverse of :func:`packed`, bit for bit, but for an order of the columns, which records do not hold."""
    found = tuple(records.shape)
    size = next(size for size in GROUP_SIZES if _native.int4_records_shape(rows, columns, size) == found)
    groups = found[1]
    values, scales = np.empty((rows, groups * size // 2), np.uint8), np.empty((rows, groups), np.float16)
    _native.int4_unpack(values, scales, np.ascontiguousarray(records).reshape(len(records), -1), size)
    return Int4Weight(torch.from_numpy(values.reshape(rows, groups, -1)), torch.from_numpy(scales), columns, size)


def packed_int8(weight: Int8Weight, bias: npt.NDArray[np.float32]) -> Records:
    """uint8 ``[panels, bytes of a panel]``, see csrc/int8/int8.h; bias float32 ``[N]``."""
    records = np.empty(_native.int8_records_shape(*weight.values.shape), np.uint8)
    _native.int8_pack(records, weight.values.contiguous().numpy(), weight.scales.numpy(), bias)
    return records


def unpacked_int8(records: Records, rows: int, columns: int) -> tuple[Int8Weight, npt.NDArray[np.float32]]:
    """The inverse of :func:`packed_int8`, bit for bit."""
    values, scales, bias = np.empty((rows, columns), np.int8), np.empty(rows, np.float32), np.empty(rows, np.float32)
    _native.int8_unpack(values, scales, bias, np.ascontiguousarray(records))
    return Int8Weight(torch.from_numpy(values), torch.from_numpy(scales)), bias
