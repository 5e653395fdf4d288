"""Which graphs compute a bundle's decoder, and its protein encoder with it, on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import _native
from ..bundle import Bundle
from ..device_cache import Verify
from ..errors import OptionError, PlatformError
from ..int4_ops import check_int4_ops
from ..manifest import PORTABLE, RECORDS, DecoderSpec, ProteinEncoderSpec
from ..portable import Derivation, derived_graph, of_decoder, of_protein_encoder

Wanted = Literal["auto", "records", "portable"]
WANTED: tuple[Wanted, ...] = ("auto", "records", "portable")
_RELAYOUT = "Make one with 'biomedgpt-export relayout' on a workstation"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenGraph:
    """A graph file and its layout, one of ``manifest.LAYOUTS``."""

    path: Path
    layout: str

    @classmethod
    def of(cls, bundle: Bundle, spec: DecoderSpec | ProteinEncoderSpec) -> ChosenGraph:
        """That of the bundle itself."""
        return cls(bundle.file(spec.graph), spec.layout)


@dataclass(frozen=True)
class Choice:
    """Whether graphs in records are used, and why.

    Attributes:
        layout: of the decoder, one of ``manifest.LAYOUTS``.
        derived: whether what lies in records gives way to portable graphs whose data is derived from it.
        obstacle: what keeps the operators for records from being used here; "" where nothing does or none are needed.
    """

    layout: str
    derived: bool = False
    obstacle: str = ""

    @property
    def description(self) -> str:
        """Of the decoder, for people."""
        return self._describe(RECORDS if self.derived else self.layout, _native.int4_paths()[0])

    def encoder_description(self, encoder: ProteinEncoderSpec) -> str:
        """Of the protein encoder, for people."""
        return self._describe(encoder.layout, _native.int8_paths()[0])

    def _describe(self, stored: str, path: str) -> str:
        if stored == PORTABLE:
            return f"{PORTABLE}, computed with ONNX Runtime's operators"
        if not self.derived:
            return f"{stored}, computed with {path}"
        return f"{PORTABLE}, derived in the device cache: {self.obstacle or 'it was asked for'}"


def choose(bundle: Bundle, wanted: Wanted = "auto") -> Choice:
    """Which graphs are used where ``wanted`` is asked for; nothing is opened or derived.

    Raises:
        OptionError: the bundle has no such decoder.
        PlatformError: it lies in records alone, or these were asked for, and the operators for these cannot be used.
    """
    if wanted not in WANTED:
        raise OptionError(f"decoder is {wanted!r}.", limit=", ".join(WANTED), remedy=f"Give {', '.join(WANTED)}.")
    spec = bundle.manifest.decoder
    if spec.layout == PORTABLE:
        if wanted == "records":
            raise OptionError(
                f"a decoder in records was asked for, and that of {bundle.path} is portable.",
                seen=wanted,
                limit=spec.layout,
                remedy=f"{_RELAYOUT} (--decoder-layout records), or leave the choice to auto.",
            )
        return Choice(PORTABLE)
    if wanted == "portable":
        if spec.portable is None:
            raise OptionError(
                f"a portable decoder was asked for, and {bundle.path} holds nothing to derive one with.",
                seen=wanted,
                limit=spec.layout,
                remedy=f"{_RELAYOUT} (--decoder-layout portable), or leave the choice to auto.",
            )
        return Choice(PORTABLE, derived=True)
    try:
        check_int4_ops()
    except PlatformError as error:
        if spec.portable is None:
            raise
        if wanted == "records":
            remedy = "Leave the choice of the decoder to auto: it takes the portable one then."
            raise PlatformError(error.message, seen=error.seen, remedy=remedy) from error
        return Choice(PORTABLE, derived=True, obstacle=error.message)
    return Choice(RECORDS)


def decoder_graph(bundle: Bundle, choice: Choice, verify: Verify) -> ChosenGraph:
    """The decoder to open; what has to be derived is derived.

    Args:
        verify: how to look at what was derived before; see :meth:`Engine.load`.

    Raises:
        PlatformError: the cache cannot hold what is derived.
        BundleCorruptError: the bundle does not hold what it is to be derived from.
    """
    if choice.obstacle:
        both = "decoder is" if of_protein_encoder(bundle) is None else "decoder and protein encoder are"
        _log.warning("%s The portable %s used instead.", choice.obstacle, both)
    return _graph(bundle, bundle.manifest.decoder, of_decoder(bundle), choice, verify)


def protein_encoder_graph(bundle: Bundle, spec: ProteinEncoderSpec, choice: Choice, verify: Verify) -> ChosenGraph:
    """The protein encoder to open, whose ``spec`` is the bundle's; otherwise as :func:`decoder_graph`."""
    return _graph(bundle, spec, of_protein_encoder(bundle), choice, verify)


def _graph(
    bundle: Bundle,
    spec: DecoderSpec | ProteinEncoderSpec,
    derivation: Derivation | None,
    choice: Choice,
    verify: Verify,
) -> ChosenGraph:
    if derivation is None or not choice.derived:
        return ChosenGraph.of(bundle, spec)
    return ChosenGraph(derived_graph(derivation, verify), PORTABLE)
