"""The demo model in PyTorch; its ``state_dict`` keys are those of the released ``biomedgpt_10b.pth``.

Llama decoder, ESM-2 and GIN exactly as ``transformers`` and OpenBioMed compute them, written small so that they train
quickly on a CPU. ``TrainingHeads`` holds the auxiliary predictors; they are not part of the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biomedgpt_edge.molecule_graph import BOND_DIRECTIONS, BOND_TYPES, SELF_LOOP_DIRECTION, SELF_LOOP_TYPE
from biomedgpt_edge.protein_tokens import ALPHABET

from ..graphs.config import EsmConfig, GinConfig
from ..quantize.int4 import WeightQuantizer

ESM_PAD_ID = ALPHABET.index("<pad>")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo model; ``pieces`` is the tokenizer's, the vocabulary matrices have one more row for [PAD]."""

    pieces: int
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    ffn: int = 768
    rms_eps: float = 1e-6
    rope_base: float = 10000.0
    max_positions: int = 2048
    esm_hidden: int = 128
    esm_layers: int = 4
    esm_heads: int = 4
    esm_ffn: int = 512
    gin_hidden: int = 300
    gin_layers: int = 5


@dataclass(frozen=True)
class GraphBatch:
    """Several molecules as one graph.

    Attributes:
        atoms: int64 ``[N, 2]``: atom row, chirality row.
        source, target: int64 ``[E]``, directed edges, both ways, without self loops.
        edge_counts: float32 ``[N, 9]``: edges of each type, then direction, ending in an atom; self loops count.
    """

    atoms: Tensor
    source: Tensor
    target: Tensor
    edge_counts: Tensor


def graph_batch(atoms: Tensor, bonds: Tensor) -> GraphBatch:
    """Directed edges and their counts from atoms ``[N, 2]`` and bonds ``[B, 4]`` (begin, end, type, direction)."""
    source = torch.cat([bonds[:, 0], bonds[:, 1]])
    target = torch.cat([bonds[:, 1], bonds[:, 0]])
    counts = torch.zeros(len(atoms), BOND_TYPES + BOND_DIRECTIONS)
    ones = torch.ones(len(target))
    counts.index_put_((target, bonds[:, 2].repeat(2)), ones, accumulate=True)
    counts.index_put_((target, BOND_TYPES + bonds[:, 3].repeat(2)), ones, accumulate=True)
    counts[:, SELF_LOOP_TYPE] += 1
    counts[:, BOND_TYPES + SELF_LOOP_DIRECTION] += 1
    return GraphBatch(atoms, source, target, counts)


def rotary_tables(positions: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, head_dim]``, rotate-half layout, of the dtype and device of ``like``."""
    inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim)
    angle = torch.arange(positions, dtype=torch.float32, device=like.device)[:, None] * inverse[None]
    angle = torch.cat([angle, angle], dim=1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, heads: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, T, heads * d]`` -> rotary-embedded ``[B, heads, T, d]``, position i paired with i + d/2."""
    batch, length, width = x.shape
    half = width // heads // 2
    first, second = x.view(batch, length, heads, 2, half).unbind(3)
    cos, sin = (table[:, None, :half] for table in tables)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.transpose(1, 2)


class _RMSNormalise(torch.autograd.Function):
    """x / rms(x) with a backward pass of its own: on CPUs, in bf16, four times as fast as the built-in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        out = x * inverse
        ctx.save_for_backward(out, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out, inverse = ctx.saved_tensors
        gradient = gradients[0]
        along = (gradient * out).mean(-1, keepdim=True)
        return (gradient - out * along) * inverse, None


class Linear(nn.Linear):
    """A linear layer of the decoder or ESM-2, which an int4 bundle stores in groups.

    With a ``quantizer``, it computes with the weights that such a bundle would store, and the gradient passes through
    the rounding unchanged (straight-through): the model learns to live with it.
    """

    quantizer: WeightQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.quantizer is not None:
            stored = self.quantizer.quantize("", weight.detach()).dequantize()
            weight = weight + (stored - weight.detach())
        return F.linear(x, weight, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm that keeps the activation's dtype under autocast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = _RMSNormalise.apply(x, self.eps)  # type: ignore[no-untyped-call]
        return normalised * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with bias that keeps the activation's dtype under autocast."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, heads * d]`` -> ``[B, heads, T, d]``."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


# PyTorch's fused attention has a slow backward pass on CPUs for short sequences: three times that of plain products.
SHORT = 400


def causal_mask(positions: int, like: Tensor) -> Tensor:
    """``[1, 1, T, T]``, a large negative number above the diagonal; dtype and device of ``like``."""
    return torch.full((positions, positions), -1e4, dtype=like.dtype, device=like.device).triu(1)[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of ``[B, heads, T, head_dim]``; ``mask`` is added to the scores.

    With ``causal`` the mask is the causal one, and None where the fused kernel makes its own.
    """
    batch, heads, length, width = q.shape
    if length > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    q, k, v = (x.reshape(batch * heads, length, width) for x in (q, k, v))
    added = torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device) if mask is None else mask
    added = added.expand(batch, heads, length, length).reshape(batch * heads, length, length)
    weights = torch.baddbmm(added, q, k.transpose(1, 2), alpha=width**-0.5).softmax(-1).to(v.dtype)
    return torch.bmm(weights, v).view(batch, heads, length, width)


