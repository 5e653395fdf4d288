"""The figures of a comparison, against their definitions computed with transformers' modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.calibration import PROOF, Example, read_examples
from biomedgpt_export.families.base import LLM
from biomedgpt_export.families.biomedgpt_10b import PROMPT_TEMPLATE, Layout
from biomedgpt_export.proof import BundleSide, SourceSide, compared, table
from biomedgpt_export.source_modules import SourceLlama
from biomedgpt_export.streamed_model import StreamedModel, Text


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    found = read_examples(PROOF)
    short = [one for one in found if len(one.answer) < 150]
    return [*[one for one in short if one.inputs][:3], *[one for one in short if not one.inputs][:1]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> StreamedModel:
    layout = Layout.locate(tiny_checkpoint)
    source = layout.open()
    return StreamedModel(source.configs, source.checkpoint.tensor, PROMPT_TEMPLATE, Tokenizer(layout.tokenizer))


def test_the_streamed_source_is_what_an_fp32_bundle_computes(
    model: StreamedModel, tiny_bundle_fp32: Path, examples: list[Example]
) -> None:
    texts = [Text(one, one.answer_ids(model.tokenizer)) for one in examples]
    bundle = BundleSide(Bundle.open(tiny_bundle_fp32), 1)
    for one, other in zip(model.logits(texts), bundle.logits(texts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())
    source = SourceSide(model).soft_tokens(examples)
    for one, other in zip(source, bundle.soft_tokens(examples), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_the_figures_are_what_they_are_called(model: StreamedModel, tiny_bundle: Path, examples: list[Example]) -> None:
    """One question without an input, from the definitions."""
    example = next(one for one in examples if not one.inputs)
    side = BundleSide(Bundle.open(tiny_bundle), 1)
    figures = compared(SourceSide(model), side, [example])

    ids = [
        np.concatenate([segment.ids for segment in example.segments(PROMPT_TEMPLATE, model.tokenizer)]),  # type: ignore[union-attr]
        example.answer_ids(model.tokenizer),
        side.continuations([example], 32)[0],
    ]
    configs = model.configs
    llama = SourceLlama(configs.llama, configs.rows, lambda key: model.weights(LLM + key), lambda text: None)
    table_rows = model.weights(f"{LLM}model.embed_tokens.weight").float()
    kl, agreed, nll = [], [], []
    for number, answer in enumerate(ids[1:]):
        text = Text(example, answer)
        tokens = torch.from_numpy(np.concatenate([ids[0], answer]))
        span = slice(len(ids[0]) - 1, len(tokens) - 1)
        p = llama.logits([table_rows[tokens]])[0][span].double().softmax(1)
        q = torch.from_numpy(next(iter(side.logits([text])))).double().softmax(1)
        kl.append((p * (p / q).log()).sum(1))
        agreed.append(p.argmax(1) == q.argmax(1))
        if number == 0:
            rows = torch.arange(len(answer))
            nll = [-one[rows, torch.from_numpy(answer)].log().mean() for one in (p, q)]
        else:
            wrong = (p.argmax(1) != torch.from_numpy(answer)).nonzero().flatten().tolist()
            assert figures["same_tokens"]["mean"] == (wrong[0] if wrong else len(answer))
    assert figures["positions"] == sum(map(len, kl))
    assert figures["kl"]["mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-2)
    assert figures["kl"]["p99"] == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-2)
    assert figures["top1_agreement"] == pytest.approx(float(torch.cat(agreed).double().mean()), abs=1e-3)
    assert figures["perplexity"] == pytest.approx([float(one.exp()) for one in nll], rel=1e-3)
    assert figures["cosine"] == {}, "nothing was given with the question"


def test_fewer_bits_cost_more(
    model: StreamedModel, tiny_bundle: Path, tiny_bundle_fp16: Path, examples: list[Example]
) -> None:
    source = SourceSide(model)
    int4, fp16 = (
        compared(source, BundleSide(Bundle.open(path), 1), examples) for path in (tiny_bundle, tiny_bundle_fp16)
    )
    assert fp16["kl"]["mean"] < 1e-3 * int4["kl"]["mean"]
    assert fp16["cosine"]["least"] > int4["cosine"]["least"]
    assert fp16["top1_agreement"] > int4["top1_agreement"]


def test_a_question_without_an_answer_counts_its_first_token(model: StreamedModel, tiny_bundle: Path) -> None:
    figures = compared(SourceSide(model), BundleSide(Bundle.open(tiny_bundle), 1), [Example("Why?", (), "")])
    assert figures["positions"] == 1 + 32
    assert figures["perplexity"] == [1.0, 1.0], "no recorded answer, nothing to be surprised by"
    assert len(table(figures)) == 5
