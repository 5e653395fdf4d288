"""int8 weights in groups along the input width: for the head of an int4 model, whose errors are those of the logits.

Layout (that of ONNX Runtime's ``com.microsoft.MatMulNBits`` with 8 bits): ``packed`` uint8 ``[N, groups, group_size]``,
a byte holds value + 128. ``scales`` float16 ``[N, groups]``. Columns beyond the width, where no group size divides it,
hold zero. Activations are quantized per group, too, and not all with one scale as for ``int8`` of an encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .int4 import group_bytes, group_size_for, grouped
from .int8 import QMAX

ZERO_POINT = 128


@dataclass(frozen=True)
class Int8GroupWeight:
    """One quantized matrix ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, groups, group_size]``.
        scales: float16 ``[N, groups]``.
        columns: K before padding.
        group_size: columns that share a scale.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    columns: int
    group_size: int
    bits: ClassVar[int] = 8

    def dequantize(self) -> torch.Tensor:
        """float32 ``[N, K]``."""
        return self._columns((self.packed.float() - ZERO_POINT) * self.scales.float().unsqueeze(-1))

    def steps(self) -> torch.Tensor:
        """float32 ``[N, K]``: distance of neighbouring levels at each weight."""
        return self._columns(self.scales.float().unsqueeze(-1).expand(-1, -1, self.group_size))

    def _columns(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.flatten(1)[:, : self.columns]


def nearest_int8_groups(weight: torch.Tensor) -> Int8GroupWeight:
    """Every value of ``weight`` float ``[N, K]`` goes to the closest level of its group, at most half a step away."""
    columns = weight.shape[1]
    group_size = group_size_for(columns)
    groups = grouped(weight, group_size)
    scales = _not_smaller(groups.abs().amax(-1) / QMAX)
    # A group of zeros has scale zero, and no level but zero.
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    values = (groups / divisor.unsqueeze(-1)).round().clamp(-QMAX, QMAX)
    return Int8GroupWeight((values + ZERO_POINT).to(torch.uint8), scales, columns, group_size)


def stored_bytes(name: str, rows: int, columns: int) -> int:
    """What :func:`nearest_int8_groups` makes of a matrix of that size, whatever its name."""
    return group_bytes(rows, columns, group_size_for(columns), Int8GroupWeight.bits)


def _not_smaller(scales: torch.Tensor) -> torch.Tensor:
    """float16 of ``scales`` float32, rounded up: with a smaller scale, the extreme of a group would be cut off.

    By a thousandth at most, but below 6e-5 (weights below .008), where float16 holds multiples of 6e-8.
    """
    halves = scales.half()
    return torch.where(halves.float() < scales, torch.nextafter(halves, halves.new_tensor(torch.inf)), halves)
