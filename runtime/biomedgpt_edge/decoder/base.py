"""What every decoder offers; ``generate`` knows nothing else of an engine."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Embeddings = npt.NDArray[np.float32]


class DecoderState(Protocol):
    """One sequence and its KV cache; a context manager that frees the cache."""

    @property
    def length(self) -> int:
        """Positions in the KV cache."""
        ...

    def prefill(self, embeddings: Embeddings) -> Logits:
        """Appends positions given as embeddings, float32 ``[T, hidden]``.

        Returns:
            Logits of the last of them, float32 ``[vocabulary]``, valid until the next call.
        """
        ...

    def step(self, token: int) -> Logits:
        """Appends one token; returns its logits, float32 ``[vocabulary]``, valid until the next call."""
        ...

    def close(self) -> None:
        """Frees the KV cache; calling it again does nothing."""
        ...

    def __enter__(self) -> DecoderState: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Decoder(Protocol):
    """A loaded decoder; states are independent of each other."""

    def open(self, capacity: int) -> DecoderState:
        """A fresh state with room for ``capacity`` positions."""
        ...
