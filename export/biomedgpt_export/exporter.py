"""Checkpoint in, bundle out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

from biomedgpt_edge.bundle import Bundle, sha256_of
from biomedgpt_edge.errors import ManifestError
from biomedgpt_edge.manifest import (
    MAX_MANIFEST_BYTES,
    DecoderSpec,
    FileEntry,
    Manifest,
    MoleculeEncoderSpec,
    Policy,
    ProteinEncoderSpec,
    TensorFiles,
    parse_manifest,
)
from biomedgpt_edge.tokenizer import Tokenizer

from . import parity, proof
from .bundle_writer import BundleWriter, file_entry
from .calibrated import quantize_model
from .calibration import CALIBRATION, PROOF, read_examples
from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, ExportError, ProofError
from .families import biomedgpt_10b as family
from .families.biomedgpt_10b import LLM, MOLECULE, PROTEIN, Configs, Layout
from .graphs.builder import GraphBuilder
from .graphs.decoder import build_decoder
from .graphs.esm import build_esm
from .graphs.gin import build_gin
from .graphs.linear import GraphPrecision, Linears, Precision
from .graphs.matrices import esm_matrices, llama_matrices
from .plan import Part, Plan, plan
from .quantize.gptq import GptqOptions
from .quantize.int4 import ZERO_POINT, WeightQuantizer
from .quantize.int8 import QMAX, QMAX_PRODUCT, nearest_int8
from .quantize.journal import Journal
from .quantize.layerwise import JournalQuantizer
from .quantize.rtn import RoundToNearest
from .streamed_model import DECODER_PART, PROTEIN_PART, StreamedModel

DECODER, MOLECULE_ENCODER, PROTEIN_ENCODER = "decoder.onnx", "molecule_encoder.onnx", "protein_encoder.onnx"
FILES = TensorFiles("embeddings.safetensors", "projections.safetensors", "tokenizer.model")
POLICY_FILE = "POLICY.txt"

MAX_THREADS = 1024

Quantizer = Literal["gptq", "rtn"]
QUANTIZERS: tuple[Quantizer, ...] = ("gptq", "rtn")
TablePrecision = Literal["fp16", "int8"]
TABLE_PRECISIONS: tuple[TablePrecision, ...] = ("fp16", "int8")
Proof = Literal["quick", "full", "none"]
PROOFS: tuple[Proof, ...] = ("quick", "full", "none")

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        layout: where the parts of the checkpoint lie.
        out: the bundle's folder; must not exist.
        precision: of the linear layers of decoder and protein encoder.
        quantizer: chooses int4 values; without meaning for other precisions.
        calibration: questions with answers for GPTQ.
        proof: how many questions the bundle is compared with its source on: ``quick`` some, ``full`` all.
        max_kl: largest mean KL divergence from the source, in nats per token, with which a bundle is written.
        protein_encoder: precision of the protein encoder's linear layers, where it is another one.
        embeddings: precision of the token embeddings; those of fp32 bundles are fp32.
        name: what the bundle calls itself.
        about: free-form facts about the model for its manifest (training data, scores).
        policy: the model's terms; the family's, unless the checkpoint is somebody's own.
        threads: processor threads for GPTQ and the parity runs.
    """

    layout: Layout
    out: Path
    precision: Precision = "int4"
    quantizer: Quantizer = "gptq"
    calibration: Path = CALIBRATION
    proof: Proof = "quick"
    max_kl: float | None = None
    protein_encoder: GraphPrecision | None = None
    embeddings: TablePrecision = "fp16"
    name: str = "BioMedGPT-10B"
    about: dict[str, Any] = field(default_factory=dict)
    policy: Policy = family.POLICY
    threads: int = 1

    @property
    def exact(self) -> bool:
        """Whether the bundle holds what the checkpoint holds, in float32."""
        return self.precision == self.protein_precision == "fp32"

    @property
    def protein_precision(self) -> GraphPrecision:
        return self.protein_encoder or self.precision

    @property
    def gptq_parts(self) -> tuple[str, ...]:
        """Parts of the model whose int4 values GPTQ chooses."""
        if self.quantizer != "gptq":
            return ()
        parts = {DECODER_PART: self.precision, PROTEIN_PART: self.protein_precision}
        return tuple(part for part, precision in parts.items() if precision == "int4")


