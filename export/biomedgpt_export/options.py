"""What to export and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from biomedgpt_edge.manifest import PORTABLE, RECORDS, Policy

from .device import find_device
from .errors import ExportError
from .families.base import Layout
from .graphs.linear import GraphPrecision, HeadPrecision, Precision

MAX_THREADS = 1024

Quantizer = Literal["gptq", "rtn"]
QUANTIZERS: tuple[Quantizer, ...] = ("gptq", "rtn")
TablePrecision = Literal["fp16", "int8"]
TABLE_PRECISIONS: tuple[TablePrecision, ...] = ("fp16", "int8")
Proof = Literal["quick", "full", "none"]
PROOFS: tuple[Proof, ...] = ("quick", "full", "none")
DecoderLayout = Literal["portable", "records"]
# By option, what the manifest says.
DECODER_LAYOUTS: Mapping[DecoderLayout, str] = {"portable": PORTABLE, "records": RECORDS}


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
        decoder_layout: ``records`` has the decoder's int4 matrices, and those of a protein encoder in int8, as our own
            operators read them, which need no repacking when a bundle is loaded; ``portable`` has them for ONNX
            Runtime's. Left out, ``records`` where the decoder has matrices that these operators compute.
        group_size: of the matrices that are quantized to int4; left out, for each the largest that divides its width.
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
    group_size: int | None = None
    decoder_layout: DecoderLayout | None = None
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

    @property
    def in_records(self) -> bool:
        """Whether the decoder's int4 matrices are to lie in records."""
        return self.decoder_layout == "records" or (self.decoder_layout is None and self.precision == "int4")

    @property
    def for_gpus(self) -> bool:
        """Whether the bundle gets graphs for GPUs, which compute in 16 bits: a float32 one stays what was exported."""
        return self.precision != "fp32"

    @property
    def protein_in_records(self) -> bool:
        """Whether a protein encoder's matrices are to lie in records, too."""
        return self.in_records and self.protein_precision == "int8"

    @property
    def work_folder(self) -> Path:
        """Where GPTQ keeps what it has done, under a name that the same command finds again."""
        return self.out.parent / f".{self.out.name}.gptq"

    def check(self) -> None:
        """What no checkpoint is needed for.

        Raises:
            ExportError: options that contradict each other, or are out of range.
            DeviceError: the device is not there.
        """
        if not 1 <= self.threads <= MAX_THREADS:
            raise ExportError(f"threads is {self.threads}.", seen=self.threads, limit=f"1 to {MAX_THREADS}")
        find_device(self.device)
        if self.questions is not None and not self.compared:
            raise ExportError(
                "questions to compare on were given, and nothing is to be compared.",
                seen=str(self.questions),
                remedy="Leave them out, or compare: proof quick or full, precision int4 or fp16.",
            )
        if self.max_kl is not None and not self.compared:
            raise ExportError(
                "a largest KL divergence was given, and nothing is to be compared.",
                seen=self.max_kl,
                remedy="Leave it out, or compare: proof quick or full, precision int4 or fp16.",
            )
        if self.decoder_layout == "records" and self.precision != "int4":
            raise ExportError(
                f"a decoder in {self.decoder_layout} was asked for, and precision {self.precision}.",
                seen=self.decoder_layout,
                remedy="Leave out --decoder-layout, or export with precision int4.",
            )
        if self.precision == "fp32" and self.embeddings != "fp16":
            raise ExportError(
                f"embeddings in {self.embeddings} were asked for, and precision fp32.",
                seen=self.embeddings,
                remedy="Leave one of them out: fp32 bundles hold embeddings in fp32.",
            )


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
