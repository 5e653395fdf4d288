"""Where the embeddings of a prompt are put together: in this machine's memory, or in that of the GPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from .decoder.base import Rows
from .splice import EmbeddingTable, FeaturePart, TokenPart, splice

Host = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Makes rows, float32 ``[positions, hidden]``, slices of which are views, and fills them."""

    def new(self, count: int) -> Rows:
        """Rows for so many positions, whatever they hold.

        Raises:
            PlatformError: there is no memory for them.
        """
        ...

    def write(self, part: TokenPart | FeaturePart, rows: Rows) -> None:
        """Fills ``rows``, as many as the part has positions.

        Raises:
            KernelArgumentError: see :func:`splice`.
        """
        ...

    def copy(self, rows: Rows) -> Rows:
        """Rows of their own, which nobody may change."""
        ...

    def fill(self, rows: Rows, known: Rows) -> None:
        """Copies ``known`` into ``rows``."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        ...

    def to_host(self, rows: Rows) -> Host:
        """As an array of this machine's."""
        ...

    def from_host(self, array: Host) -> Rows:
        """The inverse of :meth:`to_host`."""
        ...

    def close(self) -> None:
        """Lets go of what it needs; it makes nothing from then on, and rows that are there stay."""
        ...


class HostEmbedder:
    """In this machine's memory, by the kernels for processors; an :class:`Embedder`.

    Args:
        allow_16bit: see :func:`splice`.
    """

    def __init__(self, table: EmbeddingTable, *, threads: int, allow_16bit: bool) -> None:
        self._table = table
        self._threads = threads
        self._allow_16bit = allow_16bit

    def new(self, count: int) -> Host:
        """See :class:`Embedder`."""
        return np.empty((count, self._table.hidden), np.float32)

    def write(self, part: TokenPart | FeaturePart, rows: Host) -> None:
        """See :class:`Embedder`."""
        splice([part], self._table, threads=self._threads, out=rows, allow_16bit=self._allow_16bit)

    def copy(self, rows: Host) -> Host:
        """See :class:`Embedder`."""
        own: Host = rows.copy()
        own.setflags(write=False)
        return own

    def fill(self, rows: Host, known: Host) -> None:
        """See :class:`Embedder`."""
        rows[:] = known

    def wait(self) -> None:
        """See :class:`Embedder`: nothing here goes on by itself."""

    def to_host(self, rows: Host) -> Host:
        """See :class:`Embedder`."""
        return rows

    def from_host(self, array: Host) -> Host:
        """See :class:`Embedder`."""
        return array

    def close(self) -> None:
        """See :class:`Embedder`: the table is the bundle's."""