def export_bundle(options: ExportOptions, report: Report) -> Manifest:
    """Exports a bundle; it appears at ``options.out`` whole or not at all.

    Raises:
        ExportError: the checkpoint cannot be used, the output exists, or the parity tolerance was passed.
    """
    if not 1 <= options.threads <= MAX_THREADS:
        raise ExportError(f"threads is {options.threads}.", seen=options.threads, limit=f"1 to {MAX_THREADS}")
    if options.max_kl is not None and (options.proof == "none" or options.exact):
        raise ExportError(
            "a largest KL divergence was given, and nothing is to be compared.",
            seen=options.max_kl,
            remedy="Leave it out, or compare: proof quick or full, precision int4 or fp16.",
        )
    if options.precision == "fp32" and options.embeddings != "fp16":
        raise ExportError(
            f"embeddings in {options.embeddings} were asked for, and precision fp32.",
            seen=options.embeddings,
            remedy="Leave one of them out: fp32 bundles hold embeddings in fp32.",
        )
    # The source modules of the parity runs use torch's own pool.
    torch.set_num_threads(options.threads)
    try:
        return _export(options, report)
    except OSError as error:
        folder = _work_folder(options)
        kept = f" What was quantized so far is in {folder}; the same command goes on." if folder.exists() else ""
        raise ExportError(
            f"a file cannot be read or written: {error}.",
            seen=str(error.filename),
            remedy=f"Nothing was written.{kept}",
        ) from error


def _export(options: ExportOptions, report: Report) -> Manifest:
    with BundleWriter(options.out) as writer, open_checkpoint(options.layout.fusion) as checkpoint:
        configs = Configs.read(options.layout, checkpoint)
        family.check_keys(configs, checkpoint)
        export = _Export(options, configs, checkpoint, writer.staging, report)
        planned = planned_export(options, configs, checkpoint)
        for line in planned.lines():
            report(line)
        planned.require_space(options.out.absolute().parent)
        journal = export.quantized()
        export.write_tensors()
        linears = export.write_graphs(journal)
        manifest = export.manifest(linears, writer.entries(report))
        _require_readable(manifest)
        staged = Bundle(writer.staging, manifest, digest="")
        staged.check()
        chosen = {} if journal is None else {part: JournalQuantizer(journal, part) for part in options.gptq_parts}
        measured = parity.measure(staged, configs, export.weights, options.threads, report, chosen)
        measured |= export.proved(staged)
        manifest = export.manifest(linears, manifest.files, measured)
        writer.commit(manifest)
        if journal is not None:
            journal.remove()
    report(f"wrote {options.out}")
    return manifest


def plan_bundle(options: ExportOptions) -> Plan:
    """What :func:`export_bundle` would write, after the checks that it begins with.

    Raises:
        ExportError: the checkpoint cannot be used, or there is too little space.
    """
    with open_checkpoint(options.layout.fusion) as checkpoint:
        configs = Configs.read(options.layout, checkpoint)
        family.check_keys(configs, checkpoint)
        planned = planned_export(options, configs, checkpoint)
    planned.require_space(options.out.absolute().parent)
    return planned


