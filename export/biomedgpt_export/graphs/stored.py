"""Reads back what a graph file holds: the weights that an engine will compute with, not those that went in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from biomedgpt_edge.onnx_header import INT4_MATRICES, INT8_INPUTS
from biomedgpt_edge.tensor_names import INT8_RECORDS, INT8_VALUES, SCALES, layer_names

from ..errors import ModelConfigError
from ..quantize.int4 import Int4Weight
from ..quantize.int8 import Int8Weight
from ..quantize.int8_groups import Int8GroupWeight
from .records import unpacked, unpacked_int8

ALL_ROWS = slice(None)
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Place:
    """The matrix [N, K] whose panels are the ``turn``-th of several in a tensor."""

    records: str
    turn: int
    N: int
    K: int


class StoredWeights:
    """The tensors of a saved graph, by name."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        model = onnx.load(str(path), load_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._in_groups = {
            node.input[1]: {attribute.name: attribute.i for attribute in node.attribute}
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
        }
        self._in_records = {
            name: _Place(node.input[1], turn, **{attribute.name: attribute.i for attribute in node.attribute})
            for node in model.graph.node
            if (node.domain, node.op_type) in INT4_MATRICES
            for turn, name in enumerate(layer_names(node.input[1]))
        }
        self._in_int8_records = {
            node.input[1].removesuffix(INT8_RECORDS): {attribute.name: attribute.i for attribute in node.attribute}
            for node in model.graph.node
            if (node.domain, node.op_type) in INT8_INPUTS
        }

    def linear(self, name: str, rows: slice = ALL_ROWS) -> torch.Tensor:
        """The matrix of the linear layer ``name``, or ``rows`` of it, float32 ``[N, K]``, dequantized if need be."""
        if f"{name}.weight" in self._tensors:
            return torch.from_numpy(self.array(f"{name}.weight").T[rows].astype(np.float32))
        return self._quantized(name, rows).dequantize()

    def step(self, name: str, rows: slice = ALL_ROWS) -> torch.Tensor:
        """Distance of neighbouring stored values around each weight of these rows, float32 ``[N, K]``."""
        if f"{name}.weight" in self._tensors:
            return torch.from_numpy(np.spacing(np.abs(self.array(f"{name}.weight").T[rows])).astype(np.float32))
        return self._quantized(name, rows).steps()

    def int4(self, name: str, rows: slice = ALL_ROWS) -> Int4Weight:
        """These rows of the linear layer ``name``, which is stored in int4."""
        order = torch.from_numpy(self.array(f"{name}.order").copy()) if f"{name}.order" in self._tensors else None
        if name in self._in_records:
            whole = self._unpacked(self._in_records[name])
            return replace(whole, packed=whole.packed[rows], scales=whole.scales[rows], order=order)
        packed, scales, columns, group_size = self._groups(f"{name}.weight_int4", name, rows)
        zero_points, count = None, self._in_groups[f"{name}.weight_int4"]["N"]
        if f"{name}.zero_points" in self._tensors:
            zero_points = self._by_row(f"{name}.zero_points", count, rows)
        return Int4Weight(packed, scales, columns, group_size, zero_points, order)

    def int8(self, name: str) -> bool:
        """Whether the linear layer ``name`` is stored in int8."""
        return name + INT8_VALUES in self._tensors or name in self._in_int8_records

    def int8_weight(self, name: str) -> Int8Weight:
        """The linear layer ``name``, which is stored in int8 with one scale per output."""
        if name in self._in_int8_records:
            return self.int8_records(name)[0]
        values, scales = self.array(name + INT8_VALUES).T, self.array(name + SCALES)
        return Int8Weight(torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(scales.copy()))

    def int8_records(self, name: str) -> tuple[Int8Weight, npt.NDArray[np.float32]]:
        """The linear layer ``name``, which lies in records of int8, and its bias, float32 ``[N]``."""
        sizes = self._in_int8_records[name]
        return unpacked_int8(self.array(name + INT8_RECORDS), sizes["N"], sizes["K"])

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor ``name`` as it is stored, mapped where it lies outside the graph file."""
        tensor = self._tensors[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inline: npt.NDArray[Any] = np.frombuffer(tensor.raw_data, dtype).reshape(tensor.dims)
            return inline
        place = {entry.key: entry.value for entry in tensor.external_data}
        path, offset = self._folder / place["location"], int(place["offset"])
        mapped: npt.NDArray[Any] = np.memmap(path, dtype, "r", offset=offset, shape=tuple(tensor.dims))
        return mapped

    def require_half_range(self, graph: str) -> None:
        """Whether every float32 tensor has a finite float16 counterpart, for graphs whose activations are float16.

        Raises:
            ModelConfigError: one has not; named, with the graph.
        """
        for name, tensor in self._tensors.items():
            if tensor.data_type == onnx.TensorProto.FLOAT and np.abs(self.array(name)).max(initial=0) > _LARGEST_HALF:
                raise ModelConfigError(
                    f"{name} of {graph} holds values beyond float16.", seen=name, limit=_LARGEST_HALF
                )

    def lies_inside(self, name: str) -> bool:
        """Whether the tensor ``name`` lies in the graph file itself."""
        return bool(self._tensors[name].data_location != onnx.TensorProto.EXTERNAL)

    def _unpacked(self, place: _Place) -> Int4Weight:
        return unpacked(self.array(place.records)[place.turn :: len(layer_names(place.records))], place.N, place.K)

    def _quantized(self, name: str, rows: slice) -> Int4Weight | Int8Weight | Int8GroupWeight:
        if not self.int8(name):
            return self.int4(name, rows)
        if name + INT8_VALUES in self._in_groups:
            return Int8GroupWeight(*self._groups(name + INT8_VALUES, name, rows))
        whole = self.int8_weight(name)
        return Int8Weight(whole.values[rows], whole.scales[rows])

    def _groups(self, packed_name: str, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Packed values, their scales, columns and group size."""
        attributes = self._in_groups[packed_name]
        packed = torch.from_numpy(self.array(packed_name)[rows].copy())
        scales = self._by_row(name + SCALES, attributes["N"], rows)
        return packed, scales, attributes["K"], attributes["block_size"]

    def _by_row(self, name: str, count: int, rows: slice) -> torch.Tensor:
        """What is stored flat for ``count`` rows, of some of them."""
        return torch.from_numpy(self.array(name).reshape(count, -1)[rows].copy())
