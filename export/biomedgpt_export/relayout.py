"""The same bundle with its decoder and an int8 protein encoder in another layout, without the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import (
    DATA_SUFFIX,
    PORTABLE,
    DecoderSpec,
    DerivedGraph,
    Manifest,
    MoleculeEncoderSpec,
    ProteinEncoderSpec,
)
from biomedgpt_edge.onnx_header import read_header

from .bundle_writer import BundleWriter
from .choices import Report
from .errors import ExportError
from .exporter import DECODER, PROTEIN_ENCODER
from .graphs.int4_ops import write_portable
from .graphs.int8_ops import has_int8_products, write_portable_int8
from .layouts import write_encoder_in_records, write_gpu_graphs, write_in_records, write_standard_graph
from .options import DECODER_LAYOUTS, DecoderLayout
from .plan import Plan

_Spec = TypeVar("_Spec", DecoderSpec, ProteinEncoderSpec)
_InRecords = Callable[[Path, Path], tuple[Any, DerivedGraph]]
_Portable = Callable[[Path, Path], None]


def relayout(source: Path, out: Path, layout: DecoderLayout, report: Report) -> Manifest:
    """Writes the bundle ``source`` to ``out`` with its decoder in ``layout``; matrices stay what they are, bit for bit.

    A protein encoder in int8 goes with the decoder: what is in records needs our operators, what is portable none of
    them. Graphs for GPUs, which bundles of older versions lack, are written as well. The parity report stays, and names
    the bundle that it was measured on.

    Raises:
        BundleError: ``source`` cannot be opened, or a hash differs.
        ExportError: its decoder lies so already, with graphs for GPUs, or cannot lie so, ``out`` exists, or a file
            cannot be written.
    """
    bundle = Bundle.open(source)
    decoder = bundle.manifest.decoder
    found = decoder.layout
    # Graphs for GPUs are added to records where there is a portable graph beside them, whose data they share.
    lacking = _for_gpus(bundle) and decoder.cuda is None and (found == PORTABLE or decoder.portable is not None)
    if found == DECODER_LAYOUTS[layout] and not lacking:
        raise ExportError(f"the decoder of {source} is in {layout} already.", seen=found, remedy="Use it as it is.")
    report("comparing every file with its hash")
    bundle.verify()
    try:
        return _relayout(bundle, out, layout, report)
    except OSError as error:
        raise ExportError(f"a file cannot be read or written: {error}.", remedy="Nothing was written.") from error


def _for_gpus(bundle: Bundle) -> bool:
    """Whether it may have graphs for GPUs: see :attr:`ExportOptions.for_gpus`."""
    return bundle.manifest.precision != "fp32"


def _relayout(bundle: Bundle, out: Path, layout: DecoderLayout, report: Report) -> Manifest:
    old = bundle.manifest
    # Hardly a byte more or less than it has now; what graphs for TensorRT are checked with, and a portable graph that
    # they are made from, are there for a while.
    work = 2 * sum(entry.size for entry in old.files) if _for_gpus(bundle) else 0
    Plan({"bundle": sum(entry.size for entry in old.files)}, work).require_space(out.absolute().parent)
    with BundleWriter(out) as writer:
        rewriting = _Rewriting(bundle, layout, writer.staging, report)
        specs = {
            "decoder": rewriting.decoder(),
            "molecule_encoder": rewriting.molecule_encoder(),
            "protein_encoder": rewriting.protein_encoder(),
        }
        rewriting.copy_others()
        manifest = replace(
            old,
            **specs,  # type: ignore[arg-type]
            files=writer.entries(report),
            parity={"measured_on": {"bundle": bundle.digest, "layout": old.decoder.layout}} | old.parity,
        )
        Bundle(writer.staging, manifest, digest="").check()
        writer.commit(manifest)
    report(f"wrote {out}")
    return manifest


@dataclass
class _Rewriting:
    """The files of ``bundle``, written to ``staging`` part by part.

    Attributes:
        done: files of the bundle that have been copied, or that others have taken the place of.
    """

    bundle: Bundle
    layout: DecoderLayout
    staging: Path
    report: Report
    done: set[str] = field(default_factory=set)

    def decoder(self) -> DecoderSpec:
        """Writes it in the layout that is wanted."""
        self.report(f"writing the decoder in {self.layout}")
        return self._part(self.bundle.manifest.decoder, DECODER, write_in_records, write_portable)

    def protein_encoder(self) -> ProteinEncoderSpec | None:
        """The same, as far as it has matrices in int8."""
        old = self.bundle.manifest.protein_encoder
        if old is None:
            return None
        if not has_int8_products(self.bundle.file(old.graph)):
            self._copy(self._files_of(old))
            return self._with_gpu_graphs(old, self.staging / old.graph, old.portable, self.staging / old.graph)
        return self._part(old, PROTEIN_ENCODER, write_encoder_in_records, write_portable_int8)

    def molecule_encoder(self) -> MoleculeEncoderSpec | None:
        """Stays what it is."""
        old = self.bundle.manifest.molecule_encoder
        if old is None or not _for_gpus(self.bundle):
            return old
        self._copy(self._files_of(old))
        own = self.staging / old.graph
        return replace(old, standard=write_standard_graph(own, own, self.report))

    def copy_others(self) -> None:
        """Whatever is left."""
        self._copy({entry.path for entry in self.bundle.manifest.files} - self.done)

    def _part(self, old: _Spec, name: str, in_records: _InRecords, portable_again: _Portable) -> _Spec:
        """A part whose graph may change its layout."""
        stored = self.bundle.file(old.graph)
        if old.layout == DECODER_LAYOUTS[self.layout]:
            self._copy(self._files_of(old))
            own, portable = self.staging / old.graph, old.portable
        else:
            self.done |= self._files_of(old)
            own, portable = self.staging / name, None
            if self.layout == "records":
                _, portable = in_records(stored, own)
            else:
                portable_again(stored, own)
        spec = replace(old, graph=own.name, layout=DECODER_LAYOUTS[self.layout], portable=portable)
        if portable is None:
            return self._with_gpu_graphs(spec, own, None, own)
        if old.layout == PORTABLE:
            return self._with_gpu_graphs(spec, own, portable, stored)
        built = self.staging / f"built_{name}"
        if _for_gpus(self.bundle):
            portable_again(stored, built)
        try:
            return self._with_gpu_graphs(spec, own, portable, built)
        finally:
            for path in (built, built.with_suffix(DATA_SUFFIX)):
                path.unlink(missing_ok=True)

    def _with_gpu_graphs(self, spec: _Spec, own: Path, portable: DerivedGraph | None, source: Path) -> _Spec:
        if not _for_gpus(self.bundle):
            return spec
        gpu = write_gpu_graphs(source, own, portable, self.report)
        return replace(spec, cuda=gpu.cuda, standard=gpu.standard)

    def _copy(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            target = self.staging / name
            if name not in self._for_gpus_alone and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.bundle.path / name, target)
            self.done.add(name)

    @property
    def _for_gpus_alone(self) -> set[str]:
        """Graphs that are written anew."""
        manifest, found = self.bundle.manifest, set[str]()
        for spec in (manifest.decoder, manifest.protein_encoder, manifest.molecule_encoder):
            standard, cuda = getattr(spec, "standard", None), getattr(spec, "cuda", None)
            found |= set() if standard is None else {standard.graph}
            found |= set() if cuda is None else {cuda}
        return found

    def _files_of(self, spec: DecoderSpec | ProteinEncoderSpec | MoleculeEncoderSpec) -> set[str]:
        """Files of a part's graph and of the portable one, and those that hold its weights."""
        folder, tensors = PurePosixPath(spec.graph).parent, read_header(self.bundle.file(spec.graph)).tensors
        portable = getattr(spec, "portable", None)
        graphs = {spec.graph} if portable is None else {spec.graph, portable.graph}
        return graphs | {str(folder / tensor.location) for tensor in tensors}
