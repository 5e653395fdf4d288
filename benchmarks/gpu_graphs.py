"""Graphs of full size with random weights for ONNX Runtime's CUDA provider: a 7B decoder in int4, ESM-2 in float16.

Written by the exporter's own builders, so that they are the graphs that a bundle holds. Weights of one shape are the
same numbers in every layer: what they are changes no time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from biomedgpt_edge.manifest import PORTABLE, DecoderSpec, ProteinEncoderSpec
from biomedgpt_edge.splice import EmbeddingTable
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig, LlamaConfig
from biomedgpt_export.graphs.cuda import write_cuda
from biomedgpt_export.graphs.decoder import build_decoder
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.linear import Linears
from biomedgpt_export.quantize.int4 import Int4Weight

Build = Callable[[GraphBuilder], None]


class _RandomGroups:
    """Stands for a quantizer: nobody looks at the weights, and 7 billion of them would take minutes."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._made = cache(self._random)

    def quantize(self, name: str, weight: torch.Tensor) -> Int4Weight:
        """As many groups as ``weight`` ``[N, K]`` has."""
        return self._made(*weight.shape)

    def _random(self, rows: int, columns: int) -> Int4Weight:
        groups = -(-columns // self._group_size)
        packed = torch.randint(0, 256, (rows, groups, self._group_size // 2), dtype=torch.uint8)
        scales = torch.full((rows, groups), 1 / (4.6 * columns**0.5), dtype=torch.float16)
        return Int4Weight(packed, scales, columns, self._group_size)


def decoder_bundle(folder: Path, config: LlamaConfig, group_size: int) -> Any:
    """What ``CudaDecoder`` reads of a bundle, whose graph is written into ``folder``."""
    width, wide = config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {
        "q_proj": (width, config.hidden_size),
        "k_proj": (wide, config.hidden_size),
        "v_proj": (wide, config.hidden_size),
        "o_proj": (config.hidden_size, width),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
        "lm_head": (config.vocabulary, config.hidden_size),
    }

    def weights(key: str) -> torch.Tensor:
        shape = shapes.get(key.split(".")[-2])
        # Of matrices, only the shape is asked for.
        return torch.ones(config.hidden_size) if shape is None else torch.empty(shape, device="meta")

    linears = Linears("int4", quantizer=_RandomGroups(group_size))
    graph = _written(
        folder / "decoder.onnx",
        lambda graph: build_decoder(graph, config, config.vocabulary, weights, linears, _silent),
    )
    spec = DecoderSpec(
        graph="decoder.onnx",
        layers=config.layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocabulary=config.vocabulary,
        context=config.context,
        rope_base=config.rope_base,
        norm_eps=config.norm_eps,
        layout=PORTABLE,
        cuda=graph.name,
    )
    table = EmbeddingTable(_random_halves(config.vocabulary, config.hidden_size).numpy())
    return SimpleNamespace(
        path=folder,
        digest="random weights",
        manifest=SimpleNamespace(decoder=spec),
        embeddings=table,
        file=lambda name: folder / name,
    )


def write_esm(folder: Path, config: EsmConfig) -> tuple[Path, ProteinEncoderSpec]:
    """A protein encoder in float16 in ``folder``, and what a manifest says of it."""
    wide, inner = config.hidden_size, config.intermediate_size
    matrices = {"intermediate": (inner, wide), "output": (wide, inner)}

    def weights(key: str) -> torch.Tensor:
        if key == "embeddings.word_embeddings.weight":
            return _random_halves(config.vocabulary, wide)
        owner, kind = key.split(".")[3:], key.rpartition(".")[2]
        rows, columns = (wide, wide) if "attention" in owner else matrices.get(owner[0], (wide, wide))
        if "LayerNorm" in owner:
            return torch.ones(wide) if kind == "weight" else torch.zeros(wide)
        return _random_halves(rows, columns) if kind == "weight" else torch.zeros(rows)

    path = _written(
        folder / "protein_encoder.onnx",
        lambda graph: build_esm(graph, config, weights, Linears("fp16"), _silent),
    )
    spec = ProteinEncoderSpec(
        graph="protein_encoder.onnx",
        layers=config.layers,
        width=wide,
        heads=config.heads,
        intermediate_size=inner,
        norm_eps=config.norm_eps,
        cuda=path.name,
    )
    return path, spec


@cache
def _random_halves(rows: int, columns: int) -> torch.Tensor:
    random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (random / columns**0.5).half()


def _written(path: Path, build: Build) -> Path:
    """The graph for the provider, beside the portable one that it is made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = GraphBuilder(path)
    try:
        build(graph)
        graph.save()
    finally:
        graph.close()
    target = path.with_name(f"{path.stem}-cuda.onnx")
    write_cuda(path, target)
    return target


def _silent(line: str) -> None:
    pass
