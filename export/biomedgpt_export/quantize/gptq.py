"""GPTQ: int4 values that keep what a layer computes, not each of its weights, close to the original.

Frantar et al. 2022 (arXiv:2210.17323). Columns are rounded one after another, and what rounding got wrong is made up
for by the columns that are still free. With E the error of the weights ``[N, K]`` and H the mean of x x^T over
the activations x of calibration, the error of the layer's output is the trace of E H E^T.

The paper factorizes the inverse of H. Here H = R R^T with R upper triangular, from one Cholesky factorization of H with
its rows and columns reversed: the paper's factor is the inverse of R, of which only blocks on the diagonal are needed.
That is a quarter of the arithmetic, inverts nothing large, and gives the same values (Chee et al. 2023,
arXiv:2307.13304, prove the equivalence).

Rows do not influence each other. Matrices that read the same activations can be stacked and share the factorization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..device import moved, returned
from ..errors import CalibrationError, QuantizationError
from ..finite import is_finite
from .int4 import GROUP_SIZES, Int4Weight, chosen_group_size, grouped, nearest_levels, pack, widest_scales

Order = Literal["group-aware", "none"]
ORDERS: tuple[Order, ...] = ("group-aware", "none")

# At this multiple of the mean diagonal, damping has buried what the activations say about most columns.
MAX_DAMPING = 1.0

# Scales that the search tries, as multiples of the one that represents the largest magnitude as -8. The negative ones
# represent it as 7, where they do not cut it off.
_SHRINKS = tuple(1 - step / 20 for step in range(11))
_TRIALS = (*_SHRINKS, *(-8 / 7 * shrink for shrink in _SHRINKS))


class Hessian:
    """Mean of x x^T over the activations of one layer; the constant 2 of the paper changes nothing and is left out.

    Attributes:
        layer: for error messages.
        mean: float32 ``[K, K]``. A mean, because a sum grows with the samples until float32 cannot hold it.
        samples: activation vectors so far.
    """

    def __init__(self, layer: str, columns: int, device: torch.device | str = "cpu") -> None:
        self.layer = layer
        self.mean = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.samples = 0

    def add(self, activations: torch.Tensor) -> None:
        """Takes in ``activations`` of any floating dtype, ``[..., K]``."""
        columns = self.mean.shape[0]
        if not activations.is_floating_point() or activations.ndim == 0 or activations.shape[-1] != columns:
            raise CalibrationError(
                f"layer '{self.layer}' was given activations {list(activations.shape)} of {activations.dtype}.",
                seen=str(list(activations.shape)),
                limit=columns,
                remedy=f"Floating-point activations of width {columns} are needed.",
            )
        rows = moved(activations.detach().reshape(-1, columns), self.mean.device)
        if rows.shape[0] == 0:
            return
        # NaN, infinity and values whose products overflow all show in the squares: |xy| is at most the larger square.
        wrong = ~rows.square().sum(0).isfinite()
        if wrong.any():
            raise CalibrationError(
                f"{int(wrong.sum())} of {columns} channels that enter layer '{self.layer}' hold NaN, infinity or "
                "values whose squares overflow float32.",
                seen=self.layer,
                limit="about 1e19",
                remedy="Run calibration in float32 or bfloat16; if that does not help, the checkpoint is damaged.",
            )
        total = self.samples + rows.shape[0]
        self.mean.addmm_(rows.T, rows, beta=self.samples / total, alpha=1 / total)
        self.samples = total

    def merge(self, other: Hessian) -> None:
        """Takes in what ``other`` has seen: afterwards this is the mean over the samples of both."""
        if other.mean.shape != self.mean.shape:
            raise CalibrationError(
                f"layers '{self.layer}' and '{other.layer}' are {self.mean.shape[0]} and {other.mean.shape[0]} wide.",
                seen=other.mean.shape[0],
                limit=self.mean.shape[0],
                remedy="Only records of the same layer can be merged.",
            )
        total = self.samples + other.samples
        if total:
            self.mean.lerp_(other.mean.to(self.mean.device), other.samples / total)
        self.samples = total

    def state(self) -> dict[str, torch.Tensor]:
        """``mean`` float32 ``[K, K]``, not a copy, and ``samples`` int64 ``[]``; to be saved."""
        return {"mean": self.mean, "samples": torch.tensor(self.samples)}

    @classmethod
    def from_state(cls, layer: str, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> Hessian:
        """The inverse of :meth:`state`; ``state`` may come from a file and is not trusted."""
        mean, samples = state.get("mean"), state.get("samples")
        if (
            mean is None
            or samples is None
            or mean.dtype != torch.float32
            or mean.ndim != 2
            or mean.shape[0] != mean.shape[1]
            or samples.dtype != torch.int64
            or samples.ndim != 0
            or samples < 0
            or not mean.isfinite().all()
            or (mean.diagonal() < 0).any()
        ):
            raise CalibrationError(
                f"the record of layer '{layer}' is not one that calibration writes.",
                seen=layer,
                limit="mean: finite float32 [K, K], diagonal not negative; samples: int64, not negative",
                remedy="Run calibration again.",
            )
        hessian = cls(layer, mean.shape[0], device)
        hessian.mean.copy_(mean)
        hessian.samples = int(samples)
        return hessian


@dataclass(frozen=True)
class GptqOptions:
    """How the values are chosen.

    Attributes:
        group_size: columns that share a scale; None takes the largest that divides the width.
        damping: added to the diagonal of H, as a multiple of its mean; raised tenfold where H stays singular.
        block: columns whose errors reach the columns behind them in one product; rounded up to whole groups. It
            changes the speed; results differ by float rounding alone.
        order: ``group-aware`` takes groups by their most important column, and columns by importance inside their
            group, so that none leaves the group it is stored in and the runtime needs no permutation (Gafni et al.
            2025, arXiv:2505.14638). ``none`` takes columns from left to right.
        scale_search: try smaller scales and the other sign instead of always representing the largest magnitude.
    """

    group_size: int | None = None
    damping: float = 0.01
    block: int = 128
    order: Order = "group-aware"
    scale_search: bool = True

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise QuantizationError(f"group_size is {self.group_size}.", seen=self.group_size, limit=str(GROUP_SIZES))
        if not 0 < self.damping <= MAX_DAMPING:
            raise QuantizationError(
                f"damping is {self.damping}.", seen=self.damping, limit=f"above 0, at most {MAX_DAMPING}"
            )
        if self.block < 1:
            raise QuantizationError(f"block is {self.block}.", seen=self.block, limit="at least 1")
        if self.order not in ORDERS:
            raise QuantizationError(f"order is {self.order!r}.", seen=self.order, limit=str(ORDERS))


DEFAULTS = GptqOptions()


@dataclass(frozen=True)
class GptqResult:
    """A quantized matrix and what became of it.

    Attributes:
        weight: on the CPU.
        loss: the layer's squared output error over its squared output, both summed over the calibration activations:
            trace(E H E^T) / trace(W H W^T), H without damping. 0 is exact, 1 is no better than storing zeros. 0 where
            the output is zero.
        damping: as used, a multiple of the mean of H's diagonal.
        dead: columns whose activation was zero in all of calibration; their weights are stored as zero.
    """

    weight: Int4Weight
    loss: float
    damping: float
    dead: tuple[int, ...]


def gptq(weight: torch.Tensor, hessian: Hessian, options: GptqOptions = DEFAULTS, *, key: str = "") -> GptqResult:
    """Quantizes ``weight`` of any floating dtype, ``[N, K]``, on the device of ``hessian``, in float32.

    The same input gives the same bytes on the same device with the same number of threads.

    Args:
        key: what errors call the matrix; the Hessian's layer where it is not given.

    Raises:
        QuantizationError: the matrix does not fit the Hessian, the group size or float16 scales, or holds NaN or
            infinity.
        CalibrationError: the Hessian has seen nothing but zeros, or is singular whatever the damping.
    """
    key = key or hessian.layer
    _check(key, weight, hessian)
    width = weight.shape[1]
    group_size = chosen_group_size(key, width, options.group_size)
    matrix, order = _ordered(hessian.mean, group_size, options.order)
    # Padding is a column whose activation is always zero.
    dead = matrix.diagonal() == 0
    root, damping = _factorized(matrix, dead, options.damping, hessian.layer)
    columns = grouped(moved(weight.detach(), matrix.device), group_size).flatten(1).T[order]
    columns[dead] = 0
    levels, scales, loss = _chosen(columns, root, damping, group_size, options)
    if not is_finite(scales):
        raise QuantizationError(
            f"tensor '{key}' holds values up to {float(weight.abs().max()):.3g}, too large for scales in float16.",
            seen=key,
            limit="about 5e5",
            remedy="Keep this matrix in fp16 or fp32, or check the checkpoint: trained weights are far smaller.",
        )
    silent = tuple(sorted(column for column in order[dead].tolist() if column < width))
    return GptqResult(_stored(levels, scales, order, width), loss, damping, silent)


def _check(key: str, weight: torch.Tensor, hessian: Hessian) -> None:
    columns = hessian.mean.shape[0]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != columns or not weight.is_floating_point():
        raise QuantizationError(
            f"tensor '{key}' is {list(weight.shape)} of {weight.dtype}; layer '{hessian.layer}' is {columns} wide.",
            seen=str(list(weight.shape)),
            limit=columns,
            remedy="A floating-point matrix [N, K] is needed, and the record of the layer that it belongs to.",
        )
    if not is_finite(weight):
        raise QuantizationError(
            f"tensor '{key}' holds NaN or infinity.", seen=key, remedy="Download or save the checkpoint again."
        )
    if hessian.samples == 0 or not hessian.mean.diagonal().any():
        raise CalibrationError(
            f"layer '{hessian.layer}' has seen {hessian.samples} activations, and none but zeros.",
            seen=hessian.layer,
            remedy="Calibrate with data that reaches the layer, or round its weights to nearest.",
        )


def _ordered(mean: torch.Tensor, group_size: int, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """H float32 ``[P, P]``, padded to whole groups and permuted, and the permutation: position -> stored column."""
    padding = -mean.shape[0] % group_size
    matrix = torch.nn.functional.pad(mean, (0, padding, 0, padding))
    stored = torch.arange(matrix.shape[0], device=matrix.device).view(-1, group_size)
    if order == "group-aware":
        importance = matrix.diagonal().view(-1, group_size)
        inside = importance.argsort(dim=1, descending=True, stable=True)
        groups = importance.amax(1).argsort(descending=True, stable=True)
        stored = stored.gather(1, inside)[groups]
    permutation = stored.flatten()
    return matrix[permutation][:, permutation], permutation


def _factorized(matrix: torch.Tensor, dead: torch.Tensor, damping: float, layer: str) -> tuple[torch.Tensor, float]:
    """R float32 upper triangular ``[P, P]`` with R R^T = H / m + damping, m the mean of H's diagonal; and the damping.

    Float32 is enough: what a Cholesky factorization loses is relative to the diagonal of each row and column, so a
    channel of large activations does not spoil the others. With damping 0.01, float64 gave the same losses to six
    digits and took half as long again.
    """
    matrix /= matrix.diagonal()[~dead].mean(dtype=torch.float64)
    matrix.diagonal()[dead] = 1
    while damping <= MAX_DAMPING:
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower.flip(0, 1), damping
        damping *= 10
    raise CalibrationError(
        f"the activations' second moments at layer '{layer}' are not positive definite.",
        seen=layer,
        limit=f"damping up to {MAX_DAMPING} of the mean diagonal",
        remedy="Run calibration again: no activations give such a record.",
    )


def _chosen(
    columns: torch.Tensor, root: torch.Tensor, damping: float, group_size: int, options: GptqOptions
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rounds ``columns`` float32 ``[P, N]`` in their order; R is ``root``.

    Returns:
        Levels int8 ``[P, N]``, scales float16 ``[P / group_size, N]``, and the loss of :class:`GptqResult`.
    """
    levels = torch.empty_like(columns, dtype=torch.int8)
    scales = torch.empty(columns.shape[0] // group_size, columns.shape[1], dtype=torch.float16, device=columns.device)
    errors = torch.zeros_like(columns)
    lost, whole = 0.0, 0.0
    step = -(-options.block // group_size) * group_size
    for start in range(0, columns.shape[0], step):
        stop = min(start + step, columns.shape[0])
        span, groups = slice(start, stop), slice(start // group_size, stop // group_size)
        corner = root[span, span]
        identity = torch.eye(stop - start, dtype=corner.dtype, device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        # What earlier columns got wrong, as this block feels it, and the weights that make up for it.
        pull = root[:start, span].T @ errors[:start]
        current = columns[span] + inverse.T @ pull
        levels[span], scales[groups] = _block(current, inverse, group_size, search=options.scale_search)
        errors[span] = columns[span] - levels[span] * scales[groups].float().repeat_interleave(group_size, 0)
        lost += _energy(pull + corner.T @ errors[span])
        whole += _energy(root[:stop, span].T @ columns[:stop])
    # With E in ``errors``, the trace of E (H + damping) E^T is the energy of E R.
    lost, whole = lost - damping * _energy(errors), whole - damping * _energy(columns)
    return levels, scales, max(0.0, lost / whole) if whole > 0 else 0.0


def _block(
    current: torch.Tensor, inverse: torch.Tensor, group_size: int, *, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds one block; ``current`` float32 ``[B, N]`` is overwritten, ``inverse`` ``[B, B]`` is the paper's factor.

    Returns:
        Levels float32 ``[B, N]`` and scales float16 ``[B / group_size, N]``.
    """
    levels = torch.empty_like(current)
    scales: list[torch.Tensor] = []
    for column in range(current.shape[0]):
        if column % group_size == 0:
            # The whole group as it is now: errors inside it move it little, and its first column needs the scale.
            ahead = slice(column, column + group_size)
            groups = current[ahead].T
            cost = inverse.diagonal()[ahead].pow(-2)
            scales.append(_cheapest_scales(groups, cost) if search else widest_scales(groups))
        levels[column] = nearest_levels(current[column], scales[-1])
        miss = (current[column] - levels[column] * scales[-1]) / inverse[column, column]
        current[column:].addr_(inverse[column, column:], miss, alpha=-1)
    return levels, torch.stack(scales)


def _cheapest_scales(groups: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """float16 ``[N]``: of several scales of each group, the one with the least squared error, weighted by ``cost``.

    Args:
        groups: float32 ``[N, group_size]``.
        cost: float32 ``[group_size]``, what GPTQ pays for an error: the part of H_jj that later columns cannot make up.
    """
    widest = widest_scales(groups)
    best, least = widest, torch.full_like(widest, torch.inf, dtype=torch.float32)
    for multiple in _TRIALS:
        scales = (widest.float() * multiple).half()
        levels = nearest_levels(groups, scales.unsqueeze(-1))
        paid = (groups - levels * scales.unsqueeze(-1)).square() @ cost
        best, least = torch.where(paid < least, scales, best), torch.minimum(paid, least)
    return best


def _energy(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _stored(levels: torch.Tensor, scales: torch.Tensor, order: torch.Tensor, width: int) -> Int4Weight:
    """Brings ``levels`` ``[P, N]`` and ``scales`` ``[groups, N]`` back to the columns' own places, and packs them."""
    group_size = len(order) // len(scales)
    in_place, scales_in_place = torch.empty_like(levels), torch.empty_like(scales)
    in_place[order] = levels
    scales_in_place[order[::group_size] // group_size] = scales
    packed = pack(in_place.T.contiguous().view(levels.shape[1], -1, group_size))
    return Int4Weight(returned(packed), returned(scales_in_place.T.contiguous()), width, group_size)
