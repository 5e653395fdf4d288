"""The bundle's decoder as a GGUF for llama.cpp, in blocks of Q4_0 or Q4_K, the head in Q6_K as its quantizer makes it.

Q4_0 holds the bundle's int4 exactly, a scale for every 32 columns where the bundle has one for a group. Q4_K and Q6_K
have scales of 6 and 8 bits relative to one for 256 columns, so that weights are off by up to 1.5 % of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biomedgpt_edge.manifest import DecoderSpec
from peer_models import Matrix, Models, Weights

Blocks = npt.NDArray[np.uint8]

SUPERBLOCK = 256


def gguf_file(models: Models, kind: str) -> Path:
    """A file of ``kind``, "Q4_0" or "Q4_K".

    Raises:
        ValueError: rows are no whole number of blocks, or see `Weights.matrix`.
    """
    import gguf

    path = models.folder / f"{kind.lower()}.gguf"
    if path.exists():
        return path
    weights = Weights(models.portable)
    models.folder.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(staging), "llama")
    _write_facts(writer, weights.spec)
    tensors = list(_tensors(weights, kind))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, *tensor.layout())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
    writer.close()
    return staging.replace(path)


def _write_facts(writer: Any, spec: DecoderSpec) -> None:
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_dimension_count(spec.head_size)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocabulary)
    # Ids are given, so the pieces need only be different.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(spec.vocabulary)])
    writer.add_token_scores([0.0] * spec.vocabulary)
    writer.add_token_types([1] * spec.vocabulary)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@dataclass(frozen=True)
class _Tensor:
    """What is written as ``name``: ``kind`` is a GGML type, ``shape`` [out, in] or [size], ``read`` gives the data."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]

    def layout(self) -> tuple[tuple[int, ...], Any, int, Any]:
        """Shape and dtype of the data, its bytes, its GGML type.

        Raises:
            ValueError: rows are no whole number of blocks.
        """
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        if self.shape[-1] % values:
            raise ValueError(f"rows of {self.shape[-1]} values are no whole number of {self.kind} blocks of {values}")
        *rows, row = self.shape
        bytes_of_row = row // values * size
        plain = {"F32": np.float32, "F16": np.float16}.get(self.kind)
        shape = self.shape if plain else (*rows, bytes_of_row)
        return shape, np.dtype(plain or np.uint8), int(np.prod(rows, dtype=int)) * bytes_of_row, kind


def _tensors(weights: Weights, kind: str) -> Iterator[_Tensor]:
    spec = weights.spec
    hidden, ffn, head = spec.hidden_size, spec.intermediate_size, spec.head_size
    query, kv = spec.heads * head, spec.kv_heads * head
    table = (spec.vocabulary, hidden)
    yield _Tensor("token_embd.weight", "F16", table, lambda: weights.table.astype(np.float16))
    yield _Tensor("output_norm.weight", "F32", (hidden,), lambda: weights.norm("attention", spec.layers))
    yield _Tensor("output.weight", "Q6_K", table, lambda: q6_k(weights.head()))
    shapes = {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}
    shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    encode = {"Q4_0": q4_0, "Q4_K": q4_k}[kind]
    for layer in range(spec.layers):
        for norm, name in (("attention", "attn_norm"), ("ffn", "ffn_norm")):
            read = lambda norm=norm, layer=layer: weights.norm(norm, layer)  # noqa: E731
            yield _Tensor(f"blk.{layer}.{name}.weight", "F32", (hidden,), read)
        for part, shape in shapes.items():
            read = lambda part=part, layer=layer: encode(_rows_of_llama(weights.matrix(part, layer), part, head))  # noqa: E731
            yield _Tensor(f"blk.{layer}.{names[part]}.weight", kind, shape, read)


