"""The source modules that an export is compared with: transformers' Llama and ESM-2, and GraphMVP's GIN.

Weights are loaded layer by layer into one layer's memory, so that a model of any size can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers

from biomedgpt_edge.molecule_graph import SELF_LOOP_DIRECTION, SELF_LOOP_TYPE, MoleculeGraph
from biomedgpt_edge.protein_tokens import ALPHABET

from .graphs.config import EsmConfig, GinConfig, LlamaConfig

Weights = Callable[[str], torch.Tensor]
Report = Callable[[str], None]

# From here on a pass through the source modules takes long enough for a person to wonder.
_MANY_LAYERS = 12

PAD_ID, MASK_ID = ALPHABET.index("<pad>"), ALPHABET.index("<mask>")


class SourceLlama:
    """``LlamaForCausalLM`` in float32."""

    def __init__(self, config: LlamaConfig, rows: int, weights: Weights, report: Report) -> None:
        self._model = transformers.LlamaForCausalLM(_llama_config(config, rows)).eval()
        model = self._model.model
        layer = model.layers[0]
        _load(model.norm, weights, "model.norm")
        self._model.lm_head.load_state_dict({"weight": weights("lm_head.weight").float()})
        layer.register_forward_pre_hook(_LayerLoader(weights, "model.layers", config.layers, report))
        model.layers = torch.nn.ModuleList([layer] * config.layers)
        self._model.config.num_hidden_layers = config.layers

    @torch.inference_mode()
    def logits(self, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits float32 ``[T, rows]`` of each prompt float32 ``[T, hidden]``; weights are loaded once for all."""
        # Zeros behind a prompt are nothing that its positions look at.
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        logits = self._model(inputs_embeds=padded, use_cache=False).logits
        return [rows[: len(prompt)] for rows, prompt in zip(logits, prompts, strict=True)]


class SourceEsm:
    """``EsmModel`` in float32."""

    def __init__(self, config: EsmConfig, weights: Weights, report: Report) -> None:
        self._model = transformers.EsmModel(_esm_config(config), add_pooling_layer=False).eval()
        encoder = self._model.encoder
        layer = encoder.layer[0]
        _load(self._model.embeddings.word_embeddings, weights, "embeddings.word_embeddings")
        _load(encoder.emb_layer_norm_after, weights, "encoder.emb_layer_norm_after")
        layer.register_forward_pre_hook(_LayerLoader(weights, "encoder.layer", config.layers, report))
        encoder.layer = torch.nn.ModuleList([layer] * config.layers)

    @torch.inference_mode()
    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Features float32 ``[L + 2, hidden]`` of residue ids int64 ``[L + 2]``, the final LayerNorm included."""
        batch = ids.unsqueeze(0)
        output: torch.Tensor = self._model(batch, attention_mask=torch.ones_like(batch)).last_hidden_state[0]
        return output


class SourceGin(torch.nn.Module):
    """GraphMVP's ``GNN`` as it is written: messages along edges, BatchNorm with running statistics, JK "last"."""

    def __init__(self, config: GinConfig, weights: Weights) -> None:
        super().__init__()
        self._layers = config.layers
        self._weights = weights

    @torch.inference_mode()
    def features(self, graph: MoleculeGraph) -> torch.Tensor:
        """Atom features float32 ``[N, width]``."""
        atoms, edges, kinds = _edges(graph)
        hidden = self._row("x_embedding1", atoms[:, 0]) + self._row("x_embedding2", atoms[:, 1])
        for layer in range(self._layers):
            name = f"gnns.{layer}"
            message = hidden[edges[0]]
            message = message + self._row(f"{name}.edge_embedding1", kinds[:, 0])
            message = message + self._row(f"{name}.edge_embedding2", kinds[:, 1])
            summed = torch.zeros_like(hidden).index_add_(0, edges[1], message)
            inner = torch.relu(self._linear(f"{name}.mlp.0", summed))
            hidden = self._batch_norm(layer, self._linear(f"{name}.mlp.2", inner))
            if layer + 1 < self._layers:
                hidden = torch.relu(hidden)
        return hidden

    def _row(self, name: str, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, self._weights(f"{name}.weight").float())

    def _linear(self, name: str, source: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(
            source, self._weights(f"{name}.weight").float(), self._weights(f"{name}.bias").float()
        )

    def _batch_norm(self, layer: int, source: torch.Tensor) -> torch.Tensor:
        mean, variance, weight, bias = (
            self._weights(f"batch_norms.{layer}.{part}").float()
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.nn.functional.batch_norm(source, mean, variance, weight, bias, eps=GinConfig.BATCH_NORM_EPS)


class _LayerLoader:
    """A hook that loads the next layer's weights before each call of the one layer there is."""

    def __init__(self, weights: Weights, prefix: str, layers: int, report: Report) -> None:
        self._report = report
        self._weights = weights
        self._prefix = prefix
        self._layers = layers
        self._next = 0

    def __call__(self, module: torch.nn.Module, arguments: object) -> None:
        if self._layers >= _MANY_LAYERS:
            self._report(f"  {self._prefix} {self._next + 1} of {self._layers}")
        _load(module, self._weights, f"{self._prefix}.{self._next}")
        self._next = (self._next + 1) % self._layers


def _load(module: torch.nn.Module, weights: Weights, prefix: str) -> None:
    module.load_state_dict({name: weights(f"{prefix}.{name}").float() for name in module.state_dict()})


def _edges(graph: MoleculeGraph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Atoms ``[N, 2]``, directed edges ``[2, E]`` with self loops, and their types and directions ``[E, 2]``."""
    atoms, bonds = torch.from_numpy(graph.atoms.copy()), torch.from_numpy(graph.bonds.copy())
    loops = torch.arange(len(atoms))
    pairs = torch.cat([bonds[:, :2], bonds[:, :2].flip(1), torch.stack([loops, loops], 1)])
    loop_kind = torch.tensor([SELF_LOOP_TYPE, SELF_LOOP_DIRECTION]).expand(len(atoms), 2)
    return atoms, pairs.T, torch.cat([bonds[:, 2:], bonds[:, 2:], loop_kind])


def _llama_config(config: LlamaConfig, rows: int) -> transformers.LlamaConfig:
    fields = {
        "vocab_size": rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        # One layer is built; the others are the same module with other weights.
        "num_hidden_layers": 1,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        # transformers 5 reads rope_parameters, 4 reads rope_theta.
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "attn_implementation": "eager",
    }
    return transformers.LlamaConfig.from_dict(fields)


def _esm_config(config: EsmConfig) -> transformers.EsmConfig:
    fields = {
        "vocab_size": config.vocabulary,
        "mask_token_id": MASK_ID,
        "pad_token_id": PAD_ID,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "rotary",
        "rope_theta": config.rope_base,
        "token_dropout": config.token_dropout,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    return transformers.EsmConfig.from_dict(fields)
