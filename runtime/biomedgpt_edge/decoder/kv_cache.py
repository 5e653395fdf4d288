"""How the keys and values of a layer lie in memory: an array for each, which the graph appends to in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..manifest import RECORDS, DecoderSpec

KvElement = Literal["fp32", "fp16", "int8"]
KV_ELEMENTS: tuple[KvElement, ...] = get_args(KvElement)
# Of csrc/attention: positions of a block, whose elements, of one kind of the above, and scales have so many bytes.
BLOCK = 16
_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_SCALE_BYTES = {"fp32": 0, "fp16": 0, "int8": 4}

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class KvLayout:
    """Arrays ``[*leading, kv_heads, entries, width]``, one for the keys of each layer and one for its values.

    Attributes:
        element: what a number of the cache is stored as.
        positions_per_entry: so many positions make one entry.
        leading: further dimensions that the graph wants, each 1.
    """

    element: KvElement
    dtype: np.dtype[Any]
    layers: int
    kv_heads: int
    positions_per_entry: int
    width: int
    leading: tuple[int, ...] = ()

    @classmethod
    def rows(cls, spec: DecoderSpec) -> KvLayout:
        """A row of float32 for each position, as GroupQueryAttention has it."""
        return cls("fp32", np.dtype(np.float32), spec.layers, spec.kv_heads, 1, spec.head_size, (1,))

    @classmethod
    def half_rows(cls, spec: DecoderSpec) -> KvLayout:
        """The same in float16, for GPUs."""
        return cls("fp16", np.dtype(np.float16), spec.layers, spec.kv_heads, 1, spec.head_size, (1,))

    @classmethod
    def blocks(cls, spec: DecoderSpec, element: KvElement) -> KvLayout:
        """Blocks of 16 positions, as bytes; see csrc/attention/attention.h."""
        width = BLOCK * (spec.head_size * _ELEMENT_BYTES[element] + _SCALE_BYTES[element])
        return cls(element, np.dtype(np.uint8), spec.layers, spec.kv_heads, BLOCK, width)

    @property
    def in_blocks(self) -> bool:
        """Whether it is made of blocks, and not of rows."""
        return self.positions_per_entry == BLOCK

    @property
    def names(self) -> list[str]:
        """Of the arrays, in the order in which they are stacked: keys and values of layer 0, of layer 1, ..."""
        return [f"{part}.{layer}" for layer in range(self.layers) for part in ("key", "value")]

    @property
    def bytes_per_position(self) -> int:
        """Of all layers."""
        return 2 * self.layers * self.kv_heads * self.width * self.dtype.itemsize // self.positions_per_entry

    def entries(self, positions: int) -> int:
        """That hold so many positions."""
        return -(-positions // self.positions_per_entry)

    def shape(self, positions: int) -> tuple[int, ...]:
        """Of one array with room for so many positions."""
        return (*self.leading, self.kv_heads, self.entries(positions), self.width)

    def stacked(self, positions: int) -> tuple[int, ...]:
        """Of the arrays of all layers together, without the leading dimensions: ``[2 * layers, kv_heads, ...]``."""
        return (2 * self.layers, *self.shape(positions)[len(self.leading) :])

    def bytes(self, positions: int) -> int:
        """That the cache of so many positions takes."""
        return math.prod(self.stacked(positions)) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class KeyValues:
    """A copy of the KV cache of the first ``positions`` positions.

    Attributes:
        array: as :meth:`KvLayout.stacked` says. What a last block has beyond the positions means nothing.
    """

    positions: int
    array: Values


def kv_layout(spec: DecoderSpec, layout: str, element: KvElement | None) -> KvLayout:
    """How the KV cache of a decoder lies in memory, by the layout of its graph.

    Args:
        element: None is fp16 in records, which models in fp16 lose nothing by, and fp32 where it is portable.

    Raises:
        OptionError: there is no such element type, or the cache of this graph cannot be stored so.
    """
    if element not in (None, *KV_ELEMENTS):
        raise OptionError(
            f"kv_cache is {str(element)[:40]!r}.",
            seen=str(element)[:40],
            remedy=f"Give one of {', '.join(KV_ELEMENTS)}.",
        )
    if layout == RECORDS:
        return KvLayout.blocks(spec, element or "fp16")
    if element not in (None, "fp32"):
        raise OptionError(
            f"kv_cache is {element!r}, and the decoder is portable.",
            seen=element,
            limit="portable decoders store keys and values in fp32",
            remedy="Leave it out, or use a decoder in records (a bundle that has one, and not --decoder portable).",
        )
    return KvLayout.rows(spec)
