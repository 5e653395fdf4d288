"""A thin layer over onnx.helper: nodes by name, and weights streamed to one external data file.

Weights are written when they are added and not kept, so a graph of any size needs the memory of its largest tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from biomedgpt_edge.int4_ops import OPSET as INT4_OPSET
from biomedgpt_edge.onnx_header import INT4_DOMAIN

CONTRIB = "com.microsoft"
OPSET = 20
CONTRIB_OPSET = 1
# Domains of every graph, and those of operators that only some have.
_OPSETS, _FURTHER_OPSETS = {"": OPSET, CONTRIB: CONTRIB_OPSET}, {INT4_DOMAIN: INT4_OPSET}
# Opset 20 needs IR version 9; newer IR versions shut out older runtimes for nothing.
IR_VERSION = 9
# Of graphs without any other domain: the first opset with TensorScatter, and the first IR version that all engines
# take with it.
STANDARD_OPSET, STANDARD_IR_VERSION = 24, 11

# Tensors below this stay inside the graph file, which shape inference can then see.
INLINE_BYTES = 1024
# A page, so that a mapped tensor starts on one; small tensors only need a cache line.
PAGE, LINE = 4096, 64


class GraphBuilder:
    """Builds one graph beside its external data file (``<stem>.onnx`` and ``<stem>.data``).

    Args:
        on_pages: whether tensors in that file start on pages also where a cache line would do.
        standard: whether it has operators of ONNX alone.
    """

    def __init__(self, path: Path, *, on_pages: bool = False, standard: bool = False) -> None:
        self.path = path
        self._on_pages = on_pages
        self._standard = standard
        self._data_name = f"{path.stem}.data"
        self._data = (path.parent / self._data_name).open("xb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node whose first output has its name; further outputs are called ``name:1``, ``name:2``, …"""
        names = [name, *(f"{name}:{i}" for i in range(1, outputs))]
        self._nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return name

    def adopt_input(self, value: onnx.ValueInfoProto) -> None:
        """Adds an input of another graph as it is."""
        self._inputs.append(value)

    def adopt_output(self, value: onnx.ValueInfoProto) -> None:
        """Adds an output of another graph as it is."""
        self._outputs.append(value)

    def adopt_node(self, node: onnx.NodeProto) -> None:
        """Adds a node of another graph as it is."""
        self._nodes.append(node)

    def rename_outputs(self, name: str, outputs: Sequence[str]) -> None:
        """Gives the outputs of the last node names of their own; an empty name leaves one out."""
        node = self._nodes[-1]
        if node.name != name:
            raise ValueError(f"{name} is not the last node")
        del node.output[:]
        node.output.extend(outputs)

    def tensor(
        self,
        name: str,
        array: npt.NDArray[Any],
        *,
        mapped: bool = False,
        inline: bool = False,
        kind: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> str:
        """Adds a weight or constant; equal names mean equal tensors and are stored once.

        Args:
            mapped: whether it must lie outside the graph file and start on a page, however small it is.
            inline: whether it must lie inside.
            kind, shape: its element type and dimensions, where ``array`` holds packed bytes.
        """
        if name in self._names:
            return name
        self._names.add(name)
        array = np.ascontiguousarray(array)
        element = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        proto = TensorProto(name=name, data_type=element, dims=array.shape if shape is None else shape)
        if inline or (array.nbytes < INLINE_BYTES and not mapped):
            proto.raw_data = array.tobytes()
        else:
            on_page = mapped or self._on_pages or array.nbytes >= 16 * PAGE
            self._write_external(proto, array, PAGE if on_page else LINE)
        self._initializers.append(proto)
        return name

    def save(self) -> None:
        """Writes the graph file; the same nodes and weights always give the same bytes."""
        self._data.close()
        used = {node.domain for node in self._nodes}
        opsets = _OPSETS | {domain: version for domain, version in _FURTHER_OPSETS.items() if domain in used}
        if self._standard:
            opsets = {"": STANDARD_OPSET}
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._initializers)
        model = helper.make_model(
            graph,
            ir_version=STANDARD_IR_VERSION if self._standard else IR_VERSION,
            producer_name="biomedgpt-export",
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        )
        self.path.write_bytes(model.SerializeToString(deterministic=True))

    def close(self) -> None:
        """Releases the data file of a graph that will not be saved."""
        self._data.close()

    def _write_external(self, proto: onnx.TensorProto, array: npt.NDArray[Any], alignment: int) -> None:
        offset = self._data.tell()
        padding = -offset % alignment
        self._data.write(b"\0" * padding)
        self._data.write(array.data)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self._data_name),
            ("offset", str(offset + padding)),
            ("length", str(array.nbytes)),
        ):
            proto.external_data.add(key=key, value=value)
