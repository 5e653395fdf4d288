"""Questions with answers for the demo model, from its own data, for benchmarks/precision.py.

Writes `calibration.jsonl`, about molecules and proteins that it was trained on, and `held_out.jsonl`, about others.
Both are drawn in the same way: half of the molecules are to be described, one thing is asked about the others.

Usage: python benchmarks/demo_questions.py --data DATA --out DIR [--cache DIR]
Needs `pip install -c constraints.txt '.[demo]'`. DATA holds the four files of the README; with the `state` folder of a
training run as cache, its molecules need not be read again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from rdkit import Chem

from biomedgpt_edge.errors import BioMedGPTError
from biomedgpt_export.demo.answers import HONEST, MOLECULE_ANSWERS, location_answer, structure_answer
from biomedgpt_export.demo.chemistry import facts
from biomedgpt_export.demo.molecules import prepared_molecules
from biomedgpt_export.demo.proteins import ProteinRecord, proteins
from biomedgpt_export.demo.questions import OTHER, WORDINGS

Line = dict[str, str]

# Residues: with its answer, a longer protein may not fit the demo's context.
LONGEST = 600


def molecule_lines(smiles: Sequence[str], rng: random.Random) -> list[Line]:
    """One question about each."""
    lines = []
    for one in smiles:
        kind = "describe" if rng.random() < 0.5 else rng.choice(list(MOLECULE_ANSWERS))
        answer = MOLECULE_ANSWERS[kind](facts(Chem.MolFromSmiles(one)), rng)
        lines.append({"question": rng.choice(WORDINGS[kind]), "smiles": one, "answer": answer})
    return lines


def protein_lines(
    located: Sequence[ProteinRecord], structured: Sequence[ProteinRecord], rng: random.Random
) -> list[Line]:
    """Where each of the first is, and what the others are built of."""
    lines = []
    for record in located:
        answer = location_answer(record.location, record.membrane, rng)
        lines.append({"question": rng.choice(WORDINGS["location"]), "sequence": record.sequence, "answer": answer})
    for record in structured:
        answer = structure_answer(*record.shares, rng)
        lines.append({"question": rng.choice(WORDINGS["structure"]), "sequence": record.sequence, "answer": answer})
    return lines


def drawn(
    molecules: Sequence[str],
    located: Sequence[ProteinRecord],
    structured: Sequence[ProteinRecord],
    count: int,
    rng: random.Random,
) -> list[Line]:
    """``count`` questions about molecules, a third as many about proteins, and some that have no answer here."""
    # Answers say whether a protein is bound to a membrane, which is not known of all.
    places = [record for record in located if record.membrane != "U" and len(record.sequence) <= LONGEST]
    shares = [record for record in structured if len(record.sequence) <= LONGEST]
    return [
        *molecule_lines(rng.sample(list(molecules), count), rng),
        *protein_lines(rng.sample(places, count // 6), rng.sample(shares, count // 6), rng),
        *({"question": text, "answer": HONEST} for text in rng.sample(OTHER["nothing"], count // 12)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="default: the same as --out")
    options = parser.parse_args(arguments)
    try:
        known = prepared_molecules(options.data, options.cache or options.out)
        split = proteins(options.data)
    except BioMedGPTError as error:
        raise SystemExit(f"error: {error}") from error
    parts = {
        "calibration": (known.training, split.located, split.structured, 96),
        "held_out": (known.same_source, split.held_out_located, split.held_out_structured, 24),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (*source, count) in parts.items():
        lines = drawn(*source, count, random.Random(name))
        (options.out / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    main()
