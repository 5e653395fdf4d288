"""A classical predictor of a protein's location and structure, for the demo's small encoder to learn from.

Some thousand labelled proteins are too few for a transformer to find out what sorts proteins in a cell, or what folds
them into helices and strands. Kernel ridge regression on hand-made features of the sequence (composition of the whole
and of both ends, pairs of residues, hydrophobic and charged windows: what signal peptides, transit peptides, membrane
helices and nuclear signals look like) does it with fewer. What it says of altered sequences, and of proteins without a
label too, is what the encoder is trained on beside the labels. Of a labelled protein it comes from a regression that
has not seen its group of similar sequences, of a chimera from one that has not seen the group of its beginning. It is
not part of the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from biomedgpt_edge.protein_tokens import MAX_RESIDUES, STANDARD_RESIDUES

from .answers import LOCATIONS, MEMBRANE
from .data import order
from .proteins import GROUPS, ProteinRecord

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

PLACES = tuple(LOCATIONS)
MEMBRANE_LABELS = "".join(MEMBRANE)
AMINO_ACIDS = "".join(sorted(STANDARD_RESIDUES))
_UNKNOWN = len(AMINO_ACIDS)
_INDEX = np.full(256, _UNKNOWN, np.int64)
_INDEX[[ord(letter) for letter in AMINO_ACIDS]] = np.arange(len(AMINO_ACIDS))
# Kyte and Doolittle's hydropathy, in the order of AMINO_ACIDS; zero for unknown residues.
_HYDROPATHY = np.array(
    [1.8, 2.5, -3.5, -3.5, 2.8, -0.4, -3.2, 4.5, -3.9, 3.8, 1.9, -3.5, -1.6, -3.5, -4.5, -0.8, -0.7, 4.2, -0.9, -1.3, 0]
)
_CLASSES = ("AGV", "ILMC", "FWY", "STNQ", "DE", "KR", "H", "P")
_CLASS_OF = np.array([next((i for i, c in enumerate(_CLASSES) if a in c), 0) for a in AMINO_ACIDS] + [0])
_GAPS = (2, 3, 4)

_CLIP, _KERNEL_WIDTH, _RIDGE, _PAIR_WEIGHT, _TAIL_WEIGHT = 5.0, 0.6, 0.2, 0.6, 0.7
# Keeps the kernel between sequences and known ones small.
_ROWS_AT_ONCE = 512
# Squared-weight pull of the calibration towards its start, that of sharpening alone.
_SHARPEN, _PULL = 6.0, 1e-3
_MOST_STRUCTURED, _MOST_STRETCHED, _LEAST_SPREAD = 4500, 1.5, 1e-6


class Block(NamedTuple):
    """Some features: their values, their weight in the kernel, and whether the encoder is to predict them."""

    values: F64
    weight: float
    learnt: bool


def _composition(residues: I64) -> F64:
    counts: F64 = np.bincount(residues, minlength=_UNKNOWN + 1)[:_UNKNOWN] / max(1, len(residues))
    return counts


def _windows(values: F64, width: int) -> F64:
    """Means over all windows of ``width``, or over everything where that is shorter."""
    return np.convolve(values, np.ones(width) / width, "valid") if len(values) >= width else np.array([values.mean()])


def _densest(residues: I64, letters: str, width: int) -> float:
    """Largest share of some residues in a window."""
    return float(_windows(np.isin(residues, [AMINO_ACIDS.index(c) for c in letters]).astype(float), width).max())


def _physics(residues: I64) -> F64:
    """Hydrophobic stretches (membrane helices, signal peptides), charges, and residues that gather in linkers."""
    n = len(residues)
    water = _HYDROPATHY[residues]
    positive = np.isin(residues, [AMINO_ACIDS.index(c) for c in "KR"]).astype(float)
    charge = positive - np.isin(residues, [AMINO_ACIDS.index(c) for c in "DE"])
    helix, signal = _windows(water, 19), _windows(water[:40], 8)
    buried = helix > 1.6
    return np.array([
        helix.max(), buried.mean(), (buried[1:] & ~buried[:-1]).sum(), helix[:40].max(), helix[-30:].max(),
        helix[40:].max() if len(helix) > 40 else 0.0, signal.max(), signal.argmax(),
        charge.mean(), charge[:25].sum(), charge[:10].sum(), np.abs(charge).mean(), charge[-15:].sum(),
        _windows(charge, 15).max(), _windows(charge, 15).min(),
        _densest(residues, "KR", 6), _densest(residues, "KR", 20), _densest(residues, "DE", 10),
        (residues == AMINO_ACIDS.index("C")).mean() * n,
        _densest(residues, "P", 20), _densest(residues, "S", 20), _densest(residues, "Q", 20),
    ])  # fmt: skip


def _pairs(residues: I64) -> F64:
    """Square roots of the shares of neighbouring residues, and of classes of residues a few places apart."""
    n, size = len(residues), _UNKNOWN + 1
    next_to = np.bincount(residues[:-1] * size + residues[1:], minlength=size * size).reshape(size, size)
    classes = _CLASS_OF[residues]
    k = len(_CLASSES)
    apart = [np.bincount(classes[:-gap] * k + classes[gap:], minlength=k * k) for gap in _GAPS]
    pairs: F64 = np.sqrt(np.concatenate([next_to[:_UNKNOWN, :_UNKNOWN].ravel(), *apart]) / n)
    return pairs


def _tail(residues: I64) -> F64:
    """Which residues the last three are: peroxisomes and the endoplasmic reticulum read them."""
    hot = np.zeros((3, _UNKNOWN + 1))
    last = residues[-3:]
    hot[np.arange(len(last)), last] = 1
    return hot[:, :_UNKNOWN].ravel()


def blocks(sequence: str) -> list[Block]:
    """Features of the residues that the encoder reads."""
    residues = _INDEX[np.frombuffer(sequence[:MAX_RESIDUES].encode("ascii"), np.uint8)]
    n = len(residues)
    starts = np.concatenate([_composition(residues[:k]) for k in (10, 20, 40, 80)])
    ends = np.concatenate([_composition(residues[-k:]) for k in (3, 10)])
    return [
        Block(_composition(residues), 1.0, True),
        Block(np.array([np.log(n), n / 1000]), 1.0, True),
        Block(starts, 1.0, True),
        Block(ends, 1.0, False),
        Block(_composition(residues[-30:]), 1.0, True),
        Block(_composition(residues[n // 4 : 3 * n // 4]), 1.0, False),
        Block(_pairs(residues), _PAIR_WEIGHT, False),
        Block(_physics(residues), 1.0, True),
        Block(_tail(residues) * _TAIL_WEIGHT, 1.0, False),
    ]


def features(sequences: Sequence[str]) -> F32:
    """Features of each sequence, ``[sequences, features]``."""
    return np.stack([np.concatenate([b.values for b in blocks(s)]) for s in sequences]).astype(np.float32)


_LAYOUT = blocks("M" * 100)
_WEIGHTS = np.concatenate([np.full(len(b.values), b.weight) for b in _LAYOUT]).astype(np.float32)
_LEARNT = np.flatnonzero(np.concatenate([np.full(len(b.values), b.learnt) for b in _LAYOUT]))
LEARNT_FEATURES = len(_LEARNT)


class Ridge:
    """Kernel ridge regression that can leave out the groups that a sequence belongs to.

    Args:
        found: features of known proteins, ``[N, features]``.
        wanted: what to predict, ``[N, k]``.
        groups: a number below ``GROUPS`` for each; similar sequences share one.

    Attributes:
        unseen: what is said of each known protein by the regression without its group, ``[N, k]``.
    """

    def __init__(self, found: F32, wanted: Tensor, groups: Sequence[int]) -> None:
        self._mean, self._deviation = found.mean(0), found.std(0) + 1e-6
        self._known = self._prepared(found)
        kernel = self._kernel(self._known).double()
        self._prior = wanted.mean(0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + _RIDGE * torch.eye(len(kernel)).double()))
        whole = inverse @ (wanted - self._prior)
        self.unseen = torch.zeros_like(wanted)
        self._coefficients: list[Tensor] = []
        for group in range(GROUPS):
            rows = torch.tensor([i for i, g in enumerate(groups) if g == group], dtype=torch.long)
            without = _without(inverse, whole, rows)
            self.unseen[rows] = kernel[rows] @ without + self._prior
            self._coefficients.append(without)
        self._coefficients.append(whole)

    def predict(self, found: F32, groups: Sequence[int]) -> Tensor:
        """Predictions ``[sequences, k]``.

        ``groups`` says which group's regression is asked, that is, which one must not have seen the sequence;
        ``GROUPS`` asks the one that has seen all.
        """
        prepared = self._prepared(found)
        said = torch.empty(len(found), len(self._prior), dtype=torch.float64)
        for group in set(groups):
            for rows in torch.tensor([i for i, g in enumerate(groups) if g == group]).split(_ROWS_AT_ONCE):
                said[rows] = self._kernel(prepared[rows]).double() @ self._coefficients[group] + self._prior
        return said

    def standardised(self, found: F32) -> F32:
        """Features in standard deviations from the mean of the known proteins, clipped."""
        standard: F32 = ((found - self._mean) / self._deviation).clip(-_CLIP, _CLIP)
        return standard

    def _prepared(self, found: F32) -> Tensor:
        return torch.from_numpy(self.standardised(found) * _WEIGHTS)

    def _kernel(self, prepared: Tensor) -> Tensor:
        scale = _KERNEL_WIDTH / float((_WEIGHTS**2).sum())
        kernel: Tensor = torch.exp(-scale * torch.cdist(prepared, self._known).square())
        return kernel


@dataclass(frozen=True)
class Taught:
    """What the teacher says of some proteins.

    Attributes:
        places: probabilities of the locations, ``[N, len(PLACES)]``.
        membrane: probabilities of membrane and soluble proteins, ``[N, 2]``.
        shares: of helix and strand, ``[N, 2]``.
        learnt: features that the encoder is to predict, standardised, ``[N, LEARNT_FEATURES]``.
    """

    places: F32
    membrane: F32
    shares: F32
    learnt: F32


class ProteinTeacher:
    """Two regressions, calibrated on what they say of groups that they have not seen.

    Args:
        located: proteins with a location.
        structured: proteins with a structure; ``_MOST_STRUCTURED`` of them are used.
    """

    def __init__(self, located: Sequence[ProteinRecord], structured: Sequence[ProteinRecord]) -> None:
        places = torch.tensor([PLACES.index(record.location) for record in located])
        known = torch.tensor([record.membrane in MEMBRANE_LABELS for record in located])
        membrane = torch.tensor([MEMBRANE_LABELS.find(record.membrane) for record in located])[known]
        wanted = torch.zeros(len(located), 2, dtype=torch.float64)
        wanted[known] = F.one_hot(membrane, 2).double()
        wanted[~known] = wanted[known].mean(0)  # which pulls nowhere
        wanted = torch.cat([F.one_hot(places, len(PLACES)).double(), wanted], 1)
        self._located = Ridge(features([r.sequence for r in located]), wanted, [r.group for r in located])
        unseen = self._located.unseen
        self._places = _calibrated(unseen[:, : len(PLACES)], places)
        self._membrane = _calibrated(unseen[known, len(PLACES) :], membrane)

        # The kernel grows with the square of their number.
        structured = sorted(structured, key=lambda record: order(record.sequence))[:_MOST_STRUCTURED]
        shares = torch.tensor([record.shares for record in structured], dtype=torch.float64)
        self._structured = Ridge(features([r.sequence for r in structured]), shares, [r.group for r in structured])
        # Regressions say too little of the extremes, and a class is decided by how far a share is from the mean.
        self._mean = shares.mean(0)
        said = self._structured.unseen.std(0, correction=0).clamp(min=_LEAST_SPREAD)
        self._stretch = (shares.std(0, correction=0) / said).clamp(1.0, _MOST_STRETCHED)

    def teach(self, sequences: Sequence[str], groups: Sequence[int]) -> Taught:
        """What is said of each sequence by the regressions that have not seen its group; see ``Ridge.predict``."""
        found = features(sequences)
        located = self._located.predict(found, groups)
        shares = self._mean + self._stretch * (self._structured.predict(found, groups) - self._mean)
        return Taught(
            places=_probabilities(located[:, : len(PLACES)], self._places),
            membrane=_probabilities(located[:, len(PLACES) :], self._membrane),
            shares=shares.clamp(0, 1).float().numpy(),
            learnt=self._located.standardised(found)[:, _LEARNT],
        )


def _without(inverse: Tensor, whole: Tensor, rows: Tensor) -> Tensor:
    """Coefficients of the ridge regression without some rows, in closed form from those with all."""
    if not len(rows):
        return whole
    left: Tensor = whole - inverse[:, rows] @ torch.linalg.solve(inverse[rows][:, rows], whole[rows])
    left[rows] = 0
    return left


def _with_one(scores: Tensor) -> Tensor:
    return torch.cat([scores, torch.ones(len(scores), 1, dtype=scores.dtype)], 1)


def _probabilities(scores: Tensor, calibration: Tensor) -> F32:
    found: F32 = (_with_one(scores) @ calibration.T).softmax(1).float().numpy()
    return found


def _calibrated(scores: Tensor, labels: Tensor) -> Tensor:
    """Multinomial regression ``[classes, classes + 1]`` from scores to logits."""
    classes = scores.shape[1]
    start = _SHARPEN * torch.eye(classes, classes + 1, dtype=scores.dtype)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_with_one(scores) @ weights.T, labels)
        value = value + _PULL * (weights - start)[:, :-1].square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
