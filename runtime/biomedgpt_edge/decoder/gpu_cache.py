"""KV caches on the GPU, of one size for all sequences, and how they are copied from and to."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..cuda import Buffer, Stream
from ..errors import PlatformError
from .kv_cache import KvLayout, Values


@dataclass(frozen=True)
class GpuCache:
    """Keys and values of all layers, one after the other, ``[2 * layers, kv_heads, capacity, head_size]``.

    Attributes:
        number: of this cache; CUDA graphs hold its addresses.
    """

    buffer: Buffer
    number: int


class GpuCaches:
    """Makes them, and keeps one for the next answer.

    Args:
        dropped: a method that is told the number of a cache whose memory goes.
    """

    def __init__(self, kv: KvLayout, capacity: int, stream: Stream, dropped: Callable[[int], None]) -> None:
        self._kv = kv
        self._capacity = capacity
        self._stream = stream
        # Its object holds this one: together they would wait for the collector, and the memory of a GPU with them.
        self._dropped = weakref.WeakMethod(dropped)
        self._free: list[GpuCache] = []
        self._numbers = itertools.count()

    def new(self) -> GpuCache:
        """One of zeros: a mask hides numbers, and no NaN that an answer may have left.

        Raises:
            PlatformError: the GPU has no memory for it.
        """
        with self._stream.lock:
            if self._free:
                cache = self._free.pop()
            else:
                cache = GpuCache(Buffer(self._kv.bytes(self._capacity), "a KV cache"), next(self._numbers))
            try:
                cache.buffer.clear(self._stream)
                self._stream.wait()
            except PlatformError:
                self._discard(cache)
                raise
            return cache

    def free(self, cache: GpuCache) -> None:
        """Keeps it where none is kept yet, and frees it otherwise."""
        with self._stream.lock:
            if not self._free:
                self._free.append(cache)
                return
            self._discard(cache)

    def _discard(self, cache: GpuCache) -> None:
        dropped = self._dropped()
        if dropped is not None:
            dropped(cache.number)
        cache.buffer.close()

    def addresses(self, cache: GpuCache) -> dict[str, int]:
        """By :attr:`KvLayout.names`, where each array of a layer begins."""
        size = self._kv.bytes(self._capacity) // (2 * self._kv.layers)
        return {name: cache.buffer.pointer + index * size for index, name in enumerate(self._kv.names)}

    def read(self, cache: GpuCache, positions: int) -> Values:
        """The first positions, as :meth:`KvLayout.stacked` says."""
        values = np.empty(self._kv.stacked(positions), self._kv.dtype)
        if positions:
            with self._stream.lock:
                self._stream.download_rows(self._by_head(values), cache.buffer.pointer, self._pitch)
                self._stream.wait()
        return values

    def write(self, cache: GpuCache, values: Values) -> None:
        """The inverse of :meth:`read`."""
        if values.shape[2]:
            rows = np.ascontiguousarray(self._by_head(values))
            with self._stream.lock:
                self._stream.upload_rows(cache.buffer.pointer, self._pitch, rows)
                self._stream.wait()

    @property
    def _pitch(self) -> int:
        """Bytes from one head's stretch of a cache to the next."""
        return self._capacity * self._kv.width * self._kv.dtype.itemsize

    def _by_head(self, values: Values) -> Values:
        """``[2 * layers * kv_heads, positions * head_size]``."""
        return values.reshape(2 * self._kv.layers * self._kv.kv_heads, -1)
