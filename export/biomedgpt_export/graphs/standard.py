"""A graph's second emission: the same matrices in operators of ONNX alone, for engines such as TensorRT.

int4 and int8 become DequantizeLinear -> MatMul with matrices ``[K, N]`` (what engines fuse; ``[N, K]`` and a Transpose
they do not), the contrib norms RMSNormalization, and ONNX Runtime's attentions RotaryEmbedding, TensorScatter and
Attention. A decoder's KV cache is static: ``past_*`` and ``present_*`` are ``[1, kv_heads, context, head_size]``, bound
to the same memory, new rows go to ``write_indices``, and what a position attends to is an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from biomedgpt_edge.manifest import DATA_SUFFIX
from biomedgpt_edge.standard_tensors import HALF, INT4_KN, INT8_KN, SCALES_KN, WEIGHT_HALF, sources, standard_bytes
from biomedgpt_edge.tensor_names import BIAS, INT8_VALUES, VALUES, ZERO_POINTS

from ..errors import ModelConfigError
from .attention import LAST_POSITION, LENGTH, Attention
from .builder import CONTRIB, GraphBuilder
from .stored import StoredWeights

# Of activations, and of what is not quantized.
Element = Literal["fp16", "fp32"]
_NUMPY: Mapping[Element, npt.DTypeLike] = {"fp16": np.float16, "fp32": np.float32}
_ONNX: Mapping[Element, int] = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}

# TensorRT multiplies int4 as it is where a row of the matrix [K, N] begins on a byte and scales have two blocks or
# more; else it dequantizes the whole matrix first, each time. Rows of 16 bytes in float16 suit its loads besides.
_ROW_STEP, _LEAST_BLOCKS = 8, 2
# Graph inputs of a decoder: int64 [1, T], int64 [1], the position of the first of T, and of the activations' element
# type [1, 1, T, attended], 0 where a position attends to another one and very low elsewhere. Encoders of proteins have
# the first of them, too.
POSITION_IDS, WRITE_INDICES, MASK = "position_ids", "write_indices", "mask"


@dataclass
class Standard:
    """What was written.

    Attributes:
        int4, int8: matrices that are stored so.
        plain: names of those that are stored in 16 bits although the bundle has 4: with zero points of their own, which
            TensorRT does not take.
    """

    int4: int = 0
    int8: int = 0
    plain: list[str] = field(default_factory=list)


def write_standard(source: Path, target: Path, *, element: Element = "fp16") -> Standard:
    """Writes the graph ``source``, which has ONNX Runtime's operators, to ``target``, its weights beside it.

    float32 inputs and outputs stay what they are, but for the KV cache, whose numbers are of ``element``.

    Raises:
        ModelConfigError: the graph has something that no standard operator computes, or a value beyond ``element``;
            named.
        FileExistsError: there are weights beside ``target`` already.
    """
    if element == "fp16":
        StoredWeights(source).require_half_range(source.name)
    graph = GraphBuilder(target, on_pages=True, standard=True)
    try:
        written = _Translation(source, graph, element).run()
        graph.save()
    except BaseException:
        graph.close()
        target.with_suffix(DATA_SUFFIX).unlink()
        raise
    graph.close()
    return written


class _Translation:
    def __init__(self, source: Path, graph: GraphBuilder, element: Element) -> None:
        self._name = source.name
        self._model = onnx.load(str(source), load_external_data=False).graph
        self._stored = StoredWeights(source)
        self._graph = graph
        self._element = element
        self._weights = {tensor.name for tensor in self._model.initializer}
        # Casts of what is stored: what they give -> what is stored.
        self._widened = {
            node.output[0]: node.input[0]
            for node in self._model.node
            if node.op_type == "Cast" and node.input[0] in self._weights
        }
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in self._model.initializer}
        self._written = Standard()

    def run(self) -> Standard:
        self._add_inputs()
        for node in self._model.node:
            if node.output[0] in self._widened:
                continue
            translate = _TRANSLATIONS.get((node.domain, node.op_type))
            if translate is None:
                raise ModelConfigError(
                    f"{self._name} has {node.domain or 'ONNX'}'s {node.op_type} ({node.name}), for which there is no "
                    "standard operator here.",
                    seen=node.op_type,
                )
            translate(self, node)
        for value in self._model.output:
            if not value.name.startswith("present_"):
                self._graph.adopt_output(value)
        return self._written

    # --- inputs and outputs -------------------------------------------------------------------------------------------

    def _add_inputs(self) -> None:
        """Those of the source; float32 ones are cast once, under their names with a suffix."""
        decoder = any(value.name == LAST_POSITION for value in self._model.input)
        for value in self._model.input:
            if value.name not in (LAST_POSITION, LENGTH) and not value.name.startswith("past_"):
                self._graph.adopt_input(value)
        if decoder:
            self._graph.input(POSITION_IDS, TensorProto.INT64, [1, "positions"])
            self._graph.input(WRITE_INDICES, TensorProto.INT64, [1])
            self._graph.input(MASK, _ONNX[self._element], [1, 1, "positions", "attended"])
            self._graph.node("Shape", [MASK], "attended", start=-1)
        elif any(node.op_type == "MultiHeadAttention" for node in self._model.node):
            self._graph.input(POSITION_IDS, TensorProto.INT64, [1, "residues"])
        if self._element == "fp16":
            for value in self._model.input:
                if value.type.tensor_type.elem_type == TensorProto.FLOAT and not value.name.startswith("past_"):
                    self._graph.node("Cast", [value.name], value.name + HALF, to=TensorProto.FLOAT16)

    def value(self, name: str) -> str:
        """What stands for the value, input or weight ``name``."""
        if name in self._widened or name in self._weights:
            return self._weight(self._widened.get(name, name))
        halved = {value.name for value in self._model.input if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        return name + HALF if self._element == "fp16" and name in halved else name

    def _weight(self, name: str) -> str:
        """A stored tensor of numbers at the precision of activations; of integers as it is."""
        array = self._stored.array(name)
        if array.dtype in (np.int64, np.int32) or array.dtype == np.dtype(_NUMPY[self._element]):
            return self._graph.tensor(name, array)
        if self._element == "fp32":
            return self._graph.tensor(f"{name}.wide", array.astype(np.float32))
        return self._derived(name + HALF, array.shape)

    def _derived(self, name: str, shape: tuple[int, ...], kind: int = TensorProto.FLOAT16) -> str:
        """A tensor as a box makes it, too; inside the graph where its sources lie inside, which no box reads."""
        parts = [part if part in self._weights else None for part in sources(name)]
        raw = [None if part is None else self._bytes(part) for part in parts]
        inside = any(part is not None and self._stored.lies_inside(part) for part in parts)
        made = standard_bytes(name, shape, raw)
        if kind == TensorProto.FLOAT16 and not np.isfinite(made.view(np.float16)).all():
            raise ModelConfigError(f"{self._name}: {name} holds values beyond float16.", seen=name)
        return self._graph.tensor(name, made, inline=inside, kind=kind, shape=shape)

    def _bytes(self, name: str) -> npt.NDArray[np.uint8]:
        stored: npt.NDArray[np.uint8] = np.ascontiguousarray(self._stored.array(name)).reshape(-1).view(np.uint8)
        return stored

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Adds a node that gives ``output``; outputs of the graph are float32."""
        if self._element == "fp32" or all(value.name != output for value in self._model.output):
            self._graph.node(op, inputs, output, **attributes)
            return
        narrow = self._graph.node(op, inputs, f"{output}.narrow", **attributes)
        self._graph.node("Cast", [narrow], output, to=TensorProto.FLOAT)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def same(self, node: onnx.NodeProto) -> None:
        """An operator of ONNX, over what stands for its inputs."""
        self._add(node.op_type, [self.value(name) for name in node.input], node.output[0], **_attributes(node))

    def norm(self, node: onnx.NodeProto) -> None:
        source, gain = node.input
        self._add_norm(node.output[0], self.value(source), gain, _attributes(node)["epsilon"])

    def add_and_norm(self, node: onnx.NodeProto) -> None:
        residual, update, gain = node.input
        normed, *_, total = node.output
        summed = self._graph.node("Add", [self.value(residual), self.value(update)], total)
        self._add_norm(normed, summed, gain, _attributes(node)["epsilon"])

    def _add_norm(self, name: str, source: str, gain: str, epsilon: float) -> None:
        # stash_type 1: the mean square is computed in float32.
        inputs = [source, self.value(gain)]
        self._graph.node("RMSNormalization", inputs, name, axis=-1, epsilon=epsilon, stash_type=1)

    def silu(self, node: onnx.NodeProto) -> None:
        if _attributes(node) != {"alpha": 1.0}:
            raise ModelConfigError(f"{self._name}: {node.name} is a QuickGelu, and no SiLU.", seen=node.name)
        source = self.value(node.input[0])
        sigmoid = self._graph.node("Sigmoid", [source], f"{node.name}.sigmoid")
        self._graph.node("Mul", [source, sigmoid], node.output[0])

    def gelu(self, node: onnx.NodeProto) -> None:
        self._graph.node("Gelu", [self.value(node.input[0])], node.output[0])

    def product(self, node: onnx.NodeProto) -> None:
        """MatMulNBits, in 4 or 8 bits."""
        layer = node.input[1].removesuffix(VALUES).removesuffix(INT8_VALUES)
        if layer + ZERO_POINTS not in self._weights:
            self._blocked(node, layer)
            return
        attributes = _attributes(node)
        self._written.plain.append(layer)
        weight = self._wide(self._derived(layer + WEIGHT_HALF, (attributes["K"], attributes["N"])))
        self._add("MatMul", [self.value(node.input[0]), weight], node.output[0])

    def _blocked(self, node: onnx.NodeProto, layer: str) -> None:
        """A product with a matrix in groups whose zero is the middle."""
        attributes = _attributes(node)
        bits, rows, size = (attributes[name] for name in ("bits", "N", "block_size"))
        suffix, kind = (INT4_KN, TensorProto.INT4) if bits == 4 else (INT8_KN, TensorProto.INT8)
        groups, filled = -(-attributes["K"] // size), -(-rows // _ROW_STEP) * _ROW_STEP
        columns, blocks = groups * size, max(groups, _LEAST_BLOCKS)
        stored = self._derived(layer + suffix, (columns, filled), kind)
        by_block = self._derived(f"{layer}{SCALES_KN}.{rows}x{groups}", (blocks, filled))
        inputs = [stored, self._wide(by_block)]
        weight = self._graph.node(
            "DequantizeLinear", inputs, f"{layer}.dequantized", axis=0, block_size=columns // blocks
        )
        self._count(bits)
        source, output = self.value(node.input[0]), node.output[0]
        if columns != attributes["K"]:
            # The last group of a matrix is filled up with zeros, and so is what it multiplies.
            ends = self._integers(f"fill_{columns - attributes['K']}", [0, 0, 0, 0, 0, columns - attributes["K"]])
            source = self._graph.node("Pad", [source, ends], f"{layer}.input_filled")
        if filled == rows:
            self._add("MatMul", [source, weight], output)
            return
        product = self._graph.node("MatMul", [source, weight], f"{output}.filled")
        bounds = [self._integers(f"{name}", [value]) for name, value in (("axis_0", 0), (f"rows_{rows}", rows))]
        self._add("Slice", [product, *bounds, self._integers("axis_2", [2])], output)

    def int8_product(self, node: onnx.NodeProto) -> None:
        """DynamicQuantizeMatMul: a scale for each output, and activations that stay what they are here.

        Scales below 6e-5, of rows whose weights are all below .008, lose bits in float16: at .001 a part in 600.
        """
        source, values, scales = node.input
        stored = self._graph.tensor(values, self._stored.array(values))
        weight = self._graph.node("DequantizeLinear", [stored, self.value(scales)], f"{values}.dequantized", axis=1)
        self._count(8)
        self._add("MatMul", [self.value(source), weight], node.output[0])

    def _count(self, bits: int) -> None:
        self._written.int4 += bits == 4
        self._written.int8 += bits == 8

    def _wide(self, half: str) -> str:
        """A float16 tensor at the precision of activations."""
        if self._element == "fp16":
            return half
        return self._graph.node("Cast", [half], f"{half}.wide", to=TensorProto.FLOAT)

    def decoder_attention(self, node: onnx.NodeProto) -> None:
        attention = Attention.read(node)
        if attention is None:
            raise ModelConfigError(f"{self._name}: {node.name} is no attention of a decoder.", seen=node.name)
        positions, half = self._shapes[attention.rope[0]]
        heads, kv_heads, size, name = attention.heads, attention.kv_heads, 2 * half, attention.output
        by_head = self._by_head(self.value(attention.qkv), heads + 2 * kv_heads, size, name)
        rotated, values = self._split(by_head, [heads + kv_heads, kv_heads], f"{name}.unrotated", f"{name}.new_values")
        rotated = self._rotate(rotated, attention.rope, f"{name}.rotated")
        queries, keys = self._split(rotated, [heads, kv_heads], f"{name}.queries", f"{name}.new_keys")
        attended = []
        for new, past, present in zip((keys, values), attention.past, attention.present, strict=True):
            shape = [1, kv_heads, positions, size]
            self._graph.input(past, _ONNX[self._element], shape)
            self._graph.output(present, _ONNX[self._element], shape)
            self._graph.node("TensorScatter", [past, new, WRITE_INDICES], present, axis=2)
            bounds = [self._integers("axis_0", [0]), "attended", self._integers("axis_2", [2])]
            attended.append(self._graph.node("Slice", [present, *bounds], f"{present}.attended"))
        self._attend([queries, *attended, MASK], node.output[0], heads * size)

    def encoder_attention(self, node: onnx.NodeProto) -> None:
        heads, name = _attributes(node)["num_heads"], node.output[0]
        parts = []
        for source in node.input:
            rotation = next((other for other in self._model.node if source in other.output), None)
            rotary = rotation is not None and rotation.op_type == "RotaryEmbedding"
            origin = rotation.input[0] if rotary and rotation is not None else source
            columns = self._columns_of(origin)
            by_head = self._by_head(self.value(origin), heads, columns // heads, f"{source}.heads")
            if rotary and rotation is not None:
                by_head = self._rotate(by_head, (rotation.input[2], rotation.input[3]), f"{source}.rotated")
            parts.append(by_head)
        self._attend(parts, name, columns)

    def skip(self, node: onnx.NodeProto) -> None:
        """Is part of what is made of another node."""

    def _columns_of(self, value: str) -> int:
        """Of what an Add gives that adds the bias of a linear layer."""
        bias = value.removesuffix(".sum") + BIAS
        if bias not in self._shapes:
            raise ModelConfigError(f"{self._name}: {value} is no linear layer with a bias.", seen=value)
        return int(self._shapes[bias][0])

    def _by_head(self, source: str, heads: int, size: int, name: str) -> str:
        """``[1, T, heads * size]`` as ``[1, heads, T, size]``."""
        shape = self._integers(f"heads_{heads}_{size}", [0, 0, heads, size])
        by_position = self._graph.node("Reshape", [source, shape], f"{name}.by_position")
        return self._graph.node("Transpose", [by_position], f"{name}.by_head", perm=[0, 2, 1, 3])

    def _split(self, source: str, sizes: list[int], *names: str) -> tuple[str, ...]:
        self._graph.node("Split", [source, self._integers(f"split_{sizes[0]}_{sizes[1]}", sizes)], names[0], axis=1)
        self._graph.rename_outputs(names[0], names)
        return names

    def _rotate(self, source: str, tables: tuple[str, str], name: str) -> str:
        """In float32 with tables of float32, whatever the activations are."""
        stored = [self._graph.tensor(table, self._stored.array(table)) for table in tables]
        if self._element == "fp32":
            return self._graph.node("RotaryEmbedding", [source, *stored, POSITION_IDS], name)
        wide = self._graph.node("Cast", [source], f"{name}.wide", to=TensorProto.FLOAT)
        rotated = self._graph.node("RotaryEmbedding", [wide, *stored, POSITION_IDS], f"{name}.turned")
        return self._graph.node("Cast", [rotated], name, to=TensorProto.FLOAT16)

    def _attend(self, inputs: list[str], name: str, columns: int) -> None:
        by_head = self._graph.node("Attention", inputs, f"{name}.heads")
        by_position = self._graph.node("Transpose", [by_head], f"{name}.positions", perm=[0, 2, 1, 3])
        self._graph.node("Reshape", [by_position, self._integers(f"columns_{columns}", [0, 0, columns])], name)

    def _integers(self, name: str, values: list[int]) -> str:
        return self._graph.tensor(name, np.array(values, np.int64))


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


_TRANSLATIONS: Mapping[tuple[str, str], Callable[[_Translation, onnx.NodeProto], None]] = {
    **{
        ("", name): _Translation.same
        for name in ("Add", "Gather", "Identity", "LayerNormalization", "MatMul", "Mul", "Relu", "Squeeze")
    },
    ("", "SimplifiedLayerNormalization"): _Translation.norm,
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _Translation.add_and_norm,
    (CONTRIB, "QuickGelu"): _Translation.silu,
    (CONTRIB, "Gelu"): _Translation.gelu,
    (CONTRIB, "MatMulNBits"): _Translation.product,
    (CONTRIB, "DynamicQuantizeMatMul"): _Translation.int8_product,
    (CONTRIB, "GroupQueryAttention"): _Translation.decoder_attention,
    (CONTRIB, "MultiHeadAttention"): _Translation.encoder_attention,
    (CONTRIB, "RotaryEmbedding"): _Translation.skip,
}
