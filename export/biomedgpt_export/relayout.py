"""The same bundle with its decoder and an int8 protein encoder in another layout, without the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import Manifest
from biomedgpt_edge.onnx_header import read_header

from .bundle_writer import BundleWriter, file_entry
from .choices import Report
from .errors import ExportError
from .graphs.int4_ops import write_portable, write_with_int4_ops
from .graphs.int8_ops import has_int8_products, write_portable_int8, write_with_int8_ops
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
    writers = _writers(bundle, layout)
    replaced = {path for graph in writers for path in _files_of(bundle, graph)}
    kept = [entry for entry in old.files if entry.path not in replaced]
    with BundleWriter(out) as writer:
        for entry in kept:
            (writer.staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / entry.path, writer.staging / entry.path)
        report(f"writing the decoder in {layout}")
        graphs = {graph: writer.staging / PurePosixPath(graph).name for graph in writers}
        for graph, write in writers.items():
            write(bundle.file(graph), graphs[graph])
        written = [path for graph in graphs.values() for path in (graph, graph.with_suffix(".data"))]
        files = [*kept, *(file_entry(path, path.name) for path in written)]
        encoder = old.protein_encoder
        if encoder is not None and encoder.graph in graphs:
            encoder = replace(encoder, graph=graphs[encoder.graph].name)
        manifest = replace(
            old,
            decoder=replace(old.decoder, graph=graphs[old.decoder.graph].name, layout=DECODER_LAYOUTS[layout]),
            protein_encoder=encoder,
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            parity={"measured_on": {"bundle": bundle.digest, "layout": old.decoder.layout}} | old.parity,
        )
        Bundle(writer.staging, manifest, digest="").check()
        writer.commit(manifest)
    report(f"wrote {out}")
    return manifest


def _writers(bundle: Bundle, layout: DecoderLayout) -> dict[str, Callable[[Path, Path], object]]:
    """By graph that the layout changes, what writes it anew."""
    manifest, records = bundle.manifest, layout == "records"
    writers: dict[str, Callable[[Path, Path], object]] = {
        manifest.decoder.graph: write_with_int4_ops if records else write_portable
    }
    encoder = manifest.protein_encoder
    if encoder is not None and has_int8_products(bundle.file(encoder.graph)):
        writers[encoder.graph] = write_with_int8_ops if records else write_portable_int8
    return writers


def _files_of(bundle: Bundle, graph: str) -> set[str]:
    """A graph's file and those that hold its weights."""
    folder = PurePosixPath(graph).parent
    return {graph, *(str(folder / tensor.location) for tensor in read_header(bundle.file(graph)).tensors)}
