"""Scores of a demo bundle on held-out molecules and proteins, beside those of always saying the commonest thing.

The bundle answers through the runtime, so what is scored is what ships, at the precision in which it ships.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.protein_tokens import MAX_RESIDUES

from . import answers
from .chemistry import MoleculeFacts, facts, formula_counts
from .data import SMALL_HEAVY_ATOMS, MoleculeTable, ProteinRecord, ProteinSplit, prepared_molecules, proteins
from .everyday import EVERYDAY, SHOWN


class Answerer:
    """A bundle that answers greedily."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def about_molecule(self, molecule: Molecule, question: str = answers.DESCRIBE) -> str:
        """Answer about a molecule."""
        return self._engine.ask(question, molecule).text

    def about_protein(self, sequence: str, question: str) -> str:
        """Answer about a protein, of which the encoder reads the first 1,022 residues."""
        return self._engine.ask(question, Protein.from_sequence(sequence, truncate=True)).text

    def about_nothing(self, question: str) -> str:
        """Answer to a question without an input."""
        return self._engine.ask(question).text


def evaluate(engine: Engine, data: Path, cache: Path, count: int, workers: int = 1, seed: int = 0) -> dict[str, Any]:
    """Held-out scores by field, and answers about everyday molecules (which are in training).

    Args:
        data: folder with the training files.
        cache: folder for the prepared data, such as the training run's ``state``.
        count: held-out molecules scored; half as many small ones and proteins of each kind.
    """
    table = prepared_molecules(data, cache, workers)
    split = proteins(data)
    answerer = Answerer(engine)
    held_out = np.flatnonzero(table.held_out)
    small = held_out[table.sizes[held_out] < SMALL_HEAVY_ATOMS]
    rng = random.Random(f"{seed}:evaluate")
    return {
        "precision": engine.bundle.manifest.precision,
        "molecules": molecule_scores(answerer, table, _sample(held_out.tolist(), count, rng), rng),
        "small_molecules": molecule_scores(answerer, table, _sample(small.tolist(), count // 2, rng), rng),
        "proteins": protein_scores(answerer, split, count // 2, rng),
        "everyday": everyday_scores(answerer),
        "answers": {name: answerer.about_molecule(Molecule.from_smiles(EVERYDAY[name])) for name in SHOWN},
        "other_questions": other_scores(answerer, split),
    }


def _sample(items: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    return rng.sample(list(items), min(count, len(items)))


def molecule_scores(answerer: Answerer, table: MoleculeTable, rows: list[int], rng: random.Random) -> dict[str, Any]:
    """Scores of descriptions of the molecules in ``rows``, and of always giving training's commonest values."""
    truth = [table.facts(row) for row in rows]
    said = [answerer.about_molecule(Molecule.from_smiles(table.smiles[row].decode())) for row in rows]
    commonest = _commonest([table.facts(i) for i in _sample(np.flatnonzero(~table.held_out).tolist(), 3000, rng)])
    return {
        "count": len(rows),
        "scores": compare(truth, [answers.claims(text) for text in said]),
        "commonest": compare(truth, [commonest] * len(truth)),
    }


def everyday_scores(answerer: Answerer) -> dict[str, Any]:
    """Scores on the everyday molecules; all of them are in training."""
    molecules = {name: Molecule.from_smiles(smiles) for name, smiles in EVERYDAY.items()}
    truth = [facts(Chem.MolFromSmiles(smiles)) for smiles in EVERYDAY.values()]
    return {
        "count": len(molecules),
        "scores": compare(truth, [answers.claims(answerer.about_molecule(m)) for m in molecules.values()]),
    }


def _commonest(known: list[MoleculeFacts]) -> answers.MoleculeClaims:
    def mode(values: Sequence[Hashable]) -> Any:
        return Counter(values).most_common(1)[0][0]

    groups = Counter(name for one in known for name in one.groups)
    return answers.MoleculeClaims(
        size=mode([answers.size_class(one.heavy) for one in known]),
        rings=mode([one.rings for one in known]),
        aromatic=mode([one.aromatic for one in known]),
        groups=frozenset(name for name, n in groups.items() if n > len(known) / 3),
        donors=mode([one.donors for one in known]),
        acceptors=mode([one.acceptors for one in known]),
        formula=mode([one.formula for one in known]),
    )


def compare(truth: list[MoleculeFacts], said: list[answers.MoleculeClaims]) -> dict[str, float]:
    """Share of exact values per field; F1 over all functional groups; formulas also without their hydrogens."""
    pairs = list(zip(truth, said, strict=True))

    def share(hits: list[bool]) -> float:
        return round(sum(hits) / max(1, len(hits)), 3)

    def heavy_atoms(formula: str | None) -> dict[str, int] | None:
        return {k: v for k, v in formula_counts(formula).items() if k != "H"} if formula is not None else None

    found = sum(len(set(t.groups) & (s.groups or frozenset())) for t, s in pairs)
    named = sum(len(s.groups or ()) for _, s in pairs)
    real = sum(len(t.groups) for t, _ in pairs)
    return {
        "size": share([answers.size_class(t.heavy) == s.size for t, s in pairs]),
        "rings": share([t.rings == s.rings for t, s in pairs]),
        "aromatic_rings": share([t.aromatic == s.aromatic for t, s in pairs]),
        "group_f1": round(2 * found / max(1, named + real), 3),
        "donors": share([t.donors == s.donors for t, s in pairs]),
        "acceptors": share([t.acceptors == s.acceptors for t, s in pairs]),
        "formula": share([t.formula == s.formula for t, s in pairs]),
        "formula_without_hydrogens": share([heavy_atoms(t.formula) == heavy_atoms(s.formula) for t, s in pairs]),
    }


def protein_scores(answerer: Answerer, split: ProteinSplit, count: int, rng: random.Random) -> dict[str, Any]:
    """Accuracy of location and of structure class, and of always giving training's commonest."""
    located = _sample(split.held_out_located, count, rng)
    structured = _sample(split.held_out_structured, count, rng)
    locations = [answers.claimed_location(answerer.about_protein(r.sequence, answers.LOCATION)) for r in located]
    classes = [answers.claimed_structure(answerer.about_protein(r.sequence, answers.STRUCTURE)) for r in structured]
    usual_location = Counter(r.location for r in split.located).most_common(1)[0][0]
    usual_class = Counter(_class(r) for r in split.structured).most_common(1)[0][0]
    return {
        "location": _accuracy([r.location for r in located], locations, usual_location),
        "structure": _accuracy([_class(r) for r in structured], classes, usual_class),
    }


def _class(record: ProteinRecord) -> str:
    """Structure class of the residues the encoder reads."""
    structure = record.structure[:MAX_RESIDUES]
    return answers.structure_class(structure.count("H") / len(structure), structure.count("E") / len(structure))


def _accuracy(truth: list[str], said: Sequence[str | None], usual: str) -> dict[str, Any]:
    total = max(1, len(truth))
    return {
        "count": len(truth),
        "accuracy": round(sum(t == s for t, s in zip(truth, said, strict=True)) / total, 3),
        "commonest": round(sum(t == usual for t in truth) / total, 3),
    }


def other_scores(answerer: Answerer, split: ProteinSplit) -> dict[str, float]:
    """Share of questions outside the demo's reach that are answered as such."""
    aspirin = Molecule.from_smiles(EVERYDAY["aspirin"])
    some = (split.held_out_located or split.located)[0].sequence
    given = {
        "molecule": [answerer.about_molecule(aspirin, q) for q in answers.OTHER_QUESTIONS["molecule"]],
        "protein": [answerer.about_protein(some, q) for q in answers.OTHER_QUESTIONS["protein"]],
        "nothing": [answerer.about_nothing(q) for q in answers.OTHER_QUESTIONS["nothing"]],
    }
    return {kind: round(sum(a == answers.HONEST for a in said) / len(said), 3) for kind, said in given.items()}
