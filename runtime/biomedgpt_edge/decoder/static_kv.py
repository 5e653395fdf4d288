"""A sequence whose KV cache has a fixed capacity, as decoders on a GPU want it: its addresses and shapes never change.

What runs the graph is a :class:`Runner`; of the engine behind it nothing is known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, KernelArgumentError, PromptTooLongError
from ..generate import PREFILL_CHUNK
from ..manifest import DecoderSpec
from .base import Embeddings, Logits, Rows
from .kv_cache import KeyValues, KvLayout, Values

# Of masks: so low that nothing is left of it behind a softmax, and a number of float16.
MASKED = -65504.0


class Runner(Protocol):
    """A decoder's graph, ready to run, and where KV caches for it lie."""

    @property
    def capacity(self) -> int:
        """Positions of a KV cache."""
        ...

    def new_cache(self) -> Any:
        """A KV cache, whatever it holds.

        Raises:
            PlatformError: there is no memory for it.
        """
        ...

    def free_cache(self, cache: Any) -> None:
        """Gives it back."""
        ...

    def read(self, cache: Any, positions: int) -> Values:
        """A copy of the first positions, as :meth:`KvLayout.stacked` says."""
        ...

    def write(self, cache: Any, values: Values) -> None:
        """The inverse of :meth:`read`."""
        ...

    def run(self, cache: Any, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        """Appends ``embeddings`` float32 ``[T, hidden]``, C-contiguous, behind the first ``start`` positions.

        Returns:
            Logits of ``wanted`` int64 ``[n]`` of the T, float32 ``[n, vocabulary]``.
        """
        ...

    def run_tokens(self, cache: Any, tokens: Sequence[int], start: int) -> Logits:
        """The same for a few tokens; logits of each."""
        ...


def explicit_inputs(
    embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64], attended: int
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a standard graph, but for the KV cache, whose first ``attended`` positions are looked at."""
    positions = np.arange(start, start + len(embeddings), dtype=np.int64)
    seen = np.arange(attended) <= positions[:, np.newaxis]
    return {
        "inputs_embeds": embeddings[np.newaxis],
        "logit_positions": wanted,
        "position_ids": positions[np.newaxis],
        "write_indices": positions[:1],
        "mask": np.where(seen, np.float16(0), np.float16(MASKED))[np.newaxis, np.newaxis],
    }


class StaticState:
    """One sequence; see :class:`DecoderState`."""

    def __init__(
        self,
        runner: Runner,
        spec: DecoderSpec,
        kv: KvLayout,
        capacity: int,
        start: KeyValues | None = None,
    ) -> None:
        if capacity > runner.capacity:
            raise PromptTooLongError(
                f"prompt and answer may take {capacity:,} positions; KV caches on the GPU have {runner.capacity:,}.",
                seen=capacity,
                limit=runner.capacity,
                remedy="Ask for fewer new tokens, or give KV caches more (with TensorRT: engines build --context).",
            )
        self._runner = runner
        self._spec = spec
        self._capacity = capacity
        self._length = 0
        self._cache: Any = runner.new_cache()
        # A state that is dropped and not closed gives its cache back, too.
        self._give_back = weakref.finalize(self, runner.free_cache, self._cache)
        if start is not None:
            self._begin(start, kv)

    @property
    def length(self) -> int:
        """See :class:`DecoderState`."""
        return self._length

    @property
    def cache(self) -> Any:
        """What its runner made for it.

        Raises:
            ClosedError: the state is closed.
        """
        if self._cache is None:
            raise ClosedError("the decoder state is closed.")
        return self._cache

    def reserve(self, positions: int) -> None:
        """See :class:`DecoderState`: there is room for all of them from the beginning."""
        _ = self.cache
        if positions > self._capacity:
            raise ValueError(f"{positions} positions do not fit a KV cache of {self._capacity}")

    def prefill(self, embeddings: Rows) -> Logits:
        """See :class:`DecoderState`."""
        # No run takes more positions at once; those that cannot all be appended are refused before any is.
        self.reserve(self._length + len(embeddings))
        for begin in range(0, max(1, len(embeddings)), PREFILL_CHUNK):
            chunk = embeddings[begin : begin + PREFILL_CHUNK]
            logits: Logits = self._run(chunk, np.array([len(chunk) - 1], np.int64))[0]
        return logits

    def step(self, token: int) -> Logits:
        """See :class:`DecoderState`."""
        logits: Logits = self.steps((token,))[0]
        return logits

    def steps(self, tokens: Sequence[int]) -> Logits:
        """See :class:`DecoderState`."""
        cache = self._cache_for(len(tokens))
        logits = self._runner.run_tokens(cache, tokens, self._length)
        self._length += len(tokens)
        return logits

    def truncate(self, length: int) -> None:
        """See :class:`DecoderState`."""
        if not 0 <= length <= self._length:
            raise ValueError(f"a KV cache of {self._length} positions cannot be cut to {length}")
        self._length = length

    def key_values(self) -> KeyValues:
        """See :class:`DecoderState`."""
        return KeyValues(self._length, self._runner.read(self.cache, self._length))

    def close(self) -> None:
        """See :class:`DecoderState`."""
        self._cache = None
        self._give_back()

    def __enter__(self) -> StaticState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, start: KeyValues, kv: KvLayout) -> None:
        if start.array.shape != kv.stacked(start.positions) or start.array.dtype != kv.dtype:
            self.close()
            raise KernelArgumentError(
                f"keys and values are {start.array.dtype}{list(start.array.shape)}; this decoder has "
                f"{kv.dtype}{list(kv.stacked(start.positions))}.",
                remedy="Begin with keys and values of the same decoder.",
            )
        if start.positions > self._capacity:
            self.close()
            raise ValueError(f"{start.positions} positions do not fit a KV cache of {self._capacity}")
        self._runner.write(self._cache, start.array)
        self._length = start.positions

    def _run(self, embeddings: Rows, wanted: npt.NDArray[np.int64]) -> Logits:
        """Appends ``embeddings`` [T, hidden]; returns logits at ``wanted`` of them."""
        count, width = len(embeddings), self._spec.hidden_size
        if embeddings.shape != (count, width) or embeddings.dtype != np.float32 or not count:
            raise KernelArgumentError(
                f"embeddings are {embeddings.dtype}{list(embeddings.shape)}; the decoder reads float32[T, {width}].",
                remedy="Give the embeddings of a prompt.",
            )
        cache = self._cache_for(count)
        given = np.ascontiguousarray(embeddings) if isinstance(embeddings, np.ndarray) else embeddings
        logits = self._runner.run(cache, given, self._length, wanted)
        self._length += count
        return logits

    def _cache_for(self, count: int) -> Any:
        """The cache, where ``count`` positions more fit it."""
        cache, total = self.cache, self._length + count
        if total > self._capacity:
            raise ValueError(f"{total} positions do not fit a KV cache of {self._capacity}")
        return cache
