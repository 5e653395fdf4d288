"""A portable graph with activations and KV cache in float16, for ONNX Runtime's CUDA provider, over the same data.

On a CPU, ONNX Runtime's float16 is slow, so that portable graphs widen what is stored; on a GPU, float16 is what its
kernels for MatMulNBits and attention are written for. float32 inputs and outputs stay, but for the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from .builder import CONTRIB

_HALF = ".half"


def write_cuda(source: Path, target: Path) -> None:
    """Writes the portable graph ``source``, its data wherever, to ``target``, beside it and over the same weights.

    Raises:
        FileExistsError: there is a ``target`` already.
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    nodes = list(_Half(graph).nodes())
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if _is_cache(value.name):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.name = target.stem
    with target.open("xb") as file:
        file.write(model.SerializeToString(deterministic=True))


def _is_cache(name: str) -> bool:
    return name.startswith(("past_", "present_"))


class _Half:
    """The nodes of a graph, with what they read in float16."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._kinds |= {
            value.name: value.type.tensor_type.elem_type for value in graph.input if not _is_cache(value.name)
        }
        # Casts that widen what is stored: what they give -> what is stored.
        self._stored = {
            node.output[0]: node.input[0]
            for node in graph.node
            if node.op_type == "Cast" and self._kinds.get(node.input[0]) == TensorProto.FLOAT16
        }
        self._outputs = {value.name for value in graph.output if not _is_cache(value.name)}

    def nodes(self) -> Iterator[onnx.NodeProto]:
        narrowed = {name for node in self._graph.node for name in node.input if self._is_wide(name)}
        for name in sorted(narrowed):
            yield helper.make_node("Cast", [name], [name + _HALF], name=name + _HALF, to=TensorProto.FLOAT16)
        for node in self._graph.node:
            if node.output[0] in self._stored:
                continue
            yield from self._translated(node)

    def _is_wide(self, name: str) -> bool:
        return self._kinds.get(name) == TensorProto.FLOAT

    def _translated(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        inputs = [self._stored.get(name, name + _HALF * self._is_wide(name)) for name in node.input]
        output = node.output[0]
        if output in self._outputs:
            # Graph outputs are float32.
            narrow = f"{output}.narrow"
            yield from self._computed(node, inputs, [narrow])
            yield helper.make_node("Cast", [narrow], [output], name=f"{output}.wide", to=TensorProto.FLOAT)
        else:
            yield from self._computed(node, inputs, list(node.output))

    def _computed(self, node: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> Iterator[onnx.NodeProto]:
        if (node.domain, node.op_type) == (CONTRIB, "DynamicQuantizeMatMul"):
            # The provider has none; activations stay what they are.
            source, values, scales = inputs
            weight = f"{values}.dequantized"
            yield helper.make_node("DequantizeLinear", [values, scales], [weight], name=weight, axis=1)
            yield helper.make_node("MatMul", [source, weight], outputs, name=node.name)
            return
        half = onnx.NodeProto()
        half.CopyFrom(node)
        half.ClearField("input")
        half.ClearField("output")
        half.input.extend(inputs)
        half.output.extend(outputs)
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]  # of CPUs
        half.ClearField("attribute")
        half.attribute.extend(kept)
        yield half
