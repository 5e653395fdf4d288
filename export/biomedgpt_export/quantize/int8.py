"""int8 weights with one scale per output, multiplied by activations that are quantized as they come.

For the protein encoder, which reads a sequence once: hundreds of rows share each weight, so that arithmetic takes the
time, and integer products are the fastest there are: ONNX Runtime's ``com.microsoft.DynamicQuantizeMatMul``, which
quantizes activations to uint8 with one scale and zero point per call (see ``smoothing``), or those of csrc/int8, with
one scale per row. For a decoder's single rows, it would be memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

QMAX = 127
# For products, since ONNX Runtime's on x86 processors without VNNI add pairs of uint8 x int8 products in 16 bits that
# saturate, where 2 * 255 * 63 fits. Unsigned weights would be safe, too, and take seven times as long where a processor
# has tiles.
QMAX_PRODUCT = 63


@dataclass(frozen=True)
class Int8Weight:
    """One quantized matrix ``[N, K]``.

    Attributes:
        values: int8 ``[N, K]``.
        scales: float32 ``[N]``.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 ``[N, K]``."""
        return self.values.float() * self.scales.unsqueeze(-1)

    def steps(self) -> torch.Tensor:
        """float32 ``[N, K]``: distance of neighbouring levels at each weight."""
        return self.scales.unsqueeze(-1).expand(-1, self.values.shape[1])


def nearest_int8(weight: torch.Tensor, largest: int) -> Int8Weight:
    """Every value of ``weight`` float ``[N, K]`` goes to the closest level, the largest of a row to ``largest``."""
    rows = weight.float()
    scales = rows.abs().amax(1) / largest
    # A row of zeros has scale zero, and no level but zero.
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales)
    return Int8Weight((rows / divisor.unsqueeze(-1)).round().clamp(-largest, largest).to(torch.int8), scales)
