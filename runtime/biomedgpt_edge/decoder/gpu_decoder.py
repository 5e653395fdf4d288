"""What decoders of other engines on a GPU have in common: states whose KV caches lie there, all of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..manifest import DecoderSpec
from ..splice import EmbeddingTable
from .base import Embeddings, Logits
from .gpu_cache import GpuCache, GpuCaches
from .kv_cache import KeyValues, KvLayout, Values
from .static_kv import StaticState


class GpuDecoder(ABC):
    """A :class:`Decoder`, and the :class:`biomedgpt_edge.decoder.static_kv.Runner` of its states.

    Attributes:
        tile: see :attr:`Decoder.tile`: of bits nothing is promised here.
        capacity: positions of a KV cache.
    """

    tile = 16
    identity: str
    spec: DecoderSpec
    table: EmbeddingTable
    kv: KvLayout
    capacity: int
    _caches: GpuCaches

    def open(self, capacity: int, start: KeyValues | None = None) -> StaticState:
        """See :meth:`Decoder.open`.

        Raises:
            PromptTooLongError: KV caches have fewer positions.
            PlatformError: the GPU has no memory for another KV cache.
            KernelArgumentError: ``start`` is not of this decoder.
        """
        return StaticState(self, self.spec, self.kv, capacity, start)

    def new_cache(self) -> GpuCache:
        """See :class:`Runner`."""
        return self._caches.new()

    def free_cache(self, cache: GpuCache) -> None:
        """See :class:`Runner`."""
        self._caches.free(cache)

    def read(self, cache: GpuCache, positions: int) -> Values:
        """See :class:`Runner`."""
        return self._caches.read(cache, positions)

    def write(self, cache: GpuCache, values: Values) -> None:
        """See :class:`Runner`."""
        self._caches.write(cache, values)

    def run_tokens(self, cache: GpuCache, tokens: Sequence[int], start: int) -> Logits:
        """See :class:`Runner`."""
        return self.run(cache, self.table.lookup(tokens), start, np.arange(len(tokens), dtype=np.int64))

    @abstractmethod
    def run(self, cache: GpuCache, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        """See :class:`Runner`."""
