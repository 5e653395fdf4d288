"""Batches as tensors, in an order that depends on the seed and the step only, so that a run can resume anywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biomedgpt_edge.protein_tokens import residue_ids

from .answers import LOCATIONS
from .chemistry import GROUPS
from .data import MoleculeTable, ProteinRecord
from .model import ESM_PAD_ID, GraphBatch, graph_batch

IGNORE = -100
_LOCATION_INDEX = {name: index for index, name in enumerate(LOCATIONS)}


class BatchOrder:
    """Batch k of an endless sequence of shuffled epochs.

    With ``jitter`` None a batch is a random draw; otherwise batches hold items of similar length (plus up to
    ``jitter``), which keeps padding low.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], size: int, seed: int, jitter: float | None) -> None:
        self.lengths = lengths
        self.size = min(size, len(lengths))
        self.seed = seed
        self.jitter = jitter
        self.per_epoch = max(1, len(lengths) // self.size)
        self._epoch = -1
        self._batches: npt.NDArray[np.int64] = np.empty((0, 0), np.int64)

    def batch(self, k: int) -> npt.NDArray[np.int64]:
        """Indices of batch ``k``, ``[size]``."""
        epoch, index = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        chosen: npt.NDArray[np.int64] = self._batches[index]
        return chosen

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))[: self.per_epoch * self.size]
        if self.jitter is not None:
            noisy = self.lengths[order] + rng.random(len(order)) * self.jitter
            order = order[np.argsort(noisy, kind="stable")]
        batches: npt.NDArray[np.int64] = rng.permutation(order.reshape(self.per_epoch, self.size), axis=0)
        return batches


@dataclass(frozen=True)
class MoleculeBatch:
    """Molecules as one graph with the labels of their atoms.

    Attributes:
        graph: all atoms, ``N`` in total.
        starts: first atom of each molecule, and N, ``[B + 1]``.
        atom_groups: float ``[N, G]``; atom_labels: int64 ``[N, 3]``.
        groups: float ``[B, G]``; counts: int64 ``[B, C]``.
    """

    graph: GraphBatch
    starts: list[int]
    atom_groups: Tensor
    atom_labels: Tensor
    groups: Tensor
    counts: Tensor


def molecule_batch(table: MoleculeTable, indices: npt.NDArray[np.int64]) -> MoleculeBatch:
    """The molecules at ``indices``, in that order."""
    starts = [0]
    atoms, bonds, groups, labels = [], [], [], []
    for i in indices.tolist():
        rows = table.atom_slice(i)
        atoms.append(table.atoms[rows])
        groups.append(table.groups[rows])
        labels.append(table.labels[rows])
        bond = table.bonds[table.bond_slice(i)].astype(np.int64)
        bond[:, :2] += starts[-1]
        bonds.append(bond)
        starts.append(starts[-1] + rows.stop - rows.start)
    graph = graph_batch(
        torch.from_numpy(np.concatenate(atoms).astype(np.int64)), torch.from_numpy(np.concatenate(bonds))
    )
    flags = np.unpackbits(np.concatenate(groups), axis=1, count=len(GROUPS))
    return MoleculeBatch(
        graph=graph,
        starts=starts,
        atom_groups=torch.from_numpy(flags).float(),
        atom_labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        groups=torch.from_numpy(np.maximum.reduceat(flags, starts[:-1], axis=0)).float(),
        counts=torch.from_numpy(np.stack([table.counts(i) for i in indices.tolist()]).astype(np.int64)),
    )


@dataclass(frozen=True)
class ProteinBatch:
    """Proteins, cut to a common limit, with their labels.

    Attributes:
        records: what the encoder sees, cut; a structure is cut with its sequence.
        ids: int64 ``[B, T]``, padded with ``ESM_PAD_ID``.
        residues: int64 ``[B, T]``, H, E, C as 0, 1, 2, else ``IGNORE``.
        locations: int64 ``[B]`` or None if the records have none.
    """

    records: list[ProteinRecord]
    ids: Tensor
    residues: Tensor
    locations: Tensor | None


def protein_batch(records: list[ProteinRecord], limit: int, rng: random.Random) -> ProteinBatch:
    """Cuts to ``limit`` residues: from the start where a location is asked (signals sit there), else anywhere."""
    cut = [_cut(record, limit, rng) for record in records]
    width = max(len(record.sequence) for record in cut) + 2
    ids = torch.full((len(cut), width), ESM_PAD_ID)
    residues = torch.full((len(cut), width), IGNORE)
    for row, record in enumerate(cut):
        encoded = torch.from_numpy(residue_ids(record.sequence))
        ids[row, : len(encoded)] = encoded
        if record.structure:
            residues[row, 1 : len(encoded) - 1] = torch.tensor(["HEC".index(c) for c in record.structure])
    located = all(record.location for record in cut)
    locations = torch.tensor([_LOCATION_INDEX[record.location] for record in cut]) if located else None
    return ProteinBatch(cut, ids, residues, locations)


def _cut(record: ProteinRecord, limit: int, rng: random.Random) -> ProteinRecord:
    if len(record.sequence) <= limit:
        return record
    start = 0 if record.location else rng.randrange(len(record.sequence) - limit + 1)
    part = slice(start, start + limit)
    return ProteinRecord(record.sequence[part], record.location, record.membrane, record.structure[part])


@dataclass(frozen=True)
class Example:
    """One exchange: text ids, soft tokens ``start`` to ``start + count`` of the batch, text ids, the answer's ids."""

    before: list[int]
    start: int
    count: int
    after: list[int]
    answer: list[int]

    def prompt(self, first_soft_row: int) -> list[int]:
        """Rows of ``[vocabulary; soft tokens]``."""
        soft = range(first_soft_row + self.start, first_soft_row + self.start + self.count)
        return [*self.before, *soft, *self.after]


def assemble(examples: list[Example], first_soft_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index ``[B, T]``, next-token labels ``[B, T]`` (``IGNORE`` outside the answer), last prompt position ``[B]``."""
    prompts = [example.prompt(first_soft_row) for example in examples]
    width = max(len(p) + len(e.answer) - 1 for p, e in zip(prompts, examples, strict=True))
    index = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORE)
    for row, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        tokens = prompt + example.answer
        index[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, len(prompt) - 1 : len(tokens) - 1] = torch.tensor(example.answer)
    return index, labels, torch.tensor([len(prompt) - 1 for prompt in prompts])
