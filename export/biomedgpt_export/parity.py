"""Exported against source: the same questions through the graphs and through the source modules.

Two things are measured. *Rounding* asks whether the stored weights are those of the checkpoint, to within the steps
of their precision. *Fidelity* asks whether the graphs compute what the source modules compute with the weights
that are stored (dequantized, if need be), in float32; both have a tolerance, and an export beyond it does not finish.
What the stored precision itself costs is another question: see ``proof``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from biomedgpt_edge import Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.base import DecoderState
from biomedgpt_edge.decoder.kv_cache import KeyValues, KvLayout
from biomedgpt_edge.decoder.onnx import OnnxDecoder
from biomedgpt_edge.engine import Engine, PreparedPrompt
from biomedgpt_edge.manifest import PORTABLE, FileEntry
from biomedgpt_edge.onnx_header import INT4_MATRICES, INT8_INPUTS
from biomedgpt_edge.prompt import MoleculeSegment, ProteinSegment, TokenSegment
from biomedgpt_edge.protein_tokens import residue_ids

from .errors import ParityError
from .families.base import LLM, MOLECULE, PROTEIN, Configs
from .graphs.int4_ops import write_portable
from .graphs.int8_ops import write_portable_int8
from .graphs.linear import ACCURACY_LEVELS
from .source_modules import SourceEsm, SourceGin, SourceLlama, Weights
from .stored_model import ROUNDING_TOLERANCE, Chosen, StoredModel, folded

# Largest difference over the largest magnitude, the same for every precision: both sides have the same weights.
TOLERANCE = 1e-4

# Aspirin, and initiation factor IF-1, which the authors' notebook asks about.
_ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
_IF1 = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"
_STEPS = 8

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Source:
    """The source modules with one set of weights; encoders as far as the model has them."""

    llama: SourceLlama
    weights: Weights
    esm: SourceEsm | None
    gin: SourceGin | None

    def embeddings(self, prompt: PreparedPrompt) -> Array:
        """The prompt's embeddings as the reference builds them, float32 ``[T, hidden]``."""
        table = self.weights(f"{LLM}model.embed_tokens.weight")
        parts = []
        for segment in prompt.segments:
            if isinstance(segment, TokenSegment):
                parts.append(table[torch.from_numpy(segment.ids)].float())
            elif isinstance(segment, MoleculeSegment) and self.gin is not None:
                parts.append(self._project("proj_mol", self.gin.features(segment.molecule.graph)))
            elif isinstance(segment, ProteinSegment) and self.esm is not None:
                ids = torch.from_numpy(residue_ids(segment.protein.sequence))
                parts.append(self._project("proj_prot", self.esm.features(ids)))
            else:
                raise TypeError("the source model has no encoder for what the bundle has encoded")
        return np.asarray(torch.cat(parts).numpy())

    def logits(self, prompts: Sequence[Array]) -> list[Array]:
        """Logits at every position of each prompt's embeddings, float32 ``[T, rows]``."""
        return [np.asarray(rows.numpy()) for rows in self.llama.logits([torch.from_numpy(rows) for rows in prompts])]

    def _project(self, name: str, features: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights(f"{name}.weight").float(), self.weights(f"{name}.bias").float()
        return torch.nn.functional.linear(features, weight, bias)


def measure(
    bundle: Bundle,
    configs: Configs,
    weights: Weights,
    threads: int,
    report: Callable[[str], None],
    chosen: Mapping[str, Chosen],
) -> dict[str, Any]:
    """The parity report of a staged bundle, for its manifest.

    Args:
        weights: tensors by their names in the checkpoint.
        chosen: by part, matrices that a quantizer did not simply round.

    Raises:
        ParityError: fidelity beyond the tolerance, or a value that is not finite.
    """
    rounded = any(recipe["precision"] != "fp32" for recipe in bundle.manifest.quantization.values())
    if configs.llama.tied_head:
        weights = _with_head(weights)
    rounding: dict[str, float] = {}
    if rounded:
        report("rounding of the stored weights")
        matrices = StoredModel(bundle)
        rounding = matrices.rounding(configs, folded(weights), chosen)
        weights = matrices.replacing(folded(weights))
    report("parity with the source modules: the exported graphs")
    with ExactArithmetic(bundle) as exact:
        exported = _exported(exact, threads)
    report("parity with the source modules: the source")
    fidelity = _fidelity(exported, _source(configs, weights, report))
    _check(fidelity)
    result: dict[str, Any] = {
        "fidelity": fidelity,
        "tolerance": {"fidelity": TOLERANCE},
    }
    if rounded:
        result["rounding"] = rounding
        result["tolerance"]["rounding"] = ROUNDING_TOLERANCE
    return result


@dataclasses.dataclass(frozen=True)
class _Exported:
    """What the graphs make of a prompt: logits at all its positions, and at the last ones again by the KV cache."""

    prompt: PreparedPrompt
    logits: Array
    stepped: Array


def _fidelity(exported: Mapping[str, _Exported], source: Source) -> dict[str, Any]:
    expected = source.logits([one.prompt.embeddings for one in exported.values()])
    return {
        name: {
            "embeddings": _difference(one.prompt.embeddings, source.embeddings(one.prompt)),
            "logits": _difference(one.logits, rows),
            "cached_logits": _difference(one.stepped, rows[-_STEPS:]),
        }
        for (name, one), rows in zip(exported.items(), expected, strict=True)
    }


def _exported(bundle: Bundle, threads: int) -> dict[str, _Exported]:
    """By kind of prompt. Encoders and decoder are in memory one after the other, and neither of them afterwards."""
    with Engine(bundle, _NoDecoder(bundle), threads=threads, allow_16bit=False) as engine:
        prompts = _prompts(engine)
    decoder = OnnxDecoder(bundle, threads=threads)
    return {
        name: _Exported(prompt, _exported_logits(decoder, prompt.embeddings), _stepped_logits(decoder, prompt))
        for name, prompt in prompts.items()
    }


class _NoDecoder:
    """Where an engine is to prepare prompts and no more."""

    tile = 1
    identity = "none"

    def __init__(self, bundle: Bundle) -> None:
        self.kv = KvLayout.rows(bundle.manifest.decoder)

    def open(self, capacity: int, start: KeyValues | None = None) -> DecoderState:
        raise TypeError("an engine that was to prepare prompts was asked for tokens")


def _prompts(engine: Engine) -> dict[str, PreparedPrompt]:
    """One of each kind that the bundle can read."""
    manifest, prompts = engine.bundle.manifest, dict[str, PreparedPrompt]()
    if manifest.molecule_encoder is not None:
        prompts["molecule"] = engine.prepare("Please describe this molecule.", Molecule.from_smiles(_ASPIRIN))
    if manifest.protein_encoder is not None:
        prompts["protein"] = engine.prepare("What is the function of this protein?", Protein.from_sequence(_IF1))
    return prompts | {"text": engine.prepare("What is a protein?")}


def _exported_logits(decoder: OnnxDecoder, embeddings: Array) -> Array:
    with decoder.open(len(embeddings)) as state:
        return state.logits(embeddings, np.arange(len(embeddings)))


def _stepped_logits(decoder: OnnxDecoder, prompt: PreparedPrompt) -> Array:
    """The last positions again, through the KV cache: a prefill without them, then one step each."""
    tokens = prompt.token_ids[-_STEPS:]
    with decoder.open(len(prompt)) as state:
        state.prefill(prompt.embeddings[:-_STEPS])
        return np.stack([state.step(int(token)).copy() for token in tokens])


def _check(fidelity: dict[str, Any]) -> None:
    beyond = [
        f"{quantity} of the {name} prompt differ by {value:.1e} (tolerance {TOLERANCE:.0e})"
        for name, figures in fidelity.items()
        for quantity, value in figures.items()
        if not value <= TOLERANCE
    ]
    if beyond:
        raise ParityError(
            f"the exported graphs do not compute what the source modules compute: {'; '.join(beyond)}.",
            seen=beyond,
            remedy="Nothing was written. Check the versions of torch, transformers and onnxruntime, and report this.",
        )


def _difference(exported: Array, expected: Array) -> float:
    """Largest absolute difference over the largest magnitude of the source."""
    if not (np.isfinite(exported).all() and np.isfinite(expected).all()):
        return math.inf
    return _rounded(float(np.abs(exported - expected).max() / np.abs(expected).max()))


def _rounded(value: float) -> float:
    """Two significant digits: enough to judge by, and stable where the last bits of a sum are not."""
    return float(f"{value:.1e}")


def _source(configs: Configs, weights: Weights, report: Callable[[str], None]) -> Source:
    def under(prefix: str) -> Weights:
        return lambda name: weights(prefix + name)

    return Source(
        SourceLlama(configs.llama, configs.rows, under(LLM), report),
        weights,
        None if configs.esm is None else SourceEsm(configs.esm, under(PROTEIN), report),
        None if configs.gin is None else SourceGin(configs.gin, under(MOLECULE)),
    )


def _with_head(weights: Weights) -> Weights:
    """A tied head under its own name: the graph holds it as a matrix of its own, rounded like the others."""
    head, table = f"{LLM}lm_head.weight", f"{LLM}model.embed_tokens.weight"
    return lambda key: weights(table if key == head else key)


class ExactArithmetic:
    """A view of the bundle whose int4 and int8 layers compute in float32 instead of quantizing activations to int8.

    It lives in copies of the graph files beside the originals, since that is where their weights are found; a graph
    in records is turned back into a portable one, since its operators have no other arithmetic.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._copies: list[Path] = []

    def __enter__(self) -> Bundle:
        manifest = self._bundle.manifest
        entries = list(manifest.files)
        specs: dict[str, Any] = {}
        for field in ("decoder", "protein_encoder"):
            spec = getattr(manifest, field)
            if spec is not None:
                copy = self._copy(self._bundle.file(spec.graph))
                entries.append(FileEntry(copy.name, copy.stat().st_size, ""))
                specs[field] = dataclasses.replace(
                    spec, graph=copy.name, layout=PORTABLE, portable=None, cuda=None, standard=None
                )
        exact = dataclasses.replace(manifest, files=tuple(entries), **specs)
        return dataclasses.replace(self._bundle, manifest=exact)

    def __exit__(self, *exception: object) -> None:
        for copy in self._copies:
            copy.unlink()

    def _copy(self, graph: Path) -> Path:
        copy = graph.with_name(f"{graph.stem}.exact.onnx")
        self._copies.append(copy)
        model = onnx.load(str(graph), load_external_data=False)
        own = {(node.domain, node.op_type) for node in model.graph.node}
        if not own.isdisjoint(INT4_MATRICES.keys() | INT8_INPUTS.keys()):
            self._copies.append(copy.with_suffix(".data"))
            (write_portable_int8 if own & INT8_INPUTS.keys() else write_portable)(graph, copy)
            model = onnx.load(str(copy), load_external_data=False)
        nodes = [exact for node in model.graph.node for exact in _exact(node)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        copy.write_bytes(model.SerializeToString())
        return copy


def _exact(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that compute in float32 what a linear layer computes with quantized activations."""
    if node.op_type == "DynamicQuantizeMatMul":
        source, values, scales = node.input
        one, plain, weight = (f"{node.name}.exact_{part}" for part in ("one", "values", "weight"))
        # Not DequantizeLinear with the scales right before MatMul: ONNX Runtime fuses them, and quantizes activations.
        return [
            onnx.helper.make_node("Constant", [], [one], value_float=1.0),
            onnx.helper.make_node("DequantizeLinear", [values, one], [plain]),
            onnx.helper.make_node("Mul", [plain, scales], [weight]),
            onnx.helper.make_node("MatMul", [source, weight], list(node.output)),
        ]
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = ACCURACY_LEVELS["fp32"]
    return [node]
