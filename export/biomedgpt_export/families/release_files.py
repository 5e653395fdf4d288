"""The files beside the weights in a BioMedGPT-10B release, for checkpoints that this package writes itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from biomedgpt_edge.protein_tokens import ALPHABET, MAX_RESIDUES, SPECIAL_POSITIONS

from .biomedgpt_10b import PROTEIN_FOLDER, TEXT_FOLDER

# fair-esm counts positions from the padding index on, which takes two more rows than there are positions.
ESM_POSITIONS = MAX_RESIDUES + SPECIAL_POSITIONS + 2


@dataclass(frozen=True)
class ReleaseSizes:
    """What the two configuration files say; ``pieces`` are the tokenizer's, without the row for [PAD]."""

    pieces: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    positions: int
    rms_norm_eps: float
    esm_hidden: int
    esm_layers: int
    esm_heads: int
    esm_ffn: int


def side_files(sizes: ReleaseSizes, tokenizer: bytes) -> dict[PurePosixPath, bytes]:
    """Contents by path below the release's folder."""
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        TEXT_FOLDER / "config.json": _json(_text_config(sizes)),
        TEXT_FOLDER / "tokenizer.model": tokenizer,
        TEXT_FOLDER / "tokenizer_config.json": _json(_text_tokenizer_config(sizes)),
        TEXT_FOLDER / "special_tokens_map.json": _json(specials),
        PROTEIN_FOLDER / "config.json": _json(_protein_config(sizes)),
        PROTEIN_FOLDER / "vocab.txt": "\n".join(ALPHABET).encode(),
        PROTEIN_FOLDER / "tokenizer_config.json": _json(
            {"model_max_length": MAX_RESIDUES + SPECIAL_POSITIONS, "tokenizer_class": "EsmTokenizer"}
        ),
        PROTEIN_FOLDER / "special_tokens_map.json": _json(
            {f"{name}_token": f"<{name}>" for name in ("cls", "eos", "mask", "pad", "unk")}
        ),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _text_config(sizes: ReleaseSizes) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": sizes.positions,
        "model_type": "llama",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "pad_token_id": 0,
        "rms_norm_eps": sizes.rms_norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": False,
        "vocab_size": sizes.pieces,
    }


def _text_tokenizer_config(sizes: ReleaseSizes) -> dict[str, Any]:
    def special(content: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    return {
        "bos_token": special("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": special("</s>"),
        "model_max_length": sizes.positions,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": special("<unk>"),
    }


def _protein_config(sizes: ReleaseSizes) -> dict[str, Any]:
    return {
        "architectures": ["EsmForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "emb_layer_norm_before": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": sizes.esm_hidden,
        "intermediate_size": sizes.esm_ffn,
        "is_folding_model": False,
        "layer_norm_eps": 1e-05,
        "mask_token_id": ALPHABET.index("<mask>"),
        "max_position_embeddings": ESM_POSITIONS,
        "model_type": "esm",
        "num_attention_heads": sizes.esm_heads,
        "num_hidden_layers": sizes.esm_layers,
        "pad_token_id": ALPHABET.index("<pad>"),
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "use_cache": True,
        "vocab_size": len(ALPHABET),
    }
