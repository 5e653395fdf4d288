"""The scores as a Markdown table."""

from __future__ import annotations

from .molecules import COMMONEST_OF
from .proteins import LOW_IDENTITY
from .scores import Scores
from .statistics import Row, Score

_HEADINGS = {
    "same_source": "held-out molecules of the training sources",
    "chebi": "held-out molecules of ChEBI-20",
    "well_known_shown": "well-known molecules, in training",
    "well_known_held_out": "well-known molecules, held out",
    "location": "held-out proteins with a location",
    "location_low_identity": f"of these, below {LOW_IDENTITY:.0%} identity to any training protein found",
    "structure": "held-out proteins with a known structure",
    "wordings": "held-out wordings, kind of answer",
    "refusals": "held-out questions without an answer here, declined",
    "together": "held-out questions about molecules and proteins together",
}
_LABELS = {
    "size": "size class", "parts": "unconnected parts", "heavy_atoms": "heavy atoms",
    "composition": "atoms of each element", "rings": "rings",
    "aromatic_rings": "aromatic rings", "group_f1": "functional groups, F1", "groups_exact": "functional groups, all",
    "donors": "hydrogen bond donors", "acceptors": "hydrogen bond acceptors", "formula": "molecular formula",
    "accuracy": "right", "membrane": "membrane or soluble protein, where known",
    "helix_within_ten": "percent helix, within ten", "strand_within_ten": "percent strand, within ten",
    "molecule": "with a molecule", "protein": "with a protein", "follow_up": "as a second turn",
    "nothing": "without an input", "fields": "fields of the answers",
}  # fmt: skip
_FP32_NOTES = {
    "bundle": "",
    "manifest": "The fp32 column was recorded when the bundle was made, on the same items.",
    "": "No fp32 bundle was given and the manifest records no scores of one on the same items.",
}


def table(scores: Scores) -> str:
    """The scores in Markdown: one table, and what has to be known to read it."""
    lines = [f"| | {scores.precision} (95 % interval) | fp32 | commonest | simple baseline |", "|---|---|---|---|---|"]
    for name, section in scores.sections.items():
        lines.append(f"| **{section.count:,} {_HEADINGS[name]}** | | | | |")
        lines += [f"| {_LABELS[key]} | {_cells(row)} |" for key, row in section.rows.items()]
    notes = [
        *_differences(scores),
        f"Commonest: always the commonest training value (for percentages the mean), for molecules that of "
        f"{COMMONEST_OF:,} drawn training molecules. Simple baseline: for molecules what is true of the nearest "
        "training molecule (Tanimoto, Morgan fingerprints), for proteins logistic regression on amino-acid fractions. "
        "Intervals are Wilson's, for F1 and differences a bootstrap over items.",
        _FP32_NOTES[scores.fp32_from],
        *(
            f"Left out of {section.count + count:,} {_HEADINGS[name]}: {count} ({reason})."
            for name, section in scores.sections.items()
            for reason, count in section.left_out.items()
        ),
    ]
    return "\n".join([*lines, "", *(note for note in notes if note)]) + "\n"


def _differences(scores: Scores) -> list[str]:
    """What the bundle has over the composition regression, and what it loses against fp32: over all, and at most."""
    lines = []
    for name in ("location", "location_low_identity"):
        row = scores.sections[name].rows.get("accuracy") if name in scores.sections else None
        if row and row.over_baseline:
            over = _points(row.over_baseline)
            lines.append(f"{_HEADINGS[name]}: {scores.precision} over the composition regression: {over}.")
    if "together" in scores.sections:
        over_all = scores.sections["together"].rows["fields"].over_fp32
        if over_all:
            lines.append(f"{_HEADINGS['together']}: {scores.precision} against fp32: {_points(over_all)}.")
    over_fp32 = [
        (row.over_fp32, f"{_LABELS[key]}, {_HEADINGS[name]}")
        for name, section in scores.sections.items()
        for key, row in section.rows.items()
        if row.over_fp32
    ]
    if over_fp32:
        worst, where = min(over_fp32, key=lambda one: one[0].value)
        lost = f"{where}: {_points(worst)}" if worst.value < 0 else "none"
        lines.append(f"Largest loss of {scores.precision} against fp32: {lost}.")
    return lines


def _points(over: Score) -> str:
    """``+12.3 points (9.1 to 15.4)``."""
    value, low, high = (round(100 * one, 1) + 0.0 for one in (over.value, over.low, over.high))
    return f"{value:+.1f} points ({low:.1f} to {high:.1f})"


def _cells(row: Row) -> str:
    interval = f"{_short(row.bundle.value)} ({_short(row.bundle.low)}–{_short(row.bundle.high)})"
    return " | ".join([interval, *map(_short, (row.fp32.value if row.fp32 else None, row.commonest, row.baseline))])


def _short(value: float | None) -> str:
    """``.994``, ``1.000``, or nothing."""
    if value is None:
        return ""
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1.000"
