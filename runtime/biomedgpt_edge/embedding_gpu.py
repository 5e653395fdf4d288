"""The embeddings of a prompt, put together in the memory of the GPU for our own decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import CudaArray
from .decoder.cuda import NativeDecoder
from .embedding import Host
from .errors import ClosedError
from .splice import FeaturePart, Projection, TokenPart


class GpuEmbedder:
    """In the memory of the GPU, by the kernel for it, on the stream of the decoder that reads the rows.

    What is asked for is queued there and not waited for. Features may be arrays of this machine or
    :class:`CudaArray` objects; projections are brought there when they are first needed.
    """

    def __init__(self, decoder: NativeDecoder, *, allow_16bit: bool) -> None:
        self._open_decoder: NativeDecoder | None = decoder
        self._allow_16bit = allow_16bit
        self._projections = dict[Projection, tuple[CudaArray, CudaArray]]()
        # Of the last prompt. To free memory is to wait for the GPU, which has nothing to do when the next one begins.
        self._features = list[Any]()

    def new(self, count: int) -> CudaArray:
        """See :class:`Embedder`."""
        self._features.clear()
        return self._rows(count)

    def write(self, part: TokenPart | FeaturePart, rows: CudaArray) -> None:
        """See :class:`Embedder`."""
        if isinstance(part, TokenPart):
            self._decoder.splice(rows, (("tokens", 0, part.ids),), allow_16bit=self._allow_16bit)
            return
        weight, bias = self._brought(part.projection)
        features = self._uploaded(part.features) if isinstance(part.features, np.ndarray) else part.features
        segment = ("features", 0, features, weight, bias, part.projection.layer_norm_eps)
        self._decoder.splice(rows, (segment,), allow_16bit=self._allow_16bit)
        self._features.append(features)

    def copy(self, rows: CudaArray) -> CudaArray:
        """See :class:`Embedder`."""
        own = self._rows(len(rows))
        own.copy_from(rows)
        return own

    def fill(self, rows: CudaArray, known: CudaArray) -> None:
        """See :class:`Embedder`."""
        rows.copy_from(known)

    def wait(self) -> None:
        """See :class:`Embedder`."""
        self._decoder.wait()

    def to_host(self, rows: CudaArray) -> Host:
        """See :class:`Embedder`."""
        array = np.empty(rows.shape, np.float32)
        rows.download(array)
        return array

    def from_host(self, array: Host) -> CudaArray:
        """See :class:`Embedder`."""
        return self._uploaded(array)

    def close(self) -> None:
        """See :class:`Embedder`."""
        self._projections.clear()
        self._features.clear()
        self._open_decoder = None

    @property
    def _decoder(self) -> NativeDecoder:
        if self._open_decoder is None:
            raise ClosedError("the engine is closed.", remedy="Load the bundle again.")
        return self._open_decoder

    def _rows(self, count: int) -> CudaArray:
        return self._decoder.array((count, self._decoder.spec.hidden_size))

    def _brought(self, projection: Projection) -> tuple[CudaArray, CudaArray]:
        if projection not in self._projections:
            brought = self._uploaded(projection.weight), self._uploaded(projection.bias)
            self._projections[projection] = brought
        return self._projections[projection]

    def _uploaded(self, array: npt.NDArray[Any]) -> CudaArray:
        there = self._decoder.array(array.shape, array.dtype.name)
        there.upload(np.ascontiguousarray(array))
        return there
