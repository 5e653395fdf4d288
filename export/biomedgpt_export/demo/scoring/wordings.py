"""Whether the answer to a wording that training did not have is of the right kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...errors import TrainingDataError
from .. import answers
from ..molecules import screen
from ..questions import HELD_OUT_FOLLOW_UPS, HELD_OUT_OTHER, HELD_OUT_WORDINGS, MOLECULE_KINDS, WORDINGS
from .panel import HeldOut, Panel
from .sections import Section, digest
from .statistics import Field, Row, shares

# Inputs that each held-out wording is asked about.
WORDING_INPUTS = 5


@dataclass(frozen=True)
class Asked:
    """A wording, the turns before it, what is given, and the kind of answer that is right."""

    kind: str
    wording: str
    before: tuple[str, ...] = ()
    given: str = "molecule"


def wordings() -> dict[str, list[Asked]]:
    """Held-out wordings by what they are the first or a later turn of."""
    found: dict[str, list[Asked]] = {"molecule": [], "protein": [], "follow_up": []}
    for kind, texts in HELD_OUT_WORDINGS.items():
        given = "molecule" if kind in MOLECULE_KINDS else "protein"
        found[given] += [Asked(kind, text, given=given) for text in texts]
    for kind, texts in HELD_OUT_FOLLOW_UPS.items():
        given = "molecule" if kind in MOLECULE_KINDS else "protein"
        first = _OTHER_KIND.get(kind, "describe")
        found["follow_up"] += [Asked(kind, text, (WORDINGS[first][0],), given) for text in texts]
    return found


# What is asked in the first turn, so that a follow-up cannot be answered by saying the same again.
_OTHER_KIND = {"describe": "rings", "location": "structure", "structure": "location"}


def refusals() -> dict[str, list[Asked]]:
    """Held-out questions that the demo has no answer to, by what is given with them."""
    return {given: [Asked("other", text, given=given) for text in texts] for given, texts in HELD_OUT_OTHER.items()}


def wording_section(panel: Panel, asked: dict[str, list[Asked]], subjects: dict[str, list[dict[str, str]]]) -> Section:
    """How often the answer to a wording is of the right kind, whatever it says, for each group of wordings.

    Each wording is asked about several ``subjects`` (arguments of ``Answerer.ask``). Answers to one wording are much
    alike, so intervals count wordings, not answers.
    """
    rows: dict[str, Row] = {}
    misses: list[str] = []
    for group, questions in asked.items():
        right = []
        for question in questions:
            texts = [panel.ask(*question.before, question.wording, **one) for one in subjects[question.given]]
            kinds = [[answers.kind_of(text) for text in column] for column in zip(*texts, strict=True)]
            right.append([column.count(question.kind) / len(column) for column in kinds])
            wrong = Counter(str(kind) for kind in kinds[0] if kind != question.kind)
            misses += [f"{question.wording} ({question.kind}): {kind} ×{n}" for kind, n in wrong.items()]
        if right:
            rows[group] = Field([shares(column) for column in zip(*right, strict=True)]).row()
    every = [one for questions in asked.values() for one in questions]
    items = [*(" ".join((*one.before, one.wording)) for one in every), repr(subjects)]
    return Section(len(every), digest(items), rows, misses=misses)


def wording_subjects(held_out: HeldOut) -> dict[str, list[dict[str, str]]]:
    """The inputs that wordings are asked about, by kind of input.

    Raises:
        TrainingDataError: no usable molecule or no protein is held out.
    """
    proteins = [*held_out.located[: WORDING_INPUTS // 2], *held_out.structured[: WORDING_INPUTS - WORDING_INPUTS // 2]]
    usable = [smiles for smiles in held_out.same_source[: 10 * WORDING_INPUTS] if not screen(smiles).problem]
    if not usable or not proteins:
        raise TrainingDataError("nothing is held out to ask about.", remedy="Check the training files.")
    return {
        "molecule": [{"smiles": smiles} for smiles in usable[:WORDING_INPUTS]],
        "protein": [{"sequence": record.sequence} for record in proteins],
        "nothing": [{}],
    }
