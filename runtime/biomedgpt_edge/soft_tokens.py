"""Soft tokens by content: a second question about the same molecule or protein neither encodes nor projects it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict

from . import _native
from .decoder.base import Rows
from .device_cache import ArrayFolder
from .embedding import Embedder
from .errors import PlatformError

# At the 7B's width, a protein of 1,022 residues takes 16 MiB; the bound keeps an 8 GB box safe in a long session.
CACHE_BYTES = 64 * 2**20


class SoftTokenCache:
    """Those used last, up to a number of bytes; several threads may use it.

    Args:
        limit: bytes in memory, of whatever holds the embedder's rows.
        embedder: makes them.
        folder: keeps them on disk too.
        identity: what their bits depend on beside the input and the processor.
    """

    def __init__(
        self, limit: int, embedder: Embedder, *, folder: ArrayFolder | None = None, identity: str = ""
    ) -> None:
        self._limit = limit
        self._embedder = embedder
        self._folder = folder
        self._identity = identity
        self._bytes = 0
        self._items: OrderedDict[str, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, content: str, shape: tuple[int, ...]) -> Rows | None:
        """Soft tokens ``[n, hidden]`` of what :func:`prompt.content_of` names; not to be changed."""
        with self._lock:
            found = self._items.get(content)
            if found is not None:
                self._items.move_to_end(content)
            elif self._folder is not None:
                stored = self._folder.load(self._key(content), shape)
                if stored is not None:
                    found = self._embedder.from_host(stored)
                    self._put(content, found)
            return found

    def put(self, content: str, rows: Rows) -> None:
        """Keeps a copy of ``rows``, float32 ``[n, hidden]``, where there is memory for it."""
        try:
            tokens = self._embedder.copy(rows)
        except PlatformError:
            # The prompt is complete: an answer is not to fail for what would make the next one faster.
            return
        with self._lock:
            self._put(content, tokens)
            if self._folder is not None:
                self._folder.save(self._key(content), self._embedder.to_host(tokens))

    def clear(self) -> None:
        """Frees what is in memory."""
        with self._lock:
            self._items.clear()
            self._bytes = 0

    def _put(self, content: str, tokens: Rows) -> None:
        previous = self._items.pop(content, None)
        self._bytes += tokens.nbytes - (0 if previous is None else previous.nbytes)
        self._items[content] = tokens
        while self._bytes > self._limit:
            self._bytes -= self._items.popitem(last=False)[1].nbytes

    def _key(self, content: str) -> str:
        parts = [self._identity, _native.cpu_features(), content]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
