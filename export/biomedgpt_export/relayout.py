"""The same bundle with its decoder and an int8 protein encoder in another layout, without the checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import DecoderSpec, FileEntry, Manifest, ProteinEncoderSpec
from biomedgpt_edge.onnx_header import read_header

from .bundle_writer import BundleWriter
from .choices import Report
from .errors import ExportError
from .exporter import DECODER, PROTEIN_ENCODER
from .graphs.int4_ops import write_portable
from .graphs.int8_ops import has_int8_products, write_portable_int8
from .layouts import write_encoder_in_records, write_in_records
from .options import DECODER_LAYOUTS, DecoderLayout
from .plan import Plan


def relayout(source: Path, out: Path, layout: DecoderLayout, report: Report) -> Manifest:
    """Writes the bundle ``source`` to ``out`` with its decoder in ``layout``; matrices stay what they are, bit for bit.

    A protein encoder in int8 goes with the decoder: what is in records needs our operators, what is portable none of
    them. The parity report stays, and names the bundle that it was measured on.

    Raises:
        BundleError: ``source`` cannot be opened, or a hash differs.
        ExportError: its decoder lies so already or cannot lie so, ``out`` exists, or a file cannot be written.
    """
    bundle = Bundle.open(source)
    found = bundle.manifest.decoder.layout
    if found == DECODER_LAYOUTS[layout]:
        raise ExportError(f"the decoder of {source} is in {layout} already.", seen=found, remedy="Use it as it is.")
    report("comparing every file with its hash")
    bundle.verify()
    try:
        return _relayout(bundle, out, layout, report)
    except OSError as error:
        raise ExportError(f"a file cannot be read or written: {error}.", remedy="Nothing was written.") from error


def _relayout(bundle: Bundle, out: Path, layout: DecoderLayout, report: Report) -> Manifest:
    old = bundle.manifest
    # Hardly a byte more or less than it has now.
    Plan({"bundle": sum(entry.size for entry in old.files)}, 0).require_space(out.absolute().parent)
    with BundleWriter(out) as writer:
        report(f"writing the decoder in {layout}")
        decoder = _write_decoder(bundle, layout, writer.staging / DECODER)
        encoder = _write_encoder(bundle, layout, writer.staging / PROTEIN_ENCODER)
        written = writer.entries(report)
        kept = _kept(bundle, encoder)
        for entry in kept:
            (writer.staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / entry.path, writer.staging / entry.path)
        manifest = replace(
            old,
            decoder=decoder,
            protein_encoder=encoder,
            files=tuple(sorted([*kept, *written], key=lambda entry: entry.path)),
            parity={"measured_on": {"bundle": bundle.digest, "layout": old.decoder.layout}} | old.parity,
        )
        Bundle(writer.staging, manifest, digest="").check()
        writer.commit(manifest)
    report(f"wrote {out}")
    return manifest


def _write_decoder(bundle: Bundle, layout: DecoderLayout, target: Path) -> DecoderSpec:
    old, portable = bundle.manifest.decoder, None
    if layout == "records":
        _, portable = write_in_records(bundle.file(old.graph), target)
    else:
        write_portable(bundle.file(old.graph), target)
    return replace(old, graph=target.name, layout=DECODER_LAYOUTS[layout], portable=portable)


def _write_encoder(bundle: Bundle, layout: DecoderLayout, target: Path) -> ProteinEncoderSpec | None:
    """The protein encoder's specification, which is the old one where its graph stays as it is."""
    old = bundle.manifest.protein_encoder
    if old is None or not has_int8_products(bundle.file(old.graph)):
        return old
    portable = None
    if layout == "records":
        _, portable = write_encoder_in_records(bundle.file(old.graph), target)
    else:
        write_portable_int8(bundle.file(old.graph), target)
    return replace(old, graph=target.name, layout=DECODER_LAYOUTS[layout], portable=portable)


def _kept(bundle: Bundle, encoder: ProteinEncoderSpec | None) -> list[FileEntry]:
    """The files that are not those of a graph that was written again."""
    old = bundle.manifest
    gone = _files_of(bundle, old.decoder)
    if old.protein_encoder is not None and encoder is not old.protein_encoder:
        gone |= _files_of(bundle, old.protein_encoder)
    return [entry for entry in old.files if entry.path not in gone]


def _files_of(bundle: Bundle, spec: DecoderSpec | ProteinEncoderSpec) -> set[str]:
    """Files of a part's graphs and those that hold its weights."""
    folder, tensors = PurePosixPath(spec.graph).parent, read_header(bundle.file(spec.graph)).tensors
    graphs = {spec.graph} if spec.portable is None else {spec.graph, spec.portable.graph}
    return graphs | {str(folder / tensor.location) for tensor in tensors}
