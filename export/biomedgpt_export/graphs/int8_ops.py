"""Graphs whose int8 products are the operators of csrc/ort instead of DynamicQuantizeMatMul, and back.

Weights stay what they are, bit for bit. Activations are quantized to eight bits either way: per row by the operators,
per tensor by ONNX Runtime. Results differ by rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from biomedgpt_edge.onnx_header import INT4_DOMAIN, INT8_INPUTS
from biomedgpt_edge.tensor_names import BIAS, INT8_RECORDS, INT8_VALUES, SCALES

from .builder import CONTRIB, GraphBuilder
from .int4_ops import adopt, adopt_signature
from .records import packed_int8
from .stored import StoredWeights

_LINEAR, _GELU, _ADD = (name for _, name in INT8_INPUTS)


@dataclass(frozen=True)
class _Operator:
    """One that stands for a product, the addition of its bias, and what may follow.

    Attributes:
        source: what it multiplies.
        matrix: the linear layer's name.
        residual: what it adds to the product, if anything.
        output: what it gives, under the name that it had.
        inside: outputs of nodes that it stands for, too.
    """

    name: str
    source: str
    matrix: str
    residual: str
    output: str
    inside: tuple[str, ...]


class _Source:
    """A graph, with what each name is made by and read by."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(str(path), load_external_data=False).graph
        self.stored = StoredWeights(path)
        self.weights = {tensor.name for tensor in self.graph.initializer}
        self._uses = Counter(name for node in self.graph.node for name in node.input)
        self._uses.update(output.name for output in self.graph.output)
        self._readers = {name: node for node in self.graph.node for name in node.input}

    def reader(self, name: str) -> onnx.NodeProto | None:
        """The only node that reads ``name``."""
        return self._readers.get(name) if self._uses[name] == 1 else None

    def operators(self) -> Mapping[str, _Operator]:
        """By the output of each."""
        found = (self._operator(node) for node in self.graph.node if _is_product(node))
        return {operator.output: operator for operator in found if operator is not None}

    def _operator(self, product: onnx.NodeProto) -> _Operator | None:
        matrix = product.input[1].removesuffix(INT8_VALUES)
        total = self.reader(product.output[0])
        if total is None or total.op_type != "Add" or total.input[1] != matrix + BIAS:
            return None
        source, output = product.input[0], total.output[0]
        inside = (product.output[0],)
        following = self.reader(output)
        if following is not None and (following.domain, following.op_type) == (CONTRIB, "Gelu"):
            return _Operator(_GELU, source, matrix, "", following.output[0], (*inside, output))
        if following is not None and following.op_type == "Add" and following.input[1] == output:
            return _Operator(_ADD, source, matrix, following.input[0], following.output[0], (*inside, output))
        return _Operator(_LINEAR, source, matrix, "", output, inside)


def _is_product(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (CONTRIB, "DynamicQuantizeMatMul")


def has_int8_products(graph: Path) -> bool:
    """Whether ``graph`` has linear layers in int8 that the functions below turn from one layout into the other."""
    source = _Source(graph)
    return bool(source.operators()) or any((node.domain, node.op_type) in INT8_INPUTS for node in source.graph.node)


def write_with_int8_ops(source: Path, target: Path) -> int:
    """Writes the graph ``source`` to ``target``, its weights beside it, with our own operators for int8 products.

    The input ``records`` of an operator is uint8 ``[panels, bytes of a panel]``, see csrc/int8/int8.h, and begins on a
    page of the file. Sessions need :func:`biomedgpt_edge.int4_ops.register_int4_ops`.

    Returns:
        How many products were replaced; those without a bias were not.

    Raises:
        FileExistsError: there are weights beside ``target`` already.
    """
    found = _Source(source)
    operators = found.operators()
    gone = {name for operator in operators.values() for name in operator.inside}
    graph = GraphBuilder(target)
    try:
        adopt_signature(graph, found.graph)
        for node in found.graph.node:
            operator = operators.get(node.output[0])
            if operator is not None:
                _add_operator(graph, operator, found.stored)
            elif node.output[0] not in gone:
                adopt(graph, node, found.weights, found.stored)
        graph.save()
    finally:
        graph.close()
    return len(operators)


def _add_operator(graph: GraphBuilder, operator: _Operator, stored: StoredWeights) -> None:
    weight = stored.int8_weight(operator.matrix)
    records = packed_int8(weight, stored.array(operator.matrix + BIAS))
    inputs = [operator.source, graph.tensor(operator.matrix + INT8_RECORDS, records, mapped=True)]
    if operator.residual:
        inputs.append(operator.residual)
    rows, columns = weight.values.shape
    graph.node(operator.name, inputs, operator.output, domain=INT4_DOMAIN, N=rows, K=columns)


def write_portable_int8(source: Path, target: Path, *, on_pages: bool = False) -> None:
    """The inverse of :func:`write_with_int8_ops`: the same nodes and matrices, bit for bit.

    Args:
        on_pages: whether all tensors outside the graph file start on pages, as in what a box derives.

    Raises:
        FileExistsError: there are weights beside ``target`` already.
    """
    found = _Source(source)
    graph = GraphBuilder(target, on_pages=on_pages)
    try:
        adopt_signature(graph, found.graph)
        for node in found.graph.node:
            if (node.domain, node.op_type) in INT8_INPUTS:
                _add_nodes(graph, node, found.stored)
            else:
                adopt(graph, node, found.weights, found.stored)
        graph.save()
    finally:
        graph.close()


def _add_nodes(graph: GraphBuilder, node: onnx.NodeProto, stored: StoredWeights) -> None:
    matrix, output = node.input[1].removesuffix(INT8_RECORDS), node.output[0]
    weight, bias = stored.int8_records(matrix)
    values = graph.tensor(matrix + INT8_VALUES, weight.values.numpy().T)
    scales = graph.tensor(matrix + SCALES, weight.scales.numpy())
    product = graph.node("DynamicQuantizeMatMul", [node.input[0], values, scales], f"{matrix}.product", domain=CONTRIB)
    summed = output if node.op_type == _LINEAR else f"{matrix}.sum"
    graph.node("Add", [product, graph.tensor(matrix + BIAS, bias)], summed)
    if node.op_type == _GELU:
        graph.node("Gelu", [summed], output, domain=CONTRIB)
    elif node.op_type == _ADD:
        graph.node("Add", [node.input[2], summed], output)
