"""Llama and ESM-2 one layer at a time, over many sequences at once.

Only one layer's weights are needed at any moment, so that a model of any size can be run. What a linear layer computes
is up to the caller (a :class:`LinearStep`): with the checkpoint's matrices, with those of a bundle, or with matrices
that are quantized at that very moment, for the activations that enter them. Everything in between is float32.

Sequences lie one after another in the rows of ``[N, hidden]``; attention is what tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from .graphs.config import EsmConfig, LlamaConfig
from .graphs.decoder import rope_tables
from .graphs.matrices import HEAD, Matrix, Weights, esm_matrices, llama_matrices

# Rows whose wide intermediate results are in memory at once.
_ROWS_AT_ONCE = 2048


# Multiplies rows [n, K] by one matrix and adds its bias.
Product = Callable[[torch.Tensor], torch.Tensor]


class LinearStep(Protocol):
    """Decides what the linear layers that read the same activations compute."""

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        """Is given all activations, float32 ``[N, K]``, and returns one product per matrix."""
        ...


class ExactStep:
    """Computes with the checkpoint's own matrices."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        return [product(matrix.weight(self._weights), matrix.bias_vector(self._weights)) for matrix in matrices]


def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """``rows @ weight.T + bias``, in float32."""
    weight, bias = weight.float(), None if bias is None else bias.float()
    return lambda rows: F.linear(rows, weight, bias)


class StreamedLlama:
    """``LlamaForCausalLM``.

    Args:
        weights: tensors by their names in transformers.
    """

    def __init__(self, config: LlamaConfig, weights: Weights) -> None:
        self.layers = config.layers
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
        (project,) = step(matrices("qkv"), normed)
        attended = self._attended(project(normed), lengths)
        (output,) = step(matrices("o"), attended)
        hidden = hidden + output(attended)
        normed = self._normed(hidden, f"{key}.post_attention_layernorm")
        gate, up = step(matrices("gate", "up"), normed)
        gated = torch.cat([F.silu(gate(rows)) * up(rows) for rows in normed.split(_ROWS_AT_ONCE)])
        (down,) = step(matrices("down"), gated)
        return hidden + down(gated)

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads, from the residual stream after the last layer."""
        return self._normed(hidden, "model.norm")

    def head(self) -> Matrix:
        """The head, which is the embedding table where that is tied."""
        return self._matrices[HEAD]

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        gain = self._weights(f"{name}.weight").float()
        return F.rms_norm(hidden, gain.shape, gain, self._config.norm_eps)

    def _attended(self, projected: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        config = self._config
        sizes = [config.heads * config.head_size, *[config.kv_heads * config.head_size] * 2]
        return _attention(projected.split(sizes, 1), lengths, config.head_size, config.rope_base, causal=True)


class StreamedEsm:
    """``EsmModel`` of ESM-2.

    Args:
        weights: tensors by their names in transformers.
    """

    def __init__(self, config: EsmConfig, weights: Weights) -> None:
        self.layers = config.layers
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
        projections = step(matrices("query", "key", "value"), normed)
        attended = _attention(
            [project(normed) for project in projections], lengths, self._config.head_size, self._config.rope_base
        )
        (output,) = step(matrices("attention_output"), attended)
        hidden = hidden + output(attended)
        normed = self._normed(hidden, f"{key}.LayerNorm")
        (widen,) = step(matrices("intermediate"), normed)
        inner = torch.cat([F.gelu(widen(rows)) for rows in normed.split(_ROWS_AT_ONCE)])
        (narrow,) = step(matrices("output"), inner)
        return hidden + narrow(inner)

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The encoder's features, from the residual stream after the last layer."""
        return self._normed(hidden, "encoder.emb_layer_norm_after")

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        gain, shift = self._weights(f"{name}.weight").float(), self._weights(f"{name}.bias").float()
        return F.layer_norm(hidden, gain.shape, gain, shift, self._config.norm_eps)


def _attention(
    projected: Sequence[torch.Tensor], lengths: Sequence[int], head_size: int, rope_base: float, *, causal: bool = False
) -> torch.Tensor:
    """Attention inside each sequence of queries, keys and values ``[N, heads * head_size]``, rotated by position."""
    longest = max(lengths)
    cos, sin = (torch.from_numpy(table).unsqueeze(1) for table in rope_tables(longest, head_size, rope_base))
    attended = []
    for query, key, value in zip(*(part.split(list(lengths)) for part in projected), strict=True):
        count = len(query)
        heads = [part.view(count, -1, head_size) for part in (query, key, value)]
        heads[:2] = [_rotated(part, cos[:count], sin[:count]) for part in heads[:2]]
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        attended.append(mixed[0].transpose(0, 1).reshape(count, -1))
    return torch.cat(attended)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[T, heads, d]`` with value i turned against value i + d/2, by angles ``[T, 1, d/2]``."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
