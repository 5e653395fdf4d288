"""The protein encoder's graph computes what transformers' EsmModel and fair-esm's ESM2 compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export.families.tensors import esm_tensors
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.linear import Linears

SEQUENCES = [
    "M",
    "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK",
    "ACDEFGHIKLMNPQRSTVWYXBUZO" * 4,
]


def config(**changes: object) -> EsmConfig:
    fields = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "layers": 2,
        "heads": 3,
        "vocabulary": 33,
        "context": 1026,
        "rope_base": 10000.0,
        "norm_eps": 1e-5,
        "token_dropout": True,
    }
    return EsmConfig(**{**fields, **changes})  # type: ignore[arg-type]


CONFIGS = {
    "plain": config(),
    "head size 8": config(heads=6),
    "head size 64": config(hidden_size=128, heads=2, intermediate_size=512),
    "one head": config(hidden_size=40, heads=1),
    "large eps": config(norm_eps=1e-2),
    "another RoPE base": config(rope_base=500.0),
    "without token dropout": config(token_dropout=False),
    "one layer": config(layers=1),
    "four layers, odd inner width": config(layers=4, intermediate_size=101),
}


def oracle(of: EsmConfig) -> transformers.EsmModel:
    torch.manual_seed(0)
    model = transformers.EsmModel(
        transformers.EsmConfig(
            vocab_size=of.vocabulary,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=of.hidden_size,
            num_hidden_layers=of.layers,
            num_attention_heads=of.heads,
            intermediate_size=of.intermediate_size,
            max_position_embeddings=of.context,
            layer_norm_eps=of.norm_eps,
            position_embedding_type="rotary",
            rope_theta=of.rope_base,
            token_dropout=of.token_dropout,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.2)
    return model


def features(folder: Path, of: EsmConfig, weights: Callable[[str], torch.Tensor], sequence: str) -> np.ndarray:
    """The graph's output before the final LayerNorm, ``[L + 2, hidden]``."""
    path = folder / "protein_encoder.onnx"
    graph = GraphBuilder(path)
    build_esm(graph, of, weights, Linears("fp32"), lambda line: None)
    graph.save()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"residue_ids": residue_ids(sequence)[np.newaxis]})[0][0]
    return result


def final_norm(model: torch.nn.Module, found: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(found)).numpy())


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sequence", SEQUENCES, ids=len)
def test_features_are_those_of_transformers(tmp_path: Path, name: str, sequence: str) -> None:
    of = CONFIGS[name]
    model = oracle(of)
    found = features(tmp_path, of, lambda key: model.state_dict()[key], sequence)
    ids = torch.from_numpy(residue_ids(sequence))[None]
    with torch.inference_mode():
        expected = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
    assert_close(final_norm(model.encoder.emb_layer_norm_after, found), expected)


_FAIR_NAMES = (
    (r"^embeddings\.word_embeddings", "embed_tokens"),
    (r"^encoder\.emb_layer_norm_after", "emb_layer_norm_after"),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.query", "self_attn.q_proj"),
    (r"attention\.self\.key", "self_attn.k_proj"),
    (r"attention\.self\.value", "self_attn.v_proj"),
    (r"attention\.output\.dense", "self_attn.out_proj"),
    (r"attention\.LayerNorm", "self_attn_layer_norm"),
    (r"intermediate\.dense", "fc1"),
    (r"output\.dense", "fc2"),
    (r"\.LayerNorm", ".final_layer_norm"),
)


def fair_name(name: str) -> str:
    for pattern, replacement in _FAIR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("sequence", SEQUENCES, ids=len)
def test_features_and_residue_ids_are_those_of_fair_esm(tmp_path: Path, sequence: str) -> None:
    import esm
    from esm.model.esm2 import ESM2

    # fair-esm fixes the inner width at four times the hidden size and eps at 1e-5.
    of = config(hidden_size=64, heads=4, intermediate_size=256)
    torch.manual_seed(0)
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = ESM2(of.layers, of.hidden_size, of.heads, alphabet, token_dropout=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    state = model.state_dict()
    found = features(tmp_path, of, lambda key: state[fair_name(key)], sequence)
    _, _, ids = alphabet.get_batch_converter()([("protein", sequence)])
    np.testing.assert_array_equal(ids[0].numpy(), residue_ids(sequence))
    with torch.inference_mode():
        expected = model(ids, repr_layers=[of.layers])["representations"][of.layers][0].numpy()
    assert_close(final_norm(model.emb_layer_norm_after, found), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_a_checkpoint_must_have_are_those_of_transformers(name: str) -> None:
    of = CONFIGS[name]
    theirs = {key: tuple(parameter.shape) for key, parameter in oracle(of).named_parameters()}
    assert dict(esm_tensors(of)).items() <= theirs.items()
    assert {key for key in theirs if "contact_head" not in key and "position_embeddings" not in key} == dict(
        esm_tensors(of)
    ).keys()
