"""The Llama-shaped decoder as a graph of ONNX Runtime's contrib operators.

Inputs are embeddings, so that soft tokens and text reach it alike. The KV cache is a buffer of fixed capacity per
layer, given as ``past_*`` and returned as ``present_*``; bound to the same memory, it is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto

from biomedgpt_edge.tensor_names import ROPE_COS, ROPE_SIN

from .attention import LAST_POSITION, Attention, length_input
from .builder import CONTRIB, GraphBuilder
from .config import LlamaConfig
from .linear import Linears
from .matrices import HEAD, Matrix, Weights, llama_matrices

Report = Callable[[str], None]


def build_decoder(
    graph: GraphBuilder, config: LlamaConfig, rows: int, weights: Weights, linears: Linears, report: Report
) -> None:
    """Adds the decoder to ``graph``.

    Graph inputs: ``inputs_embeds`` float32 ``[1, T, hidden]``; ``logit_positions`` int64 ``[n]``, the positions among
    T whose logits are wanted; ``seqlens_k`` int32 ``[1]``, total positions - 1; ``total_sequence_length`` int32
    scalar; ``past_key.{i}``, ``past_value.{i}`` float32 ``[1, kv_heads, capacity, head_size]``. Outputs: ``logits``
    float32 ``[n, rows]`` and ``present_*`` like ``past_*``.

    Args:
        rows: rows of the vocabulary matrix, added tokens included.
        weights: tensors by their names in transformers' ``LlamaForCausalLM``.
    """
    hidden = graph.input("inputs_embeds", TensorProto.FLOAT, [1, "positions", config.hidden_size])
    wanted = graph.input("logit_positions", TensorProto.INT64, ["logits"])
    graph.input(LAST_POSITION, TensorProto.INT32, [1])
    graph.adopt_input(length_input())
    _add_rope_tables(graph, config)
    matrices = llama_matrices(config)
    normed = _norm(graph, "layers.0.input_layernorm", hidden, weights("model.layers.0.input_layernorm.weight"), config)
    for layer in range(config.layers):
        last = layer + 1 == config.layers
        next_norm = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
        hidden, normed = _layer(graph, config, layer, hidden, normed, next_norm, weights, linears, matrices)
        report(f"decoder layer {layer + 1} of {config.layers}")
    picked = graph.node("Gather", [normed, wanted], "picked", axis=1)
    logits = linears.emit_matrix(graph, picked, matrices[HEAD], weights)
    graph.node("Squeeze", [logits, graph.tensor("axis_0", np.array([0], np.int64))], "logits")
    graph.output("logits", TensorProto.FLOAT, ["logits", rows])


def _layer(
    graph: GraphBuilder,
    config: LlamaConfig,
    layer: int,
    residual: str,
    normed: str,
    next_norm: str,
    weights: Weights,
    linears: Linears,
    matrices: dict[str, Matrix],
) -> tuple[str, str]:
    """One decoder layer; returns the residual stream after it and that stream normed for what follows."""
    name, key = f"layers.{layer}", f"model.layers.{layer}"
    attended = _attention(graph, config, layer, normed, weights, linears, matrices)
    gain = weights(f"{key}.post_attention_layernorm.weight")
    residual, normed = _add_and_norm(graph, f"{name}.post_attention_layernorm", residual, attended, gain, config)
    gate, up = (linears.emit_matrix(graph, normed, matrices[f"{name}.{part}_proj"], weights) for part in ("gate", "up"))
    # QuickGelu with alpha 1 is SiLU, x * sigmoid(x), in one pass.
    gated = graph.node("QuickGelu", [gate], f"{name}.silu", domain=CONTRIB, alpha=1.0)
    gated = graph.node("Mul", [gated, up], f"{name}.gated")
    down = linears.emit_matrix(graph, gated, matrices[f"{name}.down_proj"], weights)
    return _add_and_norm(graph, f"{name}.next_layernorm", residual, down, weights(f"{next_norm}.weight"), config)


def _attention(
    graph: GraphBuilder,
    config: LlamaConfig,
    layer: int,
    normed: str,
    weights: Weights,
    linears: Linears,
    matrices: dict[str, Matrix],
) -> str:
    name = f"layers.{layer}"
    qkv = linears.emit_matrix(graph, normed, matrices[f"{name}.qkv_proj"], weights)
    attention = Attention.of_layer(layer, qkv, config.heads, config.kv_heads)
    attention.emit_portable(graph)
    for past, present in attention.portable_cache(config.head_size):
        graph.adopt_input(past)
        graph.adopt_output(present)
    return linears.emit_matrix(graph, attention.output, matrices[f"{name}.o_proj"], weights)


def _norm(graph: GraphBuilder, name: str, source: str, weight: torch.Tensor, config: LlamaConfig) -> str:
    gamma = graph.tensor(f"{name}.weight", weight.float().numpy())
    return graph.node(
        "SimplifiedLayerNormalization", [source, gamma], name, axis=-1, epsilon=config.norm_eps, stash_type=1
    )


def _add_and_norm(
    graph: GraphBuilder, name: str, residual: str, update: str, weight: torch.Tensor, config: LlamaConfig
) -> tuple[str, str]:
    """RMSNorm(residual + update) fused with the addition; returns the sum and the normed sum."""
    gamma = graph.tensor(f"{name}.weight", weight.float().numpy())
    graph.node(
        "SkipSimplifiedLayerNormalization", [residual, update, gamma], name, domain=CONTRIB, epsilon=config.norm_eps
    )
    graph.rename_outputs(name, [name, "", "", f"{name}.residual"])
    return f"{name}.residual", name


def _add_rope_tables(graph: GraphBuilder, config: LlamaConfig) -> None:
    cos, sin = rope_tables(config.context, config.head_size, config.rope_base)
    graph.tensor(ROPE_COS, cos)
    graph.tensor(ROPE_SIN, sin)


def rope_tables(positions: int, head_size: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``[positions, head_size / 2]`` each; angles in float32, as transformers computes them."""
    frequencies = 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos().numpy(), angles.sin().numpy()
