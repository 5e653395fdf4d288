"""SmoothQuant: what outlier channels cost int8 activations is taken over by the weights.

Xiao et al. 2022 (arXiv:2211.10438). All activations that enter a layer share one scale, which the largest channel
sets: beside one that is a hundred times as large, the others have a few levels left. Behind a LayerNorm, channel j can
be divided by any s_j if column j of every matrix that reads the norm is multiplied by it, which changes nothing that
is computed. With s_j = sqrt(max |x_j| / max |w_j|), activations and weights have the same spread.

Here s_j is a power of two: rescaling then rounds nothing, and the last bits of a maximum decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graphs.config import EsmConfig
from ..graphs.matrices import Matrix, Weights, esm_norm_readers
from ..streamed import ExactStep, Product, StreamedEsm

RECIPE = "SmoothQuant, strength 0.5, powers of two"

# As an exponent: a channel that nothing reads stays finite.
_MOST = 20.0


class _Balance:
    """Computes with the checkpoint's own matrices (a ``LinearStep``), and balances the channels that enter them.

    Attributes:
        scales: s of all matrices so far, float32 ``[K]`` by the matrix's name.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._exact = ExactStep(weights)
        self.scales: dict[str, torch.Tensor] = {}

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        parts = [matrix.weight(self._weights).float() for matrix in matrices]
        balanced = _balanced(_largest(rows), torch.stack([_largest(part) for part in parts]).amax(0))
        self.scales.update((matrix.name, balanced) for matrix in matrices)
        return self._exact(matrices, rows)


def esm_smoothing(config: EsmConfig, weights: Weights, ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What to multiply tensors of an ESM-2 by, so that no channel behind a norm stands out.

    Args:
        weights: tensors by their names in transformers' ``EsmModel``.
        ids: residue ids int64 ``[L + 2]`` of the proteins that it is calibrated with.

    Returns:
        By tensor name, float32 ``[hidden]`` along the last axis: of gain and shift of each norm 1 / s, of the matrices
        that read it s. The final norm, which no matrix of the encoder reads, is not among them.
    """
    esm, balance = StreamedEsm(config, weights), _Balance(weights)
    hidden, lengths = esm.embedded(torch.cat(list(ids))), [len(one) for one in ids]
    for index in range(esm.layers):
        hidden = esm.layer(index, hidden, lengths, balance)
    factors = dict[str, torch.Tensor]()
    for norm, readers in esm_norm_readers(config).items():
        scales = balance.scales[readers[0].name]
        factors |= {f"{norm}.{part}": 1 / scales for part in ("weight", "bias")}
        factors |= {key: scales for matrix in readers for key in matrix.keys}
    return factors


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each column of ``[n, K]``, without a copy of what may be large."""
    largest: torch.Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=0)
    return largest


def _balanced(activations: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """s from largest magnitudes ``[K]``; 1 for channels that are always zero, or that no weight reads."""
    exponents = (0.5 * (activations / columns).log2()).round().clamp(-_MOST, _MOST)
    scales: torch.Tensor = torch.where((activations > 0) & (columns > 0), exponents.exp2(), 1.0)
    return scales
