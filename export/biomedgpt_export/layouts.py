"""Graphs in records, with what a box without the operators for them derives portable ones with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from biomedgpt_edge.bundle import sha256_of
from biomedgpt_edge.manifest import DATA_SUFFIX, PortableGraph
from biomedgpt_edge.portable import portable_data

from .errors import ModelConfigError, ParityError
from .graphs.int4_ops import Replaced, write_portable, write_with_int4_ops
from .graphs.int8_ops import write_portable_int8, write_with_int8_ops

PORTABLE_DECODER, PORTABLE_ENCODER = "decoder-portable.onnx", "protein_encoder-portable.onnx"


def write_in_records(source: Path, target: Path) -> tuple[Replaced, PortableGraph]:
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


def write_encoder_in_records(source: Path, target: Path) -> tuple[int, PortableGraph]:
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


def _without_data(portable: Path) -> PortableGraph:
    """Describes the data of a graph and removes it."""
    data = portable.with_suffix(DATA_SUFFIX)
    described = PortableGraph(portable.name, data.stat().st_size, sha256_of(data))
    data.unlink()
    return described


def _require_derivable(records: Path, portable: Path, described: PortableGraph) -> None:
    digest = hashlib.sha256()
    for part in portable_data(records, portable):
        digest.update(part.data)
    if digest.hexdigest() != described.data_sha256:
        raise ParityError(
            f"the data of {portable.name} cannot be derived from {records.name}.",
            seen=digest.hexdigest(),
            limit=described.data_sha256,
            remedy="Nothing was written. Use --decoder-layout portable, and report this.",
        )
