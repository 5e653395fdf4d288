"""Several tokens in one call of the decoder, where an answer repeats what stood before it (prompt lookup decoding).

Nothing is guessed about a token's likelihood: what follows is proposed, the decoder computes the logits behind every
proposed token, and those are given out only as far as the tokens that were chosen are the proposed ones. So whatever
chooses tokens finds the logits that single steps would have given it, if the decoder's rows do not depend on the number
of rows in a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from .decoder.base import DecoderState, Logits

# Tokens that must agree for what followed them to be proposed; the longest first.
NGRAMS = (3, 2)
# With the token that is certain, a call has 8 rows at most; with more, arithmetic and not bandwidth sets its time.
DRAFT = 7
# Steps until a speculation that did not pay is tried again; twice as many each time it does not.
FIRST_PAUSE, LONGEST_PAUSE = 16, 512


class PromptLookup:
    """Finds what followed the last tokens when they stood in the text before.

    Args:
        ids: of the prompt; negative ones stand for soft tokens, which are like nothing else.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        # n tokens -> the place behind them, where they stood last.
        self._behind: dict[tuple[int, ...], int] = {}
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Appends a token of the text."""
        for size in NGRAMS:
            if len(self._ids) >= size:
                self._behind[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, count: int) -> list[int]:
        """At most ``count`` tokens that may follow; none if nothing is known."""
        for size in NGRAMS:
            last = tuple(self._ids[-size:])
            place = self._behind.get(last) if min(last, default=-1) >= 0 else None
            if place is not None:
                proposed = self._ids[place : place + count]
                soft = next((n for n, token in enumerate(proposed) if token < 0), len(proposed))
                return proposed[:soft]
        return []


class Balance:
    """Decides whether proposing tokens pays, from what calls took and how many tokens they gave.

    A call with proposed tokens pays while it gives more tokens than single steps would in the same time.
    """

    def __init__(self) -> None:
        self._step: float | None = None
        self._gain = 1.25
        self._pause = FIRST_PAUSE
        self._waiting = 0

    def wanted(self) -> bool:
        """Whether to propose tokens now. Asked once for each call."""
        if self._waiting:
            self._waiting -= 1
        return self._step is not None and not self._waiting

    def stepped(self, seconds: float) -> None:
        """A call with one token took so long."""
        self._step = seconds if self._step is None else 0.75 * self._step + 0.25 * seconds

    def speculated(self, seconds: float, tokens: int) -> None:
        """A call with several took so long and gave so many, the certain one included."""
        if self._step is None:
            return
        self._gain = 0.75 * self._gain + 0.25 * tokens * self._step / max(seconds, 1e-9)
        if self._gain >= 1.0:
            self._pause = FIRST_PAUSE
            return
        self._waiting, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        # One more call that does not pay is enough to stop again.
        self._gain = 1.0


class Speculation:
    """Steps of one answer over a decoder state.

    Args:
        state: after the prompt.
        lookup: holds the prompt.
        steps: how many there will be at most; no position beyond the last is computed.
        clock: gives seconds.

    Attributes:
        drafted, accepted: tokens that were proposed, and those of them that were chosen.
    """

    def __init__(
        self, state: DecoderState, lookup: PromptLookup, steps: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._state = state
        self._lookup = lookup
        self._left = steps
        self._clock = clock
        self._balance = Balance()
        self._draft: list[int] = []
        self._rows: Logits | None = None
        self._agreed = 0
        self._seconds = 0.0
        self.drafted = 0
        self.accepted = 0

    def step(self, token: int) -> Logits:
        """As :meth:`DecoderState.step`; the state may be ahead until :meth:`settle`."""
        self._left -= 1
        self._lookup.push(token)
        if self._rows is not None and self._agreed < len(self._draft) and self._draft[self._agreed] == token:
            self._agreed += 1
            self.accepted += 1
            row: Logits = self._rows[self._agreed]
            return row
        self.settle()
        draft = self._lookup.draft(min(DRAFT, self._left)) if self._balance.wanted() else []
        return self._call(token, draft)

    def settle(self) -> None:
        """Takes back the positions of tokens that were proposed and not chosen."""
        if self._draft:
            self._balance.speculated(self._seconds, 1 + self._agreed)
            self._state.truncate(self._state.length - len(self._draft) + self._agreed)
        self._draft, self._rows, self._agreed = [], None, 0

    def _call(self, token: int, draft: list[int]) -> Logits:
        started = self._clock()
        if not draft:
            logits = self._state.step(token)
            self._balance.stepped(self._clock() - started)
            return logits
        self._rows = self._state.steps([token, *draft])
        self._seconds = self._clock() - started
        self._draft = draft
        self.drafted += len(draft)
        first: Logits = self._rows[0]
        return first
