"""Scores of a demo bundle on what it was not trained on, beside those of the unquantized one and of simple methods.

The bundle answers greedily through the runtime, so what is scored is what ships, at the precision in which it ships.
An answer that lacks a field is wrong there, and one that the runtime refuses to give is wrong everywhere. Everything is
fixed: the same bundle and data give the same scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from biomedgpt_edge.errors import OptionError

from .molecules import MoleculeScorer
from .panel import Answerer, HeldOut, Panel, Progress, Say, Training
from .proteins import STRUCTURED_PROTEINS, location_sections, structure_section
from .sections import Scored, Section, together
from .statistics import Score
from .wordings import refusals, wording_section, wording_subjects, wordings


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
    scored = {
        "same_source": molecules.section(held_out.same_source),
        "chebi": molecules.section(held_out.chebi),
        # In training, and so no part of what is held out together.
        "well_known_shown": Scored(molecules.section([*shown.values()], [*shown]).section),
        "well_known_held_out": molecules.section([*unseen.values()], [*unseen]),
        **location_sections(panel, held_out, training),
        "structure": structure_section(panel, held_out.structured, training.structured),
        "wordings": Scored(wording_section(panel, wordings(), subjects)),
        "refusals": Scored(wording_section(panel, refusals(), subjects)),
    }
    sections = {name: one.section for name, one in scored.items()} | {"together": together([*scored.values()])}
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
