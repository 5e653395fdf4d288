"""The checkpoint's tensors as a bundle holds them: folded, rounded, and under the names of the checkpoint.

Folding is done here a second time and in another way than the exporter does it, since this is what it is checked with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.fusion import fuse_linear_bn_weights

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import DecoderSpec

from .errors import ParityError
from .families.base import LLM, MOLECULE, PROTEIN, Configs
from .families.tensors import esm_tensors, gin_tensors, llama_tensors
from .graphs.config import GinConfig
from .graphs.matrices import HEAD
from .graphs.stored import StoredWeights
from .quantize.int4 import Int4Weight
from .source_modules import Weights

# Root mean square, in steps. Rounding to the nearest stays below 0.5; being off by one step everywhere is 1.
ROUNDING_TOLERANCE = 0.75
# The smallest fp16 scale: a group whose values are too small for it holds zeros.
_SMALLEST_STEP = 2.0**-24

_TABLE, _HEAD = f"{LLM}model.embed_tokens.weight", f"{LLM}lm_head.weight"
_FINAL_NORM = f"{PROTEIN}encoder.emb_layer_norm_after"
_ESM_PARTS = {
    **{f"attention.self.{part}": part for part in ("query", "key", "value")},
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
_ESM_LINEAR = re.compile(rf"encoder\.layer\.(\d+)\.({'|'.join(map(re.escape, _ESM_PARTS))})\.weight")
_GIN_LINEAR = re.compile(r"gnns\.(\d+)\.(mlp\.[02])\.weight")
_LLAMA_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.weight")


def folded(weights: Weights) -> Weights:
    """``weights`` with norms folded into the matrices before or behind them, and those norms the identity."""

    def fold(key: str) -> torch.Tensor:
        if key.startswith("proj_prot."):
            gain, shift = weights(f"{_FINAL_NORM}.weight").float(), weights(f"{_FINAL_NORM}.bias").float()
            matrix, bias = weights("proj_prot.weight").float(), weights("proj_prot.bias").float()
            return (
                matrix @ torch.diag(gain) if key.endswith("weight") else torch.nn.functional.linear(shift, matrix, bias)
            )
        if key.startswith(f"{_FINAL_NORM}."):
            return torch.full_like(weights(key), float(key.endswith("weight")), dtype=torch.float32)
        if key.startswith(f"{MOLECULE}batch_norms."):
            return _identity_batch_norm(key, weights(key))
        match = re.fullmatch(rf"{re.escape(MOLECULE)}gnns\.(\d+)\.mlp\.2\.(weight|bias)", key)
        if match is not None:
            return _fused(weights, int(match[1]))[match[2] == "bias"]
        return weights(key)

    return fold


def _identity_batch_norm(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Statistics and parameters with which BatchNorm in evaluation mode changes nothing."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - GinConfig.BATCH_NORM_EPS}
    return torch.full_like(tensor, values[key.rpartition(".")[2]], dtype=torch.float32)


def _fused(weights: Weights, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    linear, norm = f"{MOLECULE}gnns.{layer}.mlp.2", f"{MOLECULE}batch_norms.{layer}"
    mean, variance, gain, shift = (
        weights(f"{norm}.{part}").double() for part in ("running_mean", "running_var", "weight", "bias")
    )
    matrix, bias = weights(f"{linear}.weight").double(), weights(f"{linear}.bias").double()
    fused = fuse_linear_bn_weights(matrix, bias, mean, variance, GinConfig.BATCH_NORM_EPS, gain, shift)
    return fused[0].detach().float(), fused[1].detach().float()


class Chosen(Protocol):
    """Knows what a quantizer chose."""

    def matrix(self, key: str) -> Int4Weight:
        """The matrix called ``key`` in the graph."""
        ...


class StoredModel:
    """The matrices of a bundle by their names in the checkpoint."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._spec = manifest.decoder
        self._decoder = StoredWeights(bundle.file(manifest.decoder.graph))
        encoders = (manifest.protein_encoder, manifest.molecule_encoder)
        self._protein, self._molecule = (StoredWeights(bundle.file(spec.graph)) if spec else None for spec in encoders)
        table = bundle.embeddings
        self._table_scales = None if table.scales is None else torch.from_numpy(table.scales.copy()).unsqueeze(-1)
        self._arrays: dict[str, npt.NDArray[Any]] = {_TABLE: table.rows}
        projections = {"proj_mol": bundle.molecule_projection, "proj_prot": bundle.protein_projection}
        self._arrays |= {f"{name}.weight": p.weight for name, p in projections.items() if p is not None}

    def replacing(self, weights: Weights) -> Weights:
        """``weights`` (folded) with every matrix that the bundle holds replaced by what it holds."""

        def stored(key: str) -> torch.Tensor:
            if key in self._arrays:
                values = torch.from_numpy(self._arrays[key].astype(np.float32))
                return values if key != _TABLE or self._table_scales is None else values * self._table_scales
            place = self._place(key)
            return weights(key) if place is None else place[0].linear(*place[1:])

        return stored

    def rounding(self, configs: Configs, weights: Weights, chosen: Mapping[str, Chosen]) -> dict[str, float]:
        """Root mean square of (stored - checkpoint), in steps of the stored precision: the worst matrix of each part.

        Args:
            weights: the checkpoint's, folded.
            chosen: by part, where matrices are not the nearest to those of the checkpoint, what they must be.

        Raises:
            ParityError: a matrix is not that of the checkpoint, or not the chosen one.
        """
        stored, worst = self.replacing(weights), dict[str, float]()
        for part, key in self._matrices(configs):
            error = (stored(key) - weights(key).float()) / self._step(key).clamp(min=_SMALLEST_STEP)
            distance = float(error.square().mean().sqrt())
            right = self._is_chosen(key, chosen[part]) if part in chosen else distance <= ROUNDING_TOLERANCE
            if not right:
                raise ParityError(
                    f"the stored matrix '{key}' differs from the checkpoint by {distance:.2g} steps of its precision"
                    + (", and is not the one that was chosen." if part in chosen else "."),
                    seen=key,
                    limit=ROUNDING_TOLERANCE,
                    remedy="Nothing was written. Please report this.",
                )
            worst[part] = max(worst.get(part, 0.0), float(f"{distance:.1e}"))
        return worst

    def _is_chosen(self, key: str, chosen: Chosen) -> bool:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return place[0].int4(place[1]).same_as(chosen.matrix(place[1]))

    def _matrices(self, configs: Configs) -> Iterator[tuple[str, str]]:
        """Part of the bundle and checkpoint key of every matrix it holds."""
        for key in self._arrays:
            yield "tensors", key
        names = [LLM + name for name, _ in llama_tensors(configs.llama, configs.rows)]
        names += [_HEAD] * configs.llama.tied_head
        if configs.esm is not None:
            names += [PROTEIN + name for name, _ in esm_tensors(configs.esm)]
        if configs.gin is not None:
            names += [MOLECULE + name for name, _ in gin_tensors(configs.gin)]
        parts = {LLM: "decoder", PROTEIN: "protein_encoder", MOLECULE: "molecule_encoder"}
        if self._decoder.int8(HEAD):
            # A part of its own, since its steps are; nothing but the nearest levels is chosen for it.
            parts = {_HEAD: HEAD, **parts}
        for key in names:
            if self._place(key) is not None:
                yield next(part for prefix, part in parts.items() if key.startswith(prefix)), key

    def _step(self, key: str) -> torch.Tensor:
        if key == _TABLE and self._table_scales is not None:
            return self._table_scales
        if key in self._arrays:
            return torch.from_numpy(np.spacing(np.abs(self._arrays[key])).astype(np.float32))
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return place[0].step(*place[1:])

    def _place(self, key: str) -> tuple[StoredWeights, str, slice] | None:
        """Graph, linear layer and rows of it that hold the matrix ``key``; None for what no linear layer holds."""
        if key.startswith(LLM):
            found = _decoder_linear(key.removeprefix(LLM), self._spec)
            return None if found is None else (self._decoder, *found)
        match = _ESM_LINEAR.fullmatch(key.removeprefix(PROTEIN))
        if match is not None and self._protein is not None:
            return self._protein, f"layers.{match[1]}.{_ESM_PARTS[match[2]]}", slice(None)
        match = _GIN_LINEAR.fullmatch(key.removeprefix(MOLECULE))
        if match is not None and self._molecule is not None:
            return self._molecule, f"layers.{match[1]}.{match[2]}", slice(None)
        return None


def _decoder_linear(key: str, spec: DecoderSpec) -> tuple[str, slice] | None:
    """The graph's linear layer, and the rows of it, that hold a matrix of the checkpoint."""
    if key == "lm_head.weight":
        return HEAD, slice(None)
    match = _LLAMA_LINEAR.fullmatch(key)
    if match is None:
        return None
    layer, part = match.groups()
    query, key_value = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    rows = {
        "q_proj": slice(0, query),
        "k_proj": slice(query, query + key_value),
        "v_proj": slice(query + key_value, query + 2 * key_value),
    }
    if part in rows:
        return f"layers.{layer}.qkv_proj", rows[part]
    return f"layers.{layer}.{part}", slice(None)
