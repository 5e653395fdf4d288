"""The demo's modules compute what ``transformers`` and OpenBioMed's GIN compute from the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rdkit import Chem
from torch import Tensor
from transformers import EsmConfig, EsmModel, LlamaConfig, LlamaForCausalLM

from biomedgpt_edge.molecule_graph import featurize
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export.demo.model import (
    SHORT,
    DemoConfig,
    DemoModel,
    TrainingHeads,
    attend,
    causal_mask,
    graph_batch,
    rotary_tables,
    rotate,
)
from biomedgpt_export.demo.release import write_release

TINY = DemoConfig(
    pieces=61, hidden=32, layers=3, heads=2, ffn=48, esm_hidden=32, esm_layers=2, esm_heads=2, esm_ffn=64,
    gin_hidden=20, gin_layers=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DemoModel:
    """A tiny model after a few steps, so that norms, biases and batch statistics are not at their initial values."""
    torch.manual_seed(0)
    model = DemoModel(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    graph = graph_of("CC(=O)Oc1ccccc1C(=O)O")
    ids = torch.tensor(residue_ids("MKVLAAGICLRW"))[None]
    for _ in range(4):
        soft = [
            model.proj_mol(model.mol_structure_encoder(graph)),
            model.proj_prot(model.prot_structure_encoder(ids))[0],
        ]
        final, _ = model.llm.model(torch.cat(soft)[None])
        loss = F.cross_entropy(model.llm.lm_head(final)[0], torch.arange(final.shape[1]) % TINY.pieces)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = folder / "some.model"
    tokenizer.write_bytes(b"not read here")
    write_release(model, tokenizer, folder, {})
    return folder


def graph_of(smiles: str) -> object:
    graph = featurize(Chem.MolFromSmiles(smiles))
    return graph_batch(torch.tensor(graph.atoms), torch.tensor(graph.bonds))


def config(checkpoint: Path, folder: str) -> dict[str, object]:
    return json.loads((checkpoint / folder / "config.json").read_text())


def read_back(checkpoint: Path) -> DemoModel:
    """The demo's own modules with the weights that were written."""
    model = DemoModel(TINY)
    model.load_state_dict(stored(checkpoint, ""))
    return model.eval()


