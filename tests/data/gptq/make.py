"""Writes the checkpoints of this folder with GPTQModel, and digests of what GPTQModel itself reads in them.

Run in an environment of its own: ``python make.py OUT``, with gptqmodel 7.2.0, transformers 5.23.0, torch 2.13 (CPU).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, INNER, VOCABULARY = 64, 128, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "v1_symmetric_reordered": {"format": "gptq", "sym": True, "desc_act": True},
    "v1_asymmetric": {"format": "gptq", "sym": False, "desc_act": False},
    "v2_asymmetric_reordered": {"format": "gptq_v2", "sym": False, "desc_act": True},
}
KEPT = ("config.json", "quantize_config.json", "model.safetensors")


def write_source(folder: Path) -> None:
    """A random Llama with one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).half()
    table = model.model.embed_tokens.weight
    with torch.no_grad():
        # Channels of unequal energy give activation order something to sort.
        table.mul_(torch.logspace(0, 1.5, HIDDEN)[torch.randperm(HIDDEN)].half())
        for weight in model.parameters():
            if weight.ndim == 2 and weight is not table:
                # Rows off zero give zero points of all sizes; one row of either sign gives 0 and 15.
                weight.add_(0.01 * torch.randn(weight.shape[0], 1).half())
                weight[3].abs_()
                weight[5].abs_().neg_()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1", pad_token="t2")
    tokenizer.save_pretrained(folder)


def quantize(source: Path, out: Path, **settings: object) -> None:
    chosen = random.Random(0)
    rows = [[chosen.randrange(VOCABULARY) for _ in range(64)] for _ in range(32)]
    model = GPTQModel.load(
        str(source), QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, **settings), device="cpu"
    )
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(out))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every matrix ``[N, K]`` that the tool dequantizes, float16, by the name of its weight."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseQuantLinear)}
    matrices = {name: layer.dequantize_weight().T.contiguous() for name, layer in sorted(layers.items())}
    return {f"{name}.weight": hashlib.sha256(m.numpy().tobytes()).hexdigest() for name, m in matrices.items()}


def main(out: Path) -> None:
    known = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write_source(source)
        for name, settings in VARIANTS.items():
            saved = Path(scratch) / name
            quantize(source, saved, **settings)
            known[name] = digests(saved)
            (out / name).mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copyfile(saved / file, out / name / file)
    (out / "dequantized.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
