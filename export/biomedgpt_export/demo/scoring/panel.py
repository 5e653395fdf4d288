"""Who is asked and about what: bundles that answer through the runtime, what is held out, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.errors import InputError

from ..proteins import ProteinRecord

Say = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """What is asked about. Molecules are SMILES; the well-known ones have names."""

    same_source: list[str]
    chebi: list[str]
    well_known_shown: dict[str, str]
    well_known_held_out: dict[str, str]
    located: list[ProteinRecord]
    structured: list[ProteinRecord]


@dataclass(frozen=True)
class Training:
    """What the simple methods learn from: molecules as SMILES that RDKit can read, and proteins."""

    smiles: list[str]
    located: list[ProteinRecord]
    structured: list[ProteinRecord]


class Answerer(Protocol):
    """Something that answers questions about one molecule, one protein or nothing."""

    @property
    def precision(self) -> str:
        """Name of its column: "int4", "fp32", ..."""

    @property
    def source(self) -> str:
        """SHA-256 of the trained weights it was made from."""

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
        """Answer to the last of the questions, which are the turns of one chat; the first one brings the input.

        Raises:
            InputError: the input cannot be used.
        """


class EngineAnswerer:
    """A bundle that answers greedily through the runtime."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def precision(self) -> str:
        """Of the bundle."""
        return self._engine.bundle.manifest.precision

    @property
    def source(self) -> str:
        """Of the checkpoint's fusion file, or of each of its shards."""
        sources = self._engine.bundle.manifest.sources
        return " ".join(one.sha256 for one in sources if one.path.split("/")[0] == "fusion")

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
        """See ``Answerer.ask``; of a protein the first 1,022 residues are read."""
        chat = self._engine.chat()
        inputs: list[Molecule | Protein] = [Molecule.from_smiles(smiles)] if smiles else []
        if sequence:
            inputs.append(Protein.from_sequence(sequence, truncate=True))
        text = ""
        for turn, question in enumerate(questions):
            text = chat.ask(question, *(inputs if turn == 0 else [])).text
        return text


class Progress:
    """Says how many of ``total`` questions are answered and how long the rest may take, every ten seconds."""

    def __init__(self, total: int, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._done = 0
        self._start = self._last = clock()

    def step(self) -> None:
        """One more is answered."""
        self._done += 1
        now = self._clock()
        if now - self._last >= 10 or self._done == self._total:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._say(f"{self._done:,} of {self._total:,} questions, about {left / 60:.1f} min left")


@dataclass(frozen=True)
class Panel:
    """The bundle and, if there is one, the fp32 bundle, asked the same."""

    bundle: Answerer
    reference: Answerer | None
    progress: Progress

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> list[str]:
        """One or two answers; an empty one, which is right about nothing, where the runtime refuses to answer."""
        self.progress.step()
        texts = []
        for one in [self.bundle] if self.reference is None else [self.bundle, self.reference]:
            try:
                texts.append(one.ask(*questions, smiles=smiles, sequence=sequence))
            except InputError:
                texts.append("")
        return texts
