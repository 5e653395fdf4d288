"""What the options come to for one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from biomedgpt_edge.errors import PlatformError
from biomedgpt_edge.int4_ops import check_int4_ops
from biomedgpt_edge.tokenizer import Tokenizer

from . import proof
from .calibration import CALIBRATION, PROOF, Questions, read_examples, readable, require_protein
from .device import find_device
from .errors import CheckpointError, ExportError
from .estimate import Estimate, Subject
from .families.base import LLM, PROTEIN, Source
from .graphs.linear import GraphPrecision, HeadPrecision
from .graphs.matrices import HEAD, esm_matrices, llama_matrices
from .graphs.records import int8_records_bytes, records_bytes
from .options import ExportOptions
from .plan import Part, Plan, plan
from .quantize import int8_groups
from .quantize.imported import ImportedWeights
from .quantize.int4 import chosen_group_size
from .quantize.rtn import RoundToNearest
from .streamed_model import DECODER_PART, PROTEIN_PART

Report = Callable[[str], None]


@contextmanager
def checked(options: ExportOptions, report: Report = lambda line: None) -> Iterator[Choices]:
    """What the options come to, the checkpoint opened, after the checks that need no more than its names and shapes."""
    options.check()
    # The source modules of the parity runs use torch's own pool.
    torch.set_num_threads(options.threads)
    with options.layout.open() as source:
        choices = Choices(options, source, report)
        choices.check()
        yield choices


@dataclass(frozen=True)
class Choices:
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
        if options.group_size is not None and not self._quantized_here:
            raise ExportError(
                f"groups of {options.group_size} were asked for, and no part is to be quantized to int4.",
                seen=options.group_size,
                remedy="Leave out --group-size.",
            )
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
        self._check_operators()
        _ = self.calibration, self.comparison

    def _check_operators(self) -> None:
        """A bundle is compared as it is, so that one in records needs the operators for these here, too."""
        if not self.options.in_records or not self.options.compared:
            return
        try:
            check_int4_ops()
        except PlatformError as error:
            raise ExportError(
                f"a decoder in records cannot be compared with its source: {error.message}",
                seen=error.seen,
                remedy="Use --decoder-layout portable, or --proof none.",
            ) from error

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

    @property
    def _stored_bytes(self) -> Callable[[str, int, int], int] | None:
        """Of a layer of the decoder, where that is not a matter of its precision alone."""
        if self.imported is not None:
            # In records, but for the last rows and columns of a matrix, they take the same.
            return self.imported.stored_bytes
        return self._in_records if self.options.in_records else None

    def _in_records(self, name: str, rows: int, columns: int) -> int:
        return records_bytes(rows, columns, chosen_group_size(name, columns, self.options.group_size))

    def plan(self) -> Plan:
        """Sizes of what the options make of the checkpoint.

        Raises:
            CheckpointError: it is quantized in groups that a bundle cannot hold.
            QuantizationError: a group size was asked for that a matrix cannot have.
        """
        options, configs = self.options, self.source.configs
        llama, esm, gin = configs.llama, configs.esm, configs.gin
        decoder = llama_matrices(llama)
        head = [decoder.pop(HEAD)] if self.lm_head == "int8" else []
        parts = [
            Part(
                DECODER_PART,
                decoder.values(),
                LLM,
                options.precision,
                self._stored_bytes,
                group_size=options.group_size,
            )
        ]
        if head:
            parts.append(Part(HEAD, head, LLM, "int8", int8_groups.stored_bytes))
        if esm is not None:
            parts.append(
                Part(
                    PROTEIN_PART,
                    esm_matrices(esm).values(),
                    PROTEIN,
                    options.protein_precision,
                    int8_records_bytes if options.protein_in_records else None,
                    group_size=options.group_size,
                )
            )
        value = 4 if options.precision == "fp32" else 2
        widths = (0 if gin is None else gin.width) + (0 if esm is None else esm.hidden_size)
        tensors = {
            "embeddings": configs.rows * llama.hidden_size * (1 if options.embeddings == "int8" else value),
            "projections": widths * llama.hidden_size * value,
        }
        # Records are made from the portable graph, and turned back for the parity runs.
        twice = [DECODER_PART, HEAD] if options.in_records else []
        twice += [PROTEIN_PART] if options.protein_in_records else []
        # Graphs for TensorRT are written with their data first.
        twice += [DECODER_PART, HEAD, *([] if esm is None else [PROTEIN_PART])] if options.for_gpus else []
        return plan(parts, tensors, self.source.checkpoint, [*self.gptq_parts, *twice])

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
