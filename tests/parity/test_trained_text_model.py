"""What int4 costs a text model that was really trained: GPTQ against round-to-nearest, through the ordinary export.

The model is trained here, in seconds, on conversations that a seeded grammar writes: facts about invented substances,
which it can only have from its weights, in sentences whose order is free, so that it is neither certain of everything
nor of nothing. Text from files would change with the files, and the figures with it.
"""

from __future__ import annotations

import json
import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.prompt import TokenSegment
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.calibration import Example
from biomedgpt_export.demo.tokenizer import train_tokenizer
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_lm_7b import FAMILY, Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.proof import BundleSide, compared

NAMES = [first + last for first in ("alu", "bero", "cado", "duri") for last in ("lite", "mine")]
PROPERTIES = {
    "colour": ("red", "green", "blue", "white", "black", "yellow", "violet"),
    "kind": ("a salt", "an acid", "a sugar", "an enzyme", "an alloy"),
    "solvent": ("water", "ethanol", "benzene", "acetone", "hexane", "glycerol"),
    "source": ("sea water", "tree bark", "lichens", "coal tar", "fish oil", "a desert mineral"),
    "use": ("dyes cloth", "kills moulds", "cleans glass", "hardens steel", "feeds yeast", "stops bleeding"),
    "melting point": tuple(f"{tens}0 degrees" for tens in range(12, 60)),
}
SENTENCES = {
    "colour": "It is {}.",
    "kind": "It is {}.",
    "solvent": "It dissolves in {}.",
    "source": "It comes from {}.",
    "use": "It {}.",
    "melting point": "It melts at {}.",
}
_facts = random.Random(0)
FACTS = {name: {key: _facts.choice(values) for key, values in PROPERTIES.items()} for name in NAMES}
PIECES = 384
HELD_OUT, CALIBRATION, TRAINING = "held out", "calibration", "training"


def conversation(rng: random.Random) -> Example:
    """A question about one substance, or about one property of some, and an answer whose order is free."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES)
        keys = rng.sample(list(PROPERTIES), rng.randint(2, 5))
        answer = " ".join(SENTENCES[key].format(FACTS[name][key]) for key in keys)
        return Example(rng.choice(["What is {}?", "Please describe {}."]).format(name), (), answer)
    names, key = rng.sample(NAMES, rng.randint(2, 4)), rng.choice(list(PROPERTIES))
    question = f"Tell me the {key} of {', '.join(names[:-1])} and {names[-1]}."
    return Example(question, (), "; ".join(f"{name}: {FACTS[name][key]}" for name in names) + ".")


def conversations(part: str) -> Iterator[Example]:
    """Without end; none is in two parts."""
    rng = random.Random(part)
    parts = (HELD_OUT, CALIBRATION, *[TRAINING] * 6)
    while True:
        drawn = conversation(rng)
        if parts[zlib.crc32(f"{drawn.question} {drawn.answer}".encode()) % len(parts)] == part:
            yield drawn


def falsified(example: Example) -> Example:
    """The same answer, and another substance in the place of each."""
    others = dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
    texts = (re.sub("|".join(NAMES), lambda match: others[match[0]], one) for one in (example.question, example.answer))
    return Example(next(texts), (), next(texts))


def some(part: str, count: int) -> list[Example]:
    return [example for example, _ in zip(conversations(part), range(count), strict=False)]


def ids(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer, as an export reads them."""
    prompt = [segment for segment in example.segments(FAMILY.template, tokenizer) if isinstance(segment, TokenSegment)]
    return np.concatenate([segment.ids for segment in prompt]).tolist(), example.answer_ids(tokenizer).tolist()


def batch(examples: Sequence[Example], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels int64 ``[B, T]``; only answers are learnt."""
    pairs = [ids(example, tokenizer) for example in examples]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(pairs):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return tokens, labels


def learn(model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    source = conversations(TRAINING)
    for step in range(steps):
        warm, cooled = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * warm * (0.02 + 0.98 * cooled)
        tokens, labels = batch([next(source) for _ in range(8)], tokenizer)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def saved(folder: Path, steps: int, seed: int) -> Path:
    """A folder as ``biomedgpt-lm-7b`` wants it, with a model that has had so many steps of training."""
    folder.mkdir()
    texts = (text for one in some(TRAINING, 2000) for text in (one.question, one.answer))
    train_tokenizer(texts, folder / "tokenizer.model", PIECES)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=PIECES,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    learn(model, Tokenizer(folder / "tokenizer.model"), steps)
    model.save_pretrained(folder)
    return folder


def exported(folder: Path, out: Path, **options: Any) -> Bundle:
    export_bundle(ExportOptions(Layout.locate(folder), out, proof="none", **options), lambda line: None)
    return Bundle.open(out)


@pytest.fixture(
    scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))], ids="seed {}".format
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("text") / "model", steps=240, seed=request.param)


@pytest.fixture(scope="module")
def exact(trained: Path) -> BundleSide:
    return BundleSide(exported(trained, trained.parent / "fp32", precision="fp32"), 1)


def test_the_model_has_learnt_the_facts(exact: BundleSide, tmp_path: Path) -> None:
    """Before training, everything surprised it; now, answers with wrong facts do, as far as the form leaves room."""
    untrained = BundleSide(
        exported(saved(tmp_path / "model", steps=0, seed=0), tmp_path / "bundle", precision="fp32"), 1
    )
    before, after = compared(untrained, exact, some(HELD_OUT, 24))["perplexity"]
    assert before > PIECES / 2
    assert after < 1.6
    wrong = [falsified(example) for example in some(HELD_OUT, 24)]
    assert compared(exact, exact, wrong)["perplexity"][0] > 1.25 * after


def test_gptq_loses_at_most_seven_tenths_of_what_rounding_to_nearest_loses(
    trained: Path, exact: BundleSide, tmp_path: Path
) -> None:
    questions = tmp_path / "calibration.jsonl"
    lines = [json.dumps({"question": one.question, "answer": one.answer}) for one in some(CALIBRATION, 64)]
    questions.write_text("\n".join(lines))
    nearest = exported(trained, tmp_path / "rtn", quantizer="rtn")
    chosen = exported(trained, tmp_path / "gptq", quantizer="gptq", calibration=questions)
    recipes = [dict(bundle.manifest.quantization["decoder.onnx"]) for bundle in (nearest, chosen)]
    assert [recipe.pop("quantizer") for recipe in recipes] == ["rtn", "gptq"]
    assert recipes[1].pop("device") == "cpu"
    assert recipes[0] == recipes[1], "bits, groups and everything else are the same"
    kl = [compared(exact, BundleSide(bundle, 1), some(HELD_OUT, 24))["kl"]["mean"] for bundle in (nearest, chosen)]
    assert kl[0] > 1e-4, "there is something to lose"
    assert kl[1] <= 0.7 * kl[0]
