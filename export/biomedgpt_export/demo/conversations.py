"""Conversations to train on: questions in many wordings, their answers, follow-up turns, and what cannot be answered.

A conversation ends with the question to be answered; earlier turns are context and are not learnt themselves. Which
molecule or protein of a batch an input stands for is kept beside the turns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from biomedgpt_edge.inputs import Molecule, Protein
from biomedgpt_edge.prompt import Input, Turn

from . import answers
from .chemistry import MoleculeFacts
from .proteins import ProteinFacts
from .questions import FOLLOW_UPS, OTHER, WORDINGS

# Something of the right kind; only its kind matters to the texts around it.
_SOME: dict[str, Input] = {"molecule": Molecule.from_smiles("C"), "protein": Protein.from_sequence("M")}

_SINGLE_KINDS = tuple(kind for kind in answers.MOLECULE_ANSWERS if kind != "describe")
_DESCRIBED, _CANONICAL, _LOCATION = 0.5, 0.45, 0.55


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and the batch positions of what is given with it, all of one kind."""

    question: str
    answer: str
    given: str = "nothing"
    subjects: tuple[int, ...] = ()

    def turn(self, last: bool) -> Turn:
        """As a turn of a conversation; the last one is open."""
        inputs = tuple(_SOME[self.given] for _ in self.subjects)
        return Turn(self.question, inputs, None if last else self.answer)


@dataclass(frozen=True)
class Conversation:
    """Exchanges, of which the last one's answer is learnt."""

    exchanges: tuple[Exchange, ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What the prompt is built from."""
        last = len(self.exchanges) - 1
        return tuple(exchange.turn(i == last) for i, exchange in enumerate(self.exchanges))

    @property
    def subjects(self) -> tuple[int, ...]:
        """Batch position of each input, in order."""
        return tuple(subject for exchange in self.exchanges for subject in exchange.subjects)

    @property
    def answer(self) -> str:
        """What is to be learnt."""
        return self.exchanges[-1].answer


def reworded(question: str, rng: random.Random) -> str:
    """The question as someone in a hurry types it, now and then: no capital, no mark at the end."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    return question.rstrip(".?!") if rng.random() < 0.1 else question


def _wording(kind: str, rng: random.Random) -> str:
    """The first wording is the canonical one, which people see in the documentation."""
    return WORDINGS[kind][0] if rng.random() < _CANONICAL else reworded(rng.choice(WORDINGS[kind]), rng)


def _refused(given: str, subjects: tuple[int, ...], rng: random.Random) -> Exchange:
    return Exchange(reworded(rng.choice(OTHER[given]), rng), answers.HONEST, given, subjects)


# -------------------------------------------------------------------------------------------------------- molecules


def about_nothing(rng: random.Random) -> Exchange:
    """A question without an input."""
    return _refused("nothing", (), rng)


def about_molecule(known: MoleculeFacts, subject: int, rng: random.Random, *, refused: float = 0.06) -> Exchange:
    """One question about one molecule; with probability ``refused`` one that has no answer here."""
    if rng.random() < refused:
        return _refused("molecule", (subject,), rng)
    kind = "describe" if rng.random() < _DESCRIBED else rng.choice(_SINGLE_KINDS)
    return Exchange(_wording(kind, rng), answers.MOLECULE_ANSWERS[kind](known, rng), "molecule", (subject,))


def _molecule_follow_up(known: MoleculeFacts, rng: random.Random) -> Exchange:
    if rng.random() < 0.2:
        return Exchange(_refused("molecule", (), rng).question, answers.HONEST)
    kind = rng.choice(_SINGLE_KINDS if rng.random() < 0.85 else ("describe",))
    return Exchange(reworded(rng.choice(FOLLOW_UPS[kind]), rng), answers.MOLECULE_ANSWERS[kind](known, rng))


def molecule_chat(known: Sequence[MoleculeFacts], subject: int, rng: random.Random) -> Conversation:
    """Two or three turns that end on molecule ``subject`` of the batch; some bring in another one, or begin without."""
    mine, other = known[subject], rng.randrange(len(known))
    choice = rng.random()
    if choice < 0.08:  # several molecules in one question are more than the demo does
        two = about_molecule(mine, subject, rng)
        return Conversation((Exchange(two.question, answers.HONEST, "molecule", (other, subject)),))
    if choice < 0.12:
        return Conversation((about_nothing(rng), about_nothing(rng)))
    if choice < 0.20:
        return Conversation((about_nothing(rng), about_molecule(mine, subject, rng)))
    if choice < 0.32:
        return Conversation((about_molecule(known[other], other, rng), about_molecule(mine, subject, rng)))
    first, second = about_molecule(mine, subject, rng, refused=0.1), _molecule_follow_up(mine, rng)
    more = (_molecule_follow_up(mine, rng),) if rng.random() < 0.25 else ()
    return Conversation((first, second, *more))


# --------------------------------------------------------------------------------------------------------- proteins


def _protein_answer(known: ProteinFacts, rng: random.Random) -> tuple[str, str]:
    """A kind of question, and its answer."""
    if rng.random() < _LOCATION:
        return "location", answers.location_answer(known.location, known.membrane, rng)
    return "structure", answers.structure_answer(known.helix, known.strand, rng)


def about_protein(known: ProteinFacts, subject: int, rng: random.Random, *, refused: float = 0.15) -> Exchange:
    """One question about one protein; with probability ``refused`` one that has no answer here."""
    if rng.random() < refused:
        return _refused("protein", (subject,), rng)
    kind, answer = _protein_answer(known, rng)
    return Exchange(_wording(kind, rng), answer, "protein", (subject,))


def protein_chat(known: Sequence[ProteinFacts], subject: int, rng: random.Random) -> Conversation:
    """Two turns that end on protein ``subject`` of the batch; some bring in another one."""
    mine, other = known[subject], rng.randrange(len(known))
    choice = rng.random()
    if choice < 0.1:
        two = about_protein(mine, subject, rng)
        return Conversation((Exchange(two.question, answers.HONEST, "protein", (other, subject)),))
    if choice < 0.25:
        return Conversation((about_protein(known[other], other, rng), about_protein(mine, subject, rng)))
    first = about_protein(mine, subject, rng, refused=0.25)
    if rng.random() < 0.2:
        return Conversation((first, Exchange(_refused("protein", (), rng).question, answers.HONEST)))
    kind, answer = _protein_answer(mine, rng)
    return Conversation((first, Exchange(reworded(rng.choice(FOLLOW_UPS[kind]), rng), answer)))
