"""Checkpoint in, bundle out."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

from biomedgpt_edge import Protein
from biomedgpt_edge.bundle import Bundle
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
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_edge.tokenizer import Tokenizer

from . import parity, proof
from .bundle_writer import BundleWriter, file_entry
from .calibrated import quantize_model
from .calibration import CALIBRATION, PROOF, Questions, read_examples, readable, require_protein
from .device import describe, find_device
from .errors import CheckpointError, ExportError, MemoryNeedError, ProofError
from .estimate import Estimate, Subject
from .families.base import LLM, MOLECULE, PROTEIN, Layout, Source
from .finite import is_finite
from .graphs.builder import GraphBuilder
from .graphs.config import EsmConfig
from .graphs.decoder import build_decoder
from .graphs.esm import build_esm
from .graphs.gin import build_gin
from .graphs.linear import GraphPrecision, HeadPrecision, Linears, Precision
from .graphs.matrices import HEAD, esm_matrices, llama_matrices
from .memory import available_memory
from .plan import Part, Plan, plan
from .quantize import int8_groups
from .quantize.gptq import GptqOptions
from .quantize.imported import ImportedWeights
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
        quantizer: chooses int4 values, as far as the checkpoint has not chosen them before; left out, ``gptq``. Without
            meaning for other precisions.
        calibration: questions with answers for GPTQ and for an int8 protein encoder; left out, a set of its own.
        device: where GPTQ runs, ``cpu``, ``cuda`` or ``cuda:N``.
        proof: how many questions the bundle is compared with its source on: ``quick`` some, ``full`` all.
        questions: other ones than those of its own to be compared on.
        max_kl: largest mean KL divergence from the source, in nats per token, with which a bundle is written.
        protein_encoder: precision of the protein encoder's linear layers, where it is another one.
        embeddings: precision of the token embeddings; those of fp32 bundles are fp32.
        lm_head: precision of the LM head of int4 bundles, where it is another one; int8 is rounded to nearest.
        name: what the bundle calls itself; left out, the family's title.
        about: free-form facts about the model for its manifest (training data, scores).
        policy: the model's terms; left out, the family's.
        threads: processor threads for GPTQ and the parity runs.
    """

    layout: Layout
    out: Path
    precision: Precision = "int4"
    quantizer: Quantizer | None = None
    calibration: Path | None = None
    device: str = "cpu"
    proof: Proof = "quick"
    questions: Path | None = None
    max_kl: float | None = None
    protein_encoder: GraphPrecision | None = None
    embeddings: TablePrecision = "fp16"
    lm_head: HeadPrecision | None = None
    name: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    threads: int = 1

    @property
    def exact(self) -> bool:
        """Whether the bundle holds what the checkpoint holds, in float32."""
        return self.precision == self.protein_precision == "fp32"

    @property
    def compared(self) -> bool:
        """Whether the bundle is compared with its source, which an exact one need not be."""
        return self.proof != "none" and not self.exact

    @property
    def protein_precision(self) -> GraphPrecision:
        return self.protein_encoder or self.precision


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
    folder = _work_folder(options)
    kept = f" What was quantized so far is in {folder}; the same command goes on." if folder.exists() else ""
    return f"Nothing was written.{kept}"


def _check_options(options: ExportOptions) -> None:
    """What no checkpoint is needed for."""
    if not 1 <= options.threads <= MAX_THREADS:
        raise ExportError(f"threads is {options.threads}.", seen=options.threads, limit=f"1 to {MAX_THREADS}")
    find_device(options.device)
    if options.questions is not None and not options.compared:
        raise ExportError(
            "questions to compare on were given, and nothing is to be compared.",
            seen=str(options.questions),
            remedy="Leave them out, or compare: proof quick or full, precision int4 or fp16.",
        )
    if options.max_kl is not None and not options.compared:
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


