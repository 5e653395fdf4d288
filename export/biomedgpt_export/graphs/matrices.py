"""Which matrices of a checkpoint each linear layer of a graph stacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import EsmConfig, LlamaConfig

Weights = Callable[[str], torch.Tensor]

HEAD = "lm_head"


@dataclass(frozen=True)
class Matrix:
    """A linear layer.

    Attributes:
        name: in the graph.
        modules: of the checkpoint, whose rows it stacks.
        bias: whether they have one.
    """

    name: str
    modules: tuple[str, ...]
    bias: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that it stacks."""
        return tuple(f"{module}.weight" for module in self.modules)

    def weight(self, weights: Weights) -> torch.Tensor:
        """``[N, K]``, in the checkpoint's dtype."""
        parts = [weights(key) for key in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bias_vector(self, weights: Weights) -> torch.Tensor | None:
        """``[N]``, where there is one."""
        return torch.cat([weights(f"{module}.bias") for module in self.modules]) if self.bias else None


def llama_matrices(config: LlamaConfig) -> dict[str, Matrix]:
    """Those of transformers' ``LlamaForCausalLM``, by their names in the graph."""
    found = []
    for layer in range(config.layers):
        name, key = f"layers.{layer}", f"model.layers.{layer}"
        # With attention_bias, transformers' Llama has a bias on all four projections.
        bias = config.attention_bias
        projections = tuple(f"{key}.self_attn.{part}_proj" for part in "qkv")
        found += [
            Matrix(f"{name}.qkv_proj", projections, bias),
            Matrix(f"{name}.o_proj", (f"{key}.self_attn.o_proj",), bias),
            *(Matrix(f"{name}.{part}_proj", (f"{key}.mlp.{part}_proj",)) for part in ("gate", "up", "down")),
        ]
    found.append(Matrix(HEAD, ("model.embed_tokens" if config.tied_head else "lm_head",)))
    return {matrix.name: matrix for matrix in found}


def esm_matrices(config: EsmConfig) -> dict[str, Matrix]:
    """Those of transformers' ``EsmModel``, by their names in the graph."""
    modules = {
        **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    }
    return {
        f"layers.{layer}.{part}": Matrix(f"layers.{layer}.{part}", (f"encoder.layer.{layer}.{module}",), bias=True)
        for layer in range(config.layers)
        for part, module in modules.items()
    }


def esm_norm_readers(config: EsmConfig) -> dict[str, tuple[Matrix, ...]]:
    """Which of them read each LayerNorm, by its module in the checkpoint; the final one feeds none of them."""
    matrices = esm_matrices(config)
    readers = {"attention.LayerNorm": ("query", "key", "value"), "LayerNorm": ("intermediate",)}
    return {
        f"encoder.layer.{layer}.{norm}": tuple(matrices[f"layers.{layer}.{part}"] for part in parts)
        for layer in range(config.layers)
        for norm, parts in readers.items()
    }
