"""Layers that are streamed over many sequences compute what transformers' modules compute on each alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export.device import CPU
from biomedgpt_export.families.tensors import esm_tensors, llama_tensors
from biomedgpt_export.graphs.config import EsmConfig, LlamaConfig
from biomedgpt_export.source_modules import SourceEsm, SourceLlama, Weights
from biomedgpt_export.streamed import ExactStep, StreamedEsm, StreamedLlama

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=4, head_size=16, vocabulary=50, context=128,
    rope_base=10000.0, norm_eps=1e-6, attention_bias=False, tied_head=False,
)  # fmt: skip
ESM = EsmConfig(
    hidden_size=64, intermediate_size=160, layers=3, heads=4, vocabulary=33, context=1026, rope_base=10000.0,
    norm_eps=1e-5, token_dropout=True,
)  # fmt: skip
LENGTHS = (5, 1, 23)


def random_weights(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> Weights:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in tensors}
    return made.__getitem__


@pytest.mark.parametrize(
    "config",
    [LLAMA, replace(LLAMA, kv_heads=2), replace(LLAMA, attention_bias=True), replace(LLAMA, head_size=32)],
    ids=["heads", "grouped", "bias", "wide heads"],
)
def test_llama(config: LlamaConfig) -> None:
    weights = random_weights(llama_tensors(config, config.vocabulary))
    model = StreamedLlama(config, weights)
    embeddings = torch.randn(sum(LENGTHS), config.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = embeddings
    for index in range(model.layers):
        hidden = model.layer(index, hidden, LENGTHS, ExactStep(weights, CPU))
    (head,) = ExactStep(weights, CPU)([model.head()], hidden)
    logits = head(model.normed(hidden))
    source = SourceLlama(config, config.vocabulary, weights, lambda text: None)
    expected = torch.cat([source.logits(one) for one in embeddings.split(list(LENGTHS))])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [ESM, replace(ESM, token_dropout=False)], ids=["token dropout", "plain"])
def test_esm(config: EsmConfig) -> None:
    weights = random_weights(esm_tensors(config))
    model = StreamedEsm(config, weights)
    ids = [torch.from_numpy(residue_ids(sequence)) for sequence in ("MKV", "A", "MAKEDTLEFPGVVKELLPN")]
    hidden, lengths = model.embedded(torch.cat(ids)), [len(one) for one in ids]
    for index in range(model.layers):
        hidden = model.layer(index, hidden, lengths, ExactStep(weights, CPU))
    source = SourceEsm(config, weights, lambda text: None)
    expected = torch.cat([source.features(one) for one in ids])
    torch.testing.assert_close(model.normed(hidden), expected, atol=1e-5, rtol=1e-4)


def test_a_tied_head_is_the_embedding_table() -> None:
    config = replace(LLAMA, tied_head=True)
    weights = random_weights(llama_tensors(config, config.vocabulary))
    assert torch.equal(StreamedLlama(config, weights).head().weight(weights), weights("model.embed_tokens.weight"))