def _export(options: ExportOptions, report: Report) -> Manifest:
    with _checked(options, report) as choices, BundleWriter(options.out) as writer:
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
    with _checked(options) as choices:
        planned = choices.plan()
    planned.require_space(options.out.absolute().parent)
    return planned


def estimate_bundle(options: ExportOptions) -> Estimate:
    """The steps of :func:`export_bundle`, their memory and arithmetic.

    Raises:
        ExportError: the checkpoint cannot be used.
    """
    with _checked(options) as choices:
        return choices.estimate(choices.plan())


@contextmanager
def _checked(options: ExportOptions, report: Report = lambda line: None) -> Iterator[_Choices]:
    """What the options come to, the checkpoint opened, after the checks that need no more than its names and shapes."""
    _check_options(options)
    # The source modules of the parity runs use torch's own pool.
    torch.set_num_threads(options.threads)
    with options.layout.open() as source:
        choices = _Choices(options, source, report)
        choices.check()
        yield choices


def _work_folder(options: ExportOptions) -> Path:
    """Where GPTQ keeps what it has done, under a name that the same command finds again."""
    return options.out.parent / f".{options.out.name}.gptq"


@dataclass(frozen=True)
class _Choices:
    """What the options come to for one checkpoint."""

    options: ExportOptions
    source: Source
    report: Report

    def check(self) -> None:
        """What the checkpoint leaves no room for is refused, not ignored.

        Raises:
            ExportError: an option asks for it.
            CalibrationError: questions cannot be used: nobody should learn that hours later.
        """
        options, imported = self.options, self.source.quantized is not None
        if options.protein_encoder is not None and self.source.configs.esm is None:
            raise ExportError(
                f"a protein encoder in {options.protein_encoder} was asked for, and the bundle is to be without one.",
                seen=options.protein_encoder,
                remedy="Leave out --protein-encoder.",
            )
        if imported and options.precision != "int4":
            raise ExportError(
                f"precision {options.precision} was asked for, and the language model is quantized to int4.",
                seen=options.precision,
                limit="int4",
                remedy="Export with precision int4, or export the original weights.",
            )
        self._check_head()
        self._require_all_used()
        if options.quantizer is not None and not self._quantized_here:
            why = "the checkpoint is quantized" if imported else "no part is to be stored in int4"
            raise ExportError(
                f"the quantizer {options.quantizer} was asked for, and {why}.",
                seen=options.quantizer,
                remedy="Leave it out.",
            )
        if options.calibration is not None and not self.gptq_parts and not self.smooths:
            raise ExportError(
                "calibration questions were given, and GPTQ has nothing to quantize, nor is there an int8 encoder.",
                seen=str(options.calibration),
                remedy="Leave them out, or quantize a checkpoint that is not quantized with precision int4 and gptq.",
            )
        if options.device != "cpu" and not self.gptq_parts:
            raise ExportError(
                f"the device {options.device} was asked for, and GPTQ, which would run there, has nothing to quantize.",
                seen=options.device,
                remedy="Leave it out.",
            )
        _ = self.calibration, self.comparison

    def _check_head(self) -> None:
        options, quantized = self.options, self.source.quantized
        if options.lm_head is not None and options.precision != "int4":
            raise ExportError(
                f"an LM head in {options.lm_head} was asked for, and precision {options.precision}.",
                seen=options.lm_head,
                remedy="Leave out --lm-head, or export with precision int4.",
            )
        keys = llama_matrices(self.source.configs.llama)[HEAD].keys
        if options.lm_head == "int8" and quantized is not None and not set(quantized.quantized_keys()).isdisjoint(keys):
            raise ExportError(
                "an LM head in int8 was asked for, and the checkpoint has quantized its head to int4.",
                seen=options.lm_head,
                limit="int4",
                remedy="Leave out --lm-head, or export the original weights.",
            )

    def _require_all_used(self) -> None:
        """A matrix that the checkpoint has quantized is one that a linear layer of the decoder computes with."""
        if self.source.quantized is None:
            return
        used = {key for matrix in llama_matrices(self.source.configs.llama).values() for key in matrix.keys}
        unused = sorted(set(self.source.quantized.quantized_keys()) - used)
        if unused:
            raise CheckpointError(
                f"the checkpoint has quantized {', '.join(unused)}, which a bundle does not hold in groups.",
                seen=unused,
                remedy="Nothing was written. Quantize the linear layers alone, or export the original weights.",
            )

    @property
    def lm_head(self) -> HeadPrecision:
        """Precision of the head beside a decoder in int4."""
        return self.options.lm_head or "int4"

    @property
    def _quantized_here(self) -> tuple[str, ...]:
        """Parts of the model whose int4 values the checkpoint does not bring along."""
        wanted = dict[str, GraphPrecision]()
        if self.source.quantized is None:
            wanted[DECODER_PART] = self.options.precision
        if self.source.configs.esm is not None:
            wanted[PROTEIN_PART] = self.options.protein_precision
        return tuple(part for part, precision in wanted.items() if precision == "int4")

    @property
    def gptq_parts(self) -> tuple[str, ...]:
        """Those of them whose values GPTQ chooses."""
        return () if self.options.quantizer == "rtn" else self._quantized_here

    @property
    def smooths(self) -> bool:
        """Whether activations of the protein encoder are to be quantized, and outliers to be smoothed out before."""
        return self.source.configs.esm is not None and self.options.protein_precision == "int8"

    @cached_property
    def device(self) -> torch.device:
        """Where GPTQ runs.

        Raises:
            DeviceError: it is not there.
        """
        return find_device(self.options.device)

    @cached_property
    def calibration(self) -> Questions | None:
        """What the model reads for GPTQ, or so that its int8 encoder is smoothed, where one of them is to be done.

        Raises:
            CalibrationError: the file cannot be used, has no question for this model, none with a protein where its
                encoder is to be calibrated, or too long a one.
        """
        if not self.gptq_parts and not self.smooths:
            return None
        questions = self._questions("calibration", self.options.calibration, CALIBRATION)
        if self.smooths or PROTEIN_PART in self.gptq_parts:
            require_protein(questions.examples)
        return questions

    @cached_property
    def comparison(self) -> Questions | None:
        """What the bundle is compared with its source on, where it is.

        Raises:
            CalibrationError: see :attr:`calibration`.
        """
        if not self.options.compared:
            return None
        questions = self._questions("comparison", self.options.questions, PROOF, answer=proof.CONTINUED)
        return questions.first(proof.QUICK) if self.options.proof == "quick" else questions

    def _questions(self, purpose: str, given: Path | None, shipped: Path, *, answer: int = 0) -> Questions:
        """Those that were given, all of them; or the shipped ones, as far as the model can read them."""
        layout, configs = self.options.layout, self.source.configs
        path, context = given or shipped, configs.llama.context

        def left_out(count: int) -> None:
            self.report(f"{purpose}: {count} questions are longer than the model's context of {context} positions")

        examples = readable(read_examples(path), configs.inputs, purpose, self.report)
        return Questions.fitting(
            path, examples, layout.family.template, Tokenizer(layout.tokenizer), context,
            answer=answer, left_out=None if given else left_out,
        )  # fmt: skip

    @cached_property
    def imported(self) -> ImportedWeights | None:
        """The int4 values that the checkpoint brings along for the decoder; what it has not quantized is rounded.

        That is its head, mostly, which is read for every token: the precision that was asked for holds for it, too.

        Raises:
            CheckpointError: a bundle cannot hold its groups.
        """
        quantized = self.source.quantized
        if quantized is None:
            return None
        matrices = llama_matrices(self.source.configs.llama)
        return ImportedWeights(quantized, RoundToNearest(), lambda name: matrices[name].keys)

    def plan(self) -> Plan:
        """Sizes of what the options make of the checkpoint.

        Raises:
            CheckpointError: it is quantized in groups that a bundle cannot hold.
        """
        options, configs, imported = self.options, self.source.configs, self.imported
        llama, esm, gin = configs.llama, configs.esm, configs.gin
        decoder = llama_matrices(llama)
        head = [decoder.pop(HEAD)] if self.lm_head == "int8" else []
        stored = None if imported is None else imported.stored_bytes
        parts = [Part(DECODER_PART, decoder.values(), LLM, options.precision, stored)]
        if head:
            parts.append(Part(HEAD, head, LLM, "int8", int8_groups.stored_bytes))
        if esm is not None:
            parts.append(Part(PROTEIN_PART, esm_matrices(esm).values(), PROTEIN, options.protein_precision))
        value = 4 if options.precision == "fp32" else 2
        widths = (0 if gin is None else gin.width) + (0 if esm is None else esm.hidden_size)
        tensors = {
            "embeddings": configs.rows * llama.hidden_size * (1 if options.embeddings == "int8" else value),
            "projections": widths * llama.hidden_size * value,
        }
        return plan(parts, tensors, self.source.checkpoint, self.gptq_parts)

    def estimate(self, planned: Plan) -> Estimate:
        """Memory and time of what the options make of the checkpoint."""
        options, source = self.options, self.source
        table = "fp32" if options.precision == "fp32" else options.embeddings
        checkpoint = sum(path.stat().st_size for path in source.files.values())
        precisions = {DECODER_PART: options.precision, PROTEIN_PART: options.protein_precision}
        return Subject(
            configs=source.configs,
            precisions=precisions,
            table=table,
            gptq=self.gptq_parts,
            head=self.lm_head == "int4",
            smooths=self.smooths,
            device=self.device,
            calibration=self.calibration,
            comparison=self.comparison,
            checkpoint=checkpoint,
            bundle=planned.bundle,
        ).estimate()


