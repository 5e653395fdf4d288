"""An export that computes something else than its source does not finish, whatever the mistake was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_export import exporter
from biomedgpt_export.errors import ParityError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.base import Modality
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs import decoder, gin, linear
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig, GinConfig
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize import rtn
from biomedgpt_export.quantize.int4 import Int4Weight
from biomedgpt_export.quantize.int8_groups import Int8GroupWeight, nearest_int8_groups
from biomedgpt_export.quantize.layerwise import JournalQuantizer

Patch = pytest.MonkeyPatch


def export(checkpoint: Path, out: Path, precision: str, **options: Any) -> None:
    options = {"quantizer": "rtn" if precision == "int4" else None, "proof": "none", **options}
    export_bundle(ExportOptions(Layout.locate(checkpoint), out, precision, **options), lambda line: None)  # type: ignore[arg-type]


def with_config(patch: Patch, part: str, **changes: object) -> None:
    """One graph is built from a configuration that is not the model's."""
    real = getattr(exporter, f"build_{part}")

    def build(graph: GraphBuilder, config: Any, *arguments: Any) -> None:
        real(graph, dataclasses.replace(config, **changes), *arguments)

    patch.setattr(exporter, f"build_{part}", build)


def with_weights(patch: Patch, part: str, rename: Callable[[str], str]) -> None:
    """One graph takes its weights from other keys than it should."""
    real, position = getattr(exporter, f"build_{part}"), {"decoder": 3, "esm": 2, "gin": 2}[part]

    def build(*arguments: Any) -> None:
        changed = list(arguments)
        changed[position] = lambda key: arguments[position](rename(key))
        real(*changed)

    patch.setattr(exporter, f"build_{part}", build)


def swap(one: str, other: str) -> Callable[[str], str]:
    def rename(key: str) -> str:
        return key.replace(one, "\0").replace(other, one).replace("\0", other)

    return rename


def with_node(patch: Patch, op: str, change: Callable[[list[str], dict[str, Any]], None]) -> None:
    """Every node of one operator is changed."""
    real = GraphBuilder.node

    def node(self: GraphBuilder, name: str, inputs: list[str], *arguments: Any, **attributes: Any) -> str:
        inputs = list(inputs)
        if name == op:
            change(inputs, attributes)
        return real(self, name, inputs, *arguments, **attributes)

    patch.setattr(GraphBuilder, "node", node)


def with_tables(patch: Patch, module: Any, change: Callable[..., Any]) -> None:
    real = decoder.rope_tables
    patch.setattr(module, "rope_tables", lambda *arguments: change(real, *arguments))


def with_fold(patch: Patch, change: Callable[..., Any]) -> None:
    real = gin.folded_output
    patch.setattr(gin, "folded_output", lambda layer, weights: change(real, layer, weights))


def without_mean(real: Any, layer: int, weights: Any) -> Any:
    return real(layer, lambda key: weights(key) * 0 if key.endswith("running_mean") else weights(key))


def with_other_eps(real: Any, layer: int, weights: Any) -> Any:
    offset = 1e-2 - GinConfig.BATCH_NORM_EPS
    return real(layer, lambda key: weights(key) + offset if key.endswith("running_var") else weights(key))


def without_root(real: Any, layer: int, weights: Any) -> Any:
    return real(layer, lambda key: weights(key).square() if key.endswith("running_var") else weights(key))


def of_next_layer(real: Any, layer: int, weights: Any) -> Any:
    return real(layer, lambda key: weights(key.replace(f"norms.{layer}", f"norms.{(layer + 1) % 5}")))