def stored(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    tensors = torch.load(checkpoint / "fusion_ckpts/biomedgpt_10b.pth", weights_only=True)
    return {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("length", [1, 17, SHORT + 3])
def test_llama_equals_transformers(checkpoint: Path, length: int) -> None:
    written = {**config(checkpoint, "text_ckpts/biomedgpt-lm-7b"), "vocab_size": TINY.pieces + 1}
    reference = LlamaForCausalLM(LlamaConfig(**written)).eval()
    reference.load_state_dict(stored(checkpoint, "llm."))
    model = read_back(checkpoint)
    embedded = 0.1 * torch.randn(2, length, TINY.hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.llm.lm_head(model.llm.model(embedded)[0])
        theirs = reference(inputs_embeds=embedded).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_esm_equals_transformers(checkpoint: Path) -> None:
    reference = EsmModel(EsmConfig(**config(checkpoint, "protein_ckpts/esm2-3b")), add_pooling_layer=False).eval()
    problems = reference.load_state_dict(stored(checkpoint, "prot_structure_encoder."), strict=False)
    assert not problems.unexpected_keys
    assert all("inv_freq" in key or "contact_head" in key for key in problems.missing_keys)
    model = read_back(checkpoint)
    sequences = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "GAVLXW"]
    ids = torch.ones(2, 35, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence) + 2] = torch.tensor(residue_ids(sequence))
    with torch.no_grad():
        ours = model.prot_structure_encoder(ids)
        theirs = reference(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
    for row, sequence in enumerate(sequences):
        valid = slice(0, len(sequence) + 2)
        torch.testing.assert_close(ours[row, valid], theirs[row, valid], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1C(=O)O", "F/C=C\\F", "[Na+].[Cl-]", "C", "N[C@@H](C)C(=O)O"])
def test_gin_equals_the_specification(checkpoint: Path, smiles: str) -> None:
    """The layer equations, written out edge by edge in numpy and float64."""
    weights = {key: value.double().numpy() for key, value in stored(checkpoint, "mol_structure_encoder.").items()}
    graph = featurize(Chem.MolFromSmiles(smiles))
    h = weights["x_embedding1.weight"][graph.atoms[:, 0]] + weights["x_embedding2.weight"][graph.atoms[:, 1]]
    for k in range(TINY.gin_layers):
        of_type, of_direction = (weights[f"gnns.{k}.edge_embedding{i}.weight"] for i in (1, 2))
        gathered = h + of_type[4] + of_direction[0]
        for begin, end, kind, direction in graph.bonds:
            for source, target in ((begin, end), (end, begin)):
                gathered[target] += h[source] + of_type[kind] + of_direction[direction]
        inner = np.maximum(gathered @ weights[f"gnns.{k}.mlp.0.weight"].T + weights[f"gnns.{k}.mlp.0.bias"], 0)
        outer = inner @ weights[f"gnns.{k}.mlp.2.weight"].T + weights[f"gnns.{k}.mlp.2.bias"]
        norm = {name: weights[f"batch_norms.{k}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        h = (outer - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
        if k < TINY.gin_layers - 1:
            h = np.maximum(h, 0)
    with torch.no_grad():
        ours = read_back(checkpoint).mol_structure_encoder(graph_of(smiles))
    np.testing.assert_allclose(ours.numpy(), h, atol=2e-4, rtol=1e-4)


def test_rms_norm_has_the_gradient_of_the_built_in_one(model: DemoModel) -> None:
    norm = model.llm.model.norm
    x = torch.randn(3, 5, TINY.hidden, requires_grad=True)
    direction = torch.randn_like(x)
    results = []
    for out in (norm(x), F.rms_norm(x, (TINY.hidden,), norm.weight, TINY.rms_eps)):
        results.append((out, *torch.autograd.grad(out, [x, norm.weight], direction)))
    for ours, builtin in zip(*results, strict=True):
        torch.testing.assert_close(ours, builtin, atol=1e-5, rtol=1e-5)


def test_short_attention_equals_the_fused_one() -> None:
    q, k, v = torch.randn(3, 2, 4, 11, 8).unbind(0)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, causal_mask(11, q), causal=True), fused)


def test_rotary_positions_are_relative() -> None:
    tables = rotary_tables(20, 8, 10000.0, torch.zeros(1))
    q, k = (torch.randn(1, 1, 16).expand(1, 20, 16) for _ in range(2))
    scores = rotate(q, 2, tables) @ rotate(k, 2, tables).transpose(-1, -2)
    torch.testing.assert_close(scores[0, 0, 3, 1], scores[0, 0, 17, 15], atol=1e-4, rtol=1e-4)


def test_padding_does_not_change_a_protein(model: DemoModel) -> None:
    ids = torch.tensor(residue_ids("MKVLAAGIC"))
    padded = torch.ones(2, 30, dtype=torch.long)
    padded[0, : len(ids)] = ids
    padded[1, :] = torch.tensor(residue_ids("G" * 28))
    with torch.no_grad():
        alone, together = model.prot_structure_encoder(ids[None])[0], model.prot_structure_encoder(padded)[0]
    torch.testing.assert_close(together[: len(ids)], alone, atol=1e-5, rtol=1e-4)


def test_the_loss_of_what_is_found_adds_up_over_its_classes() -> None:
    heads = TrainingHeads(
        TINY, groups=2, atom_classes=(), locations=2, learnt=1, count_classes=(), found_classes=(2, 4)
    )
    with torch.no_grad():
        heads.found.weight.zero_()
        heads.found.bias.copy_(torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    states, found = torch.randn(2, TINY.hidden), torch.tensor([[0, 3], [0, 1]])
    torch.testing.assert_close(heads.found_loss(states, found), torch.tensor(4.0).log())
    found[1, 0] = 1
    torch.testing.assert_close(heads.found_loss(states, found), torch.tensor(4.0).log() + 25)
