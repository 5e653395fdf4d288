"""Graphs in other layouts, and those that a bundle holds without their data, which a box derives where it uses them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from biomedgpt_edge.bundle import sha256_of
from biomedgpt_edge.manifest import DATA_SUFFIX, DerivedGraph
from biomedgpt_edge.portable import derived_data

from .choices import Report
from .errors import ModelConfigError, ParityError
from .graphs.cuda import write_cuda
from .graphs.int4_ops import Replaced, write_portable, write_with_int4_ops
from .graphs.int8_ops import write_portable_int8, write_with_int8_ops
from .graphs.standard import write_standard
from .graphs.stored import StoredWeights

PORTABLE_DECODER, PORTABLE_ENCODER = "decoder-portable.onnx", "protein_encoder-portable.onnx"


@dataclass(frozen=True)
class GpuGraphs:
    """Graphs of a part for GPUs; see :class:`biomedgpt_edge.manifest.DecoderSpec`."""

    cuda: str | None = None
    standard: DerivedGraph | None = None


def write_in_records(source: Path, target: Path) -> tuple[Replaced, DerivedGraph]:
    """Writes the portable graph ``source`` to ``target`` in records, and beside it one of the first kind without data.

    Of ``source``, ``target`` and the data, two lie on disk at once.

    Raises:
        ModelConfigError: see :func:`write_with_int4_ops`; nothing was written.
        ParityError: what a box would derive is not what ``source`` holds.
    """
    portable = target.with_name(PORTABLE_DECODER)
    write_portable(source, portable, on_pages=True)
    described = _without_data(portable)
    try:
        replaced = write_with_int4_ops(source, target)
    except ModelConfigError:
        portable.unlink()
        raise
    _require_derivable(target, portable, described)
    return replaced, described


def write_encoder_in_records(source: Path, target: Path) -> tuple[int, DerivedGraph]:
    """As :func:`write_in_records`, of a protein encoder in int8; returns how many products lie in records.

    Raises:
        ParityError: what a box would derive is not what ``source`` holds.
    """
    portable = target.with_name(PORTABLE_ENCODER)
    write_portable_int8(source, portable, on_pages=True)
    described = _without_data(portable)
    count = write_with_int8_ops(source, target)
    _require_derivable(target, portable, described)
    return count, described


def write_gpu_graphs(source: Path, own: Path, portable: DerivedGraph | None, report: Report) -> GpuGraphs:
    """Writes what GPUs compute a decoder or protein encoder with, beside ``own``.

    Args:
        source: the portable graph with its data.
        own: the part's graph, which may be the same.
        portable: that of ``own`` where it lies in records.

    Raises:
        ParityError: see :func:`write_in_records`.
    """
    try:
        StoredWeights(source).require_half_range(source.name)
    except ModelConfigError as error:
        report(f"no graphs for GPUs: {error.message}")
        return GpuGraphs()
    cuda = own.with_name(f"{own.stem}-cuda.onnx")
    write_cuda(own if portable is None else own.with_name(portable.graph), cuda)
    return GpuGraphs(cuda.name, write_standard_graph(source, own, report))


def write_standard_graph(source: Path, own: Path, report: Report) -> DerivedGraph | None:
    """The standard graph alone; None, which is reported, where no standard operator computes something of the part.

    Raises:
        ParityError: see :func:`write_in_records`.
    """
    target = own.with_name(f"{own.stem}-standard.onnx")
    try:
        written = write_standard(source, target)
    except ModelConfigError as error:
        report(f"no standard graph for TensorRT: {error.message}")
        return None
    if written.plain:
        report(f"{own.stem}: in 16 bits for TensorRT: {', '.join(written.plain)}")
    described = _without_data(target)
    _require_derivable(own, target, described)
    return described


def _without_data(graph: Path) -> DerivedGraph:
    """Describes the data of a graph and removes it."""
    data = graph.with_suffix(DATA_SUFFIX)
    described = DerivedGraph(graph.name, data.stat().st_size, sha256_of(data))
    data.unlink()
    return described


def _require_derivable(own: Path, graph: Path, described: DerivedGraph) -> None:
    digest = hashlib.sha256()
    for part in derived_data(own, graph):
        digest.update(part.data)
    if digest.hexdigest() != described.data_sha256:
        raise ParityError(
            f"the data of {graph.name} cannot be derived from {own.name}.",
            seen=digest.hexdigest(),
            limit=described.data_sha256,
            remedy="Nothing was written. Report this, with the model's configuration.",
        )
