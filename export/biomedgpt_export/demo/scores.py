"""Scores of a demo bundle on what it was not trained on, beside those of the unquantized one and of simple methods.

The bundle answers greedily through the runtime, so what is scored is what ships, at the precision in which it ships.
An answer that lacks a field is wrong there, and one that the runtime refuses to give is wrong everywhere. Everything is
fixed: the same bundle and data give the same scores.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.errors import InputError, OptionError

from ..errors import TrainingDataError
from . import answers
from .answers import MoleculeClaims
from .baselines import (
    NearestMolecule,
    commonest,
    commonest_claims,
    composition_regression,
    true_claims,
    with_commonest_groups,
)
from .molecules import screen
from .proteins import ProteinRecord
from .questions import (
    DESCRIBE,
    HELD_OUT_FOLLOW_UPS,
    HELD_OUT_OTHER,
    HELD_OUT_WORDINGS,
    LOCATION,
    MOLECULE_KINDS,
    STRUCTURE,
    WORDINGS,
)
from .similarity import identity_to_nearest

LOW_IDENTITY = 0.3
STRUCTURED_PROTEINS = 600
# Training molecules that the commonest values are taken from, drawn with a fixed seed.
COMMONEST_OF = 5000
# Inputs that each held-out wording is asked about.
WORDING_INPUTS = 5
_RESAMPLES = 2000
_Z95 = 1.959964

# Field of a molecule -> what it is called in ``MoleculeClaims``; F1 of the groups is the one that is no share.
EXACT_FIELDS = {
    "size": "size", "parts": "parts", "heavy_atoms": "heavy", "composition": "composition", "rings": "rings",
    "aromatic_rings": "aromatic", "groups_exact": "groups", "donors": "donors", "acceptors": "acceptors",
    "formula": "formula",
}  # fmt: skip
GROUP_F1 = "group_f1"

# Of each item what is right, and out of how much: for a share 1 or 0 out of 1, for F1 twice the groups in common out of
# those in truth and answer together. A score is the ratio of the sums.
Counts = npt.NDArray[np.float64]

Say = Callable[[str], None]
_Item = TypeVar("_Item")


# ------------------------------------------------------------------------------------------------- what is compared


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


# ----------------------------------------------------------------------------------------------------------- scores


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
class Scores:
    """All sections.

    Attributes:
        precision, source: of the bundle; see ``Answerer``.
        fp32_from: "bundle" (asked now), "manifest" (recorded earlier) or "" (unknown).
    """

    precision: str
    source: str
    fp32_from: str
    sections: dict[str, Section]

    def to_json(self) -> dict[str, Any]:
        """As it is recorded in ``demo.json`` and so in the manifest, under "scores"."""
        return asdict(self)


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


def group_counts(truth: Sequence[MoleculeClaims], said: Sequence[MoleculeClaims]) -> Counts:
    """``[molecules, 2]`` of the functional groups, for F1 over all groups of all molecules."""
    empty: frozenset[str] = frozenset()
    pairs = [(t.groups or empty, s.groups or empty) for t, s in zip(truth, said, strict=True)]
    return np.array([[2 * len(t & s), len(t) + len(s)] for t, s in pairs], dtype=np.float64).reshape(-1, 2)


def share_score(counts: Counts) -> Score:
    """A share of independent items, with Wilson's interval."""
    return wilson(float(_ratio(counts.sum(axis=0))), len(counts))


