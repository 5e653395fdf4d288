"""Llama and ESM-2 one layer at a time, over many sequences at once.

Only one layer's weights are needed at any moment, so that a model of any size can be run. What a linear layer computes
is up to the caller (a :class:`LinearStep`): with the checkpoint's matrices, with those of a bundle, or with matrices
that are quantized at that very moment, for the activations that enter them. Everything in between is float32.

Sequences lie one after another in the rows of ``[N, hidden]``; attention is what tells them apart. All rows are kept on
the host; a device computes some of them at a time, with the matrices of the layer at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from .device import CPU, moved, returned
from .graphs.config import EsmConfig, LlamaConfig
from .graphs.decoder import rope_tables
from .graphs.matrices import HEAD, Matrix, Weights, esm_matrices, llama_matrices

# Rows that are computed at once: what is wide, or on a device, is there for so many alone.
ROWS_AT_ONCE = 2048

# Multiplies rows [n, K] by one matrix and adds its bias, on the device of that matrix.
Product = Callable[[torch.Tensor], torch.Tensor]


class LinearStep(Protocol):
    """Decides what the linear layers that read the same activations compute."""

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        """Is given all activations, float32 ``[N, K]``, and returns one product per matrix."""
        ...


class ExactStep:
    """Computes with the checkpoint's own matrices."""

    def __init__(self, weights: Weights, device: torch.device = CPU) -> None:
        self._weights = weights
        self._device = device

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        return [
            product(matrix.weight(self._weights), matrix.bias_vector(self._weights), self._device)
            for matrix in matrices
        ]


