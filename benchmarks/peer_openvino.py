"""The bundle's decoder as a model of OpenVINO, as optimum-intel exports a Llama with int4 weights in groups.

Weights are constants of i4 with scales of f16; the KV cache is the model's state, reordered by ``beam_idx``; norms,
rotary embeddings and attention are spelled in the way that OpenVINO's CPU plugin fuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_models import Matrix, Models, Weights, staged

MODEL = "openvino_model.xml"


def openvino_folder(models: Models) -> Path:
    """A folder with the model.

    Raises:
        ValueError: see `Weights.matrix`.
    """
    import openvino as ov

    folder = models.folder / "openvino"
    if not folder.exists():
        with staged(folder) as staging:
            ov.save_model(_Graph(Weights(models.portable)).model(), staging / MODEL, compress_to_fp16=False)
    return folder


class _Graph:
    """Inputs ``input_ids``, ``attention_mask``, ``position_ids`` int64 [1, T or total], ``beam_idx`` int32 [1]; output
    ``logits`` float32 [1, 1, vocabulary], of the last position."""

    def __init__(self, weights: Weights) -> None:
        import openvino as ov
        from openvino import opset13 as ops

        self._ov, self._ops = ov, ops
        self._weights, self._spec = weights, weights.spec
        self._ids, self._mask, self._positions = self._inputs = [
            self._input(name, [-1, -1], ov.Type.i64) for name in ("input_ids", "attention_mask", "position_ids")
        ]
        self._beams = self._input("beam_idx", [-1], ov.Type.i32)
        self._assigned: list[Any] = []

    def model(self) -> Any:
        ops, ov, layers = self._ops, self._ov, self._spec.layers
        hidden = ops.gather(self._as_float(self._weights.table.astype(np.float16)), self._ids, np.int64(0))
        cos, sin = self._rotations()
        allowed = self._allowed()
        for layer in range(layers):
            normed = self._norm(hidden, self._weights.norm("attention", layer))
            hidden = ops.add(hidden, self._attention(normed, layer, cos, sin, allowed))
            normed = self._norm(hidden, self._weights.norm("ffn", layer))
            hidden = ops.add(hidden, self._feed_forward(normed, layer))
        hidden = self._norm(hidden, self._weights.norm("attention", layers))
        one = np.array([1], np.int64)
        last = ops.slice(hidden, -one, np.array([np.iinfo(np.int64).max]), one, one)
        logits = self._product(last, self._weights.head())
        logits.output(0).set_names({"logits"})
        return ov.Model([ops.result(logits)], self._assigned, [*self._inputs, self._beams], "decoder")

    def _input(self, name: str, shape: list[int], kind: Any) -> Any:
        parameter = self._ops.parameter(self._ov.PartialShape(shape), kind, name=name)
        parameter.output(0).set_names({name})
        return parameter

    def _as_float(self, values: Any) -> Any:
        return self._ops.convert(self._ops.constant(values), "f32")

    def _product(self, rows: Any, matrix: Matrix) -> Any:
        """``rows`` times the transposed matrix, whose levels less 8 are the i4 that OpenVINO multiplies by scales."""
        ops, ov = self._ops, self._ov
        columns = matrix.levels.shape[1]
        shape = [*matrix.scales.shape, columns // matrix.scales.shape[1]]
        packed = (matrix.levels[:, ::2] | matrix.levels[:, 1::2] << 4) ^ 0x88
        values = ops.constant(ov.Tensor(packed.reshape(-1), ov.Shape(shape), ov.Type.i4), shared_memory=False)
        scaled = ops.multiply(ops.convert(values, "f16"), ops.constant(matrix.scales[..., np.newaxis]))
        weight = ops.convert(ops.reshape(scaled, np.array(matrix.levels.shape), False), "f32")
        return ops.matmul(rows, weight, False, True)

    def _norm(self, hidden: Any, gains: Any) -> Any:
        ops = self._ops
        mean = ops.reduce_mean(ops.power(hidden, np.float32(2)), np.array([-1]), True)
        root = ops.sqrt(ops.add(mean, np.float32(self._spec.norm_eps)))
        return ops.multiply(ops.constant(gains), ops.multiply(hidden, ops.divide(np.float32(1), root)))

    def _rotations(self) -> tuple[Any, Any]:
        """Cosines and sines, [1, 1, T, head_size]."""
        ops, size = self._ops, self._spec.head_size
        frequencies = 1.0 / self._spec.rope_base ** (np.arange(0, size, 2, dtype=np.float32) / size)
        positions = ops.convert(ops.unsqueeze(self._positions, np.int64(1)), "f32")
        product = ops.matmul(ops.constant(frequencies.reshape(1, -1, 1)), positions, False, False)
        half = ops.transpose(product, np.array([0, 2, 1]))
        angles = ops.concat([half, half], -1)
        cos, sin = (ops.unsqueeze(of(angles), np.int64(1)) for of in (ops.cos, ops.sin))
        return cos, sin

    def _rotated(self, heads: Any, cos: Any, sin: Any) -> Any:
        ops, half, one = self._ops, self._spec.head_size // 2, np.array([1], np.int64)
        last, end = np.array([3], np.int64), np.array([np.iinfo(np.int64).max])
        first = ops.slice(heads, 0 * one, half * one, one, last)
        second = ops.slice(heads, half * one, end, one, last)
        turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(heads, cos), ops.multiply(turned, sin))

    def _allowed(self) -> Any:
        """What is added to scores, [1, 1, T, total]: nothing up to a position, much less beyond it."""
        ops = self._ops
        total = ops.gather(ops.shape_of(self._mask), np.int64(1), np.int64(0))
        keys = ops.range(np.int64(0), total, np.int64(1), "i64")
        seen = ops.less_equal(keys, ops.unsqueeze(self._positions, np.int64(2)))
        return ops.unsqueeze(ops.select(seen, np.float32(0), np.finfo(np.float32).min), np.int64(1))

    def _heads(self, normed: Any, part: str, layer: int, count: int) -> Any:
        """[1, heads, T, head_size]"""
        ops = self._ops
        rows = self._product(normed, self._weights.matrix(part, layer))
        split = ops.reshape(rows, np.array([0, 0, count, self._spec.head_size]), True)
        return ops.transpose(split, np.array([0, 2, 1, 3]))

    def _attention(self, normed: Any, layer: int, cos: Any, sin: Any, allowed: Any) -> Any:
        ops, spec = self._ops, self._spec
        query = self._rotated(self._heads(normed, "q", layer, spec.heads), cos, sin)
        key = self._rotated(self._heads(normed, "k", layer, spec.kv_heads), cos, sin)
        keys = self._appended(key, f"past_key_values.{layer}.key")
        values = self._appended(self._heads(normed, "v", layer, spec.kv_heads), f"past_key_values.{layer}.value")
        if spec.heads != spec.kv_heads:
            keys, values = (self._repeated(each) for each in (keys, values))
        mixed = ops.scaled_dot_product_attention(query, keys, values, allowed)
        together = ops.reshape(
            ops.transpose(mixed, np.array([0, 2, 1, 3])), np.array([0, 0, spec.heads * spec.head_size]), True
        )
        return self._product(together, self._weights.matrix("o", layer))

    def _appended(self, new: Any, name: str) -> Any:
        """The state ``name`` and ``new`` after it, which is the state from then on."""
        ops, spec = self._ops, self._spec
        batch = ops.gather(ops.shape_of(self._ids), np.array([0]), np.int64(0))
        sizes = ops.concat([batch, *(np.array([size]) for size in (spec.kv_heads, 0, spec.head_size))], 0)
        empty = ops.broadcast(np.float32(0), sizes)
        state = ops.read_value(empty, name, np.float32, [-1, spec.kv_heads, -1, spec.head_size])
        past = ops.gather(state, self._beams, np.int64(0))
        whole = ops.concat([past, new], 2)
        self._assigned.append(ops.assign(whole, name))
        return whole

    def _repeated(self, heads: Any) -> Any:
        """Each head for all queries that share it."""
        ops, spec = self._ops, self._spec
        shared = ops.unsqueeze(heads, np.int64(2))
        sizes = np.array([1, 1, spec.heads // spec.kv_heads, 1, 1])
        wide = ops.broadcast(shared, sizes, "BIDIRECTIONAL")
        return ops.reshape(wide, np.array([0, spec.heads, -1, spec.head_size]), True)

    def _feed_forward(self, normed: Any, layer: int) -> Any:
        ops = self._ops
        gate, up = (self._product(normed, self._weights.matrix(part, layer)) for part in ("gate", "up"))
        return self._product(ops.multiply(ops.swish(gate), up), self._weights.matrix("down", layer))
