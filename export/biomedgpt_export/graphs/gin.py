"""GraphMVP's GIN in dense form, h' = MLP((A + I) h + C E), BatchNorm folded into the MLP's second matrix.

Summing over edges is a product with the adjacency matrix, and the edge embeddings of an atom's edges add up to its
edge counts times the embedding table; both are exact and run on every engine.
"""

from __future__ import annotations

import torch
from onnx import TensorProto

from biomedgpt_edge.molecule_graph import BOND_DIRECTIONS, BOND_TYPES

from .builder import GraphBuilder
from .config import GinConfig
from .linear import Linears
from .matrices import Weights


def build_gin(graph: GraphBuilder, config: GinConfig, weights: Weights, linears: Linears) -> None:
    """Adds the encoder to ``graph``.

    Graph inputs as :class:`biomedgpt_edge.molecule_graph.DenseGraph`: ``atom_type`` and ``chirality`` int64 ``[N]``,
    ``adjacency`` float32 ``[N, N]``, ``edge_counts`` float32 ``[N, 9]``; output ``atom_features`` float32
    ``[N, width]``.

    Args:
        weights: tensors by their names in GraphMVP's ``GNN``.
    """
    atom_type = graph.input("atom_type", TensorProto.INT64, ["atoms"])
    chirality = graph.input("chirality", TensorProto.INT64, ["atoms"])
    adjacency = graph.input("adjacency", TensorProto.FLOAT, ["atoms", "atoms"])
    counts = graph.input("edge_counts", TensorProto.FLOAT, ["atoms", BOND_TYPES + BOND_DIRECTIONS])
    tables = [graph.tensor(f"x_embedding{i}", weights(f"x_embedding{i}.weight").float().numpy()) for i in (1, 2)]
    embedded = [
        graph.node("Gather", [table, index], f"{table}.rows")
        for table, index in zip(tables, (atom_type, chirality), strict=True)
    ]
    hidden = graph.node("Add", embedded, "embedded")
    for layer in range(config.layers):
        last = layer + 1 == config.layers
        hidden = _layer(graph, layer, hidden, adjacency, counts, weights, linears)
        hidden = graph.node("Identity" if last else "Relu", [hidden], "atom_features" if last else f"layers.{layer}")
    graph.output("atom_features", TensorProto.FLOAT, ["atoms", config.width])


def _layer(
    graph: GraphBuilder, layer: int, hidden: str, adjacency: str, counts: str, weights: Weights, linears: Linears
) -> str:
    name, key = f"layers.{layer}", f"gnns.{layer}"
    edges = torch.cat([weights(f"{key}.edge_embedding1.weight"), weights(f"{key}.edge_embedding2.weight")]).float()
    neighbours = graph.node("MatMul", [adjacency, hidden], f"{name}.neighbours")
    edge_sum = graph.node("MatMul", [counts, graph.tensor(f"{name}.edges", edges.numpy())], f"{name}.edge_sum")
    message = graph.node("Add", [neighbours, edge_sum], f"{name}.message")
    inner = linears.emit(graph, message, f"{name}.mlp.0", weights(f"{key}.mlp.0.weight"), weights(f"{key}.mlp.0.bias"))
    inner = graph.node("Relu", [inner], f"{name}.mlp.relu")
    return linears.emit(graph, inner, f"{name}.mlp.2", *folded_output(layer, weights))


def folded_output(layer: int, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The second matrix and bias of a layer's MLP with the BatchNorm behind it folded in (running statistics)."""
    key, norm = f"gnns.{layer}.mlp.2", f"batch_norms.{layer}"
    # In float64, so that folding itself adds no rounding before the result is stored.
    gamma, beta = weights(f"{norm}.weight").double(), weights(f"{norm}.bias").double()
    mean, variance = weights(f"{norm}.running_mean").double(), weights(f"{norm}.running_var").double()
    scale = gamma / torch.sqrt(variance + GinConfig.BATCH_NORM_EPS)
    weight = weights(f"{key}.weight").double() * scale.unsqueeze(1)
    bias = scale * (weights(f"{key}.bias").double() - mean) + beta
    return weight.float(), bias.float()