# --------------------------------------------------------------------------------------------------------- Llama


class LlamaAttention(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        d = config.hidden
        self.heads = config.heads
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.o_proj = Linear(d, d, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q = rotate(self.q_proj(x), self.heads, tables)
        k = rotate(self.k_proj(x), self.heads, tables)
        v = _heads(self.v_proj(x), self.heads)
        mixed = attend(q, k, v, causal_mask(x.shape[1], x) if x.shape[1] <= SHORT else None, causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        return out


class LlamaMLP(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaLayer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.rms_eps)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LlamaModel(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.pieces + 1, config.hidden)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, T, d]`` -> final normed state, and the residual after two thirds of the layers."""
        head_dim = self.config.hidden // self.config.heads
        tables = rotary_tables(x.shape[1], head_dim, self.config.rope_base, x)
        middle = x
        for index, layer in enumerate(self.layers):
            if index == 2 * len(self.layers) // 3:
                middle = x
            x = layer(x, tables)
        return self.norm(x), middle


class Llama(nn.Module):
    """``LlamaForCausalLM`` that reads embeddings; text is right-padded, so causality is the only mask needed."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden, config.pieces + 1, bias=False)
        self._initialise(config)

    def _initialise(self, config: DemoConfig) -> None:
        nn.init.normal_(self.model.embed_tokens.weight, std=0.04)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        residual = 1 / math.sqrt(2 * config.layers)
        for name, weight in self.model.layers.named_parameters():
            if weight.ndim == 2:
                scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)


# --------------------------------------------------------------------------------------------------------- ESM-2


class EsmSelfAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = Linear(d, d)
        self.key = Linear(d, d)
        self.value = Linear(d, d)


class EsmDense(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.dense = Linear(inner, outer)


class EsmAttention(nn.Module):
    """Pre-norm attention; the key names are those of HF's ``EsmAttention``."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.heads = config.esm_heads
        self.self = EsmSelfAttention(config.esm_hidden)
        self.output = EsmDense(config.esm_hidden, config.esm_hidden)
        self.LayerNorm = LayerNorm(config.esm_hidden)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        projections, z = self.self, self.LayerNorm(x)
        q = rotate(projections.query(z), self.heads, tables)
        k = rotate(projections.key(z), self.heads, tables)
        v = _heads(projections.value(z), self.heads)
        mixed = attend(q, k, v, mask)
        out: Tensor = x + self.output.dense(mixed.transpose(1, 2).reshape(x.shape))
        return out


class EsmLayer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.attention = EsmAttention(config)
        self.intermediate = EsmDense(config.esm_hidden, config.esm_ffn)
        self.output = EsmDense(config.esm_ffn, config.esm_hidden)
        self.LayerNorm = LayerNorm(config.esm_hidden)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = self.attention(x, tables, mask)
        out: Tensor = x + self.output.dense(F.gelu(self.intermediate.dense(self.LayerNorm(x))))
        return out


class EsmEmbeddings(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(len(ALPHABET), d)


class EsmEncoder(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EsmLayer(config) for _ in range(config.esm_layers))
        self.emb_layer_norm_after = LayerNorm(config.esm_hidden)


class Esm(nn.Module):
    """HF ``EsmModel`` with rotary positions and token dropout, for inputs without a mask token."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.head_dim = config.esm_hidden // config.esm_heads
        self.embeddings = EsmEmbeddings(config.esm_hidden)
        self.encoder = EsmEncoder(config)
        nn.init.normal_(self.embeddings.word_embeddings.weight, std=0.5)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ids ``[B, T]``, padded on the right with ``ESM_PAD_ID`` -> last hidden state ``[B, T, d]``."""
        pad = ids == ESM_PAD_ID
        x = self.embeddings.word_embeddings(ids).to(dtype) * EsmConfig.TOKEN_DROPOUT_SCALE
        x = x.masked_fill(pad[..., None], 0.0)
        mask = None
        if bool(pad.any()):
            mask = torch.zeros(pad.shape, dtype=dtype, device=pad.device).masked_fill(pad, -1e4)[:, None, None, :]
        tables = rotary_tables(ids.shape[1], self.head_dim, 10000.0, x)
        for layer in self.encoder.layer:
            x = layer(x, tables, mask)
        out: Tensor = self.encoder.emb_layer_norm_after(x)
        return out


# --------------------------------------------------------------------------------------------------------- GIN


class GINLayer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.edge_embedding1 = nn.Embedding(BOND_TYPES, d)
        self.edge_embedding2 = nn.Embedding(BOND_DIRECTIONS, d)
        nn.init.normal_(self.edge_embedding1.weight, std=0.1)
        nn.init.normal_(self.edge_embedding2.weight, std=0.1)

    def forward(self, h: Tensor, graph: GraphBatch) -> Tensor:
        """Sum over neighbours and self of node plus edge embeddings, then the MLP; ``[N, d]``."""
        edges = torch.cat([self.edge_embedding1.weight, self.edge_embedding2.weight])
        gathered = h.index_add(0, graph.target, h[graph.source]) + graph.edge_counts @ edges
        out: Tensor = self.mlp(gathered)
        return out


class GIN(nn.Module):
    """GraphMVP's GIN as OpenBioMed uses it: node features of the last layer, in atom order."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        d = config.gin_hidden
        self.x_embedding1 = nn.Embedding(GinConfig.ATOM_TYPES, d)
        self.x_embedding2 = nn.Embedding(GinConfig.CHIRALITY_TAGS, d)
        self.gnns = nn.ModuleList(GINLayer(d) for _ in range(config.gin_layers))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(d) for _ in range(config.gin_layers))
        nn.init.normal_(self.x_embedding1.weight, std=0.3)
        nn.init.normal_(self.x_embedding2.weight, std=0.3)

    def forward(self, graph: GraphBatch) -> Tensor:
        """Node features ``[N, d]``, fp32."""
        h: Tensor = self.x_embedding1(graph.atoms[:, 0]) + self.x_embedding2(graph.atoms[:, 1])
        last = len(self.gnns) - 1
        for index, (layer, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True)):
            h = norm(layer(h, graph).float())
            if index < last:
                h = F.relu(h)
        return h


