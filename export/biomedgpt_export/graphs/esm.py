"""ESM-2 as a graph, up to but without its final LayerNorm, which is folded into the projection (see ``splice``)."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from .builder import CONTRIB, GraphBuilder
from .config import EsmConfig
from .decoder import Report, rope_tables
from .linear import Linears
from .matrices import Matrix, Weights, esm_matrices


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
    matrices = esm_matrices(config)
    for layer in range(config.layers):
        name, key = f"layers.{layer}", f"encoder.layer.{layer}"
        normed = _norm(graph, f"{name}.attention_norm", hidden, f"{key}.attention.LayerNorm", config, weights)
        attended = _attention(graph, config, name, normed, weights, linears, matrices)
        hidden = graph.node("Add", [hidden, attended], f"{name}.after_attention")
        normed = _norm(graph, f"{name}.ffn_norm", hidden, f"{key}.LayerNorm", config, weights)
        inner = linears.emit_matrix(graph, normed, matrices[f"{name}.intermediate"], weights)
        inner = graph.node("Gelu", [inner], f"{name}.gelu", domain=CONTRIB)
        outer = linears.emit_matrix(graph, inner, matrices[f"{name}.output"], weights)
        last = layer + 1 == config.layers
        hidden = graph.node("Add", [hidden, outer], "residue_features" if last else f"{name}.after_ffn")
        report(f"protein encoder layer {layer + 1} of {config.layers}")
    graph.output("residue_features", TensorProto.FLOAT, [1, "residues", config.hidden_size])


def _attention(
    graph: GraphBuilder,
    config: EsmConfig,
    name: str,
    normed: str,
    weights: Weights,
    linears: Linears,
    matrices: dict[str, Matrix],
) -> str:
    query, key, value = (
        linears.emit_matrix(graph, normed, matrices[f"{name}.{part}"], weights) for part in ("query", "key", "value")
    )
    rotated = [
        graph.node(
            "RotaryEmbedding", [source, "first_position", "rope_cos", "rope_sin"], f"{source}.rotated", domain=CONTRIB
        )
        for source in (query, key)
    ]
    # ESM scales the query before rotating it; rotation is linear, so scaling the product afterwards is the same.
    attended = graph.node(
        "MultiHeadAttention", [*rotated, value], f"{name}.attention", domain=CONTRIB, num_heads=config.heads
    )
    return linears.emit_matrix(graph, attended, matrices[f"{name}.attention_output"], weights)


def _norm(graph: GraphBuilder, name: str, source: str, key: str, config: EsmConfig, weights: Weights) -> str:
    gamma = graph.tensor(f"{name}.weight", weights(f"{key}.weight").float().numpy())
    beta = graph.tensor(f"{name}.bias", weights(f"{key}.bias").float().numpy())
    return graph.node("LayerNormalization", [source, gamma, beta], name, axis=-1, epsilon=config.norm_eps)
