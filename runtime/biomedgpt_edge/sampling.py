"""Logits -> token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from .errors import BioMedGPTError, OptionError

DEFAULT_MAX_NEW_TOKENS = 256
# Below it, all but the likeliest tokens have no weight in 64 bits, unless their logits are the same.
_LEAST_TEMPERATURE = 1e-30


class OptionArguments(TypedDict, total=False):
    """The fields of :class:`GenerationOptions` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    speculate: bool | None


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated; the default is greedy.

    Attributes:
        max_new_tokens: at most this many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest tokens; 0 keeps all.
        top_p: draw among the likeliest tokens whose probabilities reach p; 1 keeps all.
        repetition_penalty: divides (or multiplies, if negative) the logit of every token already generated (CTRL,
            Keskar et al. 2019); 1 is none, 0.01 to 100. The prompt does not count.
        seed: of the draw; the same seed and machine give the same answer. None takes a fresh one.
        stop: texts that end the answer; they are not part of it. A list or tuple.
        speculate: where the text repeats an earlier one, compute several tokens in one call of the decoder as long as
            that is faster. Row-invariant decoders choose the same tokens with it, and None means on for those alone;
            others (see :attr:`Decoder.tile`) may choose another token at a near tie.

    Raises:
        OptionError: a value outside its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    speculate: bool | None = None

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, int, 1, 2**20)
        _check("temperature", self.temperature, float, 0.0, 100.0)
        _check("top_k", self.top_k, int, 0, 2**24)
        _check("top_p", self.top_p, float, 0.0, 1.0, above=True)
        _check("repetition_penalty", self.repetition_penalty, float, 0.01, 100.0)
        if self.seed is not None:
            _check("seed", self.seed, int, 0, 2**64 - 1)
        if not isinstance(self.speculate, (bool, type(None))):
            raise OptionError(
                f"speculate is {str(self.speculate)[:40]!r}.",
                seen=str(self.speculate)[:40],
                remedy="Give True or False.",
            )
        texts = self.stop if isinstance(self.stop, (list, tuple)) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise OptionError(
                f"stop is {str(self.stop)[:40]!r}.", seen=str(self.stop)[:40], remedy='Give a list of texts: ["###"].'
            )
        object.__setattr__(self, "stop", tuple(self.stop))


class Choice(NamedTuple):
    """How a decoder that chooses by itself chooses the next token; see csrc/decoder/choose.h.

    Attributes:
        inverse_temperature: 0 is greedy.
        uniform: where in the sum of what may be drawn, 0 to 1, exclusive.
    """

    inverse_temperature: float
    top_k: int
    top_p: float
    uniform: float


class Sampler:
    """Chooses tokens for one answer.

    Args:
        vocabulary: tokens that may be chosen; rows of the logits beyond it (``[PAD]``) are never.
    """

    def __init__(self, options: GenerationOptions, vocabulary: int) -> None:
        self._options = options
        self._vocabulary = vocabulary
        self._random = np.random.default_rng(options.seed)
        self._seen: dict[int, None] = {}
        # Kept from token to token: to get memory of such a size from the system, and to give it back, takes longer than
        # to compute what it holds.
        self._scores, self._chosen, self._ranked = np.empty((3, vocabulary), np.float32)
        self._wide, self._sums = np.empty((2, vocabulary))

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, from logits float32 ``[rows]``; of equally likely ones the lowest wins.

        Raises:
            BioMedGPTError: the largest logit is NaN or infinite, so that no token could answer for it.
        """
        scores = self._penalized(logits[: self._vocabulary])
        token = int(scores.argmax())
        # NaN wins every argmax, so one look at the winner finds it.
        _require_finite(float(scores[token]))
        if self._options.temperature > 0:
            token = self._draw(scores)
        if self._options.repetition_penalty != 1.0:
            self._seen[token] = None
        return token

    def choice(self) -> Choice | None:
        """For the next token, where the decoder is to choose it; None where it needs logits: with a penalty.

        Draws take the same numbers as those of :meth:`choose`.
        """
        options = self._options
        if options.repetition_penalty != 1.0:
            return None
        if options.temperature == 0:
            return Choice(0.0, 0, 1.0, 0.0)
        # In 32 bits, in which the inverse of smaller ones is infinite.
        inverse = 1 / max(options.temperature, _LEAST_TEMPERATURE)
        return Choice(inverse, options.top_k, options.top_p, self._random.random())

    def take(self, token: int, largest: float) -> int:
        """What a decoder chose, and the largest logit it saw.

        Raises:
            BioMedGPTError: as :meth:`choose`.
        """
        _require_finite(largest)
        return token

    def _penalized(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        penalty = self._options.repetition_penalty
        if penalty == 1.0:
            return scores
        np.copyto(self._scores, scores)
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        chosen = scores[seen]
        self._scores[seen] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
        return self._scores

    def _draw(self, scores: npt.NDArray[np.float32]) -> int:
        candidates, weights = self._distribution(scores)
        # As numpy's Generator.choice draws, without its checks, which would take longer than all the rest.
        reached = weights.cumsum(out=self._sums[: len(weights)])
        place = int(reached.searchsorted(self._random.random() * reached[-1], side="right"))
        return place if candidates is None else int(candidates[place])

    def _distribution(
        self, scores: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
        """Tokens that may be drawn, None for all, and their probabilities up to a factor; valid until the next call."""
        if self._options.top_k == 0 and self._options.top_p == 1.0:
            return None, self._weights(scores)
        candidates = _largest(scores, self._options.top_k)
        chosen = scores.take(candidates, out=self._chosen[: len(candidates)], mode="clip")
        if self._options.top_p < 1.0:
            # Numbers of 32 bits, in front of all places, are what sorts fastest.
            ranked = self._ranked[: len(chosen)]
            np.copyto(ranked, chosen)
            ranked.sort()
            reached = self._weights(ranked[::-1]).cumsum(out=self._sums[: len(chosen)])
            # The token that crosses p stays in.
            count = int(reached.searchsorted(self._options.top_p * reached[-1])) + 1
            kept = _largest(chosen, count)
            candidates, chosen = candidates[kept], chosen[kept]
        return candidates, self._weights(chosen)

    def _weights(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        weights = self._wide[: len(scores)]
        # Subtracting first keeps the smallest temperatures finite.
        with np.errstate(over="ignore"):
            np.subtract(scores, scores.max(), out=weights, dtype=np.float64)
            weights /= self._options.temperature
        return np.exp(weights, out=weights)


def _require_finite(largest: float) -> None:
    if not np.isfinite(largest):
        raise BioMedGPTError(
            f"the model's largest logit is {largest}.",
            remedy="Run 'biomedgpt-edge verify' on the bundle; export it again.",
        )


def _largest(scores: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.int64]:
    """Places of the ``count`` largest scores (0: of all), ascending; of equal scores those in front."""
    if not 0 < count < len(scores):
        return np.arange(len(scores))
    last = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > last)
    return np.sort(np.concatenate([above, np.flatnonzero(scores == last)[: count - len(above)]]))


def _check(name: str, value: object, kind: type, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, (int, np.integer) if kind is int else (int, float, np.integer, np.floating))
    inside = number and not isinstance(value, bool) and (low < value if above else low <= value) and value <= high  # type: ignore[operator]
    if not inside:
        low_text = f"above {low}" if above else f"at least {low}"
        raise OptionError(
            f"{name} is {str(value)[:40]!r}.",
            seen=str(value)[:40],
            limit=f"{low_text} and at most {high}",
            remedy=f"Give {'a whole number' if kind is int else 'a number'}, {low_text} and at most {high}.",
        )