def planned_export(options: ExportOptions, configs: Configs, checkpoint: Checkpoint) -> Plan:
    """Sizes of what the options make of a checkpoint."""
    parts = [
        Part(DECODER_PART, llama_matrices(configs.llama).values(), LLM, options.precision),
        Part(PROTEIN_PART, esm_matrices(configs.esm).values(), PROTEIN, options.protein_precision),
    ]
    value = 4 if options.precision == "fp32" else 2
    hidden, widths = configs.llama.hidden_size, configs.gin.width + configs.esm.hidden_size
    tensors = {
        "embeddings": configs.rows * hidden * (1 if options.embeddings == "int8" else value),
        "projections": widths * hidden * value,
    }
    return plan(parts, tensors, checkpoint, options.gptq_parts)


def _work_folder(options: ExportOptions) -> Path:
    """Where GPTQ keeps what it has done, under a name that the same command finds again."""
    return options.out.parent / f".{options.out.name}.gptq"


@dataclass
class _Export:
    options: ExportOptions
    configs: Configs
    checkpoint: Checkpoint
    staging: Path
    report: Report

    def weights(self, key: str) -> torch.Tensor:
        """One tensor of the checkpoint.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        tensor = self.checkpoint.tensor(key)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"tensor '{key}' holds NaN or infinity.", seen=key, remedy="Download or save the checkpoint again."
            )
        return tensor

    def write_tensors(self) -> None:
        """Embeddings, projections, tokenizer and policy."""
        self.report("writing embeddings and projections")
        _save_tensors(self.staging / FILES.embeddings, self._embeddings())
        protein_weight, protein_bias = self._protein_projection()
        _save_tensors(
            self.staging / FILES.projections,
            {
                "molecule.weight": self._stored("proj_mol.weight"),
                "molecule.bias": self.weights("proj_mol.bias").float(),
                "protein.weight": self._stored("proj_prot.weight", protein_weight),
                "protein.bias": protein_bias,
            },
        )
        (self.staging / FILES.tokenizer).write_bytes(self.options.layout.tokenizer.read_bytes())
        policy = self.options.policy
        (self.staging / POLICY_FILE).write_text(
            f"Licence: {policy.licence}\nUse policy: {policy.use_policy}\n{policy.notice}\n", encoding="utf-8"
        )

    def quantized(self) -> Journal | None:
        """The matrices that GPTQ chose, where it is to choose; what an earlier run did is taken up.

        Raises:
            CalibrationError: the calibration file cannot be used.
            JournalError: the earlier run was another one.
        """
        options = self.options
        if not options.gptq_parts:
            return None
        examples = read_examples(options.calibration)
        gptq = GptqOptions()
        plan = {
            "calibration": sha256_of(options.calibration),
            "gptq": asdict(gptq),
            "parts": list(options.gptq_parts),
            "sources": {entry.path: entry.sha256 for entry in self._sources},
            "threads": options.threads,
            "torch": torch.__version__,
        }
        journal = Journal(_work_folder(options), plan)
        quantize_model(self._streamed(), examples, options.gptq_parts, journal, gptq, self.report)
        return journal

    def proved(self, bundle: Bundle) -> dict[str, Any]:
        """What the precision of a staged bundle costs, as ``proof`` for its manifest.

        Raises:
            ProofError: it costs more than it may.
        """
        options = self.options
        if options.exact or options.proof == "none":
            return {}
        examples = read_examples(PROOF)
        self.report("comparing with the source")
        figures = proof.compared(
            proof.SourceSide(self._streamed()),
            proof.BundleSide(bundle, options.threads),
            examples[: proof.QUICK] if options.proof == "quick" else examples,
        )
        for line in proof.table(figures):
            self.report(line)
        kl = figures["kl"]["mean"]
        if options.max_kl is not None and not kl <= options.max_kl:
            raise ProofError(
                f"the bundle's mean KL divergence from its source is {kl}.",
                seen=kl,
                limit=options.max_kl,
                remedy="Nothing was written. Calibrate with more, or other, questions, or use a higher precision.",
            )
        return {"proof": figures}

    def _streamed(self) -> StreamedModel:
        tokenizer = Tokenizer(self.options.layout.tokenizer)
        return StreamedModel(self.configs, self.weights, family.PROMPT_TEMPLATE, tokenizer)

    def write_graphs(self, journal: Journal | None) -> dict[str, Linears]:
        """The three graphs; returns how the linear layers of each were stored."""
        precision, protein = self.options.precision, self.options.protein_precision

        def quantizer(part: str) -> WeightQuantizer:
            if journal is None or part not in self.options.gptq_parts:
                return RoundToNearest()
            return JournalQuantizer(journal, part)

        # 300 and 600 columns gain nothing from groups, and the whole encoder is 4 MB: it stays fp16 in int4 bundles.
        linears = {
            MOLECULE_ENCODER: Linears("fp16" if precision == "int4" else precision),
            # Few channels of a trained ESM-2 hold values far beyond the others, which int8 activations would flatten:
            # they are used where they were asked for.
            PROTEIN_ENCODER: Linears(protein, quantizer(PROTEIN_PART), activations="fp32"),
            DECODER: Linears(precision, quantizer(DECODER_PART), activations="int8"),
        }
        self.report("molecule encoder")
        self._build(MOLECULE_ENCODER, lambda graph: build_gin(
            graph, self.configs.gin, self._under(MOLECULE), linears[MOLECULE_ENCODER]
        ))  # fmt: skip
        self._build(PROTEIN_ENCODER, lambda graph: build_esm(
            graph, self.configs.esm, self._under(PROTEIN), linears[PROTEIN_ENCODER], self.report
        ))  # fmt: skip
        self._build(DECODER, lambda graph: build_decoder(
            graph, self.configs.llama, self.configs.rows, self._under(LLM), linears[DECODER], self.report
        ))  # fmt: skip
        return linears

    def manifest(
        self, linears: dict[str, Linears], files: tuple[FileEntry, ...], measured: dict[str, Any] | None = None
    ) -> Manifest:
        """The manifest over the staged ``files``, with the parity report once it was measured."""
        llama, esm, gin = self.configs.llama, self.configs.esm, self.configs.gin
        return Manifest(
            family=family.FAMILY,
            name=self.options.name,
            precision=self.options.precision,
            decoder=DecoderSpec(
                graph=DECODER,
                layers=llama.layers,
                hidden_size=llama.hidden_size,
                intermediate_size=llama.intermediate_size,
                heads=llama.heads,
                kv_heads=llama.kv_heads,
                head_size=llama.head_size,
                vocabulary=self.configs.rows,
                context=llama.context,
                rope_base=llama.rope_base,
                norm_eps=llama.norm_eps,
                attention_bias=llama.attention_bias,
            ),
            molecule_encoder=MoleculeEncoderSpec(MOLECULE_ENCODER, gin.layers, gin.width),
            protein_encoder=ProteinEncoderSpec(
                PROTEIN_ENCODER, esm.layers, esm.hidden_size, esm.heads, esm.intermediate_size, esm.norm_eps
            ),
            tensors=FILES,
            prompt=family.PROMPT_TEMPLATE,
            policy=self.options.policy,
            files=files,
            sources=self._sources,
            quantization={name: _recipe(used) for name, used in linears.items()},
            parity=measured or {},
            about=self.options.about,
        )

    @cached_property
    def _sources(self) -> tuple[FileEntry, ...]:
        """What the bundle is made from, named by the part it plays, so that folder names change no byte."""
        shards = self.checkpoint.files
        names = ["fusion"] if len(shards) == 1 else [f"fusion/{path.name}" for path in shards]
        entries = []
        for name, path in [*zip(names, shards, strict=True), *self.options.layout.side_files.items()]:
            self.report(f"hashing {path.name} ({path.stat().st_size:,} bytes)")
            entries.append(file_entry(path, name))
        return tuple(entries)

    def _embeddings(self) -> dict[str, torch.Tensor]:
        key = f"{LLM}model.embed_tokens.weight"
        if self.options.embeddings == "fp16":
            return {"weight": self._stored(key)}
        quantized = nearest_int8(self.weights(key), QMAX)
        return {"weight": quantized.values, "scale": quantized.scales}

    def _protein_projection(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``proj_prot`` with the gain and shift of the encoder's final LayerNorm folded in."""
        norm = f"{PROTEIN}encoder.emb_layer_norm_after"
        weight, bias = self.weights("proj_prot.weight").double(), self.weights("proj_prot.bias").double()
        gain, shift = self.weights(f"{norm}.weight").double(), self.weights(f"{norm}.bias").double()
        return (weight * gain).float(), (bias + weight @ shift).float()

    def _stored(self, key: str, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor ``key``, or what was made of it, in the dtype in which the bundle stores it.

        Raises:
            CheckpointError: a value has no finite fp16 counterpart.
        """
        dtype = torch.float32 if self.options.precision == "fp32" else torch.float16
        stored = (self.weights(key) if tensor is None else tensor).to(dtype)
        if not torch.isfinite(stored).all():
            raise CheckpointError(
                f"tensor '{key}' holds values beyond fp16.", seen=key, limit=65504, remedy="Export with precision fp32."
            )
        return stored

    def _under(self, prefix: str) -> Callable[[str], torch.Tensor]:
        return lambda name: self.weights(prefix + name)

    def _build(self, name: str, build: Callable[[GraphBuilder], None]) -> None:
        graph = GraphBuilder(self.staging / name)
        try:
            build(graph)
            graph.save()
        finally:
            graph.close()


def read_about(path: Path) -> tuple[dict[str, Any], Policy]:
    """Facts for the manifest from a JSON file, and the model's terms: its ``policy``, or else the family's.

    Raises:
        ExportError: not a JSON object, or a policy without its three texts.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}.", seen=str(path)) from error
    if not isinstance(about, dict):
        raise ExportError(f"{path} is not a JSON object.", seen=str(path))
    terms = about.pop("policy", None)
    if terms is None:
        return about, family.POLICY
    names = [entry.name for entry in fields(Policy)]
    if not isinstance(terms, dict) or sorted(terms) != sorted(names) or not all(map(_is_text, terms.values())):
        raise ExportError(f"'policy' in {path} needs the texts {', '.join(names)}.", seen=str(path))
    return about, Policy(**terms)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _require_readable(manifest: Manifest) -> None:
    """The runtime's own reader decides whether a manifest can be read; sizes and facts come from outside."""
    try:
        text = manifest.to_json()
        parse_manifest(text)
    except (ValueError, ManifestError) as error:
        raise ExportError(
            f"no bundle can hold this model: {error}", remedy="Look at the model's configuration and at --about."
        ) from error
    if len(text.encode("utf-8")) > MAX_MANIFEST_BYTES // 2:
        raise ExportError(
            "the manifest would be too large.", limit=MAX_MANIFEST_BYTES // 2, remedy="Give fewer facts with --about."
        )


def _recipe(linears: Linears) -> dict[str, Any]:
    recipe: dict[str, Any] = {"precision": linears.precision}
    if linears.precision == "int8":
        recipe |= {"symmetric": True, "largest": QMAX_PRODUCT, "scales": "fp32, one per output", "activations": "int8"}
    if linears.precision == "int4" and linears.quantizer is not None:
        recipe |= {
            "quantizer": linears.quantizer.name,
            "symmetric": not linears.asymmetric,
            "zero_point": ZERO_POINT,
            "scales": "fp16",
            "activations": linears.activations,
            "weights_by_group_size": {str(size): count for size, count in sorted(linears.group_sizes.items())},
            "zero_padded": linears.padded,
        }
    return recipe


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()
    }
    # Not save_file, which gives the file the private mode of its temporary one.
    path.write_bytes(safetensors.numpy.save(arrays))