@dataclass
class _Export:
    options: ExportOptions
    source: Source
    choices: _Choices
    staging: Path
    report: Report
    smoothing: dict[str, torch.Tensor] = field(default_factory=dict)

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
        gptq = GptqOptions()
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
        journal = Journal(_work_folder(self.options), plan)
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
        if esm is not None:
            # Few channels of a trained ESM-2 hold values far beyond the others, which int8 activations would flatten:
            # they are used where they were asked for, and smoothed out then.
            quantizer = self._quantizer(PROTEIN_PART, journal)
            linears = written[PROTEIN_ENCODER] = Linears(self.options.protein_precision, quantizer, activations="fp32")
            self.report("protein encoder")
            with self._graph(PROTEIN_ENCODER) as graph:
                build_esm(graph, esm, self._under(PROTEIN), linears, self.report)
        imported = self.choices.imported
        quantizer = self._quantizer(DECODER_PART, journal) if imported is None else imported
        linears = written[DECODER] = Linears(precision, quantizer, activations="int8", lm_head=self.choices.lm_head)
        with self._graph(DECODER) as graph:
            build_decoder(graph, llama, configs.rows, self._under(LLM), linears, self.report)
        return written

    def _quantizer(self, part: str, journal: Journal | None) -> WeightQuantizer:
        if journal is None or part not in self.choices.gptq_parts:
            return RoundToNearest()
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
            ),
            molecule_encoder=None if gin is None else MoleculeEncoderSpec(MOLECULE_ENCODER, gin.layers, gin.width),
            protein_encoder=None if esm is None else _protein_spec(esm),
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


def read_about(path: Path) -> tuple[dict[str, Any], Policy | None]:
    """Facts for the manifest from a JSON file, and the model's terms, its ``policy``, if it has them.

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
        return about, None
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


def _protein_spec(esm: EsmConfig) -> ProteinEncoderSpec:
    return ProteinEncoderSpec(
        PROTEIN_ENCODER, esm.layers, esm.hidden_size, esm.heads, esm.intermediate_size, esm.norm_eps
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
