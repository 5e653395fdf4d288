"""A decoder's attention: ONNX Runtime's GroupQueryAttention, or CausalAttention of csrc/ort in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from biomedgpt_edge.onnx_header import ATTENTION
from biomedgpt_edge.tensor_names import ROPE_COS, ROPE_SIN

from .builder import CONTRIB, GraphBuilder

# Graph inputs: int32 [1], total positions - 1; and an int32 scalar, total positions, which only ONNX Runtime's needs.
LAST_POSITION, LENGTH = "seqlens_k", "total_sequence_length"
# csrc/attention multiplies so many elements at once.
HEAD_STEP, MAX_HEAD_SIZE = 16, 256


@dataclass(frozen=True)
class Attention:
    """One node, whichever of the two it is.

    Attributes:
        qkv: queries, keys and values of the new positions, float32 ``[1, T, (heads + 2 * kv_heads) * head_size]``.
        past, present: the KV cache, keys and values, before and after.
        rope: tables of cosines and sines, float32 ``[positions, head_size / 2]``.
        output: float32 ``[1, T, heads * head_size]``.
    """

    qkv: str
    past: tuple[str, str]
    rope: tuple[str, str]
    output: str
    present: tuple[str, str]
    heads: int
    kv_heads: int

    @classmethod
    def of_layer(cls, layer: int, qkv: str, heads: int, kv_heads: int) -> Attention:
        """With the names that decoder graphs use."""
        past, present = ((f"{state}_key.{layer}", f"{state}_value.{layer}") for state in ("past", "present"))
        return cls(qkv, past, (ROPE_COS, ROPE_SIN), f"layers.{layer}.attention", present, heads, kv_heads)

    @classmethod
    def read(cls, node: onnx.NodeProto) -> Attention | None:
        """What a node says, None where it is no attention as it is emitted here."""
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        names = list(node.input)
        if (node.domain, node.op_type) == (CONTRIB, "GroupQueryAttention") and len(names) == 9:
            heads, kv_heads = attributes.pop("num_heads", 0), attributes.pop("kv_num_heads", 0)
            others = attributes == {"do_rotary": 1, "rotary_interleaved": 0} and names[1:3] == ["", ""]
            found = cls._named([names[0], *names[3:5], *names[7:]], node.output, heads, kv_heads)
            return found if others and names[5:7] == [LAST_POSITION, LENGTH] else None
        if (node.domain, node.op_type) == ATTENTION and len(names) == 6 and names[3] == LAST_POSITION:
            return cls._named([*names[:3], *names[4:]], node.output, attributes["heads"], attributes["kv_heads"])
        return None

    @classmethod
    def _named(cls, inputs: list[str], outputs: list[str], heads: int, kv_heads: int) -> Attention:
        qkv, past_key, past_value, cos, sin = inputs
        output, present_key, present_value = outputs
        return cls(qkv, (past_key, past_value), (cos, sin), output, (present_key, present_value), heads, kv_heads)

    def emit_portable(self, graph: GraphBuilder) -> None:
        """Adds it as ONNX Runtime's operator."""
        graph.node(
            "GroupQueryAttention",
            [self.qkv, "", "", *self.past, LAST_POSITION, LENGTH, *self.rope],
            self.output,
            domain=CONTRIB,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        graph.rename_outputs(self.output, [self.output, *self.present])

    def emit_own(self, graph: GraphBuilder) -> None:
        """Adds it as our own operator."""
        domain, operator = ATTENTION
        inputs = [self.qkv, *self.past, LAST_POSITION, *self.rope]
        graph.node(operator, inputs, self.output, domain=domain, heads=self.heads, kv_heads=self.kv_heads)
        graph.rename_outputs(self.output, [self.output, *self.present])

    def portable_cache(self, head_size: int) -> Iterator[tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]]:
        """Graph input and output for keys and for values, with a row of float32 for each position."""
        return self._cache(TensorProto.FLOAT, [1, self.kv_heads, "capacity", head_size])

    def own_cache(self) -> Iterator[tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]]:
        """The same as blocks of bytes, whose size says the element type (see csrc/attention/attention.h)."""
        return self._cache(TensorProto.UINT8, [self.kv_heads, "blocks", "block_bytes"])

    def _cache(self, kind: int, shape: list[int | str]) -> Iterator[tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]]:
        for names in zip(self.past, self.present, strict=True):
            past, present = (helper.make_tensor_value_info(name, kind, shape) for name in names)
            yield past, present


def length_input() -> onnx.ValueInfoProto:
    """The graph input that GroupQueryAttention wants beside the last position."""
    return helper.make_tensor_value_info(LENGTH, TensorProto.INT32, [])
