"""Decoder graphs with the operators of csrc/ort instead of ONNX Runtime's, and back: the same matrices.

Int4 products become Int4Linear and Int4GateUp instead of MatMulNBits, and attention becomes CausalAttention instead of
GroupQueryAttention, so that nothing that a position goes through depends on the positions beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from biomedgpt_edge.onnx_header import INT4_DOMAIN, INT4_MATRICES
from biomedgpt_edge.tensor_names import VALUES, layer_names, records_name

from ..errors import ModelConfigError
from ..quantize.int4 import GROUP_SIZES
from .attention import HEAD_STEP, LENGTH, MAX_HEAD_SIZE, Attention, length_input
from .builder import CONTRIB, GraphBuilder
from .linear import ACCURACY_LEVELS, Activations, add_int4_product
from .records import packed
from .stored import StoredWeights

# With which the operators compute.
_ACTIVATIONS: Activations = "int8"


@dataclass(frozen=True)
class Replaced:
    """What became of the products of a graph.

    Attributes:
        linear: those that are an Int4Linear now.
        gate_up: pairs that are an Int4GateUp now, with the SiLU and the multiplication after them.
        kept: those that are still a MatMulNBits, which the operators do not compute: with 8 bits, with zero points of
            their own, or with activations in float32.
    """

    linear: int
    gate_up: int
    kept: int


@dataclass(frozen=True)
class _Operator:
    """One that stands for ``products``, a linear layer or a gate and an up projection.

    Attributes:
        output: what it gives, under the name that it had.
        inside: outputs of nodes that it stands for, too.
    """

    products: tuple[onnx.NodeProto, ...]
    output: str
    inside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "Int4Linear" if len(self.products) == 1 else "Int4GateUp"


def write_with_int4_ops(source: Path, target: Path) -> Replaced:
    """Writes the graph ``source`` of an int4 bundle to ``target``, its weights beside it, with our own operators.

    The input ``records`` of an operator is uint8 ``[panels, groups, bytes of a record]``, see csrc/int4/int4.h, and
    begins on a page of the file; its name is made of those of its matrices. Sessions need
    :func:`biomedgpt_edge.int4_ops.register_int4_ops`.

    Raises:
        ModelConfigError: the operators compute no product of this graph; nothing was written.
        FileExistsError: there are weights beside ``target`` already.
    """
    stored = StoredWeights(source)
    model = onnx.load(str(source), load_external_data=False).graph
    products = {node.output[0]: node for node in model.node if _is_product(node)}
    ours = {name: node for name, node in products.items() if _is_ours(node)}
    if not ours:
        raise ModelConfigError(
            f"{source.name} has no int4 product with zero point 8, int8 activations and groups of "
            f"{', '.join(map(str, GROUP_SIZES))}.",
            seen=source.name,
            remedy="Use --decoder-layout portable, or weights without zero points of their own.",
        )
    gate_ups = list(_gate_ups(model, ours))
    gone = {name for operator in gate_ups for name in operator.inside}
    linears = [_Operator((node,), name) for name, node in ours.items() if name not in gone]
    _check_heads(model, stored, source.name)
    graph = GraphBuilder(target)
    try:
        _write(graph, model, stored, {operator.output: operator for operator in gate_ups + linears}, gone)
    finally:
        graph.close()
    return Replaced(len(linears), len(gate_ups), len(products) - len(ours))


def _check_heads(model: onnx.GraphProto, stored: StoredWeights, name: str) -> None:
    """Whether the attention operator takes these heads."""
    for attention in _attentions(model):
        size = _head_size(attention, stored)
        if size % HEAD_STEP or size > MAX_HEAD_SIZE:
            raise ModelConfigError(
                f"the heads of {name} have {size} elements.",
                seen=size,
                limit=f"multiples of {HEAD_STEP} up to {MAX_HEAD_SIZE}",
                remedy="Use --decoder-layout portable.",
            )


def _attentions(model: onnx.GraphProto) -> list[Attention]:
    return [attention for attention in map(Attention.read, model.node) if attention is not None]


def adopt_signature(
    graph: GraphBuilder,
    model: onnx.GraphProto,
    caches: Iterable[tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]] = (),
    *,
    without: Collection[str] = (),
) -> None:
    """Gives this graph the inputs, ``without`` some, and outputs of another one, with these for the KV cache."""
    replaced = {value.name: value for pair in caches for value in pair}
    for value in model.input:
        if value.name not in without:
            graph.adopt_input(replaced.get(value.name, value))
    for value in model.output:
        graph.adopt_output(replaced.get(value.name, value))


def _adopt_tables(graph: GraphBuilder, attention: Attention, stored: StoredWeights) -> None:
    for name in attention.rope:
        graph.tensor(name, stored.array(name))


def _head_size(attention: Attention, stored: StoredWeights) -> int:
    return 2 * int(stored.array(attention.rope[0]).shape[1])


def _is_product(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (CONTRIB, "MatMulNBits")


def _is_ours(product: onnx.NodeProto) -> bool:
    """Whether the operators compute it, to the same precision."""
    attributes = _attributes(product)
    return (
        len(product.input) == 3
        and product.input[1].endswith(VALUES)
        and attributes.keys() == {"K", "N", "bits", "block_size", "accuracy_level"}
        and attributes["bits"] == 4
        and attributes["block_size"] in GROUP_SIZES
        and attributes["accuracy_level"] == ACCURACY_LEVELS[_ACTIVATIONS]
    )


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _gate_ups(model: onnx.GraphProto, ours: Mapping[str, onnx.NodeProto]) -> Iterator[_Operator]:
    """An operator for each ``silu(gate) * up`` whose parts nothing else needs."""
    by_output = {node.output[0]: node for node in model.node}
    uses = Counter(name for node in model.node for name in node.input)
    uses.update(output.name for output in model.output)
    for node in model.node:
        if (node.domain, node.op_type) != ("", "Mul"):
            continue
        silu = by_output.get(node.input[0])
        if silu is None or silu.op_type != "QuickGelu" or _attributes(silu) != {"alpha": 1.0}:
            continue
        inside = (silu.input[0], silu.output[0], node.input[1])
        gate, up = ours.get(inside[0]), ours.get(inside[2])
        if gate is None or up is None or any(uses[name] != 1 for name in inside):
            continue
        if gate.input[0] == up.input[0] and _attributes(gate) == _attributes(up):
            yield _Operator((gate, up), node.output[0], inside)


def _write(
    graph: GraphBuilder,
    model: onnx.GraphProto,
    stored: StoredWeights,
    operators: Mapping[str, _Operator],
    gone: set[str],
) -> None:
    caches = [pair for attention in _attentions(model) for pair in attention.own_cache()]
    others = (node for node in model.node if Attention.read(node) is None)
    adopt_signature(graph, model, caches, without={LENGTH}.difference(*(node.input for node in others)))
    weights = {tensor.name for tensor in model.initializer}
    kept = [node for node in model.node if node.output[0] not in gone | operators.keys()]
    # Scales that nothing widens any more are left out.
    needed = {name for node in kept for name in node.input} | {output.name for output in model.output}
    for node in model.node:
        operator, attention = operators.get(node.output[0]), Attention.read(node)
        if operator is not None:
            _add_operator(graph, operator, stored)
        elif attention is not None:
            _adopt_tables(graph, attention, stored)
            attention.emit_own(graph)
        elif node.output[0] not in gone and (node.op_type != "Cast" or node.output[0] in needed):
            adopt(graph, node, weights, stored)
    graph.save()


def _add_operator(graph: GraphBuilder, operator: _Operator, stored: StoredWeights) -> None:
    first = operator.products[0]
    names = [product.input[1].removesuffix(VALUES) for product in operator.products]
    parts = [packed(stored.int4(name)) for name in names]
    by_turns = parts[0] if len(parts) == 1 else np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    records = graph.tensor(records_name(names), by_turns, mapped=True)
    widths = {name: value for name, value in _attributes(first).items() if name in ("K", "N")}
    graph.node(operator.name, [first.input[0], records], operator.output, domain=INT4_DOMAIN, **widths)


def write_portable(source: Path, target: Path, *, on_pages: bool = False) -> None:
    """The inverse of :func:`write_with_int4_ops`: the same matrices, bit for bit, with MatMulNBits.

    Args:
        on_pages: whether all tensors outside the graph file start on pages, as in what a box derives.

    Raises:
        FileExistsError: there are weights beside ``target`` already.
    """
    stored = StoredWeights(source)
    model = onnx.load(str(source), load_external_data=False).graph
    weights = {tensor.name for tensor in model.initializer}
    graph = GraphBuilder(target, on_pages=on_pages)
    try:
        caches = [pair for own in _attentions(model) for pair in own.portable_cache(_head_size(own, stored))]
        adopt_signature(graph, model, caches)
        if caches and all(value.name != LENGTH for value in model.input):
            graph.adopt_input(length_input())
        for node in model.node:
            attention = Attention.read(node)
            if attention is not None:
                _adopt_tables(graph, attention, stored)
                attention.emit_portable(graph)
            elif (node.domain, node.op_type) in INT4_MATRICES:
                _add_products(graph, node, stored)
            else:
                adopt(graph, node, weights, stored)
        graph.save()
    finally:
        graph.close()


def adopt(graph: GraphBuilder, node: onnx.NodeProto, weights: Collection[str], stored: StoredWeights) -> None:
    """Adds a node of another graph and those of ``weights`` that it reads."""
    for name in node.input:
        if name in weights:
            graph.tensor(name, stored.array(name))
    graph.adopt_node(node)


def _add_products(graph: GraphBuilder, node: onnx.NodeProto, stored: StoredWeights) -> None:
    output, names = node.output[0], layer_names(node.input[1])
    products = [add_int4_product(graph, node.input[0], name, stored.int4(name), _ACTIVATIONS) for name in names]
    if len(products) == 1:
        graph.rename_outputs(products[0], [output])
        return
    gate, up = products
    silu = graph.node("QuickGelu", [gate], f"{output}.silu", domain=CONTRIB, alpha=1.0)
    graph.node("Mul", [silu, up], output)
