"""Checkpoint in, bundle out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

from biomedgpt_edge import Protein
from biomedgpt_edge.available_memory import available_memory
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import ManifestError
from biomedgpt_edge.manifest import (
    DATA_SUFFIX,
    MAX_MANIFEST_BYTES,
    PORTABLE,
    RECORDS,
    DecoderSpec,
    DerivedGraph,
    FileEntry,
    Manifest,
    MoleculeEncoderSpec,
    Policy,
    ProteinEncoderSpec,
    TensorFiles,
    parse_manifest,
)
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_edge.tokenizer import Tokenizer

from . import parity, proof
from .bundle_writer import BundleWriter, file_entry
from .calibrated import quantize_model
from .choices import Choices, Report, checked
from .device import describe
from .errors import CheckpointError, ExportError, MemoryNeedError, ModelConfigError, ProofError
from .estimate import Estimate
from .families.base import LLM, MOLECULE, PROTEIN, Source
from .finite import is_finite
from .graphs.builder import GraphBuilder
from .graphs.config import EsmConfig
from .graphs.decoder import build_decoder
from .graphs.esm import build_esm
from .graphs.gin import build_gin
from .graphs.int4_ops import write_portable
from .graphs.linear import Linears
from .layouts import GpuGraphs, write_encoder_in_records, write_gpu_graphs, write_in_records, write_standard_graph
from .options import ExportOptions
from .plan import Plan
from .quantize import int8_groups
from .quantize.gptq import GptqOptions
from .quantize.int4 import ZERO_POINT, WeightQuantizer
from .quantize.int8 import QMAX, QMAX_PRODUCT, nearest_int8
from .quantize.journal import Journal
from .quantize.layerwise import JournalQuantizer
from .quantize.rtn import RoundToNearest
from .quantize.smoothing import RECIPE as SMOOTHING
from .quantize.smoothing import esm_smoothing
from .streamed_model import DECODER_PART, PROTEIN_PART, StreamedModel

DECODER, MOLECULE_ENCODER, PROTEIN_ENCODER = "decoder.onnx", "molecule_encoder.onnx", "protein_encoder.onnx"
FILES = TensorFiles("embeddings.safetensors", "projections.safetensors", "tokenizer.model")
POLICY_FILE = "POLICY.txt"


def export_bundle(options: ExportOptions, report: Report) -> Manifest:
    """Exports a bundle; it appears at ``options.out`` whole or not at all.

    Raises:
        ExportError: the checkpoint cannot be used, the output exists, or the parity tolerance was passed.
    """
    try:
        return _export(options, report)
    except torch.OutOfMemoryError as error:
        raise MemoryNeedError(
            f"the device {options.device} has too little memory.",
            seen=options.device,
            remedy=f"{_nothing_written(options)} Close other programs that use it, or use --device cpu.",
        ) from error
    except OSError as error:
        what = f"a file cannot be read or written: {error}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk is full: {error}, below {options.out.absolute().parent}."
        raise ExportError(
            what,
            seen=None if error.filename is None else str(error.filename),
            remedy=_nothing_written(options),
        ) from error


def _nothing_written(options: ExportOptions) -> str:
    """What an export that ends early leaves."""
    folder = options.work_folder
    kept = f" What was quantized so far is in {folder}; the same command goes on." if folder.exists() else ""
    return f"Nothing was written.{kept}"


def _export(options: ExportOptions, report: Report) -> Manifest:
    with checked(options, report) as choices, BundleWriter(options.out) as writer:
        source, planned = choices.source, choices.plan()
        for line in planned.lines():
            report(line)
        planned.require_space(options.out.absolute().parent)
        choices.estimate(planned).require_memory(available_memory())
        export = _Export(options, source, choices, writer.staging, report)
        export.smooth()
        journal = export.quantized()
        export.write_tensors()
        linears = export.write_graphs(journal)
        manifest = export.manifest(linears, writer.entries(report))
        _require_readable(manifest)
        staged = Bundle(writer.staging, manifest, digest="")
        staged.check()
        chosen = {} if journal is None else {part: JournalQuantizer(journal, part) for part in choices.gptq_parts}
        measured = parity.measure(staged, source.configs, export.rescaled, options.threads, report, chosen)
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
    with checked(options) as choices:
        planned = choices.plan()
    planned.require_space(options.out.absolute().parent)
    return planned


def estimate_bundle(options: ExportOptions) -> Estimate:
    """The steps of :func:`export_bundle`, their memory and arithmetic.

    Raises:
        ExportError: the checkpoint cannot be used.
    """
    with checked(options) as choices:
        return choices.estimate(choices.plan())


@dataclass
class _Export:
    options: ExportOptions
    source: Source
    choices: Choices
    staging: Path
    report: Report
    smoothing: dict[str, torch.Tensor] = field(default_factory=dict)
    portable: DerivedGraph | None = None
    portable_encoder: DerivedGraph | None = None
    gpu: GpuGraphs = field(default_factory=GpuGraphs)
    gpu_encoder: GpuGraphs = field(default_factory=GpuGraphs)
    standard_gin: DerivedGraph | None = None

    def weights(self, key: str) -> torch.Tensor:
        """One tensor of the checkpoint.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        tensor = self.source.checkpoint.tensor(key)
        if not is_finite(tensor):
            name = self.source.checkpoint.original_name(key)
            raise CheckpointError(
                f"tensor '{name}' holds NaN or infinity.", seen=name, remedy="Download or save the checkpoint again."
            )
        return tensor

    def rescaled(self, key: str) -> torch.Tensor:
        """The same, with outlier channels smoothed out, where they are; the model computes what it did.

        Raises:
            CheckpointError: see :meth:`weights`.
        """
        tensor, factor = self.weights(key), self.smoothing.get(key)
        return tensor if factor is None else tensor.float() * factor

    def smooth(self) -> None:
        """Finds how to rescale the norms of an int8 protein encoder, by the proteins of the calibration questions."""
        esm, questions = self.source.configs.esm, self.choices.calibration
        if esm is None or questions is None or not self.choices.smooths:
            return
        given = [item.sequence for one in questions.examples for item in one.inputs if isinstance(item, Protein)]
        ids = [torch.from_numpy(residue_ids(sequence)) for sequence in dict.fromkeys(given)]
        self.report(f"smoothing the protein encoder on {len(ids)} proteins, {sum(map(len, ids))} positions")
        factors = esm_smoothing(esm, self._under(PROTEIN), ids)
        self.smoothing = {PROTEIN + key: factor for key, factor in factors.items()}

    def write_tensors(self) -> None:
        """Embeddings, projections, tokenizer and policy."""
        self.report("writing embeddings and projections")
        _save_tensors(self.staging / FILES.embeddings, self._embeddings())
        _save_tensors(self.staging / FILES.projections, self._projections())
        (self.staging / FILES.tokenizer).write_bytes(self.options.layout.tokenizer.read_bytes())
        policy = self._policy
        (self.staging / POLICY_FILE).write_text(
            f"Licence: {policy.licence}\nUse policy: {policy.use_policy}\n{policy.notice}\n", encoding="utf-8"
        )

    def quantized(self) -> Journal | None:
        """The matrices that GPTQ chose, where it is to choose; what an earlier run did is taken up.

        Raises:
            JournalError: the earlier run was another one.
        """
        questions = self.choices.calibration
        if questions is None or not self.choices.gptq_parts:
            return None
        gptq = GptqOptions(group_size=self.options.group_size)
        plan = {
            "calibration": questions.sha256,
            "device": describe(self.choices.device),
            "gptq": asdict(gptq),
            "inputs": [kind.__name__ for kind in self.source.configs.inputs],
            "lm_head": self.choices.lm_head,
            "parts": list(self.choices.gptq_parts),
            "sources": {entry.path: entry.sha256 for entry in self._sources},
            "threads": self.options.threads,
            "torch": torch.__version__,
        }
        journal = Journal(self.options.work_folder, plan)
        model = replace(self._streamed(), device=self.choices.device)
        parts, head = self.choices.gptq_parts, self.choices.lm_head == "int4"
        quantize_model(model, questions.examples, parts, journal, gptq, self.report, head=head)
        return journal

    def proved(self, bundle: Bundle) -> dict[str, Any]:
        """What the precision of a staged bundle costs, as ``proof`` for its manifest.

        Raises:
            ProofError: it costs more than it may.
        """
        options, questions = self.options, self.choices.comparison
        if questions is None:
            return {}
        imported = self.source.quantized is not None
        self.report("comparing with the source" + ", which is the dequantized checkpoint" * imported)
        figures = proof.compared(
            proof.SourceSide(self._streamed()),
            proof.BundleSide(bundle, options.threads),
            questions.examples,
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
        facts = {
            "source": "the checkpoint, dequantized" if imported else "the checkpoint",
            "questions_sha256": questions.sha256,
        }
        return {"proof": figures | facts}

    def _streamed(self) -> StreamedModel:
        layout = self.options.layout
        return StreamedModel(self.source.configs, self.weights, layout.family.template, Tokenizer(layout.tokenizer))

    def write_graphs(self, journal: Journal | None) -> dict[str, Linears]:
        """The decoder and the encoders that there are; returns how the linear layers of each were stored."""
        precision, configs = self.options.precision, self.source.configs
        llama, esm, gin = configs.llama, configs.esm, configs.gin
        written = dict[str, Linears]()
        if gin is not None:
            # 300 and 600 columns gain nothing from groups, and all of it is 4 MB: it stays fp16 in int4 bundles.
            linears = written[MOLECULE_ENCODER] = Linears("fp16" if precision == "int4" else precision)
            self.report("molecule encoder")
            with self._graph(MOLECULE_ENCODER) as graph:
                build_gin(graph, gin, self._under(MOLECULE), linears)
            if self.options.for_gpus:
                built = self.staging / MOLECULE_ENCODER
                self.standard_gin = write_standard_graph(built, built, self.report)
        imported = self.choices.imported
        quantizer = self._quantizer(DECODER_PART, journal) if imported is None else imported
        linears = written[DECODER] = Linears(precision, quantizer, activations="int8", lm_head=self.choices.lm_head)
        name = f"built_{DECODER}" if self.options.in_records else DECODER
        with self._graph(name) as graph:
            build_decoder(graph, llama, configs.rows, self._under(LLM), linears, self.report)
        self._lay_out(self.staging / name)
        if esm is not None:
            written[PROTEIN_ENCODER] = self._write_protein_encoder(esm, journal)
        return written

    def _lay_out(self, built: Path) -> None:
        """The decoder in records, in place of the one that was built; and those for GPUs."""
        own = self.staging / DECODER
        if built != own:
            self._lay_out_in_records(built)
        if self.options.for_gpus:
            self.report("decoder for GPUs")
            self.gpu = write_gpu_graphs(built, own, self.portable, self.report)
        if built != own:
            _unlink_graph(built)

    def _lay_out_in_records(self, built: Path) -> None:
        try:
            replaced, self.portable = write_in_records(built, self.staging / DECODER)
        except ModelConfigError as error:
            if self.options.decoder_layout is not None:
                raise
            self.report(f"decoder not in records: {error.message}")
            write_portable(built, self.staging / DECODER)
        else:
            self.report(f"decoder in records, {replaced.kept} products in another form")

    def _write_protein_encoder(self, esm: EsmConfig, journal: Journal | None) -> Linears:
        """In int8, it lies in records where the decoder does."""
        precision = self.options.protein_precision
        # Few channels of a trained ESM-2 hold values far beyond the others, which int8 activations would flatten: they
        # are used where they were asked for, and smoothed out then.
        linears = Linears(precision, self._quantizer(PROTEIN_PART, journal), activations="fp32")
        self.report("protein encoder")
        in_records = precision == "int8" and self.portable is not None
        name = f"built_{PROTEIN_ENCODER}" if in_records else PROTEIN_ENCODER
        with self._graph(name) as graph:
            build_esm(graph, esm, self._under(PROTEIN), linears, self.report)
        built, own = self.staging / name, self.staging / PROTEIN_ENCODER
        if in_records:
            count, self.portable_encoder = write_encoder_in_records(built, own)
            self.report(f"protein encoder in records, {count} linear layers")
        if self.options.for_gpus:
            self.gpu_encoder = write_gpu_graphs(built, own, self.portable_encoder, self.report)
        if in_records:
            _unlink_graph(built)
        return linears

    def _quantizer(self, part: str, journal: Journal | None) -> WeightQuantizer:
        if journal is None or part not in self.choices.gptq_parts:
            return RoundToNearest(self.options.group_size)
        return JournalQuantizer(journal, part)

    def manifest(
        self, linears: dict[str, Linears], files: tuple[FileEntry, ...], measured: dict[str, Any] | None = None
    ) -> Manifest:
        """The manifest over the staged ``files``, with the parity report once it was measured."""
        family, configs = self.options.layout.family, self.source.configs
        llama, esm, gin = configs.llama, configs.esm, configs.gin
        return Manifest(
            family=family.name,
            name=self.options.name or family.title,
            precision=self.options.precision,
            decoder=DecoderSpec(
                graph=DECODER,
                layers=llama.layers,
                hidden_size=llama.hidden_size,
                intermediate_size=llama.intermediate_size,
                heads=llama.heads,
                kv_heads=llama.kv_heads,
                head_size=llama.head_size,
                vocabulary=configs.rows,
                context=llama.context,
                rope_base=llama.rope_base,
                norm_eps=llama.norm_eps,
                attention_bias=llama.attention_bias,
                layout=PORTABLE if self.portable is None else RECORDS,
                portable=self.portable,
                cuda=self.gpu.cuda,
                standard=self.gpu.standard,
            ),
            molecule_encoder=(
                None if gin is None else MoleculeEncoderSpec(MOLECULE_ENCODER, gin.layers, gin.width, self.standard_gin)
            ),
            protein_encoder=None if esm is None else _protein_spec(esm, self.portable_encoder, self.gpu_encoder),
            tensors=FILES,
            prompt=family.template,
            policy=self._policy,
            files=files,
            sources=self._sources,
            quantization=self._recipes(linears),
            parity=measured or {},
            about={**family.facts, **self.options.about},
        )

    def _recipes(self, linears: dict[str, Linears]) -> dict[str, Any]:
        recipes = {name: _recipe(used, self.choices.device) for name, used in linears.items()}
        if self.smoothing:
            recipes[PROTEIN_ENCODER]["smoothing"] = SMOOTHING
        return recipes

    @cached_property
    def _sources(self) -> tuple[FileEntry, ...]:
        """What the bundle is made from, named by the part it plays, so that folder names change no byte."""
        entries = []
        for name, path in self.source.files.items():
            self.report(f"hashing {path.name} ({path.stat().st_size:,} bytes)")
            entries.append(file_entry(path, name))
        return tuple(entries)

    @property
    def _policy(self) -> Policy:
        return self.options.policy or self.options.layout.family.policy

    def _embeddings(self) -> dict[str, torch.Tensor]:
        key = f"{LLM}model.embed_tokens.weight"
        if self.options.embeddings == "fp16":
            return {"weight": self._stored(key)}
        quantized = nearest_int8(self.weights(key), QMAX)
        return {"weight": quantized.values, "scale": quantized.scales}

    def _projections(self) -> dict[str, torch.Tensor]:
        """From the widths of the encoders that there are to the decoder's."""
        tensors = dict[str, torch.Tensor]()
        if self.source.configs.gin is not None:
            tensors["molecule.weight"] = self._stored("proj_mol.weight")
            tensors["molecule.bias"] = self.weights("proj_mol.bias").float()
        if self.source.configs.esm is not None:
            weight, bias = self._protein_projection()
            tensors["protein.weight"] = self._stored("proj_prot.weight", weight)
            tensors["protein.bias"] = bias
        return tensors

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
        if not is_finite(stored):
            name = self.source.checkpoint.original_name(key)
            raise CheckpointError(
                f"tensor '{name}' holds values beyond fp16.",
                seen=name,
                limit=65504,
                remedy="Export with precision fp32.",
            )
        return stored

    def _under(self, prefix: str) -> Callable[[str], torch.Tensor]:
        return lambda name: self.rescaled(prefix + name)

    @contextmanager
    def _graph(self, name: str) -> Iterator[GraphBuilder]:
        """A graph that is saved once it is whole."""
        graph = GraphBuilder(self.staging / name)
        try:
            yield graph
            graph.save()
        finally:
            graph.close()


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


def _unlink_graph(graph: Path) -> None:
    for path in (graph, graph.with_suffix(DATA_SUFFIX)):
        path.unlink()


def _protein_spec(esm: EsmConfig, portable: DerivedGraph | None, gpu: GpuGraphs) -> ProteinEncoderSpec:
    return ProteinEncoderSpec(
        graph=PROTEIN_ENCODER,
        layers=esm.layers,
        width=esm.hidden_size,
        heads=esm.heads,
        intermediate_size=esm.intermediate_size,
        norm_eps=esm.norm_eps,
        layout=PORTABLE if portable is None else RECORDS,
        portable=portable,
        cuda=gpu.cuda,
        standard=gpu.standard,
    )


def _recipe(linears: Linears, device: torch.device) -> dict[str, Any]:
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
        if linears.quantizer.name == JournalQuantizer.name:
            recipe["device"] = describe(device)
    if linears.int8_group_size is not None:
        recipe["lm_head"] = {
            "precision": "int8",
            "quantizer": "rtn",
            "symmetric": True,
            "zero_point": int8_groups.ZERO_POINT,
            "scales": "fp16",
            "group_size": linears.int8_group_size,
        }
    return recipe


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()
    }
    # Not save_file, which gives the file the private mode of its temporary one.
    path.write_bytes(safetensors.numpy.save(arrays))
