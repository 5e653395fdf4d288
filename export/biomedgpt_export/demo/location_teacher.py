"""A classical predictor of a protein's location, for the demo's small encoder to learn from.

Four thousand labelled proteins are too few for a transformer to find out what sorts proteins in a cell. Kernel ridge
regression on hand-made features of the sequence (composition of the whole and of both ends, pairs of residues,
hydrophobic and charged windows: what signal peptides, transit peptides, membrane helices and nuclear signals look like)
does it with fewer. Its calibrated probabilities, of altered sequences and of proteins without a label too, are what
the encoder is trained on beside the labels. Of a labelled protein they come from a regression that has not seen its
group of similar sequences, of a chimera from one that has not seen the group of its beginning. It is not part of the
bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from biomedgpt_edge.protein_tokens import MAX_RESIDUES, STANDARD_RESIDUES

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

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

GROUPS = 8
_CLIP, _KERNEL_WIDTH, _RIDGE, _PAIR_WEIGHT, _TAIL_WEIGHT = 5.0, 0.6, 0.2, 0.6, 0.7
# Keeps the kernel between sequences and known ones small.
_ROWS_AT_ONCE = 512
# Squared-weight pull of the calibration towards its start, that of sharpening alone.
_SHARPEN, _PULL = 6.0, 1e-3


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


class LocationTeacher:
    """Kernel ridge regression, calibrated on what it says of groups that it has not seen.

    Args:
        sequences: labelled proteins.
        labels: class of each.
        groups: a number below ``GROUPS`` for each; similar sequences share one.
        classes: number of classes.
    """

    def __init__(self, sequences: Sequence[str], labels: Sequence[int], groups: Sequence[int], classes: int) -> None:
        found = features(sequences)
        self._mean, self._deviation = found.mean(0), found.std(0) + 1e-6
        self._known = self._prepared(found)
        kernel = self._kernel(self._known).double()
        wanted = F.one_hot(torch.tensor(labels), classes).double()
        self._prior = wanted.mean(0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + _RIDGE * torch.eye(len(kernel)).double()))
        whole = inverse @ (wanted - self._prior)
        unseen = torch.zeros_like(wanted)
        self._coefficients: list[Tensor] = []
        for group in range(GROUPS):
            rows = torch.tensor([i for i, g in enumerate(groups) if g == group], dtype=torch.long)
            without = _without(inverse, whole, rows)
            unseen[rows] = kernel[rows] @ without + self._prior
            self._coefficients.append(without)
        self._coefficients.append(whole)
        self._calibration = _calibrated(unseen, torch.tensor(labels))

    def probabilities(self, sequences: Sequence[str], groups: Sequence[int]) -> tuple[F32, F32]:
        """Locations ``[sequences, classes]``, and the features the encoder is to predict, standardised.

        ``groups`` says which group's regression is asked, that is, which one must not have seen the sequence;
        ``GROUPS`` asks the one that has seen all.
        """
        found = features(sequences)
        prepared = self._prepared(found)
        scores = torch.empty(len(sequences), len(self._prior), dtype=torch.float64)
        for group in set(groups):
            for rows in torch.tensor([i for i, g in enumerate(groups) if g == group]).split(_ROWS_AT_ONCE):
                scores[rows] = self._kernel(prepared[rows]).double() @ self._coefficients[group] + self._prior
        learnt = ((found - self._mean) / self._deviation)[:, _LEARNT].clip(-_CLIP, _CLIP)
        places: F32 = (_with_one(scores) @ self._calibration.T).softmax(1).float().numpy()
        return places, learnt

    def _prepared(self, found: F32) -> Tensor:
        standard = ((found - self._mean) / self._deviation).clip(-_CLIP, _CLIP)
        return torch.from_numpy(standard * _WEIGHTS)

    def _kernel(self, prepared: Tensor) -> Tensor:
        scale = _KERNEL_WIDTH / float((_WEIGHTS**2).sum())
        kernel: Tensor = torch.exp(-scale * torch.cdist(prepared, self._known).square())
        return kernel


def _without(inverse: Tensor, whole: Tensor, rows: Tensor) -> Tensor:
    """Coefficients of the ridge regression without some rows, in closed form from those with all."""
    if not len(rows):
        return whole
    left: Tensor = whole - inverse[:, rows] @ torch.linalg.solve(inverse[rows][:, rows], whole[rows])
    left[rows] = 0
    return left


def _with_one(scores: Tensor) -> Tensor:
    return torch.cat([scores, torch.ones(len(scores), 1, dtype=scores.dtype)], 1)


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
