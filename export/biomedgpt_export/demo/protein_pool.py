"""What the protein encoder sees in training: altered proteins, what the teacher says of each, in batches of one length.

Every epoch draws anew. A labelled protein is mostly shortened (both ends stay, since the signals that sort proteins sit
there) and often mutated; a chimera has the beginning of one protein and the rest of another. What a step sees depends
on the seed and the step only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import numpy as np

from biomedgpt_edge.protein_tokens import MAX_RESIDUES

from .protein_teacher import F32, MEMBRANE_LABELS, PLACES, ProteinTeacher, Taught
from .proteins import ProteinRecord, ProteinSplit

_LABEL_WEIGHT = 0.5  # of a protein's own labels beside what the teacher says
_WHOLE, _SHORTENED, _CHIMERA_HEAD, _CHIMERA = 0.3, (100, 340), (15, 100), (100, 300)
_STRUCTURED_PIECE, _FROM_START = (160, 320), 0.6
_MUTATED, _MOST_MUTATED, _SIMILAR = 0.5, 0.15, 0.7
_JITTER = 0.06
# An epoch ends after this many batches, whatever is left of its proteins, so that a step tells which epoch it is in.
_BATCHES_PER_EPOCH = 500

# Groups of residues that replace each other in relatives, and the background frequencies of all.
_RELATED = ("AGSV", "ILMV", "FWY", "STAN", "DEQN", "KRQ", "HNY", "PA", "CSA")
_SIMILAR_TO = {a: group.replace(a, "") for group in _RELATED for a in group}
_BACKGROUND = "AAAAAAAACDDDDDEEEEEEFFFFGGGGGGGHHIIIIIKKKKKKLLLLLLLLLMMNNNNPPPPPQQQQRRRRRSSSSSSSTTTTTVVVVVVWYYY"


@dataclass(frozen=True)
class PoolBatch:
    """Proteins of one length.

    Attributes:
        records: altered sequences with their labels; a chimera has none.
        taught: what the teacher says of them, mixed with the labels where there are some.
        share: proteins here over those of an average batch.
    """

    records: list[ProteinRecord]
    taught: Taught
    share: float


@dataclass(frozen=True)
class _Epoch:
    number: int
    records: list[ProteinRecord]
    taught: Taught
    batches: list[list[int]]


class ProteinPool:
    """Batches of altered proteins.

    Args:
        split: the training proteins.
        seed: of everything random.
        tokens: per batch, ``<cls>`` and ``<eos>`` included.
        chimeras, structured: how many of them an epoch has, beside each located protein once.
    """

    def __init__(
        self, split: ProteinSplit, teacher: ProteinTeacher, seed: str, *, tokens: int, chimeras: int, structured: int
    ) -> None:
        self._split = split
        self._teacher = teacher
        self._seed = seed
        self._tokens = tokens
        self._chimeras = chimeras
        self._structured = min(structured, len(split.structured))
        self._current: _Epoch | None = None

    def batch(self, step: int) -> PoolBatch:
        """The batch of a step."""
        number, index = divmod(step, _BATCHES_PER_EPOCH)
        if self._current is None or self._current.number != number:
            self._current = self._epoch(number)
        epoch = self._current
        chosen = epoch.batches[index % len(epoch.batches)]
        records = [epoch.records[i] for i in chosen]
        rng = random.Random(f"{self._seed}:{step}")
        shortest = min(len(record.sequence) for record in records)
        average = len(epoch.records) / len(epoch.batches)
        return PoolBatch(
            records=[_without_middle(record, shortest, rng.randint(shortest // 4, shortest)) for record in records],
            taught=Taught(**{field.name: getattr(epoch.taught, field.name)[chosen] for field in fields(Taught)}),
            share=len(chosen) / average,
        )

    def _epoch(self, number: int) -> _Epoch:
        rng = random.Random(f"{self._seed}:epoch {number}")
        located = self._split.located
        records = [_altered(record, rng) for record in located]
        groups = [record.group for record in located]
        for _ in range(self._chimeras):
            first, second = rng.choice(located), rng.choice(located)
            records.append(_chimera(first.sequence, second.sequence, rng))
            groups.append(first.group)
        for record in rng.sample(self._split.structured, self._structured):
            records.append(_piece(record, rng))
            groups.append(record.group)
        taught = self._teacher.teach([record.sequence for record in records], groups)
        for row, record in enumerate(records):
            _mix_in_labels(record, taught, row)
        return _Epoch(number, records, taught, _batches(records, self._tokens, rng))


def _mix_in_labels(record: ProteinRecord, taught: Taught, row: int) -> None:
    """Half of what is learnt of a record is what is known of it, where something is."""

    def mix(said: F32, known: F32) -> None:
        said[row] += _LABEL_WEIGHT * (known - said[row])

    if record.location:
        mix(taught.places, _only(PLACES.index(record.location), len(PLACES)))
    if record.membrane in MEMBRANE_LABELS:
        mix(taught.membrane, _only(MEMBRANE_LABELS.index(record.membrane), len(MEMBRANE_LABELS)))
    if record.structure:
        mix(taught.shares, np.array(record.shares, np.float32))


def _only(index: int, size: int) -> F32:
    one = np.zeros(size, np.float32)
    one[index] = 1
    return one


def _batches(records: list[ProteinRecord], tokens: int, rng: random.Random) -> list[list[int]]:
    """Rows of similar length, at most ``tokens`` per batch, shuffled."""
    noisy = [len(record.sequence) * (1 + _JITTER * rng.random()) for record in records]
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(records)), key=noisy.__getitem__):
        longest = max(longest, len(records[row].sequence) + 2)
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = len(records[row].sequence) + 2
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches


# ---------------------------------------------------------------------------------------------------- alterations


def _altered(record: ProteinRecord, rng: random.Random) -> ProteinRecord:
    """A located protein, mostly shortened, often mutated."""
    sequence = record.sequence[:MAX_RESIDUES]
    if rng.random() >= _WHOLE:
        sequence = _shortened(sequence, rng.randint(*_SHORTENED), rng)
    if rng.random() < _MUTATED:
        sequence = mutated(sequence, rng.random() * _MOST_MUTATED, rng)
    return replace(record, sequence=sequence)


def mutated(sequence: str, rate: float, rng: random.Random) -> str:
    """Each residue replaced with probability ``rate``, mostly by a similar one."""

    def replaced(residue: str) -> str:
        similar = rng.random() < _SIMILAR
        return rng.choice(_SIMILAR_TO.get(residue, _BACKGROUND) if similar else _BACKGROUND)

    return "".join(replaced(residue) if rng.random() < rate else residue for residue in sequence)


def _shortened(sequence: str, length: int, rng: random.Random) -> str:
    """Without an inner stretch, where the sequence is longer than ``length``."""
    if len(sequence) <= length:
        return sequence
    head = rng.randint(length // 3, length - length // 4)
    return sequence[:head] + sequence[len(sequence) - (length - head) :]


def _chimera(first: str, second: str, rng: random.Random) -> ProteinRecord:
    """The beginning of one protein before the rest of another."""
    head = rng.randint(*_CHIMERA_HEAD)
    second = second[:MAX_RESIDUES]
    joined = first[:head] + second[min(head, len(second) // 2) :]
    return ProteinRecord(_shortened(joined, rng.randint(*_CHIMERA), rng))


def _piece(record: ProteinRecord, rng: random.Random) -> ProteinRecord:
    """A stretch of a protein with a structure, its labels cut with it."""
    sequence, structure = record.sequence[:MAX_RESIDUES], record.structure[:MAX_RESIDUES]
    if len(sequence) > _STRUCTURED_PIECE[1]:
        start = 0 if rng.random() < _FROM_START else rng.randrange(len(sequence) - _STRUCTURED_PIECE[1])
        part = slice(start, start + rng.randint(*_STRUCTURED_PIECE))
        sequence, structure = sequence[part], structure[part]
    return replace(record, sequence=sequence, structure=structure)


def _without_middle(record: ProteinRecord, length: int, head: int) -> ProteinRecord:
    """Cut to ``length`` by removing what follows the first ``head`` residues, labels with it."""

    def cut(text: str) -> str:
        return text[:head] + text[len(text) - (length - head) :] if text else text

    return replace(record, sequence=cut(record.sequence), structure=cut(record.structure))
