"""Text embeddings and encoder features, written into one prompt buffer by the native kernel.

Nothing here copies or casts an array: weights may be read-only memory maps, and what does not fit is an error. Wherever
an array is expected, any object with the buffer protocol will do, and any with DLPack whose memory is the CPU's (a
tensor of PyTorch, say).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import KernelArgumentError

# Any dtype: which ones an argument may have is the kernel's to check, at run time.
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """The decoder's token embeddings.

    Attributes:
        rows: [vocab, hidden], float16, float32 or int8, contiguous.
        scales: [vocab] float32 for an int8 table, where an embedding is ``rows[id] * scales[id]``; otherwise None.
    """

    rows: Array
    scales: npt.NDArray[np.float32] | None = None

    @property
    def hidden(self) -> int:
        """Width of an embedding."""
        return int(self.rows.shape[1])

    def lookup_into(self, token_id: int, out: npt.NDArray[np.float32]) -> None:
        """Writes the embedding of one token into ``out`` [1, hidden], without allocating a buffer per decoded token.

        Raises:
            KernelArgumentError: ``token_id`` is outside the vocabulary, or ``out`` or the table does not fit.
        """
        _native.splice(out, self.rows, self.scales, (("tokens", 0, np.array((token_id,), dtype=np.int64)),))

    def lookup(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Embeddings of tokens, float32 ``[n, hidden]``.

        Raises:
            KernelArgumentError: one of them is outside the vocabulary.
        """
        rows = np.empty((len(tokens), self.hidden), np.float32)
        for row, token in enumerate(tokens):
            self.lookup_into(token, rows[row : row + 1])
        return rows


@dataclass(frozen=True, eq=False)
class Projection:
    """The affine map from an encoder's features to the decoder's width.

    Attributes:
        weight: [hidden, in], float16 or float32, contiguous, as ``torch.nn.Linear`` stores it.
        bias: [hidden] float32.
        layer_norm_eps: epsilon of the encoder's final LayerNorm where that is folded in: its gain and shift are then
            part of ``weight`` and ``bias``, and feature rows are normalised before the product. None for no norm.
    """

    weight: Array
    bias: npt.NDArray[np.float32]
    layer_norm_eps: float | None = None


@dataclass(frozen=True, eq=False)
class TokenPart:
    """Positions that hold text: ``ids`` [count], int64 or int32, each within the vocabulary."""

    ids: Array

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class FeaturePart:
    """Positions that hold a molecule or protein: ``features`` [count, in], float16 or float32, through ``projection``.

    Rows of ``features`` may be apart by more than their width (a slice of a wider array); elements of a row are
    adjacent.
    """

    features: Array | _native.CudaArray
    projection: Projection

    def __len__(self) -> int:
        return len(self.features)


def splice(
    parts: Sequence[TokenPart | FeaturePart],
    table: EmbeddingTable,
    *,
    threads: int,
    out: Array | None = None,
    path: str = "auto",
    allow_16bit: bool = False,
) -> Array:
    """Builds the prompt embeddings of ``parts``, laid one after another.

    Args:
        parts: what the prompt is made of, in order. Parts of length zero are allowed.
        table: the decoder's token embeddings.
        threads: upper bound of the threads used, at least 1. The result does not depend on it, bit for bit.
        out: buffer to fill, [sum of the parts' lengths, hidden] float32 or float16, contiguous; when None, one
            of float32 is allocated.
        path: instruction-set path, "auto" or one of ``_native.splice_paths()`` that ``allow_16bit`` permits.
        allow_16bit: whether features and weights may be rounded to bfloat16 for their product, where the processor has
            instructions for that; sums stay float32.

    Returns:
        ``out``. A NaN in a feature row makes that row NaN, and no other.

    Raises:
        KernelArgumentError: an array has the wrong shape, dtype or layout, an id is outside the vocabulary, or the
            path is not available on this machine. ``out`` is untouched then.
    """
    segments: list[tuple[str, int, Array] | tuple[str, int, Any, Array, Array, float | None]] = []
    row = 0
    for part in parts:
        if isinstance(part, TokenPart):
            segments.append(("tokens", row, part.ids))
        else:
            projection = part.projection
            segments.append(
                ("features", row, part.features, projection.weight, projection.bias, projection.layer_norm_eps)
            )
        row += len(part)
    if out is None:
        if table.rows.ndim != 2:
            raise KernelArgumentError(f"table: got {table.rows.ndim} dimensions, expected 2.", seen=table.rows.shape)
        out = np.empty((row, table.hidden), dtype=np.float32)
    _native.splice(out, table.rows, table.scales, segments, threads, path, allow_16bit)
    return out
