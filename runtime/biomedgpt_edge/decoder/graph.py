"""Which graph computes a bundle's decoder on this machine."""

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
from ..manifest import PORTABLE, RECORDS, PortableGraph
from .portable import derived_graph

Wanted = Literal["auto", "records", "portable"]
WANTED: tuple[Wanted, ...] = ("auto", "records", "portable")
_RELAYOUT = "Make one with 'biomedgpt-export relayout' on a workstation"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecoderGraph:
    """A graph file and its layout, one of ``manifest.LAYOUTS``."""

    path: Path
    layout: str

    @classmethod
    def of(cls, bundle: Bundle) -> DecoderGraph:
        """That of the bundle itself."""
        decoder = bundle.manifest.decoder
        return cls(bundle.file(decoder.graph), decoder.layout)


@dataclass(frozen=True)
class Choice:
    """A layout and why it is the one.

    Attributes:
        layout: one of ``manifest.LAYOUTS``.
        portable: the graph, where that is not the bundle's own, but has its data derived from it.
        obstacle: what keeps the operators for records from being used here; "" where nothing does or none are needed.
    """

    layout: str
    portable: PortableGraph | None = None
    obstacle: str = ""

    @property
    def description(self) -> str:
        """For people."""
        if self.layout == RECORDS:
            return f"{RECORDS}, computed with {_native.int4_paths()[0]}"
        if self.portable is None:
            return f"{PORTABLE}, computed with ONNX Runtime's operators"
        return f"{PORTABLE}, derived in the device cache: {self.obstacle or 'it was asked for'}"


def choose(bundle: Bundle, wanted: Wanted = "auto") -> Choice:
    """Which graph is used where ``wanted`` is asked for; nothing is opened or derived.

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
        return Choice(PORTABLE, spec.portable)
    try:
        check_int4_ops()
    except PlatformError as error:
        if spec.portable is None:
            raise
        if wanted == "records":
            remedy = "Leave the choice of the decoder to auto: it takes the portable one then."
            raise PlatformError(error.message, seen=error.seen, remedy=remedy) from error
        return Choice(PORTABLE, spec.portable, error.message)
    return Choice(RECORDS)


def decoder_graph(bundle: Bundle, choice: Choice, verify: Verify) -> DecoderGraph:
    """The graph to open; what has to be derived is derived.

    Args:
        verify: how to look at what was derived before; see :meth:`Engine.load`.

    Raises:
        PlatformError: the cache cannot hold what is derived.
        BundleCorruptError: the bundle does not hold what it is to be derived from.
    """
    if choice.obstacle:
        _log.warning("%s The portable decoder is used instead.", choice.obstacle)
    if choice.portable is None:
        return DecoderGraph.of(bundle)
    return DecoderGraph(derived_graph(bundle, choice.portable, verify), choice.layout)