def product(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> Product:
    """``rows @ weight.T + bias``, in float32, of rows on ``device``."""
    weight, bias = moved(weight, device), None if bias is None else moved(bias, device)
    return lambda rows: F.linear(rows, weight, bias)


def rowwise(function: Product, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """float32 ``[N, M]``: ``function`` of ``rows`` ``[N, K]``, some of them at a time on ``device``."""
    first, *others = rows.split(ROWS_AT_ONCE)
    found = returned(function(moved(first, device)))
    if not others:
        return found
    # Filled piece by piece: to join them at the end would have all of it in memory twice.
    result = found.new_empty(len(rows), found.shape[1])
    result[:ROWS_AT_ONCE] = found
    for number, some in enumerate(others, 1):
        start = number * ROWS_AT_ONCE
        result[start : start + len(some)] = returned(function(moved(some, device)))
    return result


class StreamedLlama:
    """``LlamaForCausalLM``.

    Args:
        weights: tensors by their names in transformers.

    Attributes:
        device: on which the layers are computed; what goes in and comes out is on the host.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, device: torch.device = CPU) -> None:
        self.layers = config.layers
        self.device = device
        self._config = config
        self._weights = weights
        self._matrices = llama_matrices(config)

    @torch.inference_mode()
    def layer(self, index: int, hidden: torch.Tensor, lengths: Sequence[int], step: LinearStep) -> torch.Tensor:
        """The residual stream float32 ``[N, hidden]`` after layer ``index``."""
        name, key = f"layers.{index}", f"model.layers.{index}"

        def matrices(*parts: str) -> list[Matrix]:
            return [self._matrices[f"{name}.{part}_proj"] for part in parts]

        normed = self._normed(hidden, f"{key}.input_layernorm")
        # Products hold matrices, and have no names here, so that each set of them is gone before the next one comes.
        attended = self._attended(rowwise(step(matrices("qkv"), normed)[0], normed, self.device), lengths)
        hidden = rowwise(step(matrices("o"), attended)[0], attended, self.device).add_(hidden)
        normed = self._normed(hidden, f"{key}.post_attention_layernorm")
        gated = rowwise(_gated(*step(matrices("gate", "up"), normed)), normed, self.device)
        return rowwise(step(matrices("down"), gated)[0], gated, self.device).add_(hidden)

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads, from the residual stream after the last layer."""
        return self._normed(hidden, "model.norm")

    def head(self) -> Matrix:
        """The head, which is the embedding table where that is tied."""
        return self._matrices[HEAD]

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        gain = moved(self._weights(f"{name}.weight"), self.device)
        return rowwise(lambda rows: F.rms_norm(rows, gain.shape, gain, self._config.norm_eps), hidden, self.device)

    def _attended(self, projected: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        config = self._config
        sizes = [config.heads * config.head_size, *[config.kv_heads * config.head_size] * 2]
        rotary = _Rotary(max(lengths), config.head_size, config.rope_base, self.device)
        return _attention(projected.split(sizes, 1), lengths, rotary, causal=True)


class StreamedEsm:
    """``EsmModel`` of ESM-2.

    Args:
        weights: tensors by their names in transformers.

    Attributes:
        device: on which the layers are computed; what goes in and comes out is on the host.
    """

    def __init__(self, config: EsmConfig, weights: Weights, device: torch.device = CPU) -> None:
        self.layers = config.layers
        self.device = device
        self._config = config
        self._weights = weights
        self._matrices = esm_matrices(config)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[N, hidden]`` of residue ids int64 ``[N]`` without masked ones."""
        rows = F.embedding(ids, self._weights("embeddings.word_embeddings.weight").float())
        return rows * EsmConfig.TOKEN_DROPOUT_SCALE if self._config.token_dropout else rows

    @torch.inference_mode()
    def layer(self, index: int, hidden: torch.Tensor, lengths: Sequence[int], step: LinearStep) -> torch.Tensor:
        """The residual stream float32 ``[N, hidden]`` after layer ``index``."""
        name, key = f"layers.{index}", f"encoder.layer.{index}"

        def matrices(*parts: str) -> list[Matrix]:
            return [self._matrices[f"{name}.{part}"] for part in parts]

        normed = self._normed(hidden, f"{key}.attention.LayerNorm")
        projected = [
            rowwise(project, normed, self.device) for project in step(matrices("query", "key", "value"), normed)
        ]
        rotary = _Rotary(max(lengths), self._config.head_size, self._config.rope_base, self.device)
        attended = _attention(projected, lengths, rotary)
        del projected
        hidden = rowwise(step(matrices("attention_output"), attended)[0], attended, self.device).add_(hidden)
        normed = self._normed(hidden, f"{key}.LayerNorm")
        inner = rowwise(_activated(*step(matrices("intermediate"), normed)), normed, self.device)
        return rowwise(step(matrices("output"), inner)[0], inner, self.device).add_(hidden)

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The encoder's features, from the residual stream after the last layer."""
        return self._normed(hidden, "encoder.emb_layer_norm_after")

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        gain, shift = (moved(self._weights(f"{name}.{part}"), self.device) for part in ("weight", "bias"))
        return rowwise(
            lambda rows: F.layer_norm(rows, gain.shape, gain, shift, self._config.norm_eps), hidden, self.device
        )


def _gated(gate: Product, up: Product) -> Product:
    return lambda rows: F.silu(gate(rows)) * up(rows)


def _activated(widen: Product) -> Product:
    return lambda rows: F.gelu(widen(rows))


class _Rotary:
    """Turns queries and keys by their position, on ``device``."""

    def __init__(self, longest: int, head_size: int, base: float, device: torch.device) -> None:
        self.head_size = head_size
        self.device = device
        self._cos, self._sin = (
            moved(torch.from_numpy(table), device).unsqueeze(1) for table in rope_tables(longest, head_size, base)
        )

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """``[T, heads, d]`` with value i turned against value i + d/2."""
        cos, sin = self._cos[: len(states)], self._sin[: len(states)]
        first, second = states.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(
    projected: Sequence[torch.Tensor], lengths: Sequence[int], rotary: _Rotary, *, causal: bool = False
) -> torch.Tensor:
    """Attention inside each sequence of queries, keys and values ``[N, heads * head_size]``, rotated by position."""
    attended = []
    for parts in zip(*(part.split(list(lengths)) for part in projected), strict=True):
        count = len(parts[0])
        query, key, value = (moved(part, rotary.device).view(count, -1, rotary.head_size) for part in parts)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (rotary(query), rotary(key), value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        attended.append(returned(mixed[0].transpose(0, 1).reshape(count, -1)))
    return torch.cat(attended)
