"""The molecule encoder's dense graph computes what GraphMVP's message passing computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import add_self_loops

from biomedgpt_edge import Molecule
from biomedgpt_edge.molecule_graph import dense
from biomedgpt_export.families.tensors import gin_tensors
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import GinConfig
from biomedgpt_export.graphs.gin import build_gin
from biomedgpt_export.graphs.linear import Linears, Precision

MOLECULES = [
    "C",
    "[Na+].[Cl-]",
    "CCO",
    "CC(=O)Oc1ccccc1C(=O)O",
    "C#N",
    "F/C=C/F",
    "F/C=C\\F",
    "N[C@@H](C)C(=O)O",
    "C1CC2CCC1CC2",
    "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O",
    "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "[U]",
]


class GINConv(MessagePassing):
    """As in GraphMVP: summed messages, an embedding per edge, self loops of bond type 4 and direction 0."""

    def __init__(self, width: int) -> None:
        super().__init__(aggr="add")
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.edge_embedding1 = nn.Embedding(6, width)
        self.edge_embedding2 = nn.Embedding(3, width)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_attr: torch.Tensor) -> torch.Tensor:
        edge_index, _ = add_self_loops(edge_index, num_nodes=x.size(0))
        loops = torch.zeros(x.size(0), 2, dtype=edge_attr.dtype)
        loops[:, 0] = 4
        edge_attr = torch.cat((edge_attr, loops), dim=0)
        edges = self.edge_embedding1(edge_attr[:, 0]) + self.edge_embedding2(edge_attr[:, 1])
        return self.propagate(edge_index, x=x, edge_attr=edges)

    def message(self, x_j: torch.Tensor, edge_attr: torch.Tensor) -> torch.Tensor:
        return x_j + edge_attr

    def update(self, aggr_out: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(aggr_out)
        return result


class GNN(nn.Module):
    """As in GraphMVP, JK "last", without dropout."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.x_embedding1 = nn.Embedding(120, width)
        self.x_embedding2 = nn.Embedding(3, width)
        self.gnns = nn.ModuleList(GINConv(width) for _ in range(layers))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_attr: torch.Tensor) -> torch.Tensor:
        h = self.x_embedding1(x[:, 0]) + self.x_embedding2(x[:, 1])
        for layer, (gnn, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True)):
            h = norm(gnn(h, edge_index, edge_attr))
            if layer + 1 < len(self.gnns):
                h = torch.relu(h)
        return h


def oracle(layers: int, width: int) -> GNN:
    torch.manual_seed(0)
    model = GNN(layers, width).eval()
    with torch.no_grad():
        for norm in model.batch_norms:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(1e-3, 2.0)
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_(0, 0.3)
    return model


def session(folder: Path, model: GNN, layers: int, width: int, precision: Precision) -> ort.InferenceSession:
    path = folder / "molecule_encoder.onnx"
    graph = GraphBuilder(path)
    build_gin(graph, GinConfig(layers, width), lambda key: model.state_dict()[key], Linears(precision))
    graph.save()
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("layers", "width"), [(1, 8), (2, 30), (5, 300), (3, 65)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features_are_those_of_message_passing(tmp_path: Path, layers: int, width: int, precision: Precision) -> None:
    model = oracle(layers, width)
    opened = session(tmp_path, model, layers, width, precision)
    for smiles in MOLECULES:
        graph = Molecule.from_smiles(smiles).graph
        bonds = torch.from_numpy(graph.bonds.copy())
        edges = torch.stack([bonds[:, :2], bonds[:, :2].flip(1)], 1).reshape(-1, 2).T
        kinds = bonds[:, 2:].repeat_interleave(2, 0)
        with torch.inference_mode():
            expected = model(torch.from_numpy(graph.atoms.copy()), edges, kinds).numpy()
        feeds = dense(graph)
        (found,) = opened.run(
            None,
            {
                "atom_type": feeds.atom_type,
                "chirality": feeds.chirality,
                "adjacency": feeds.adjacency,
                "edge_counts": feeds.edge_counts,
            },
        )
        assert found.shape == (len(graph.atoms), width)
        tolerance = {"fp32": 1e-5, "fp16": 5e-3}[precision]
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), smiles


def test_the_tensors_a_checkpoint_must_have_are_those_of_graphmvp() -> None:
    theirs = {key: tuple(value.shape) for key, value in oracle(5, 300).state_dict().items() if "num_batches" not in key}
    assert dict(gin_tensors(GinConfig(5, 300))) == theirs
