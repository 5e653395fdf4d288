"""ESM-2 as a graph, up to but without its final LayerNorm, which is folded into the projection (see ``splice``)."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from .builder import CONTRIB, GraphBuilder
from .config import EsmConfig
from .decoder import Report, Weights, rope_tables
from .linear import Linears


def build_esm(graph: GraphBuilder, config: EsmConfig, weights: Weights, linears: Linears, report: Report) -> None:
    """Adds the encoder to ``graph``.

    Graph input ``residue_ids`` int64 ``[1, L + 2]``; output ``residue_features`` float32 ``[1, L + 2, hidden]``.

    Args:
        weights: tensors by their names in transformers' ``EsmModel``.
    """
    ids = graph.input("residue_ids", TensorProto.INT64, [1, "residues"])
    table = weights("embeddings.word_embeddings.weight").float()
    if config.token_dropout:
        # No <mask> ever reaches the encoder, so its rescaling of the embeddings is a constant of the table.
        table = table * EsmConfig.TOKEN_DROPOUT_SCALE
    hidden = graph.node("Gather", [graph.tensor("word_embeddings", table.numpy()), ids], "embedded")
    cos, sin = rope_tables(config.context, config.head_size, config.rope_base)
    graph.tensor("rope_cos", cos)
    graph.tensor("rope_sin", sin)
    graph.tensor("first_position", np.array([0], np.int64))
    for layer in range(config.layers):
        name, key = f"layers.{layer}", f"encoder.layer.{layer}"
        normed = _norm(graph, f"{name}.attention_norm", hidden, f"{key}.attention.LayerNorm", config, weights)
        attended = _attention(graph, config, name, f"{key}.attention", normed, weights, linears)
        hidden = graph.node("Add", [hidden, attended], f"{name}.after_attention")
        normed = _norm(graph, f"{name}.ffn_norm", hidden, f"{key}.LayerNorm", config, weights)
        inner = _linear(graph, normed, f"{name}.intermediate", f"{key}.intermediate.dense", weights, linears)
        inner = graph.node("Gelu", [inner], f"{name}.gelu", domain=CONTRIB)
        outer = _linear(graph, inner, f"{name}.output", f"{key}.output.dense", weights, linears)
        last = layer + 1 == config.layers
        hidden = graph.node("Add", [hidden, outer], "residue_features" if last else f"{name}.after_ffn")
        report(f"protein encoder layer {layer + 1} of {config.layers}")
    graph.output("residue_features", TensorProto.FLOAT, [1, "residues", config.hidden_size])


def _attention(
    graph: GraphBuilder, config: EsmConfig, name: str, key: str, normed: str, weights: Weights, linears: Linears
) -> str:
    query, key_states, value = (
        _linear(graph, normed, f"{name}.{part}", f"{key}.self.{part}", weights, linears)
        for part in ("query", "key", "value")
    )
    rotated = [
        graph.node(
            "RotaryEmbedding", [source, "first_position", "rope_cos", "rope_sin"], f"{source}.rotated", domain=CONTRIB
        )
        for source in (query, key_states)
    ]
    # ESM scales the query before rotating it; rotation is linear, so scaling the product afterwards is the same.
    attended = graph.node(
        "MultiHeadAttention", [*rotated, value], f"{name}.attention", domain=CONTRIB, num_heads=config.heads
    )
    return _linear(graph, attended, f"{name}.attention_output", f"{key}.output.dense", weights, linears)


def _linear(graph: GraphBuilder, source: str, name: str, key: str, weights: Weights, linears: Linears) -> str:
    weight: torch.Tensor = weights(f"{key}.weight")
    return linears.emit(graph, source, name, weight, weights(f"{key}.bias"))


def _norm(graph: GraphBuilder, name: str, source: str, key: str, config: EsmConfig, weights: Weights) -> str:
    gamma = graph.tensor(f"{name}.weight", weights(f"{key}.weight").float().numpy())
    beta = graph.tensor(f"{name}.bias", weights(f"{key}.bias").float().numpy())
    return graph.node("LayerNormalization", [source, gamma, beta], name, axis=-1, epsilon=config.norm_eps)
