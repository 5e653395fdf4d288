"""Scores of descriptions of molecules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .. import answers
from ..answers import MoleculeClaims
from ..molecules import screen
from ..questions import DESCRIBE
from .baselines import NearestMolecule, commonest_claims, true_claims, with_commonest_groups
from .panel import Panel
from .sections import Scored, Section, digest, sample
from .statistics import Counts, Field, ratio_score, share_score, shares

# Training molecules that the commonest values are taken from, drawn with a fixed seed.
COMMONEST_OF = 5000

EXACT_FIELDS = {
    "size": "size", "parts": "parts", "heavy_atoms": "heavy", "composition": "composition", "rings": "rings",
    "aromatic_rings": "aromatic", "groups_exact": "groups", "donors": "donors", "acceptors": "acceptors",
    "formula": "formula",
}  # fmt: skip
GROUP_F1 = "group_f1"


def group_counts(truth: Sequence[MoleculeClaims], said: Sequence[MoleculeClaims]) -> Counts:
    """``[molecules, 2]`` of the functional groups, for F1 over all groups of all molecules."""
    empty: frozenset[str] = frozenset()
    pairs = [(t.groups or empty, s.groups or empty) for t, s in zip(truth, said, strict=True)]
    return np.array([[2 * len(t & s), len(t) + len(s)] for t, s in pairs], dtype=np.float64).reshape(-1, 2)


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
        self._known = [true_claims(smiles) for smiles in sample(training, COMMONEST_OF)]
        self._usual = commonest_claims(self._known)

    def section(self, molecules: Sequence[str], names: Sequence[str] = ()) -> Scored:
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
        fields = self._fields(usable, truth, said) if usable else {}
        section = Section(
            count=len(usable),
            items=digest(usable),
            rows={name: one.row(ratio_score if name == GROUP_F1 else share_score) for name, one in fields.items()},
            left_out=dict(left_out),
            misses=_misses([names[index] for index in kept], truth, said[0]) if names and kept else [],
        )
        return Scored(section, tuple(one for name, one in fields.items() if name in EXACT_FIELDS))

    def _fields(
        self, molecules: Sequence[str], truth: Sequence[MoleculeClaims], said: Sequence[Sequence[MoleculeClaims]]
    ) -> dict[str, Field]:
        columns = [molecule_counts(truth, one) for one in said]
        usual = molecule_counts(truth, [self._usual] * len(truth))
        whole_list = with_commonest_groups(self._usual, self._known)
        usual["groups_exact"] = molecule_counts(truth, [whole_list] * len(truth))["groups_exact"]
        simple = molecule_counts(truth, [self._nearest.claims(smiles) for smiles in molecules])
        return {name: Field([one[name] for one in columns], usual[name], simple[name]) for name in usual}


def _misses(names: Sequence[str], truth: Sequence[MoleculeClaims], said: Sequence[MoleculeClaims]) -> list[str]:
    """``name: field, field`` for each molecule of which something is wrong."""
    found = []
    for name, t, s in zip(names, truth, said, strict=True):
        wrong = [one for one, attribute in EXACT_FIELDS.items() if getattr(t, attribute) != getattr(s, attribute)]
        if wrong:
            found.append(f"{name}: {', '.join(wrong)}")
    return found