def f1_score(counts: Counts) -> Score:
    """F1 with a percentile bootstrap over molecules (fixed seed).

    Where nothing is wrong a bootstrap cannot tell how far below the truth may lie: the interval is then Wilson's of the
    share of molecules that are wholly right.
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


def _digest(items: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ asking


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


# -------------------------------------------------------------------------------------------------------- molecules


def molecule_counts(truth: Sequence[MoleculeClaims], said: Sequence[MoleculeClaims]) -> dict[str, Counts]:
    """Counts of each field over the same molecules."""
    pairs = list(zip(truth, said, strict=True))
    counts: dict[str, Counts] = {}
    for name, attribute in EXACT_FIELDS.items():
        if name == "groups_exact":
            counts[GROUP_F1] = group_counts(truth, said)
        counts[name] = shares([getattr(t, attribute) == getattr(s, attribute) for t, s in pairs])
    return counts


class MoleculeScorer:
    """Scores descriptions of molecules beside what the simple methods say of them."""

    def __init__(self, panel: Panel, training: Sequence[str]) -> None:
        self._panel = panel
        self._nearest = NearestMolecule(training)
        self._known = [true_claims(smiles) for smiles in _sample(training, COMMONEST_OF)]
        self._usual = commonest_claims(self._known)

    def section(self, molecules: Sequence[str], names: Sequence[str] = ()) -> Section:
        """Scores of ``molecules``; with ``names``, the wrong fields of each are listed."""
        left_out: Counter[str] = Counter()
        kept: list[int] = []
        for index, smiles in enumerate(molecules):
            if problem := screen(smiles).problem:
                left_out[problem] += 1
            else:
                kept.append(index)
        usable = [molecules[index] for index in kept]
        truth = [true_claims(smiles) for smiles in usable]
        texts = [self._panel.ask(DESCRIBE, smiles=smiles) for smiles in usable]
        said = [[answers.claims(text) for text in column] for column in zip(*texts, strict=True)]
        return Section(
            count=len(usable),
            items=_digest(usable),
            rows=self._rows(usable, truth, said) if usable else {},
            left_out=dict(left_out),
            misses=_misses([names[index] for index in kept], truth, said[0]) if names and kept else [],
        )

    def _rows(
        self, molecules: Sequence[str], truth: Sequence[MoleculeClaims], said: Sequence[Sequence[MoleculeClaims]]
    ) -> dict[str, Row]:
        columns = [molecule_counts(truth, one) for one in said]
        usual = molecule_counts(truth, [self._usual] * len(truth))
        whole_list = with_commonest_groups(self._usual, self._known)
        usual["groups_exact"] = molecule_counts(truth, [whole_list] * len(truth))["groups_exact"]
        simple = molecule_counts(truth, [self._nearest.claims(smiles) for smiles in molecules])
        return {
            name: Field([one[name] for one in columns], usual[name], simple[name]).row(
                f1_score if name == GROUP_F1 else share_score
            )
            for name in usual
        }


def _misses(names: Sequence[str], truth: Sequence[MoleculeClaims], said: Sequence[MoleculeClaims]) -> list[str]:
    """``name: field, field`` for each molecule of which something is wrong."""
    found = []
    for name, t, s in zip(names, truth, said, strict=True):
        wrong = [one for one, attribute in EXACT_FIELDS.items() if getattr(t, attribute) != getattr(s, attribute)]
        if wrong:
            found.append(f"{name}: {', '.join(wrong)}")
    return found


# --------------------------------------------------------------------------------------------------------- proteins


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

    def section(self, rows: Callable[[], dict[str, Row]]) -> Section:
        """Section of these proteins; without rows where there are none."""
        return Section(
            len(self.records), _digest([one.sequence for one in self.records]), rows() if self.records else {}
        )


def location_sections(panel: Panel, held_out: HeldOut, training: Training) -> dict[str, Section]:
    """All proteins with a location, and those that no similar training protein was found for.

    Similar to any that training saw: proteins of a known structure get locations from a teacher there.
    """
    answered = Answered.ask(panel, LOCATION, held_out.located, training.located)
    seen = [record.sequence for record in (*training.located, *training.structured)]
    nearest = identity_to_nearest([record.sequence for record in held_out.located], seen)
    far = np.flatnonzero(nearest < LOW_IDENTITY).tolist()
    location = answered.label(answers.claimed_location, lambda record: record.location)
    return {
        "location": answered.section(lambda: {"accuracy": location.row(), **_membrane(answered)}),
        "location_low_identity": answered.among(far).section(lambda: {"accuracy": location.among(far).row()}),
    }


def _membrane(answered: Answered) -> dict[str, Row]:
    """Whether a membrane protein or a soluble one, of those of which it is known."""
    known = answered.among([i for i, record in enumerate(answered.records) if record.membrane != "U"])
    known = replace(known, training=[record for record in answered.training if record.membrane != "U"])
    if not known.records:
        return {}
    return {"membrane": known.label(answers.claimed_membrane, lambda record: record.membrane).row()}


def structure_section(panel: Panel, held_out: Sequence[ProteinRecord], training: list[ProteinRecord]) -> Section:
    """Structure classes and shares of at most ``STRUCTURED_PROTEINS`` proteins, drawn with a fixed seed."""
    answered = Answered.ask(panel, STRUCTURE, _sample(held_out, STRUCTURED_PROTEINS), training)
    return answered.section(
        lambda: {
            "accuracy": answered.label(answers.claimed_structure, structure_class).row(),
            "helix_within_ten": answered.share(0).row(),
            "strand_within_ten": answered.share(1).row(),
        }
    )


def _sample(items: Sequence[_Item], count: int) -> list[_Item]:
    return random.Random(0).sample(list(items), min(count, len(items)))


# --------------------------------------------------------------------------------------------------------- wordings


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
    return Section(len(every), _digest(items), rows, misses=misses)


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


# ------------------------------------------------------------------------------------------------------- everything


def score(bundle: Answerer, reference: Answerer | None, held_out: HeldOut, training: Training, say: Say) -> Scores:
    """Scores of ``bundle``, and of ``reference`` on the same items.

    Args:
        bundle: what ships.
        reference: the fp32 bundle of the same checkpoint, or None.
        held_out, training: see there.
        say: gets lines about the progress.

    Raises:
        OptionError: the reference is not in fp32, or of another checkpoint.
        TrainingDataError: data that cannot be asked about or that a simple method cannot learn from.
    """
    if reference is not None and reference.precision != "fp32":
        raise OptionError(
            f"the bundle to compare with is in {reference.precision}.", limit="fp32", remedy="Give the fp32 bundle."
        )
    if reference is not None and reference.source != bundle.source:
        raise OptionError(
            "the bundle to compare with was made from another checkpoint.",
            seen=reference.source,
            limit=bundle.source,
            remedy="Export both from the same checkpoint.",
        )
    subjects = wording_subjects(held_out)
    panel = Panel(bundle, reference, Progress(_total(held_out, subjects), say))
    say(f"fingerprints of {len(training.smiles):,} training molecules")
    molecules = MoleculeScorer(panel, training.smiles)
    shown, unseen = held_out.well_known_shown, held_out.well_known_held_out
    sections = {
        "same_source": molecules.section(held_out.same_source),
        "chebi": molecules.section(held_out.chebi),
        "well_known_shown": molecules.section([*shown.values()], [*shown]),
        "well_known_held_out": molecules.section([*unseen.values()], [*unseen]),
        **location_sections(panel, held_out, training),
        "structure": structure_section(panel, held_out.structured, training.structured),
        "wordings": wording_section(panel, wordings(), subjects),
        "refusals": wording_section(panel, refusals(), subjects),
    }
    for name, section in sections.items():
        for reason, count in section.left_out.items():
            say(f"{name}: {count} left out: {reason}")
    return Scores(bundle.precision, bundle.source, "bundle" if reference is not None else "", sections)


def _total(held_out: HeldOut, subjects: dict[str, list[dict[str, str]]]) -> int:
    """Questions that will be asked, if no molecule is left out."""
    molecules = (held_out.same_source, held_out.chebi, held_out.well_known_shown, held_out.well_known_held_out)
    asked = [one for groups in (wordings(), refusals()) for questions in groups.values() for one in questions]
    return (
        sum(map(len, molecules))
        + len(held_out.located)
        + min(STRUCTURED_PROTEINS, len(held_out.structured))
        + sum(len(subjects[one.given]) for one in asked)
    )


def with_recorded_fp32(scores: Scores, about: dict[str, Any]) -> Scores:
    """``scores`` with the fp32 column that a bundle's manifest records.

    It is used where it was measured on the same items with the same checkpoint; differences from it, where what they
    were measured for scored the same as the bundle does.

    Args:
        scores: measured without an fp32 bundle.
        about: ``manifest.about``; its "scores" are as ``Scores.to_json`` gave them, or of an older shape, or missing.
    """
    recorded = _at(about, "scores")
    if _at(recorded, "source") != scores.source:
        return scores
    same_precision = _at(recorded, "precision") == scores.precision
    sections: dict[str, Section] = {}
    for name, section in scores.sections.items():
        there = _at(recorded, "sections", name)
        rows = dict(section.rows)
        for key, row in rows.items() if _at(there, "items") == section.items else ():
            over = _recorded(there, key, "over_fp32") if same_precision else None
            same = _recorded(there, key, "bundle") == row.bundle
            rows[key] = replace(row, fp32=_recorded(there, key, "fp32"), over_fp32=over if same else None)
        sections[name] = replace(section, rows=rows)
    known = any(row.fp32 is not None for section in sections.values() for row in section.rows.values())
    return replace(scores, fp32_from="manifest" if known else "", sections=sections)


def _at(tree: object, *keys: str) -> object:
    """What lies under ``keys`` in nested dictionaries, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _recorded(section: object, row: str, score: str) -> Score | None:
    numbers = [_at(section, "rows", row, score, name) for name in ("value", "low", "high")]
    found = [number for number in numbers if isinstance(number, float)]
    return Score(*found) if len(found) == len(numbers) else None
