"""int4 weights in groups along the input width, and the layout in which a bundle stores them.

Layout (that of ONNX Runtime's ``com.microsoft.MatMulNBits``): ``packed`` uint8 ``[N, groups, group_size / 2]``, two
neighbouring columns per byte, the even one in the low nibble; a nibble holds value + 8. ``scales`` float16
``[N, groups]``. Columns beyond the width, where no group size divides it, hold zero.

What this package quantizes itself is symmetric and keeps its columns in place. Imported weights may have zero points
other than 8, and columns in another order; the layout has both as additions, which are absent where they say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ..errors import QuantizationError

GROUP_SIZES = (128, 64, 32)
ZERO_POINT = 8
QMIN, QMAX = -8, 7


@dataclass(frozen=True)
class Int4Weight:
    """One quantized matrix ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, groups, group_size / 2]``.
        scales: float16 ``[N, groups]``.
        columns: K before padding.
        group_size: columns that share a scale.
        zero_points: uint8 ``[N, ceil(groups / 2)]``, the nibble that stands for zero in each group, packed as the
            columns are; None where all are 8.
        order: int32 ``[K]``, the input that each stored column multiplies; None where they stand in place.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    columns: int
    group_size: int
    zero_points: torch.Tensor | None = None
    order: torch.Tensor | None = None
    bits: ClassVar[int] = 4

    def dequantize(self) -> torch.Tensor:
        """float32 ``[N, K]``, columns in place: the reference unpacker of the layout above."""
        values = unpack(self.packed).float()
        if self.zero_points is None:
            values -= ZERO_POINT
        else:
            values -= unpack(self.zero_points)[:, : values.shape[1], None]
        return self._in_place(values * self.scales.float().unsqueeze(-1))

    def steps(self) -> torch.Tensor:
        """float32 ``[N, K]``: distance of neighbouring levels at each weight."""
        return self._in_place(self.scales.float().abs().unsqueeze(-1).expand(-1, -1, self.group_size))

    def same_as(self, other: Int4Weight) -> bool:
        """Whether both are stored alike, bit for bit."""
        sizes = (self.columns, self.group_size) == (other.columns, other.group_size)
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("packed", "scales", "zero_points", "order"))
        return sizes and all(same(*pair) for pair in pairs)

    def _in_place(self, stored: torch.Tensor) -> torch.Tensor:
        """From ``[N, groups, group_size]`` to ``[N, K]`` in the order of the inputs."""
        columns = stored.flatten(1)[:, : self.columns]
        return columns if self.order is None else columns[:, torch.argsort(self.order)]


class WeightQuantizer(Protocol):
    """Chooses the int4 values of a matrix; round-to-nearest looks at the matrix alone."""

    name: str

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        """Quantizes ``weight`` float ``[N, K]``, the tensor called ``key`` in the checkpoint."""
        ...


def group_size_for(columns: int) -> int:
    """128, or 64 or 32 where 128 does not divide ``columns``; where none does, 32 with zero padding."""
    return next((size for size in GROUP_SIZES if columns % size == 0), GROUP_SIZES[-1])


def chosen_group_size(key: str, columns: int, asked: int | None) -> int:
    """The size that was asked for, or else that of :func:`group_size_for`, of the matrix called ``key``.

    Raises:
        QuantizationError: one was asked for that is not to be had, or does not divide ``columns``.
    """
    if asked is None:
        return group_size_for(columns)
    if asked not in GROUP_SIZES or columns % asked:
        fitting = [size for size in GROUP_SIZES if columns % size == 0]
        raise QuantizationError(
            f"groups of {asked} were asked for, and '{key}' has {columns} columns.",
            seen=asked,
            limit=", ".join(map(str, fitting)) or f"none of {', '.join(map(str, GROUP_SIZES))} divides {columns}",
            remedy="Ask for a size that divides every width, or for none: each matrix then gets the largest that fits.",
        )
    return asked


def group_bytes(rows: int, columns: int, group_size: int, bits: int) -> int:
    """What the values of a matrix in groups take with their float16 scales."""
    return rows * -(-columns // group_size) * (group_size * bits // 8 + 2)


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 ``[N, groups, group_size]``, zero-padded at the end of each row."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group_size))
    return padded.reshape(rows, -1, group_size)


def widest_scales(groups: torch.Tensor) -> torch.Tensor:
    """float16 ``[...]`` for ``groups`` float32 ``[..., group_size]``: the largest magnitude of a group lands on -8.

    No level is wasted that way; the sign of a scale is that of its group's extreme value, negated.
    """
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # Rounded to float16 before anything is divided by it, so that levels are chosen for the scale that is stored.
    return (extreme / QMIN).half()


def nearest_levels(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The closest integers in [-8, 7], as float32, of ``values`` at ``scales`` float16 that broadcast to them."""
    # A group too small for a float16 scale has scale zero, and no level but zero.
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    return (values / divisor).round().clamp(QMIN, QMAX)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors that may be absent are the same."""
    return one is other if one is None or other is None else torch.equal(one, other)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Integer values in [-8, 7], ``[N, groups, group_size]`` -> the packed layout."""
    return pack_nibbles((values + ZERO_POINT).to(torch.uint8))


def pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 0 to 15, ``[..., n]`` with even n -> uint8 ``[..., n / 2]``, the even ones low."""
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_nibbles`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
