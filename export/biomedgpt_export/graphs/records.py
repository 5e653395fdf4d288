"""Matrices in the layout of csrc/int4."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from biomedgpt_edge import _native

from ..quantize.int4 import GROUP_SIZES, Int4Weight

Records = npt.NDArray[np.uint8]


def records_bytes(rows: int, columns: int, group_size: int) -> int:
    """What a matrix takes, its last panel and group filled up."""
    panels, groups, size = _native.int4_records_shape(rows, columns, group_size)
    return panels * groups * size


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
