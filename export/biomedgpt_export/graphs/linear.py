"""Linear layers of a graph at the bundle's precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
import torch

from biomedgpt_edge.tensor_names import BIAS, INT8_VALUES, SCALES, VALUES, ZERO_POINTS

from ..quantize.int4 import Int4Weight, WeightQuantizer
from ..quantize.int8 import QMAX_PRODUCT, nearest_int8
from ..quantize.int8_groups import Int8GroupWeight, nearest_int8_groups
from .builder import CONTRIB, GraphBuilder
from .matrices import HEAD, Matrix, Weights

Precision = Literal["fp32", "fp16", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int4")
# Of the linear layers of one graph: int8 is for encoders, which multiply each weight by many rows at once.
GraphPrecision = Literal["fp32", "fp16", "int8", "int4"]
GRAPH_PRECISIONS: tuple[GraphPrecision, ...] = ("fp32", "fp16", "int8", "int4")
# Of the LM head of an int4 decoder, in groups either way.
HeadPrecision = Literal["int8", "int4"]
HEAD_PRECISIONS: tuple[HeadPrecision, ...] = ("int8", "int4")

# What MatMulNBits computes with on a CPU. int8 quantizes activations per block and runs 1.7 times as fast as fp32.
Activations = Literal["fp32", "int8"]
ACCURACY_LEVELS: dict[Activations, int] = {"fp32": 1, "int8": 4}


@dataclass
class Linears:
    """Emits linear layers and remembers what was stored.

    Attributes:
        precision: fp32 and fp16 store plain weights (computed in fp32 on a CPU either way), int8 stores one scale per
            output and quantizes activations, int4 stores groups.
        quantizer: chooses int4 values; needed for int4 only.
        activations: what layers in groups compute with.
        lm_head: how the head is stored where the precision is int4.
        group_sizes: group size -> number of weights quantized with it, for the manifest.
        padded: keys whose width no group size divides.
        asymmetric: keys of weights with zero points of their own.
        int8_group_size: of the head, once it was stored in int8.
    """

    precision: GraphPrecision
    quantizer: WeightQuantizer | None = None
    activations: Activations = "fp32"
    lm_head: HeadPrecision = "int4"
    group_sizes: dict[int, int] = field(default_factory=dict)
    padded: list[str] = field(default_factory=list)
    asymmetric: list[str] = field(default_factory=list)
    int8_group_size: int | None = None

    def emit(
        self,
        graph: GraphBuilder,
        source: str,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> str:
        """Adds ``source @ weight.T + bias`` for ``weight`` ``[N, K]``; returns the output's name."""
        if self.precision == "int4" and name == HEAD and self.lm_head == "int8":
            product = self._emit_int8_groups(graph, source, name, weight)
        elif self.precision == "int4":
            product = self._emit_int4(graph, source, name, weight)
        elif self.precision == "int8":
            product = _emit_int8(graph, source, name, weight)
        else:
            stored = graph.tensor(f"{name}.weight", self._plain(weight))
            if self.precision == "fp16":
                stored = graph.node("Cast", [stored], f"{name}.weight_fp32", to=onnx.TensorProto.FLOAT)
            product = graph.node("MatMul", [source, stored], f"{name}.product")
        if bias is None:
            return product
        return graph.node("Add", [product, graph.tensor(name + BIAS, bias.float().numpy())], f"{name}.sum")

    def emit_matrix(self, graph: GraphBuilder, source: str, matrix: Matrix, weights: Weights) -> str:
        """The same for a matrix that is found in a checkpoint."""
        return self.emit(graph, source, matrix.name, matrix.weight(weights), matrix.bias_vector(weights))

    def _plain(self, weight: torch.Tensor) -> np.ndarray:
        dtype = torch.float32 if self.precision == "fp32" else torch.float16
        array: np.ndarray = weight.to(dtype).T.contiguous().numpy()
        return array

    def _emit_int4(self, graph: GraphBuilder, source: str, name: str, weight: torch.Tensor) -> str:
        if self.quantizer is None:
            raise ValueError("int4 needs a quantizer")
        quantized = self.quantizer.quantize(name, weight)
        self._count(name, quantized)
        if quantized.order is not None:
            order = graph.tensor(f"{name}.order", quantized.order.numpy())
            source = graph.node("Gather", [source, order], f"{name}.reordered", axis=-1)
        return add_int4_product(graph, source, name, quantized, self.activations)

    def _emit_int8_groups(self, graph: GraphBuilder, source: str, name: str, weight: torch.Tensor) -> str:
        quantized = nearest_int8_groups(weight)
        self.int8_group_size = quantized.group_size
        if quantized.columns % quantized.group_size:
            self.padded.append(name)
        packed = graph.tensor(name + INT8_VALUES, quantized.packed.numpy())
        inputs = [source, packed, _scales_in_groups(graph, name, quantized)]
        return _product_in_groups(graph, name, quantized, inputs, self.activations)

    def _count(self, name: str, quantized: Int4Weight) -> None:
        weights = quantized.packed.shape[0] * quantized.columns
        self.group_sizes[quantized.group_size] = self.group_sizes.get(quantized.group_size, 0) + weights
        if quantized.columns % quantized.group_size:
            self.padded.append(name)
        if quantized.zero_points is not None:
            self.asymmetric.append(name)


def add_int4_product(
    graph: GraphBuilder, source: str, name: str, quantized: Int4Weight, activations: Activations
) -> str:
    """Adds the product of ``source``, whose columns are in the order of the stored ones; returns the output's name."""
    packed = graph.tensor(f"{name}{VALUES}", quantized.packed.numpy())
    inputs = [source, packed, _scales_in_groups(graph, name, quantized)]
    if quantized.zero_points is not None:
        inputs.append(graph.tensor(name + ZERO_POINTS, quantized.zero_points.flatten().numpy()))
    return _product_in_groups(graph, name, quantized, inputs, activations)


def _product_in_groups(
    graph: GraphBuilder,
    name: str,
    quantized: Int4Weight | Int8GroupWeight,
    inputs: list[str],
    activations: Activations,
) -> str:
    return graph.node(
        "MatMulNBits",
        inputs,
        f"{name}.product",
        domain=CONTRIB,
        K=quantized.columns,
        N=len(quantized.packed),
        bits=quantized.bits,
        block_size=quantized.group_size,
        accuracy_level=ACCURACY_LEVELS[activations],
    )


def _scales_in_groups(graph: GraphBuilder, name: str, quantized: Int4Weight | Int8GroupWeight) -> str:
    """Stored in fp16 and widened when the graph is loaded: the operator wants the activations' dtype."""
    scales = graph.tensor(name + SCALES, quantized.scales.flatten().numpy())
    return graph.node("Cast", [scales], f"{name}.scales_fp32", to=onnx.TensorProto.FLOAT)


def _emit_int8(graph: GraphBuilder, source: str, name: str, weight: torch.Tensor) -> str:
    quantized = nearest_int8(weight, QMAX_PRODUCT)
    values = graph.tensor(name + INT8_VALUES, quantized.values.T.contiguous().numpy())
    scales = graph.tensor(name + SCALES, quantized.scales.numpy())
    return graph.node("DynamicQuantizeMatMul", [source, values, scales], f"{name}.product", domain=CONTRIB)
