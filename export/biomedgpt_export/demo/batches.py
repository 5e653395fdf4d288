"""Batches as tensors, in an order that depends on the seed and the step only, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from biomedgpt_edge.protein_tokens import residue_ids

from .chemistry import GROUPS
from .model import GraphBatch, graph_batch
from .molecules import MoleculeTable
from .protein_pool import PoolBatch

IGNORE = -100
_Batch = TypeVar("_Batch")


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
    """Proteins of one length T - 2, with their labels.

    Attributes:
        ids: int64 ``[B, T]``.
        residues: int64 ``[B, T]``, H, E, C as 0, 1, 2, else ``IGNORE``.
        places, membrane: float ``[B, locations]`` and ``[B, 2]``, the probabilities to learn.
        shares: float ``[B, 2]``, of helix and strand.
        learnt: float ``[B, LEARNT_FEATURES]``, the features to predict.
        share: proteins here over those of an average batch.
        structured: share of the proteins that have a structure.
    """

    ids: Tensor
    residues: Tensor
    places: Tensor
    membrane: Tensor
    shares: Tensor
    learnt: Tensor
    share: float
    structured: float


def protein_batch(pool: PoolBatch) -> ProteinBatch:
    """A batch of the pool as tensors."""
    ids = torch.stack([torch.from_numpy(residue_ids(record.sequence)) for record in pool.records])
    residues = torch.full(ids.shape, IGNORE)
    for row, record in enumerate(pool.records):
        if record.structure:
            residues[row, 1:-1] = torch.tensor(["HEC".index(c) for c in record.structure])
    structured = sum(bool(record.structure) for record in pool.records) / len(pool.records)
    taught = {field.name: torch.from_numpy(getattr(pool.taught, field.name)) for field in fields(pool.taught)}
    return ProteinBatch(ids, residues, **taught, share=pool.share, structured=structured)


@dataclass(frozen=True)
class Example:
    """A prompt and the answer's ids; in the prompt, soft token i of the batch is -1 - i."""

    prompt: list[int]
    answer: list[int]


def example(texts: list[list[int]], subjects: Sequence[range], answer: list[int]) -> Example:
    """Ids of text with the soft tokens of ``subjects`` (their rows in the batch) in the gaps between them."""
    prompt = list(texts[0])
    for rows, text in zip(subjects, texts[1:], strict=True):
        prompt += [-1 - row for row in rows]
        prompt += text
    return Example(prompt, answer)


def assemble(examples: list[Example], first_soft_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index ``[B, T]`` into ``[vocabulary; soft]``, next-token labels ``[B, T]``, last prompt position ``[B]``.

    Labels are ``IGNORE`` outside the answer.
    """
    width = max(len(e.prompt) + len(e.answer) - 1 for e in examples)
    index = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORE)
    for row, one in enumerate(examples):
        tokens, prompt = one.prompt + one.answer, len(one.prompt)
        index[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, prompt - 1 : len(tokens) - 1] = torch.tensor(one.answer)
    index = torch.where(index < 0, first_soft_row - 1 - index, index)
    return index, labels, torch.tensor([len(one.prompt) - 1 for one in examples])


def moved(batch: _Batch, device: torch.device) -> _Batch:
    """The same batch with its tensors on ``device``."""
    if device.type == "cpu":
        return batch
    changes: dict[str, Tensor | GraphBatch] = {}
    for one in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, one.name)
        if isinstance(value, Tensor):
            changes[one.name] = value.to(device)
        elif isinstance(value, GraphBatch):
            changes[one.name] = moved(value, device)
    return replace(batch, **changes)  # type: ignore[type-var]