# --------------------------------------------------------------------------------------------------------- all of it


class DemoModel(nn.Module):
    """Encoders, projections and decoder; ``state_dict()`` has the keys of the 10B release and nothing else."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.llm = Llama(config)
        self.prot_structure_encoder = Esm(config)
        self.mol_structure_encoder = GIN(config)
        self.proj_mol = nn.Linear(config.gin_hidden, config.hidden)
        self.proj_prot = nn.Linear(config.esm_hidden, config.hidden)
        for projection in (self.proj_mol, self.proj_prot):
            nn.init.normal_(projection.weight, std=0.1 * projection.weight.shape[1] ** -0.5)
            nn.init.zeros_(projection.bias)

    def round_weights(self, quantizer: WeightQuantizer | None) -> None:
        """From now on, the layers that are int4 in a bundle compute with rounded weights, or exactly again."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantizer = quantizer

    def splice(self, index: Tensor, soft: Tensor) -> Tensor:
        """Rows of ``[vocabulary; soft]`` at ``index [B, T]``; soft token i of the batch is row ``pieces + 1 + i``."""
        table = torch.cat([self.llm.model.embed_tokens.weight.to(soft.dtype), soft])
        return F.embedding(index, table)


# Standard deviation of the shares of helix and strand among proteins.
SHARE_SPREAD = 0.2


