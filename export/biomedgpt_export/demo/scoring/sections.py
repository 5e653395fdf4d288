"""Scores of one set of items."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from .statistics import Field, Row, ratio_score

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Section:
    """Scores of one set.

    Attributes:
        count: molecules, proteins or questions scored.
        items: digest of what was asked, so that only scores of the same set are compared.
        rows: by field.
        left_out: how many were not scored, by reason.
        misses: for small sets, what went wrong.
    """

    count: int
    items: str
    rows: dict[str, Row]
    left_out: dict[str, int] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """A section, and the counts of its fields over all its items; without them, it has no part in :func:`together`."""

    section: Section
    fields: tuple[Field, ...] = ()


def together(scored: Sequence[Scored]) -> Section:
    """All fields of all items in one row, ``fields``: what an answer gives right, out of what its question asks for.

    Items, which is to say questions, are what intervals are drawn over, for the fields of one answer go together.
    """
    counted = [one for one in scored if one.fields and one.section.count]
    answerers = range(len(counted[0].fields[0].said)) if counted else ()
    said = [
        np.concatenate([np.sum([field.said[which] for field in one.fields], axis=0) for one in counted])
        for which in answerers
    ]
    return Section(
        count=sum(one.section.count for one in counted),
        items=digest([one.section.items for one in counted]),
        rows={"fields": Field(said).row(ratio_score)} if said else {},
    )


def digest(items: Sequence[str]) -> str:
    """By which sets of items are told apart."""
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:16]


def sample(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` of them, drawn with a fixed seed."""
    return random.Random(0).sample(list(items), min(count, len(items)))
