"""Which rounds count, and what is said about their samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A round counts unless others used more of the processors than this, as a share of the round's time on all that this
# process may run on, or the memory gave less than this share of the best bandwidth of the run.
MAX_FOREIGN_CPU = 0.06
MIN_BANDWIDTH = 0.85
# A percentile is the nearest rank: the smallest sample that at least so many percent do not exceed. It is left out
# where it could only be the largest sample, which is below 100 / (100 - p) samples.
PERCENTILES = (50, 90, 95, 99)
PERCENTILE_METHOD = "nearest rank; none below 100 / (100 - p) samples"


@dataclass(frozen=True)
class Round:
    """One turn of every stage.

    Attributes:
        index: from 1; 0 is the warm-up, which never counts.
        phase: "load", before a bundle is open, or "serve".
        seconds: what it took, probes included.
        foreign_cpu: processor time of other processes, as a share of ``seconds`` on all usable processors; None where
            the system does not tell.
        bandwidth: bytes/s by read pattern.
        arithmetic: operations/s by "kind instruction-set".
    """

    index: int
    phase: str
    seconds: float
    foreign_cpu: float | None
    bandwidth: dict[str, float]
    arithmetic: dict[str, float]

    @property
    def best_bandwidth(self) -> float:
        """Bytes/s of the fastest pattern."""
        return max(self.bandwidth.values())


def disturbances(rounds: Sequence[Round]) -> list[tuple[str, ...]]:
    """For each round, why it does not count; empty if it does."""
    best = max((one.best_bandwidth for one in rounds), default=0.0)
    return [_reasons(one, best) for one in rounds]


def _reasons(one: Round, best: float) -> tuple[str, ...]:
    if one.index == 0:
        return ("warm-up",)
    reasons = []
    if one.foreign_cpu is not None and one.foreign_cpu > MAX_FOREIGN_CPU:
        reasons.append(f"other processes used {one.foreign_cpu:.0%} of the processors, over {MAX_FOREIGN_CPU:.0%}")
    if one.best_bandwidth < MIN_BANDWIDTH * best:
        reasons.append(f"bandwidth was {one.best_bandwidth / best:.0%} of the run's best, under {MIN_BANDWIDTH:.0%}")
    return tuple(reasons)


@dataclass(frozen=True)
class Summary:
    """Of samples in one unit; ``percentiles`` by number, None where there are too few samples for it."""

    count: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[int, float | None]


def summarize(samples: Sequence[float]) -> Summary | None:
    """None of no samples."""
    if not samples:
        return None
    ordered = sorted(samples)
    return Summary(
        len(ordered),
        math.fsum(ordered) / len(ordered),
        ordered[0],
        ordered[-1],
        {number: nearest_rank(ordered, number) for number in PERCENTILES},
    )


def nearest_rank(ordered: Sequence[float], percent: int) -> float | None:
    """The ``percent``-th percentile of ascending samples; None where there are too few (see ``PERCENTILE_METHOD``)."""
    if len(ordered) * (100 - percent) < 100 and len(ordered) > 1:
        return None
    if len(ordered) == 1:
        return ordered[0] if percent == 50 else None
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]
