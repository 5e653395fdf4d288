"""The same bundle with its decoder in another layout, without the checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import DATA_SUFFIX, DecoderSpec, Manifest
from biomedgpt_edge.onnx_header import read_header

from .bundle_writer import BundleWriter, file_entry
from .choices import Report
from .errors import ExportError
from .exporter import DECODER
from .graphs.int4_ops import write_portable
from .layouts import write_in_records
from .options import DECODER_LAYOUTS, DecoderLayout
from .plan import Plan


def relayout(source: Path, out: Path, layout: DecoderLayout, report: Report) -> Manifest:
    """Writes the bundle ``source`` to ``out`` with its decoder in ``layout``; matrices stay what they are, bit for bit.

    The parity report stays, and names the bundle that it was measured on.

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
    replaced = _files_of(bundle, old.decoder)
    kept = [entry for entry in old.files if entry.path not in replaced]
    with BundleWriter(out) as writer:
        for entry in kept:
            (writer.staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / entry.path, writer.staging / entry.path)
        graph = writer.staging / DECODER
        report(f"writing the decoder in {layout}")
        written, portable = [graph, graph.with_suffix(DATA_SUFFIX)], None
        if layout == "records":
            _, portable = write_in_records(bundle.file(old.decoder.graph), graph)
            written.append(graph.with_name(portable.graph))
        else:
            write_portable(bundle.file(old.decoder.graph), graph)
        files = [*kept, *(file_entry(path, path.name) for path in written)]
        manifest = replace(
            old,
            decoder=replace(old.decoder, graph=graph.name, layout=DECODER_LAYOUTS[layout], portable=portable),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            parity={"measured_on": {"bundle": bundle.digest, "layout": old.decoder.layout}} | old.parity,
        )
        Bundle(writer.staging, manifest, digest="").check()
        writer.commit(manifest)
    report(f"wrote {out}")
    return manifest


def _files_of(bundle: Bundle, decoder: DecoderSpec) -> set[str]:
    """Files of graphs and those that hold their weights."""
    folder, tensors = PurePosixPath(decoder.graph).parent, read_header(bundle.file(decoder.graph)).tensors
    graphs = {decoder.graph} if decoder.portable is None else {decoder.graph, decoder.portable.graph}
    return graphs | {str(folder / tensor.location) for tensor in tensors}