def _rows_of_llama(matrix: Matrix, part: str, head_size: int) -> Matrix:
    """llama.cpp rotates neighbours, the bundle's graph the halves of a head: rows of queries and keys are reordered."""
    if part not in "qk":
        return matrix
    rows = np.arange(len(matrix.levels)).reshape(-1, 2, head_size // 2)
    return matrix.rows(rows.swapaxes(1, 2).reshape(-1))


def q4_0(matrix: Matrix) -> Blocks:
    """Of 32 columns: the scale, then levels, those of the first half in the low nibbles."""
    levels = matrix.levels.reshape(len(matrix.levels), -1, 2, 16)
    blocks = np.empty((*levels.shape[:2], 18), np.uint8)
    blocks[..., :2] = _bytes_of(_scales_of(matrix, 32))
    blocks[..., 2:] = levels[:, :, 0] | levels[:, :, 1] << 4
    return _by_row(blocks)


def q4_k(matrix: Matrix) -> Blocks:
    """Of 256 columns: a scale of scales and one of minima, 8 of 6 bits each, then levels.

    A weight is ``d * scale * level - dmin * minimum``. Scales have no sign: where the bundle's is negative, levels
    count from the other end. With ``dmin`` of ``8 * d``, minima are nearly the scales.
    """
    own = _scales_of(matrix, 32)
    d, scales = _split(own, 8, 63)
    signs = np.sign(own.reshape(scales.shape))
    sizes = np.abs(scales).astype(np.uint8)
    minima = np.rint(np.where(signs < 0, 7 / 8, 1) * sizes).astype(np.uint8)
    levels = matrix.levels.reshape(*d.shape, 8, 32)
    levels = np.where(signs[..., np.newaxis] < 0, 15 - levels, levels).reshape(*d.shape, 4, 2, 32)
    blocks = np.empty((*d.shape, 144), np.uint8)
    blocks[..., 0:2] = _bytes_of(d)
    blocks[..., 2:4] = _bytes_of(8 * d)
    for start, sixes in ((4, sizes), (8, minima)):
        blocks[..., start : start + 4] = sixes[..., :4] | sixes[..., 4:] >> 4 << 6
    blocks[..., 12:16] = sizes[..., 4:] & 15 | minima[..., 4:] << 4
    blocks[..., 16:] = (levels[..., 0, :] | levels[..., 1, :] << 4).reshape(*d.shape, 128)
    return _by_row(blocks)


def q6_k(matrix: Matrix) -> Blocks:
    """Of 256 columns: low four bits of ``level - 8 + 32``, high two bits, 16 scales of 8 bits, their scale."""
    d, scales = _split(_scales_of(matrix, 16), 16, 127)
    values = (matrix.levels + np.uint8(32 - 8)).reshape(*d.shape, 2, 4, 32)
    blocks = np.empty((*d.shape, 210), np.uint8)
    low = values[..., :2, :] & 15 | values[..., 2:, :] << 4
    high = values >> 4
    blocks[..., :128] = low.reshape(*d.shape, 128)
    pairs = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    blocks[..., 128:192] = pairs.reshape(*d.shape, 64)
    blocks[..., 192:208] = scales.view(np.uint8)
    blocks[..., 208:] = _bytes_of(d)
    return _by_row(blocks)


def _scales_of(matrix: Matrix, columns: int) -> npt.NDArray[np.float16]:
    """A scale for each ``columns``, a divisor of the group size, [N, K / columns]."""
    group = matrix.levels.shape[1] // matrix.scales.shape[1]
    return np.repeat(matrix.scales, group // columns, axis=1)


def _split(
    scales: npt.NDArray[np.float16], count: int, most: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int8]]:
    """``count`` scales each as one float16 times whole numbers of at most ``most``: [N, blocks], [N, blocks, count]."""
    together = scales.astype(np.float32).reshape(len(scales), -1, count)
    d = (np.abs(together).max(axis=-1) / most).astype(np.float16)
    divisor = np.where(d == 0, np.float16(1), d).astype(np.float32)
    return d, np.clip(np.rint(together / divisor[..., np.newaxis]), -most, most).astype(np.int8)


def _bytes_of(scales: npt.NDArray[np.float16]) -> Blocks:
    return np.ascontiguousarray(scales)[..., np.newaxis].view(np.uint8)


def _by_row(blocks: Blocks) -> Blocks:
    return blocks.reshape(len(blocks), -1)
