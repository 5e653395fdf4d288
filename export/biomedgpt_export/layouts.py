"""A decoder in records, with what a box without the operators for them derives a portable one with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from biomedgpt_edge.bundle import sha256_of
from biomedgpt_edge.decoder.portable import portable_data
from biomedgpt_edge.manifest import DATA_SUFFIX, PortableGraph

from .errors import ModelConfigError, ParityError
from .graphs.int4_ops import Replaced, write_portable, write_with_int4_ops

PORTABLE_DECODER = "decoder-portable.onnx"


def write_in_records(source: Path, target: Path) -> tuple[Replaced, PortableGraph]:
    """Writes the portable graph ``source`` to ``target`` in records, and beside it one of the first kind without data.

    Of ``source``, ``target`` and the data, two lie on disk at once.

    Raises:
        ModelConfigError: see :func:`write_with_int4_ops`; nothing was written.
        ParityError: what a box would derive is not what ``source`` holds.
    """
    portable = target.with_name(PORTABLE_DECODER)
    write_portable(source, portable, on_pages=True)
    data = portable.with_suffix(DATA_SUFFIX)
    described = PortableGraph(portable.name, data.stat().st_size, sha256_of(data))
    data.unlink()
    try:
        replaced = write_with_int4_ops(source, target)
    except ModelConfigError:
        portable.unlink()
        raise
    _require_derivable(target, portable, described)
    return replaced, described


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
