"""The decode loop, and the text that comes out of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from .decoder.base import ChoosingState, DecoderState, Logits, Rows
from .sampling import GenerationOptions, Sampler
from .speculation import PromptLookup, Speculation
from .tokenizer import Tokenizer

Finish = Literal["eos", "length", "stop"]
# capacity -> a state that holds none or some of the prompt's positions; leaving it frees or keeps them.
Opening = Callable[[int], AbstractContextManager[DecoderState]]

# Positions of a prompt between two looks at whether somebody still wants the answer. Half of it would read the weights
# twice as often for the same rows; twice as many would double the wait, and what lies between layers.
PREFILL_CHUNK = 256


@dataclass
class Timings:
    """Seconds spent on one answer, by stage.

    Attributes:
        featurize: parsing and featurizing the inputs; done when they were made, so not part of ``ttft``.
        encode: molecule and protein encoders (near zero if their features were kept).
        splice: building the prompt's embeddings.
        prefill: the prompt through the decoder, as far as its KV cache was not there yet. Where encoders and splice
            run on the decoder's stream, their stages end when they are queued, and this one waits for them.
        decode: all steps after it.
        prepare: from the call to the prompt's embeddings: tokenizing, ``encode`` and ``splice``.
        ttft: time to first token: ``prepare``, then prefill and choice of the first token. Time in which nobody asked
            for the next piece does not count.
        prompt_tokens: positions of the prompt, soft tokens included.
        cached_tokens: those of them whose keys and values were there already.
        new_tokens: tokens of the answer.
        steps: tokens behind ``decode``; each is a call of the decoder unless it was drafted and accepted.
        drafted: tokens that were proposed by speculation.
        accepted: those of them that were chosen.
    """

    featurize: float = 0.0
    encode: float = 0.0
    splice: float = 0.0
    prepare: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    ttft: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds; None if there was only one."""
        return self.decode / self.steps if self.steps else None


@dataclass
class Generation:
    """What :func:`generate` fills in while it runs."""

    timings: Timings
    token_ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    cancelled: threading.Event = field(default_factory=threading.Event)


def prefill(state: DecoderState, embeddings: Rows) -> Iterator[Logits]:
    """Runs what ``state`` lacks of a prompt, in chunks, so that it can be left between them.

    Args:
        embeddings: the whole prompt, float32 ``[T, hidden]``, T more than ``state.length``.

    Yields:
        After each chunk the logits of its last position, float32 ``[vocabulary]``, valid until the next.
    """
    state.reserve(len(embeddings))
    for end in _chunk_ends(state.length, len(embeddings)):
        yield state.prefill(embeddings[state.length : end])


def _chunk_ends(start: int, end: int) -> list[int]:
    """Where chunks end. None is a single position unless all are: see :attr:`Decoder.tile`."""
    ends = list(range(start + PREFILL_CHUNK, end, PREFILL_CHUNK))
    if ends and end - ends[-1] == 1:
        ends[-1] -= PREFILL_CHUNK // 2
    return [*ends, end]


def generate(
    opening: Opening,
    embeddings: Rows,
    options: GenerationOptions,
    tokenizer: Tokenizer,
    result: Generation,
    lookup: PromptLookup | None = None,
) -> Generator[int, None, None]:
    """Yields the tokens of one answer, without EOS; closing the iterator leaves the decoder's state.

    Args:
        opening: gives the state; :meth:`Decoder.open` is one.
        embeddings: the prompt, float32 ``[T, hidden]``.
        result: receives tokens, timings and the reason for the end; its ``cancelled`` event, which any thread may set,
            ends the answer before the next step or chunk of the prompt.
        lookup: holds the prompt's ids; given, tokens that may follow are computed several at a time.
    """
    started = clock = time.perf_counter()
    sampler = Sampler(options, len(tokenizer))
    timings = result.timings
    with opening(len(embeddings) + options.max_new_tokens) as state:
        timings.cached_tokens = state.length
        for logits in prefill(state, embeddings):  # noqa: B007 - the last ones are sampled below
            if result.cancelled.is_set():
                return
        timings.prefill = time.perf_counter() - clock
        ahead = None if lookup is None else Speculation(state, lookup, options.max_new_tokens - 1)
        # Asked once: a protocol is compared method by method.
        chooser = state if ahead is None and isinstance(state, ChoosingState) else None
        token = sampler.choose(logits)
        for index in range(options.max_new_tokens):
            if index == 0:
                timings.ttft = timings.prepare + time.perf_counter() - started
            if token == tokenizer.eos_id:
                result.finish = "eos"
                return
            result.token_ids.append(token)
            timings.new_tokens += 1
            yield token
            if result.cancelled.is_set():
                return
            if index + 1 < options.max_new_tokens:
                token = _next(state if ahead is None else ahead, chooser, sampler, token, timings)
                if ahead is not None:
                    timings.drafted, timings.accepted = ahead.drafted, ahead.accepted


def _next(
    stepping: DecoderState | Speculation, chooser: ChoosingState | None, sampler: Sampler, token: int, timings: Timings
) -> int:
    """The token behind ``token``: chosen by the state where it can, so that logits stay where they are."""
    choice = None if chooser is None else sampler.choice()
    clock = time.perf_counter()
    if chooser is None or choice is None:
        logits = stepping.step(token)
        timings.decode += time.perf_counter() - clock
        timings.steps += 1
        return sampler.choose(logits)
    chosen, largest = chooser.step_chosen(token, choice)
    timings.decode += time.perf_counter() - clock
    timings.steps += 1
    return sampler.take(chosen, largest)


class AnswerText:
    """Turns tokens into the text of the answer: cut before the stop text that is complete first, then no white space
    around it.

    Text that may still turn out to be trailing white space or the beginning of a stop text is held back, so what has
    been given out never has to be taken back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self._started = False
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that can be given out after ``token``."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What is left at the end, without trailing white space."""
        released = self._release(self._decoder.flush())
        rest = "" if self.stopped else self._held.rstrip()
        if not self._started:
            rest = rest.lstrip()
        self._held = ""
        return released + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        # The first to be complete, however the text is cut into tokens; of two that end together the longer one.
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)[1]].rstrip(), ""
        else:
            # White space in front of a possible stop text may become trailing white space too.
            cut = len(self._held[: len(self._held) - self._unfinished_stop()].rstrip())
            released, self._held = self._held[:cut], self._held[cut:]
        if not self._started:
            released = released.lstrip()
        self._started = self._started or bool(released)
        return released

    def _unfinished_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
