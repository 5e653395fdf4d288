"""Keys and values that outlive one answer: those of the template's beginnings, and those of a conversation.

Whatever is taken from here, an answer has the bits of one that was computed from the first position on: only positions
are kept whose bits depend on nothing else that was in their calls.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import _native
from .bundle import Bundle
from .decoder.base import Decoder, DecoderState
from .decoder.kv_cache import KeyValues
from .device_cache import ArrayFolder
from .generate import prefill
from .prompt import Segment, TokenSegment, beginnings
from .splice import TokenPart, splice

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Positions:
    """What stands at each position of a prompt.

    Attributes:
        ids: int64 ``[T]``, -1 at soft tokens.
        soft: first position and content of each molecule and protein.
    """

    ids: Ids
    soft: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], ids: Ids) -> Positions:
        starts = np.cumsum([0, *map(len, segments)]).tolist()
        found = [(at, s.content) for at, s in zip(starts, segments, strict=False) if not isinstance(s, TokenSegment)]
        return cls(ids, tuple(found))

    def and_then(self, ids: Sequence[int]) -> Positions:
        """With these tokens behind."""
        return Positions(np.concatenate([self.ids, np.array(ids, np.int64)]), self.soft)

    def common(self, other: Positions) -> int:
        """Positions at the front that both share: the same ids, and soft tokens of the same content."""
        shortest = min(len(self.ids), len(other.ids))
        differing = np.flatnonzero(self.ids[:shortest] != other.ids[:shortest])
        shared = int(differing[0]) if len(differing) else shortest
        for mine, theirs in zip(self.soft, other.soft, strict=False):
            if mine != theirs:
                return min(shared, mine[0], theirs[0])
        return shared


def reusable(common: int, total: int, tile: int) -> int:
    """How many of the first ``common`` positions a prompt of ``total`` may take over; see :attr:`Decoder.tile`."""
    rest = 1 if tile == 1 else 2
    return max(0, min(common, total - rest)) // tile * tile


class TemplatePrefixes:
    """The KV cache of what prompts begin with, whatever is asked: computed once, kept here and in ``folder``."""

    def __init__(self, decoder: Decoder, bundle: Bundle, folder: ArrayFolder | None) -> None:
        self.decoder = decoder
        self._folder = folder
        self._bundle = bundle
        found = [ids[: reusable(len(ids), len(ids) + 2, decoder.tile)] for ids in _beginnings(bundle)]
        self._prefixes = sorted(found, key=len, reverse=True)
        self._kept: dict[bytes, KeyValues] = {}
        self._lock = threading.Lock()

    def covered(self, ids: Ids) -> int:
        """Positions of a prompt that need not be computed."""
        room = reusable(len(ids), len(ids), self.decoder.tile)
        fitting = (p for p in self._prefixes if len(p) <= room and np.array_equal(p, ids[: len(p)]))
        return len(next(fitting, ()))

    def open(self, ids: Ids, capacity: int) -> DecoderState:
        """A state that holds what a prompt of these ids begins with, as far as it is known."""
        covered = self.covered(ids)
        if covered == 0:
            return self.decoder.open(capacity)
        with self._lock:
            key = ids[:covered].tobytes()
            if key not in self._kept:
                self._kept[key] = self._stored(ids[:covered])
            start = self._kept[key]
        return self.decoder.open(capacity, start)

    def _stored(self, ids: Ids) -> KeyValues:
        """From the folder, or computed and put there."""
        if self._folder is None:
            return self._computed(ids)
        key, kv = self._key(ids), self.decoder.kv
        found = self._folder.load(key, kv.stacked(len(ids)), kv.dtype)
        if found is not None:
            return KeyValues(len(ids), found)
        computed = self._computed(ids)
        self._folder.save(key, computed.array)
        return computed

    def _computed(self, ids: Ids) -> KeyValues:
        embeddings = splice([TokenPart(ids)], self._bundle.embeddings, threads=1)
        with self.decoder.open(len(ids)) as state:
            for _ in prefill(state, embeddings):
                pass
            return state.key_values()

    def _key(self, ids: Ids) -> str:
        """Everything that the bits depend on: the bundle with its graph, the engine, the processor and the ids."""
        parts = [self._bundle.digest, self.decoder.identity, _native.cpu_features(), ids.tolist()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _beginnings(bundle: Bundle) -> list[Ids]:
    return [np.array(ids, np.int64) for ids in beginnings(bundle.manifest.prompt, bundle.tokenizer)]


class Conversation:
    """The KV cache of a chat, kept between its turns."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: tuple[DecoderState, Positions] | None = None
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def open(
        self, prefixes: TemplatePrefixes, positions: Positions, generated: Sequence[int], capacity: int
    ) -> Iterator[DecoderState]:
        """A state with what this turn shares with the last one; afterwards it is kept for the next.

        Args:
            prefixes: for a turn that shares nothing. Not kept here, since a chat may outlive its engine.
            positions: of the whole prompt.
            generated: the answer's tokens, once it has some.
            capacity: what this turn needs; a later one may need more.
        """
        state = self._taken(prefixes, positions)
        if state is None:
            state = prefixes.open(positions.ids, max(capacity, self._capacity))
        try:
            yield state
        except GeneratorExit:
            self._keep(state, _computed(positions, generated, prefixes.decoder.tile))
            raise
        except BaseException:
            state.close()
            raise
        self._keep(state, _computed(positions, generated, prefixes.decoder.tile))

    def release(self, *, final: bool = False) -> None:
        """Frees the memory; the next turn reads everything again. ``final``: and keeps nothing from then on."""
        with self._lock:
            self._closed = self._closed or final
            kept, self._kept = self._kept, None
        if kept is not None:
            kept[0].close()

    def _taken(self, prefixes: TemplatePrefixes, positions: Positions) -> DecoderState | None:
        """The kept state, cut to what can be taken over; None where a template's prefix is as good."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None:
            return None
        state, known = kept
        length = reusable(min(state.length, known.common(positions)), len(positions.ids), prefixes.decoder.tile)
        if length <= prefixes.covered(positions.ids):
            state.close()
            return None
        state.truncate(length)
        return state

    def _keep(self, state: DecoderState, positions: Positions) -> None:
        with self._lock:
            freed = state if self._closed else None if self._kept is None else self._kept[0]
            if not self._closed:
                self._kept = (state, positions)
        if freed is not None:
            freed.close()


def _computed(positions: Positions, generated: Sequence[int], tile: int) -> Positions:
    """What a later turn may take over: steps have the bits of a prefill in a row-invariant decoder alone."""
    # The last token was chosen, and never the input of a step.
    return positions.and_then(generated[:-1]) if tile == 1 else positions
