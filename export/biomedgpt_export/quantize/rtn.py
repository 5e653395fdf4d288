"""Round-to-nearest: every value goes to the closest level of its group; the baseline that other methods must beat."""

from __future__ import annotations

import torch

from .int4 import QMAX, QMIN, Int4Weight, group_size_for, grouped, pack


class RoundToNearest:
    """Symmetric round-to-nearest with one float16 scale per group."""

    name = "rtn"

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        """See :class:`WeightQuantizer`; the largest magnitude of a group lands on -8, so no level is wasted."""
        columns = weight.shape[1]
        group_size = group_size_for(columns)
        groups = grouped(weight, group_size)
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        # The scale is rounded to float16 before it is used, so that the values are chosen for the scale that is stored.
        scales = (extreme / QMIN).half()
        divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()
        values = (groups / divisor.unsqueeze(-1)).round().clamp(QMIN, QMAX)
        return Int4Weight(pack(values), scales, columns, group_size)
