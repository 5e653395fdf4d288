"""What every decoder offers; ``generate`` knows nothing else of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..sampling import Choice
from .kv_cache import KeyValues, KvLayout

Logits = npt.NDArray[np.float32]
Embeddings = npt.NDArray[np.float32]
# Embeddings, or rows that an embedder made for this decoder where it reads them.
Rows: TypeAlias = Any


class DecoderState(Protocol):
    """One sequence and its KV cache; a context manager that frees the cache."""

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        ...

    def reserve(self, positions: int) -> None:
        """Makes room for ``positions`` altogether at once; without it, room grows as positions come.

        Raises:
            PlatformError: this machine gives no memory for them.
        """
        ...

    def prefill(self, embeddings: Rows) -> Logits:
        """Appends positions given as embeddings, float32 ``[T, hidden]``.

        Returns:
            Logits of the last of them, float32 ``[vocabulary]``, valid until the next call.
        """
        ...

    def step(self, token: int) -> Logits:
        """Appends one token; returns its logits, float32 ``[vocabulary]``, valid until the next call."""
        ...

    def steps(self, tokens: Sequence[int]) -> Logits:
        """Appends tokens in one call; returns the logits of each, float32 ``[n, vocabulary]``, valid until the next."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets all positions but the first ``length``.

        Raises:
            ValueError: there are not so many.
        """
        ...

    def key_values(self) -> KeyValues:
        """A copy of the KV cache, with which :meth:`Decoder.open` begins where this state is."""
        ...

    def close(self) -> None:
        """Frees the KV cache; calling it again does nothing."""
        ...

    def __enter__(self) -> DecoderState: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class ChoosingState(Protocol):
    """A :class:`DecoderState` that can choose the next token where the logits are, so that these stay there."""

    def step_chosen(self, token: int, choice: Choice) -> tuple[int, float]:
        """Appends one token; returns the one that is chosen behind it, and the largest logit."""
        ...


class Decoder(Protocol):
    """A loaded decoder; states are independent of each other."""

    @property
    def tile(self) -> int:
        """Positions that are computed together, a divisor of 128.

        A prompt whose calls end at multiples of it, counted from the same position, gives the same bits however it is
        cut, as long as no call has a single position. 1 says more: the decoder is row-invariant, every position has the
        same bits whatever else is in its call, so that steps, prefill and several steps at once agree. On a GPU no bits
        are promised, since kernels are chosen by shape: calls are cut at the same places, and what is reused is as near
        to what a fresh run gives as 16 bits are.
        """
        ...

    @property
    def identity(self) -> str:
        """What its bits depend on beside the bundle and the processor: engine, version, threads, layout, KV cache."""
        ...

    @property
    def kv(self) -> KvLayout:
        """How its KV caches lie in memory."""
        ...

    def open(self, capacity: int, start: KeyValues | None = None) -> DecoderState:
        """A state with room for at most ``capacity`` positions, empty or with those of ``start``, which is copied."""
        ...