class Stretch(nn.Module):
    """Predictions, stretched around their mean so that they spread as much as what they predict.

    A regression says too little of extremes, and a threshold is then passed too seldom. Means and spreads are those of
    the last thousand or so.
    """

    _MOMENTUM, _MOST = 0.02, 2.0

    said: Tensor
    true: Tensor

    def __init__(self, values: int) -> None:
        super().__init__()
        # Mean, and mean square.
        self.register_buffer("said", torch.tensor([[0.3] * values, [0.13] * values]))
        self.register_buffer("true", torch.tensor([[0.3] * values, [0.13] * values]))

    @torch.no_grad()
    def observe(self, said: Tensor, true: Tensor) -> None:
        """Both ``[B, values]``, of the same things."""
        for moments, values in ((self.said, said), (self.true, true)):
            moments.lerp_(torch.stack([values.mean(0), values.square().mean(0)]), self._MOMENTUM)

    def forward(self, said: Tensor) -> Tensor:
        """``[B, values]``."""
        spreads = [(moments[1] - moments[0].square()).clamp(min=1e-6).sqrt() for moments in (self.said, self.true)]
        factor = (spreads[1] / spreads[0]).clamp(1.0, self._MOST)
        stretched: Tensor = self.true[0] + factor * (said - self.said[0])
        return stretched


class TrainingHeads(nn.Module):
    """Auxiliary predictors that keep the encoders honest while the decoder is still learning.

    Attributes:
        atom: per atom, from GIN: groups (multi-label), hydrogens, aromaticity, smallest ring.
        residue: per residue, from ESM: H, E or C.
        shares: per protein, from the mean over its residues: the shares of helix and strand; ``stretch`` spreads them.
        location, membrane: per protein, from ESM's first position (``<cls>``).
        learnt: per protein, from the same: features of the whole sequence.
        counts: per molecule, from the decoder's residual at the last prompt token: the numbers the answer will state.
        found: per protein, from the same: what the encoder finds, which the answer will state.
    """

    def __init__(
        self,
        config: DemoConfig,
        *,
        groups: int,
        atom_classes: tuple[int, ...],
        locations: int,
        learnt: int,
        count_classes: tuple[int, ...],
        found_classes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.groups = groups
        self.atom_classes = atom_classes
        self.count_classes = count_classes
        self.found_classes = found_classes
        self.atom = nn.Linear(config.gin_hidden, groups + sum(atom_classes))
        self.residue = nn.Linear(config.esm_hidden, 3)
        self.shares = nn.Linear(config.esm_hidden, 2)
        self.stretch = Stretch(2)
        self.location = nn.Linear(config.esm_hidden, locations)
        self.membrane = nn.Linear(config.esm_hidden, 2)
        self.learnt = nn.Linear(config.esm_hidden, learnt)
        self.prompt_norm = RMSNorm(config.hidden, config.rms_eps)
        self.counts = nn.Linear(config.hidden, groups + sum(count_classes))
        self.found = nn.Linear(config.hidden, sum(found_classes))

    def atom_loss(self, nodes: Tensor, groups: Tensor, labels: Tensor) -> Tensor:
        """``nodes [N, d]``, ``groups [N, G]`` 0/1, ``labels [N, len(atom_classes)]``."""
        return _multi_loss(self.atom(nodes).float(), groups, labels, self.atom_classes, 3.0)

    def count_loss(self, states: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
        """``states [B, d]``, ``groups [B, G]`` 0/1, ``counts [B, len(count_classes)]``, clipped to their classes."""
        logits = self.counts(self.prompt_norm(states)).float()
        return _multi_loss(logits, groups, counts, self.count_classes, 3.0)

    def found_loss(self, states: Tensor, found: Tensor) -> Tensor:
        """``states [B, d]``, ``found [B, len(found_classes)]``."""
        return _class_losses(self.found(self.prompt_norm(states)).float(), found, self.found_classes)


def _multi_loss(logits: Tensor, groups: Tensor, labels: Tensor, classes: tuple[int, ...], weight: float) -> Tensor:
    """Binary cross-entropy of the groups times ``weight``, plus one cross-entropy per label column."""
    members = groups.shape[1]
    loss = weight * F.binary_cross_entropy_with_logits(logits[:, :members], groups)
    return loss + _class_losses(logits[:, members:], labels, classes)


def _class_losses(logits: Tensor, labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Sum of one cross-entropy per label column, whose logits stand side by side."""
    parts = zip(logits.split(classes, 1), labels.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(part, column) for part, column in parts]).sum()
