"""Shares, F1 and differences of them, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000
_Z95 = 1.959964

# Of each item what is right, and out of how much: for a share 1 or 0 out of 1, for F1 twice the groups in common out of
# those in truth and answer together. A score is the ratio of the sums.
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A share or F1 from 0 to 1, or a difference of two, and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """Scores of one field; None where there is no such method, or no fp32 bundle.

    ``over_baseline`` and ``over_fp32`` are the bundle's score minus theirs, paired by item.
    """

    bundle: Score
    fp32: Score | None = None
    commonest: float | None = None
    baseline: float | None = None
    over_baseline: Score | None = None
    over_fp32: Score | None = None


def wilson(share: float, count: int) -> Score:
    """A share of ``count`` independent trials with Wilson's interval, which holds near 0 and 1 too."""
    if count == 0:
        return Score(0.0, 0.0, 1.0)
    spread = _Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z95 * float(np.sqrt(share * (1 - share) / count + spread / (4 * count))) / (1 + spread)
    return Score(_rounded(share), _rounded(max(0.0, middle - half)), _rounded(min(1.0, middle + half)))


def shares(right: Sequence[float]) -> Counts:
    """``[items, 2]`` from how right each item is, 0 to 1."""
    return np.array([[one, 1.0] for one in right], dtype=np.float64).reshape(-1, 2)


def share_score(counts: Counts) -> Score:
    """A share of independent items, with Wilson's interval."""
    return wilson(float(_ratio(counts.sum(axis=0))), len(counts))


def ratio_score(counts: Counts) -> Score:
    """F1, or any ratio of sums, with a percentile bootstrap over items (fixed seed).

    Where nothing is wrong a bootstrap cannot tell how far below the truth may lie: the interval is then Wilson's of the
    share of items that are wholly right.
    """
    value = _ratio(counts.sum(axis=0))
    if not len(counts) or value == 1:
        return share_score(counts)
    low, high = np.percentile(_ratio(_draws(len(counts)) @ counts), [2.5, 97.5])
    return Score(_rounded(value), _rounded(low), _rounded(high))


def difference(one: Counts, other: Counts) -> Score:
    """Score of ``one`` minus that of ``other`` on the same items, with a paired percentile bootstrap (fixed seed)."""
    draws = _draws(len(one))
    low, high = np.percentile(_ratio(draws @ one) - _ratio(draws @ other), [2.5, 97.5])
    value = _ratio(one.sum(axis=0)) - _ratio(other.sum(axis=0))
    return Score(_rounded(value), _rounded(low), _rounded(high))


@lru_cache(maxsize=2)
def _draws(count: int) -> Counts:
    """``[resamples, count]``: how often each item is drawn."""
    rng = np.random.default_rng(0)
    return rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES).astype(np.float64)


def _ratio(sums: Counts) -> Counts:
    """``[..., 2]`` -> ``[...]``; 1 where there is nothing to be right about."""
    right, whole = sums[..., 0], sums[..., 1]
    return np.where(whole == 0, 1.0, right / np.maximum(whole, 1))


def _rounded(value: float | np.floating[Any] | npt.NDArray[np.float64]) -> float:
    return round(float(value), 4)


@dataclass(frozen=True)
class Field:
    """Counts of one field over the same items: of each answerer, and of the simple methods where there are any."""

    said: Sequence[Counts]
    commonest: Counts | None = None
    baseline: Counts | None = None

    def among(self, chosen: Sequence[int]) -> Field:
        """The same of some items."""
        methods = (None if counts is None else counts[chosen] for counts in (self.commonest, self.baseline))
        return Field([counts[chosen] for counts in self.said], *methods)

    def row(self, score: Callable[[Counts], Score] = share_score) -> Row:
        """Its scores and differences."""
        bundle, fp32 = self.said[0], self.said[1] if len(self.said) > 1 else None
        return Row(
            bundle=score(bundle),
            fp32=None if fp32 is None else score(fp32),
            commonest=None if self.commonest is None else score(self.commonest).value,
            baseline=None if self.baseline is None else score(self.baseline).value,
            over_baseline=None if self.baseline is None else difference(bundle, self.baseline),
            over_fp32=None if fp32 is None else difference(bundle, fp32),
        )
