"""Round-to-nearest: every value goes to the closest level of its group; the baseline that other methods must beat."""

from __future__ import annotations

import torch

from .int4 import Int4Weight, chosen_group_size, grouped, nearest_levels, pack, widest_scales


class RoundToNearest:
    """Symmetric round-to-nearest with one float16 scale per group."""

    name = "rtn"

    def __init__(self, group_size: int | None = None) -> None:
        """``group_size``: of every matrix; None takes for each the largest that divides its width."""
        self._group_size = group_size

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        """See :class:`WeightQuantizer`."""
        columns = weight.shape[1]
        group_size = chosen_group_size(key, columns, self._group_size)
        groups = grouped(weight, group_size)
        scales = widest_scales(groups)
        values = nearest_levels(groups, scales.unsqueeze(-1))
        return Int4Weight(pack(values), scales, columns, group_size)
