"""The decoder graph computes what transformers' Llama computes, prompts and steps, for any configuration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

from biomedgpt_edge.decoder.kv_cache import KvElement, kv_layout
from biomedgpt_edge.decoder.onnx import OnnxState, _signature
from biomedgpt_edge.int4_ops import OPSET, register_int4_ops
from biomedgpt_edge.manifest import RECORDS, DecoderSpec
from biomedgpt_edge.onnx_header import INT4_DOMAIN
from biomedgpt_edge.ort_session import open_session
from biomedgpt_edge.splice import EmbeddingTable
from biomedgpt_export.families.tensors import llama_tensors
from biomedgpt_export.graphs.attention import LENGTH, Attention
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import LlamaConfig
from biomedgpt_export.graphs.decoder import build_decoder
from biomedgpt_export.graphs.linear import Linears, Precision
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.rtn import RoundToNearest

ROWS, POSITIONS = 50, 40


def config(**changes: object) -> LlamaConfig:
    fields = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "head_size": 16,
        "vocabulary": ROWS - 1,
        "context": 64,
        "rope_base": 10000.0,
        "norm_eps": 1e-6,
        "attention_bias": False,
        "tied_head": False,
    }
    return LlamaConfig(**{**fields, **changes})  # type: ignore[arg-type]


CONFIGS = {
    "plain": config(),
    "grouped queries": config(kv_heads=2),
    "one KV head": config(kv_heads=1),
    "seven heads": config(hidden_size=56, heads=7, kv_heads=7),
    "attention bias": config(attention_bias=True),
    "grouped with bias": config(heads=6, kv_heads=3, head_size=32, attention_bias=True),
    "small RoPE base": config(rope_base=100.0),
    "large RoPE base": config(rope_base=1e6),
    "large eps": config(norm_eps=1e-2),
    "head size 48": config(head_size=48, kv_heads=2),
    "head size 64": config(head_size=64, heads=2, kv_heads=1),
    "tied head": config(tied_head=True),
    "one layer": config(layers=1),
    "three layers, odd widths": config(layers=3, hidden_size=52, intermediate_size=77),
}


def oracle(of: LlamaConfig, seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=ROWS,
            hidden_size=of.hidden_size,
            intermediate_size=of.intermediate_size,
            num_hidden_layers=of.layers,
            num_attention_heads=of.heads,
            num_key_value_heads=of.kv_heads,
            head_dim=of.head_size,
            max_position_embeddings=of.context,
            rope_parameters={"rope_type": "default", "rope_theta": of.rope_base},
            rms_norm_eps=of.norm_eps,
            attention_bias=of.attention_bias,
            tie_word_embeddings=of.tied_head,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains near one, so that a norm's weight matters; the rest large enough for attention to be uneven.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


@dataclass
class Case:
    session: object
    spec: DecoderSpec
    table: np.ndarray
    model: transformers.LlamaForCausalLM
    kv_cache: KvElement | None = None

    def open(self, capacity: int) -> OnnxState:
        kv, table = kv_layout(self.spec, self.spec.layout, self.kv_cache), EmbeddingTable(self.table)
        return OnnxState(self.session, self.spec, kv, table, capacity)  # type: ignore[arg-type]

    def expected(self, embeddings: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self.model(inputs_embeds=torch.from_numpy(embeddings)[None]).logits[0].numpy()
        return logits


def build(
    folder: Path, of: LlamaConfig, precision: Precision = "fp32", seed: int = 0, *, own_attention: bool = False
) -> Case:
    model = oracle(of, seed)
    path = folder / "decoder.onnx"
    graph = GraphBuilder(path)
    linears = Linears(precision, RoundToNearest() if precision == "int4" else None)
    build_decoder(graph, of, ROWS, lambda key: model.state_dict()[key], linears, lambda line: None)
    graph.save()
    spec = DecoderSpec(
        path.name,
        of.layers,
        of.hidden_size,
        of.intermediate_size,
        of.heads,
        of.kv_heads,
        of.head_size,
        ROWS,
        of.context,
        of.rope_base,
        of.norm_eps,
        of.attention_bias,
    )
    if own_attention:
        use_own_attention(path, of)
        spec = replace(spec, layout=RECORDS)
    inputs, outputs = _signature(spec, kv_layout(spec, spec.layout, None))
    session = open_session(path, threads=1, inputs=inputs, outputs=outputs, register=register_int4_ops)
    table = model.model.embed_tokens.weight.detach().numpy()
    return Case(session, spec, table, model)


def use_own_attention(path: Path, of: LlamaConfig) -> None:
    """Rewrites the graph with CausalAttention, and all else as it is."""
    model = onnx.load(str(path), load_external_data=False)
    scratch = GraphBuilder(path.with_name("scratch.onnx"))
    found = {node.output[0]: Attention.read(node) for node in model.graph.node}
    caches = {v.name: v for one in found.values() if one for pair in one.own_cache() for v in pair}
    for node in model.graph.node:
        attention = found[node.output[0]]
        if attention is not None:
            attention.emit_own(scratch)
            node.CopyFrom(scratch._nodes[-1])
    scratch.close()
    for values in (model.graph.input, model.graph.output):
        kept = [caches.get(value.name, value) for value in values if value.name != LENGTH]
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del values[:]
        values.extend(copies)
    model.opset_import.append(onnx.helper.make_opsetid(INT4_DOMAIN, OPSET))
    onnx.save(model, str(path))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_at_all_positions_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    case = build(tmp_path, CONFIGS[name])
    embeddings = np.random.default_rng(1).standard_normal((POSITIONS, case.spec.hidden_size)).astype(np.float32)
    with case.open(POSITIONS) as state:
        assert_close(state.logits(embeddings, np.arange(POSITIONS)), case.expected(embeddings))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kv_cache", "tolerance"), [("fp32", 2e-5), ("fp16", 4e-3), ("int8", 5e-2)])
def test_so_they_are_with_our_own_attention_up_to_what_the_cache_rounds(
    tmp_path: Path, name: str, kv_cache: KvElement, tolerance: float
) -> None:
    case = build(tmp_path, CONFIGS[name], own_attention=True)
    case.kv_cache = kv_cache
    embeddings = np.random.default_rng(1).standard_normal((POSITIONS, case.spec.hidden_size)).astype(np.float32)
    expected = case.expected(embeddings)
    with case.open(POSITIONS) as state:
        assert_close(state.logits(embeddings, np.arange(POSITIONS)), expected, tolerance)
    with case.open(POSITIONS) as state:
        found = [state.logits(embeddings[a:b], np.arange(b - a)) for a, b in itertools.pairwise([0, 13, 14, 15, 40])]
        assert_close(np.concatenate(found), expected, tolerance)


@pytest.mark.parametrize("name", ["plain", "grouped with bias", "head size 64"])
@pytest.mark.parametrize("split", [(1, 0), (17, 0), (9, 8), (5, 1, 11)])
def test_prefill_in_pieces_and_steps_through_the_cache_change_nothing(
    tmp_path: Path, name: str, split: tuple[int, ...]
) -> None:
    case = build(tmp_path, CONFIGS[name])
    ids = np.random.default_rng(2).integers(0, ROWS, POSITIONS)
    embeddings = case.table[ids]
    expected = case.expected(embeddings)
    ends = list(itertools.accumulate(part for part in split if part))
    with case.open(POSITIONS + 3) as state:
        for start, end in zip([0, *ends], ends, strict=False):
            assert_close(state.prefill(embeddings[start:end]), expected[end - 1])
        for position in range(ends[-1], POSITIONS):
            assert_close(state.step(int(ids[position])), expected[position])
        assert state.length == POSITIONS


def test_logits_are_computed_at_the_positions_asked_for(tmp_path: Path) -> None:
    case = build(tmp_path, CONFIGS["plain"])
    embeddings = np.random.default_rng(3).standard_normal((POSITIONS, case.spec.hidden_size)).astype(np.float32)
    with case.open(POSITIONS) as state:
        assert_close(state.logits(embeddings, np.array([5, 0, 5, 39])), case.expected(embeddings)[[5, 0, 5, 39]])


def test_every_position_of_the_context_has_its_own_rotation(tmp_path: Path) -> None:
    case = build(tmp_path, CONFIGS["plain"])
    embeddings = np.random.default_rng(4).standard_normal((64, case.spec.hidden_size)).astype(np.float32)
    with case.open(64) as state:
        assert_close(state.logits(embeddings, np.arange(64)), case.expected(embeddings))


def test_room_left_in_the_cache_changes_nothing(tmp_path: Path) -> None:
    case = build(tmp_path, CONFIGS["grouped queries"])
    embeddings = case.table[:20]
    with case.open(20) as tight, case.open(64) as roomy:
        np.testing.assert_array_equal(tight.prefill(embeddings), roomy.prefill(embeddings))


@pytest.mark.parametrize("name", ["plain", "grouped with bias", "three layers, odd widths"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_quantized_graph_computes_with_the_weights_that_it_stores(
    tmp_path: Path, name: str, precision: Precision
) -> None:
    of = CONFIGS[name]
    case = build(tmp_path, of, precision)
    stored = StoredWeights(tmp_path / "decoder.onnx")
    state = case.model.state_dict()
    sizes = [of.heads * of.head_size, of.kv_heads * of.head_size, of.kv_heads * of.head_size]
    for layer in range(of.layers):
        packed = stored.linear(f"layers.{layer}.qkv_proj").split(sizes)
        for part, weight in zip("qkv", packed, strict=True):
            state[f"model.layers.{layer}.self_attn.{part}_proj.weight"].copy_(weight)
        for group, part in (("self_attn", "o"), ("mlp", "gate"), ("mlp", "up"), ("mlp", "down")):
            weight = stored.linear(f"layers.{layer}.{part}_proj")
            state[f"model.layers.{layer}.{group}.{part}_proj.weight"].copy_(weight)
    state["lm_head.weight"].copy_(stored.linear("lm_head"))
    embeddings = np.random.default_rng(5).standard_normal((POSITIONS, of.hidden_size)).astype(np.float32)
    with case.open(POSITIONS) as opened:
        found = opened.logits(embeddings, np.arange(POSITIONS))
    # int4 layers quantize activations to int8 on a CPU.
    assert_close(found, case.expected(embeddings), 0.1 if precision == "int4" else 2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_a_checkpoint_must_have_are_those_of_transformers(name: str) -> None:
    of = CONFIGS[name]
    theirs = {key: tuple(value.shape) for key, value in oracle(of, 0).state_dict().items()}
    if of.tied_head:
        del theirs["lm_head.weight"]
    assert dict(llama_tensors(of, ROWS)) == theirs
