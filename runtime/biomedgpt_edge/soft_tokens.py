"""Soft tokens by content: a second question about the same molecule or protein neither encodes nor projects it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from . import _native
from .device_cache import ArrayFolder

SoftTokens = npt.NDArray[np.float32]

# At the 7B's width, a protein of 1,022 residues takes 16 MiB; the bound keeps an 8 GB box safe in a long session.
CACHE_BYTES = 64 * 2**20


class SoftTokenCache:
    """Those used last, up to a number of bytes; several threads may use it.

    Args:
        limit: bytes in memory.
        folder: keeps them on disk too.
        identity: what their bits depend on beside the input and the processor.
    """

    def __init__(self, limit: int, *, folder: ArrayFolder | None = None, identity: str = "") -> None:
        self._limit = limit
        self._folder = folder
        self._identity = identity
        self._bytes = 0
        self._items: OrderedDict[str, SoftTokens] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, content: str, shape: tuple[int, ...]) -> SoftTokens | None:
        """Soft tokens ``[n, hidden]`` of what :func:`prompt.content_of` names; read-only."""
        with self._lock:
            found = self._items.get(content)
            if found is not None:
                self._items.move_to_end(content)
            elif self._folder is not None:
                found = self._folder.load(self._key(content), shape)
                if found is not None:
                    self._put(content, found)
            return found

    def put(self, content: str, tokens: SoftTokens) -> None:
        """Keeps ``tokens`` float32 ``[n, hidden]``, C-contiguous, which nobody may change from now on."""
        tokens.setflags(write=False)
        with self._lock:
            self._put(content, tokens)
            if self._folder is not None:
                self._folder.save(self._key(content), tokens)

    def clear(self) -> None:
        """Frees what is in memory."""
        with self._lock:
            self._items.clear()
            self._bytes = 0

    def _put(self, content: str, tokens: SoftTokens) -> None:
        previous = self._items.pop(content, None)
        self._bytes += tokens.nbytes - (0 if previous is None else previous.nbytes)
        self._items[content] = tokens
        while self._bytes > self._limit:
            self._bytes -= self._items.popitem(last=False)[1].nbytes

    def _key(self, content: str) -> str:
        parts = [self._identity, _native.cpu_features(), content]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
