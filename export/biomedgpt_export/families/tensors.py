"""Names and shapes of the tensors of each part, and their comparison with those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from biomedgpt_edge.molecule_graph import BOND_DIRECTIONS, BOND_TYPES

from ..checkpoint import Checkpoint
from ..errors import KeyMismatchError
from ..graphs.config import EsmConfig, GinConfig, LlamaConfig

_FLOATS = ("float16", "bfloat16", "float32", "float64")

# Buffers and unused heads that one or the other library version stores.
LLAMA_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
ESM_BUFFERS = (
    r"(encoder\.layer\.\d+\.attention\.self\.)?rotary_embeddings\.inv_freq"
    r"|embeddings\.(position_embeddings\.weight|position_ids)"
    r"|(pooler\.dense|contact_head\.regression)\.(weight|bias)"
)
GIN_BUFFERS = r"batch_norms\.\d+\.num_batches_tracked"

# A tensor's name and shape.
Expected = tuple[str, tuple[int, ...]]


def key_problems(expected: Iterable[Expected], checkpoint: Checkpoint, ignored: re.Pattern[str]) -> list[str]:
    """Everything that is missing, unexpected or misshapen.

    Args:
        ignored: names of tensors that may be there without being expected.
    """
    shapes = dict(expected)
    present = dict.fromkeys(key for key in checkpoint.keys() if key in shapes or not ignored.fullmatch(key))
    problems = [f"missing: {key} {list(shape)}" for key, shape in shapes.items() if key not in present]
    problems += [f"unexpected: {key} {list(checkpoint.shape(key))}" for key in present if key not in shapes]
    problems += [
        f"misshapen: {key} is {list(checkpoint.shape(key))}, the configuration implies {list(shapes[key])}"
        for key in present
        if key in shapes and checkpoint.shape(key) != shapes[key]
    ]
    problems += [
        f"not floating point: {key} is {checkpoint.dtype(key)}"
        for key in present
        if key in shapes and checkpoint.dtype(key) not in _FLOATS
    ]
    return problems


def require_fit(problems: list[str]) -> None:
    """Raises:
    KeyMismatchError: there are ``problems``; lists them all.
    """
    if problems:
        raise KeyMismatchError(
            f"the checkpoint does not fit its configuration in {len(problems)} places:\n  "
            + "\n  ".join(problems)
            + "\n",
            problems,
            remedy="Check that the weights and the config.json files belong together.",
        )


def llama_tensors(config: LlamaConfig, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' ``LlamaForCausalLM``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.heads * config.head_size, config.kv_heads * config.head_size
    yield "model.embed_tokens.weight", (rows, hidden)
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        for part, size in (("q", query), ("k", key_value), ("v", key_value)):
            yield f"{name}.self_attn.{part}_proj.weight", (size, hidden)
            if config.attention_bias:
                yield f"{name}.self_attn.{part}_proj.bias", (size,)
        yield f"{name}.self_attn.o_proj.weight", (hidden, query)
        if config.attention_bias:
            yield f"{name}.self_attn.o_proj.bias", (hidden,)
        yield f"{name}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{name}.mlp.up_proj.weight", (inner, hidden)
        yield f"{name}.mlp.down_proj.weight", (hidden, inner)
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.tied_head:
        yield "lm_head.weight", (rows, hidden)


def esm_tensors(config: EsmConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' ``EsmModel``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings.weight", (config.vocabulary, hidden)
    for layer in range(config.layers):
        name = f"encoder.layer.{layer}"
        linears = {
            **{f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")},
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }
        for part, shape in linears.items():
            yield f"{name}.{part}.weight", shape
            yield f"{name}.{part}.bias", shape[:1]
        for norm in ("attention.LayerNorm", "LayerNorm"):
            yield f"{name}.{norm}.weight", (hidden,)
            yield f"{name}.{norm}.bias", (hidden,)
    yield "encoder.emb_layer_norm_after.weight", (hidden,)
    yield "encoder.emb_layer_norm_after.bias", (hidden,)


def gin_tensors(config: GinConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of GraphMVP's ``GNN``."""
    width = config.width
    yield "x_embedding1.weight", (GinConfig.ATOM_TYPES, width)
    yield "x_embedding2.weight", (GinConfig.CHIRALITY_TAGS, width)
    for layer in range(config.layers):
        yield f"gnns.{layer}.mlp.0.weight", (2 * width, width)
        yield f"gnns.{layer}.mlp.0.bias", (2 * width,)
        yield f"gnns.{layer}.mlp.2.weight", (width, 2 * width)
        yield f"gnns.{layer}.mlp.2.bias", (width,)
        yield f"gnns.{layer}.edge_embedding1.weight", (BOND_TYPES, width)
        yield f"gnns.{layer}.edge_embedding2.weight", (BOND_DIRECTIONS, width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"batch_norms.{layer}.{part}", (width,)