def without_folding_the_final_norm(patch: Patch) -> None:
    def plain(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights("proj_prot.weight").float(), self.weights("proj_prot.bias").float()

    patch.setattr(exporter._Export, "_protein_projection", plain)


def with_projection_bias_left_out(patch: Patch) -> None:
    real = exporter._save_tensors

    def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        real(path, {name: t * 0 if name == "molecule.bias" else t for name, t in tensors.items()})

    patch.setattr(exporter, "_save_tensors", save)


def with_embeddings_shifted(patch: Patch) -> None:
    real = exporter._save_tensors

    def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        real(path, {name: t.roll(1, 0) if name == "weight" else t for name, t in tensors.items()})

    patch.setattr(exporter, "_save_tensors", save)


def set_attribute(name: str, value: object) -> Callable[[list[str], dict[str, Any]], None]:
    return lambda inputs, attributes: attributes.update({name: value})


def change_to_tanh(inputs: list[str], attributes: dict[str, Any]) -> None:
    attributes.update(domain="", approximate="tanh")


def with_sliding_window(patch: Patch) -> None:
    with_node(patch, "GroupQueryAttention", set_attribute("local_window_size", 4))


def negated(values: torch.Tensor) -> torch.Tensor:
    return real_pack((-values).clamp(-8, 7))


real_pack = rtn.pack

# What goes wrong in how a graph computes.
WIRING: dict[str, Callable[[Patch], None]] = {
    "decoder: RoPE base": lambda p: with_config(p, "decoder", rope_base=500000.0),
    "decoder: RoPE base slightly off": lambda p: with_config(p, "decoder", rope_base=10100.0),
    "decoder: RoPE from position one": lambda p: with_tables(
        p, decoder, lambda real, n, size, base: tuple(np.roll(t, -1, 0) * 1.0 for t in real(n, size, base * 1.5))
    ),
    "decoder: RoPE sine negated": lambda p: with_tables(
        p, decoder, lambda real, *a: (real(*a)[0], -real(*a)[1] * np.linspace(1, 0, real(*a)[1].shape[1], dtype="f4"))
    ),
    "decoder: RoPE of neighbouring pairs": lambda p: with_node(
        p, "GroupQueryAttention", set_attribute("rotary_interleaved", 1)
    ),
    "decoder: no RoPE": lambda p: with_tables(
        p, decoder, lambda real, *a: (np.ones_like(real(*a)[0]), np.zeros_like(real(*a)[1]))
    ),
    "decoder: eps": lambda p: with_config(p, "decoder", norm_eps=1e-2),
    "decoder: sliding window": with_sliding_window,
    "decoder: attention scale": lambda p: with_node(p, "GroupQueryAttention", set_attribute("scale", 0.25)),
    "decoder: GELU for SiLU": lambda p: with_node(p, "QuickGelu", set_attribute("alpha", 1.702)),
    "decoder: norms swapped": lambda p: with_weights(p, "decoder", swap("input_layernorm", "post_attention_layernorm")),
    "decoder: final norm": lambda p: with_weights(
        p, "decoder", lambda key: key.replace("model.norm", "model.layers.0.input_layernorm")
    ),
    "protein: missing 0.88": lambda p: p.setattr(EsmConfig, "TOKEN_DROPOUT_SCALE", 1.0),
    "protein: token dropout left out": lambda p: with_config(p, "esm", token_dropout=False),
    "protein: RoPE base": lambda p: with_config(p, "esm", rope_base=500000.0),
    "protein: eps": lambda p: with_config(p, "esm", norm_eps=5e-2),
    "protein: norms swapped": lambda p: with_weights(p, "esm", swap("attention.LayerNorm", "LayerNorm")),
    "protein: GELU by tanh": lambda p: with_node(p, "Gelu", change_to_tanh),
    "protein: attention scale": lambda p: with_node(p, "MultiHeadAttention", set_attribute("scale", 1.0)),
    "protein: bias of another matrix": lambda p: with_weights(p, "esm", swap("query.bias", "value.bias")),
    "protein: final norm not folded": without_folding_the_final_norm,
    "molecule: fold without mean": lambda p: with_fold(p, without_mean),
    "molecule: fold with another eps": lambda p: with_fold(p, with_other_eps),
    "molecule: fold without root": lambda p: with_fold(p, without_root),
    "molecule: fold of the next layer": lambda p: with_fold(p, of_next_layer),
    "molecule: edge tables swapped by layer": lambda p: with_weights(
        p, "gin", lambda key: key.replace("gnns.0.edge", "gnns.1.edge")
    ),
    "molecule: no last BatchNorm": lambda p: with_weights(
        p, "gin", lambda key: key.replace("batch_norms.4.running_mean", "batch_norms.4.bias")
    ),
    "molecule: matrices of another layer": lambda p: with_weights(p, "gin", swap("gnns.1.mlp.0", "gnns.2.mlp.0")),
    "projection: bias left out": with_projection_bias_left_out,
    "embeddings: shifted by a row": with_embeddings_shifted,
}

# What goes wrong in which weights a graph holds.
WEIGHTS: dict[str, Callable[[Patch], None]] = {
    "decoder: gate and up swapped": lambda p: with_weights(p, "decoder", swap("gate_proj", "up_proj")),
    "decoder: query and key swapped": lambda p: with_weights(p, "decoder", swap("q_proj", "k_proj")),
    "decoder: key and value swapped": lambda p: with_weights(p, "decoder", swap("k_proj", "v_proj")),
    "decoder: layers swapped": lambda p: with_weights(p, "decoder", swap("layers.0.mlp.up", "layers.1.mlp.up")),
    "decoder: embeddings for head": lambda p: with_weights(
        p, "decoder", lambda key: key.replace("lm_head", "model.embed_tokens")
    ),
    "protein: query and key swapped": lambda p: with_weights(p, "esm", swap("query.weight", "key.weight")),
    "protein: layers swapped": lambda p: with_weights(
        p, "esm", swap("layer.0.intermediate.dense.weight", "layer.1.intermediate.dense.weight")
    ),
}

# What goes wrong in how int4 values are chosen or laid out.
PACKING: dict[str, Callable[[Patch], None]] = {
    "nibbles swapped": lambda p: p.setattr(rtn, "pack", lambda v: (real_pack(v) >> 4) | (real_pack(v) << 4)),
    "sign lost": lambda p: p.setattr(rtn, "pack", negated),
    "values off by one": lambda p: p.setattr(rtn, "pack", lambda v: real_pack((v + 1).clamp(-8, 7))),
    "groups of another width": lambda p: p.setattr(rtn, "grouped", lambda w, size: w.roll(1, 1).reshape(
        w.shape[0], -1, size) if w.shape[1] % size == 0 else real_grouped(w, size)),
}  # fmt: skip
real_grouped = rtn.grouped


def refused(checkpoint: Path, folder: Path, precision: str) -> None:
    with pytest.raises(
        (ParityError, BundleCorruptError),
        match=r"what the source modules compute|differs|operators that no bundle needs",
    ):
        export(checkpoint, folder / "bundle", precision)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "mistake"),
    [(p, mistake) for p in ("fp32", "int4") for mistake in WIRING],
)
def test_a_graph_that_computes_something_else_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Patch, mistake: str, precision: str
) -> None:
    WIRING[mistake](monkeypatch)
    refused(tiny_checkpoint, tmp_path, precision)


