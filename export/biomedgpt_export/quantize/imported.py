"""Weights that a GPTQ checkpoint brings along: stored as they are, not quantized again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import GptqCheckpoint, GptqWeight
from ..errors import CheckpointError
from .int4 import (
    GROUP_SIZES,
    ZERO_POINT,
    Int4Weight,
    WeightQuantizer,
    group_bytes,
    group_size_for,
    pack_nibbles,
    same,
)

# Sizes in which a checkpoint's groups are stored: ours, and 16 for the groups that none of ours divides. ONNX Runtime's
# processor kernel knows 16 to 256 alone (matmul_nbits.cc), so longer groups become several with one scale in any case.
BLOCK_SIZES = (*GROUP_SIZES, 16)

Sources = Callable[[str], Sequence[str]]


def same_key(key: str) -> Sequence[str]:
    """For graphs whose linear layers have the names of the checkpoint."""
    return (key,)


class ImportedWeights:
    """Gives what the checkpoint has quantized, bit for bit, and leaves the rest to another quantizer.

    Args:
        checkpoint: the quantized checkpoint.
        otherwise: for the matrices that it holds as they are.
        sources: from the key of a linear layer to the checkpoint's keys of the matrices whose rows it stacks.

    Raises:
        CheckpointError: a group size fits none of the blocks in which a bundle stores groups.
    """

    def __init__(self, checkpoint: GptqCheckpoint, otherwise: WeightQuantizer, sources: Sources = same_key) -> None:
        self.name = f"imported gptq, {otherwise.name}"
        self._quantized = frozenset(checkpoint.quantized_keys())
        self._checkpoint = checkpoint
        self._otherwise = otherwise
        self._sources = sources
        for key in self._quantized:
            self._block_size(checkpoint.shape(key)[1])

    def stored_bytes(self, key: str, rows: int, columns: int) -> int:
        """What the linear layer ``key`` of that size takes with its scales, zero points and order."""
        keys = self._sources(key)
        if self._quantized.isdisjoint(keys):
            return group_bytes(rows, columns, group_size_for(columns), Int4Weight.bits)
        size = self._block_size(columns)
        zero_points = any(map(self._checkpoint.asymmetric, keys)) * rows * -(-columns // (2 * size))
        order = any(map(self._checkpoint.reordered, keys)) * columns * torch.int32.itemsize
        return group_bytes(rows, columns, size, Int4Weight.bits) + zero_points + order

    def _block_size(self, columns: int) -> int:
        return _block_size(columns, self._checkpoint.config.columns_per_group(columns))

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        """See :class:`WeightQuantizer`.

        Raises:
            CheckpointError: ``weight`` is not the matrix that the checkpoint holds, or the matrices of one layer do
                not go together.
        """
        keys = self._sources(key)
        found = [name for name in keys if name in self._quantized]
        if not found:
            return self._otherwise.quantize(key, weight)
        if len(found) < len(keys):
            raise _not_one_layer(key, keys, "only some of them are quantized")
        parts = [to_int4(part) for part in map(self._checkpoint.quantized, keys) if part is not None]
        stored = _stacked(key, keys, parts)
        # Folding a norm into a matrix, say, cannot be done to one that is quantized; nor may names be mixed up.
        if not torch.equal(stored.dequantize(), weight.float()):
            raise CheckpointError(
                f"the layer {key} needs another matrix than the one that the checkpoint has quantized "
                f"({', '.join(keys)}).",
                seen=list(keys),
                remedy="Nothing was written. Export the original weights, and report this.",
            )
        return stored


def to_int4(weight: GptqWeight) -> Int4Weight:
    """The same numbers in a bundle's layout.

    Columns in activation order are sorted by group, which the layer undoes on its input; a group longer than a block
    becomes several blocks with the same scale and zero point.

    Raises:
        CheckpointError: the group size fits no block.
    """
    order = None
    if not weight.trivial:
        moved, weight = weight.sorted()
        order = moved.int()
    rows, columns = weight.values.shape
    block = _block_size(columns, weight.group_size)
    group_of_block = torch.arange(-(-columns // block)) * block // weight.group_size
    scales, zeros = weight.scales[:, group_of_block], weight.zeros[:, group_of_block]
    # Columns beyond the width hold what stands for zero in their block.
    nibbles = zeros.repeat_interleave(block, dim=1)
    nibbles[:, :columns] = weight.values
    packed = pack_nibbles(nibbles).reshape(rows, -1, block // 2)
    zero_points = None if (zeros == ZERO_POINT).all() else _packed_zeros(zeros)
    return Int4Weight(packed, scales, columns, block, zero_points, order)


def _block_size(columns: int, group_size: int) -> int:
    if group_size >= columns:
        # All blocks share one scale, so that padding can do for any width.
        return group_size_for(columns)
    size = next((size for size in BLOCK_SIZES if group_size % size == 0), None)
    if size is None:
        raise CheckpointError(
            f"the checkpoint is quantized in groups of {group_size} columns.",
            seen=group_size,
            limit=f"multiples of {BLOCK_SIZES[-1]}",
            remedy="A bundle cannot hold such groups. Quantize again in groups of 128, or export the original weights.",
        )
    return size


def _packed_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, groups]`` -> uint8 ``[N, ceil(groups / 2)]``."""
    return pack_nibbles(torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2)))


def _stacked(key: str, keys: Sequence[str], parts: Sequence[Int4Weight]) -> Int4Weight:
    """One matrix of the rows of several over the same input."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any((part.columns, part.group_size) != (first.columns, first.group_size) for part in parts):
        raise _not_one_layer(key, keys, "their widths or groups differ")
    if not all(same(part.order, first.order) for part in parts):
        raise _not_one_layer(key, keys, "their activation orders differ")
    zero_points = None
    if any(part.zero_points is not None for part in parts):
        zero_points = torch.cat([_explicit_zero_points(part) for part in parts])
    packed, scales = torch.cat([part.packed for part in parts]), torch.cat([part.scales for part in parts])
    return Int4Weight(packed, scales, first.columns, first.group_size, zero_points, first.order)


def _explicit_zero_points(weight: Int4Weight) -> torch.Tensor:
    if weight.zero_points is not None:
        return weight.zero_points
    return _packed_zeros(torch.full(weight.scales.shape, ZERO_POINT, dtype=torch.uint8))


def _not_one_layer(key: str, keys: Sequence[str], why: str) -> CheckpointError:
    return CheckpointError(
        f"the layer {key} computes with {', '.join(keys)} as one matrix, and {why}.",
        seen=list(keys),
        remedy="Quantize them alike, with desc_act = false or static_groups = true, or export the original weights.",
    )
