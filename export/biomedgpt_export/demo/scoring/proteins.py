"""Scores of what is said of proteins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import answers
from ..proteins import ProteinRecord
from ..questions import LOCATION, STRUCTURE
from ..similarity import identity_to_nearest
from .baselines import commonest, composition_regression
from .panel import HeldOut, Panel, Training
from .sections import Scored, Section, digest, sample
from .statistics import Counts, Field, shares

LOW_IDENTITY = 0.3
STRUCTURED_PROTEINS = 600


def structure_class(record: ProteinRecord) -> str:
    """Structure class of the residues that the encoder reads."""
    return answers.structure_class(*record.shares)


@dataclass(frozen=True)
class Answered:
    """Proteins with the answers of each answerer to one question, and the proteins that simple methods learn from."""

    records: list[ProteinRecord]
    texts: list[list[str]]
    training: list[ProteinRecord]

    @staticmethod
    def ask(panel: Panel, question: str, records: list[ProteinRecord], training: list[ProteinRecord]) -> Answered:
        """Asks about every one of ``records``."""
        texts = [panel.ask(question, sequence=record.sequence) for record in records]
        return Answered(records, [list(column) for column in zip(*texts, strict=True)], training)

    def among(self, chosen: Sequence[int]) -> Answered:
        """The same of some proteins."""
        return replace(
            self, records=[self.records[i] for i in chosen], texts=[[text[i] for i in chosen] for text in self.texts]
        )

    def label(self, read: Callable[[str], str | None], label: Callable[[ProteinRecord], str]) -> Field:
        """Counts of a label that ``read`` finds in an answer."""
        truth, known = [label(record) for record in self.records], [label(record) for record in self.training]
        sequences, trained = ([one.sequence for one in records] for records in (self.records, self.training))

        def right(said: Sequence[str | None]) -> Counts:
            return shares([t == s for t, s in zip(truth, said, strict=True)])

        return Field(
            said=[right([read(text) for text in column]) for column in self.texts],
            commonest=right([commonest(known)] * len(truth)),
            baseline=right(composition_regression(trained, known, sequences)),
        )

    def share(self, which: int) -> Field:
        """How often the stated percentage of helix (0) or strand (1) is within ten points of the truth.

        The commonest value is the training mean, rounded to ten.
        """
        truth = [record.shares[which] for record in self.records]
        usual = 10 * round(10 * float(np.mean([record.shares[which] for record in self.training])))

        def near(said: Sequence[int | None]) -> Counts:
            # A little more than ten, for a share such as 0.3 is not exact.
            return shares([s is not None and abs(s - 100 * t) < 10 + 1e-6 for t, s in zip(truth, said, strict=True)])

        stated = [[answers.claimed_shares(text) for text in column] for column in self.texts]
        return Field([near([one and one[which] for one in column]) for column in stated], near([usual] * len(truth)))

    def section(self, fields: dict[str, Field]) -> Section:
        """Section of these proteins; without rows where there are none."""
        rows = {name: one.row() for name, one in fields.items()} if self.records else {}
        return Section(len(self.records), digest([one.sequence for one in self.records]), rows)


def location_sections(panel: Panel, held_out: HeldOut, training: Training) -> dict[str, Scored]:
    """All proteins with a location, and those that no similar training protein was found for.

    Similar to any that training saw: proteins of a known structure get locations from a teacher there.
    """
    answered = Answered.ask(panel, LOCATION, held_out.located, training.located)
    seen = [record.sequence for record in (*training.located, *training.structured)]
    nearest = identity_to_nearest([record.sequence for record in held_out.located], seen)
    far = np.flatnonzero(nearest < LOW_IDENTITY).tolist()
    location = answered.label(answers.claimed_location, lambda record: record.location)
    distant = answered.among(far).section({"accuracy": location.among(far)})
    return {
        "location": Scored(answered.section({"accuracy": location} | _membrane(answered)), (location,)),
        # Some of the same proteins, which count once in all that is held out.
        "location_low_identity": Scored(distant),
    }


def _membrane(answered: Answered) -> dict[str, Field]:
    """Whether a membrane protein or a soluble one, of those of which it is known."""
    known = answered.among([i for i, record in enumerate(answered.records) if record.membrane != "U"])
    known = replace(known, training=[record for record in answered.training if record.membrane != "U"])
    if not known.records:
        return {}
    return {"membrane": known.label(answers.claimed_membrane, lambda record: record.membrane)}


def structure_section(panel: Panel, held_out: Sequence[ProteinRecord], training: list[ProteinRecord]) -> Scored:
    """Structure classes and shares of at most ``STRUCTURED_PROTEINS`` proteins, drawn with a fixed seed."""
    answered = Answered.ask(panel, STRUCTURE, sample(held_out, STRUCTURED_PROTEINS), training)
    fields = {
        "accuracy": answered.label(answers.claimed_structure, structure_class),
        "helix_within_ten": answered.share(0),
        "strand_within_ten": answered.share(1),
    }
    return Scored(answered.section(fields), tuple(fields.values()))