@pytest.mark.parametrize("mistake", WEIGHTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_graph_that_holds_other_weights_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Patch, mistake: str, precision: str
) -> None:
    WEIGHTS[mistake](monkeypatch)
    refused(tiny_checkpoint, tmp_path, precision)


@pytest.mark.parametrize("mistake", PACKING)
def test_int4_values_that_are_not_those_of_the_checkpoint_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Patch, mistake: str
) -> None:
    PACKING[mistake](monkeypatch)
    refused(tiny_checkpoint, tmp_path, "int4")


def of_the_head(change: Callable[[Int8GroupWeight], Int8GroupWeight]) -> Callable[[torch.Tensor], Int8GroupWeight]:
    return lambda weight: change(nearest_int8_groups(weight))


# What goes wrong in how int8 values of the head are chosen or laid out.
HEAD: dict[str, Callable[[torch.Tensor], Int8GroupWeight]] = {
    "signed values": of_the_head(lambda w: dataclasses.replace(w, packed=w.packed + 128)),
    "values off by one": of_the_head(lambda w: dataclasses.replace(w, packed=w.packed + 1)),
    "rows shifted": of_the_head(lambda w: dataclasses.replace(w, packed=w.packed.roll(1, 0))),
    "scales of another group": of_the_head(lambda w: dataclasses.replace(w, scales=w.scales.roll(1, 0))),
    "negated": lambda weight: nearest_int8_groups(-weight),
}


@pytest.mark.parametrize("mistake", HEAD)
def test_int8_values_of_the_head_that_are_not_those_of_the_checkpoint_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Patch, mistake: str
) -> None:
    monkeypatch.setattr(linear, "nearest_int8_groups", HEAD[mistake])
    with pytest.raises(ParityError, match=r"the stored matrix 'llm\.lm_head\.weight' differs"):
        export(tiny_checkpoint, tmp_path / "bundle", "int4", lm_head="int8")
    assert list(tmp_path.iterdir()) == []


# What a graph holds beside the packed values and scales that a quantizer chose.
BESIDE: dict[str, Callable[[Int4Weight], Int4Weight]] = {
    "zero points": lambda w: dataclasses.replace(
        w, zero_points=torch.full((len(w.packed), -(-w.packed.shape[1] // 2)), 0x77, dtype=torch.uint8)
    ),
    "order": lambda w: dataclasses.replace(w, order=torch.arange(w.columns - 1, -1, -1, dtype=torch.int32)),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_chosen_matrices_are_stored_without_zero_points_and_orders_that_nobody_chose(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Patch, beside: str
) -> None:
    real = JournalQuantizer.quantize
    monkeypatch.setattr(JournalQuantizer, "quantize", lambda self, key, weight: BESIDE[beside](real(self, key, weight)))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Why?", "answer": "So."}\n')
    without: list[Modality] = ["protein", "molecule"]
    options = ExportOptions(
        Layout.locate(tiny_checkpoint, without=without), tmp_path / "bundle", calibration=questions, proof="none"
    )
    with pytest.raises(ParityError, match="is not the one that was chosen"):
        export_bundle(options, lambda line: None)
    assert not options.out.exists()
