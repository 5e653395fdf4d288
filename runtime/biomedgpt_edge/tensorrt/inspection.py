"""What an engine is made of, as its builder lists it in its log with detailed profiling.

A line names a layer (a kernel), its inputs, constants and outputs with their element types, and the nodes of the graph
that it computes. No GPU is needed for that, which reading an engine back needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?, Metadata: ?(?P<nodes>.*)"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]*), Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<kind>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Tensor:
    """Of a layer; -1 in its shape varies."""

    name: str
    shape: tuple[int, ...]
    element: str


@dataclass(frozen=True)
class Layer:
    """One of an engine.

    Attributes:
        kind: as TensorRT calls it: gemm, kgen (generated), runtime_fusion, ...
        nodes: of the graph, that it computes or computes a part of.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]


def read_layers(lines: Iterable[str]) -> list[Layer]:
    """The layers of an engine from the lines of its builder's log."""
    found = (_LAYER.match(line) for line in lines)
    return [
        Layer(
            match["name"],
            match["kind"],
            _tensors(match["inputs"]),
            _tensors(match["constants"]),
            _tensors(match["outputs"]),
            tuple(_NODE.findall(match["nodes"])),
        )
        for match in found
        if match
    ]


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(match["name"], tuple(int(size) for size in match["shape"].split(",") if size), match["kind"])
        for match in _TENSOR.finditer(text)
    )


def products(layers: Sequence[Layer], matrices: Iterable[str]) -> dict[str, set[str]]:
    """For each of ``matrices``, names of MatMul nodes, the element types of the constants that it is multiplied with.

    A matrix that is dequantized by a layer of its own has those of what the product reads: none.
    """
    wanted = {name: set[str]() for name in matrices}
    for layer in layers:
        for node in layer.nodes:
            if node in wanted:
                wanted[node] |= {tensor.element for tensor in layer.constants if len(tensor.shape) > 1}
    return wanted


def summary(layers: Sequence[Layer]) -> str:
    """For people: how many layers, and the element types of what they multiply and give."""
    constants = sorted({tensor.element for layer in layers for tensor in layer.constants})
    outputs = sorted({tensor.element for layer in layers for tensor in layer.outputs})
    return f"{len(layers)} layers, weights in {', '.join(constants) or 'nothing'}, values in {', '.join(outputs)}"
