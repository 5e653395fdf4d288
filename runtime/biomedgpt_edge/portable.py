"""The data of graphs that a bundle holds without it, derived from that of a part's own graph in the device cache.

A portable graph, for a decoder or protein encoder in records, refers to tensors that no file of the bundle holds.
``<layer>.weight_int4`` and ``<layer>.scales`` of a linear layer in records are its values and scales, unpacked
(csrc/int4), and so are ``<layer>.weight_int8``, by columns, ``<layer>.scales`` and ``<layer>.bias`` of one in int8
(csrc/int8); any other tensor is that of the same name in the records' graph, byte for byte. Those of a standard graph,
beside records or not, are made of these (see :mod:`standard_tensors`). Tensors follow each other by offset, each on the
next page. The manifest says what they come to, size and SHA-256: what is derived is what was exported, or is not
used.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .bundle import Bundle
from .device_cache import PORTABLE, STANDARD, Verify, cache_folder, holds, locked, stamp
from .errors import BundleCorruptError, PlatformError
from .manifest import PAGE, DecoderSpec, DerivedGraph, FileEntry, MoleculeEncoderSpec, ProteinEncoderSpec
from .memory import mebibytes
from .onnx_header import INT4_MATRICES, INT8_INPUTS, ExternalTensor, Header, Product, read_header
from .onnx_products import RECORDS_GROUP_SIZES
from .standard_tensors import sources, standard_bytes
from .tensor_names import BIAS, INT8_RECORDS, INT8_VALUES, SCALES, VALUES, layer_names

# Of a folder in the cache; another one would hold other files.
FORMAT = 3
_PARTIAL = ".partial"
_log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Derivation:
    """A graph whose data is derived.

    Attributes:
        kind: portable or standard; in the cache, the folder of such ones.
        part: of the model, for people.
        own: the part's own graph, a file of the bundle, that the data is derived from.
        beside: further graphs over the same data, files of the bundle.
    """

    bundle: Bundle
    kind: str
    part: str
    own: str
    derived: DerivedGraph
    beside: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.kind} {self.part}"


def of_decoder(bundle: Bundle) -> Derivation | None:
    """That of the portable decoder; None where there is nothing to derive."""
    return _portable(bundle, "decoder", bundle.manifest.decoder)


def of_protein_encoder(bundle: Bundle) -> Derivation | None:
    """That of the portable protein encoder; None where there is nothing to derive."""
    return _portable(bundle, "protein encoder", bundle.manifest.protein_encoder)


def of_standard(bundle: Bundle) -> list[Derivation]:
    """Those of the standard graphs that a bundle holds, the decoder first."""
    manifest = bundle.manifest
    parts: dict[str, DecoderSpec | ProteinEncoderSpec | MoleculeEncoderSpec | None] = {
        "decoder": manifest.decoder,
        "molecule encoder": manifest.molecule_encoder,
        "protein encoder": manifest.protein_encoder,
    }
    return [
        Derivation(bundle, STANDARD, part, spec.graph, spec.standard)
        for part, spec in parts.items()
        if spec is not None and spec.standard is not None
    ]


def _portable(bundle: Bundle, part: str, spec: DecoderSpec | ProteinEncoderSpec | None) -> Derivation | None:
    if spec is None or spec.portable is None:
        return None
    beside = () if spec.cuda is None else (spec.cuda,)
    return Derivation(bundle, PORTABLE, part, spec.graph, spec.portable, beside)


def derived_files(derivation: Derivation) -> tuple[Path, Path]:
    """Where the graph and its data lie once they were derived.

    Raises:
        PlatformError: there is no place for them; see :func:`cache_folder`.
    """
    derived = derivation.derived
    folder = cache_folder() / derivation.kind / f"{derivation.bundle.digest}-{_part(derivation)}-{FORMAT}"
    return folder / PurePosixPath(derived.graph).name, folder / derived.data


def _part(derivation: Derivation) -> str:
    return derivation.part.replace(" ", "_")


def derived_graph(derivation: Derivation, verify: Verify) -> Path:
    """The graph with its data beside it; derived first where they are absent, cut or altered.

    Args:
        verify: how to look at what is there already; see :meth:`Engine.load`.

    Raises:
        PlatformError: the cache cannot be written, or is too small.
        BundleCorruptError: the bundle does not hold what the graph needs.
    """
    derived = derivation.derived
    graph, data = derived_files(derivation)
    listed = {entry.path: entry for entry in derivation.bundle.manifest.files}
    copied = [listed[name] for name in (derived.graph, *derivation.beside)]
    entries = [
        *(FileEntry(PurePosixPath(entry.path).name, entry.size, entry.sha256) for entry in copied),
        FileEntry(data.name, derived.data_size, derived.data_sha256),
    ]
    try:
        if not holds(graph.parent, entries, verify):
            with locked(graph.parent):
                # Another process may have derived them meanwhile.
                if not holds(graph.parent, entries, verify):
                    _derive(derivation, graph.parent, entries)
    except OSError as error:
        raise PlatformError(
            f"the {derivation.what} cannot be kept in {graph.parent}: {error.strerror or error}.",
            seen=str(graph.parent),
            remedy=f"Set BIOMEDGPT_EDGE_CACHE to a writable folder with {mebibytes(derived.data_size)} free.",
        ) from error
    return graph


def forget(derivation: Derivation) -> None:
    """Removes what was derived."""
    shutil.rmtree(derived_files(derivation)[0].parent, ignore_errors=True)


def _derive(derivation: Derivation, folder: Path, entries: list[FileEntry]) -> None:
    """Fills ``folder``, whole or not at all."""
    bundle, derived = derivation.bundle, derivation.derived
    partial = folder.with_name(f"{folder.name}{_PARTIAL}")
    # Whoever left these behind is gone, since the folder is locked.
    for old in (partial, folder):
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    _require_space(derivation, folder.parent)
    _log.info("deriving the %s, %s in %s, once", derivation.what, mebibytes(derived.data_size), folder.parent)
    partial.mkdir(mode=0o700)
    try:
        graphs = [bundle.file(name) for name in (derived.graph, *derivation.beside)]
        contents = [iter([np.frombuffer(graph.read_bytes(), np.uint8)]) for graph in graphs]
        contents.append(derived_data(bundle.file(derivation.own), bundle.file(derived.graph)))
        for entry, parts in zip(entries, contents, strict=True):
            sha256 = _write(partial / entry.path, parts)
            _require_same(entry, FileEntry(entry.path, (partial / entry.path).stat().st_size, sha256))
        stamp(partial, entries)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    _forget_others(derivation, folder)


def _forget_others(derivation: Derivation, folder: Path) -> None:
    """Removes what was derived for other bundles, but for the one of them that was derived last: updates may go back.

    A process that has one of them open keeps it, since the system does; what is opened again is derived again.
    """
    derived = folder.parent.glob(f"*-{_part(derivation)}-*")
    # Locks lie beside the folders.
    others = [path for path in derived if path.is_dir() and path != folder and path.suffix != _PARTIAL]
    for path in sorted(others, key=_modified, reverse=True)[1:]:
        _log.info("removing %s, derived for another bundle", path)
        shutil.rmtree(path, ignore_errors=True)  # another process may be doing it, too


def _modified(path: Path) -> int:
    """Nanoseconds; 0 of what another process has removed meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _require_same(expected: FileEntry, derived: FileEntry) -> None:
    if derived != expected:
        raise BundleCorruptError(
            f"{derived.path} was derived with {derived.size:,} bytes of SHA-256 {derived.sha256[:16]}…, but the "
            f"manifest says {expected.size:,} of {expected.sha256[:16]}….",
            seen=derived.sha256,
            limit=expected.sha256,
            remedy="Run 'biomedgpt-edge verify' on the bundle; if it is whole, export it again.",
        )


def _require_space(derivation: Derivation, folder: Path) -> None:
    free, size = shutil.disk_usage(folder).free, derivation.derived.data_size
    if free < size:
        raise PlatformError(
            f"the {derivation.what} takes {mebibytes(size)} in {folder}, where {mebibytes(free)} are free.",
            seen=free,
            limit=size,
            remedy="Free some space ('biomedgpt-edge cache clear'), or set BIOMEDGPT_EDGE_CACHE to another disk.",
        )


def _write(path: Path, parts: Iterator[Bytes]) -> str:
    """Writes them through to the disk, so that no loss of power leaves a stamped file of zeros; returns the SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in parts:
            file.write(part.data)
            digest.update(part.data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def derived_data(own: Path, graph: Path) -> Iterator[Bytes]:
    """The bytes of the data of ``graph`` in order, a tensor at a time: one matrix is held, and what it is made of.

    Args:
        own: the part's own graph, its data beside it; both are those of a checked bundle.
        graph: a portable or standard one.

    Raises:
        BundleCorruptError: the graph places tensors elsewhere, or needs one that the bundle does not hold.
    """
    stored, header, end = Sources(own.parent, read_header(own)), read_header(graph), 0
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        start = -(-end // PAGE) * PAGE
        data = _bytes_of(tensor.name, header.shapes[tensor.name] or (), stored)
        if data is None or (tensor.offset, tensor.length) != (start, len(data)):
            found = "no tensor" if data is None else f"{len(data):,} bytes for offset {start:,}"
            raise BundleCorruptError(
                f"{graph.name} places {tensor.length} bytes of {tensor.name[:80]!r} at offset {tensor.offset:,}, "
                f"and {own.name} has {found}.",
                seen=tensor.name[:80],
                remedy="Export the bundle again.",
            )
        yield np.zeros(start - end, np.uint8)
        yield data
        end = start + len(data)


def _bytes_of(name: str, shape: tuple[int, ...], stored: Sources) -> Bytes | None:
    """uint8 ``[bytes]``; None where there is no such tensor, and nothing to make it of."""
    given = stored.bytes_of(name)
    if given is not None:
        return given
    parts = [stored.bytes_of(part) for part in sources(name)]
    if parts[0] is None:
        return None
    try:
        return standard_bytes(name, shape, parts)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise BundleCorruptError(
            f"{name[:80]!r} of {shape} cannot be made of what the bundle holds: {error}.",
            seen=name[:80],
            remedy="Export the bundle again.",
        ) from error


def group_size_of(rows: int, columns: int, shape: tuple[int, ...]) -> int:
    """Columns that share a scale in the records of a matrix, ``[panels, groups, bytes]``, of a checked bundle."""
    return next(
        given for given in RECORDS_GROUP_SIZES if _native.int4_records_shape(rows, columns, given) == tuple(shape)
    )


@dataclass(frozen=True)
class _Place:
    """A linear layer: the ``turn``-th of those whose panels lie in the records of a product."""

    layer: str
    product: Product
    turn: int = 0


class Sources:
    """What other layouts are made of: the tensors of a part's own graph, which lie in ``folder``."""

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder = folder
        self._shapes = header.shapes
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._places = dict[str, _Place]()
        for product in header.products:
            for place, suffixes in _places(product):
                self._places |= {place.layer + suffix: place for suffix in suffixes}
        self._last: tuple[_Place, Mapping[str, Bytes]] | None = None

    def bytes_of(self, name: str) -> Bytes | None:
        """uint8 ``[bytes]``; None where there is no such tensor."""
        place = self._places.get(name)
        if place is not None:
            return self._unpacked(place)[name.removeprefix(place.layer)]
        tensor = self._tensors.get(name)
        return None if tensor is None else self._mapped(tensor)

    def _unpacked(self, place: _Place) -> Mapping[str, Bytes]:
        """Bytes by what tensors with them are called behind the name of the layer."""
        # Scales come after the values of the same layer.
        if self._last is None or self._last[0] is not place:
            self._last = None
            unpack = self._unpack_int4 if place.product.operator in INT4_MATRICES else self._unpack_int8
            self._last = place, unpack(place)
        return self._last[1]

    def _unpack_int4(self, place: _Place) -> Mapping[str, Bytes]:
        rows, columns = _sizes(place.product)
        records, count = self.records(place.product), INT4_MATRICES[place.product.operator]
        panels, groups, size = len(records) // count, records.shape[1], records.shape[2]
        group_size = group_size_of(rows, columns, (panels, groups, size))
        values = np.empty((rows, groups * group_size // 2), np.uint8)
        scales = np.empty((rows, groups), np.float16)
        own = np.ascontiguousarray(records.reshape(panels, count, groups * size)[:, place.turn])
        _native.int4_unpack(values, scales, own, group_size)
        return {VALUES: values.reshape(-1), SCALES: _bytes(scales)}

    def _unpack_int8(self, place: _Place) -> Mapping[str, Bytes]:
        rows, columns = _sizes(place.product)
        values, scales, bias = (
            np.empty((rows, columns), np.int8),
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
        )
        _native.int8_unpack(values, scales, bias, self.records(place.product))
        return {INT8_VALUES: _bytes(np.ascontiguousarray(values.T)), SCALES: _bytes(scales), BIAS: _bytes(bias)}

    def records(self, product: Product) -> Bytes:
        """Mapped, of the shape that the graph declares."""
        name = product.inputs[1]
        tensor, shape = self._tensors.get(name), self._shapes[name] or ()
        data = None if tensor is None else self._mapped(tensor)
        if data is None or len(data) != math.prod(shape):
            raise BundleCorruptError(
                f"the records {name[:80]!r} are {shape}, and have {0 if data is None else len(data):,} bytes outside "
                "the graph.",
                seen=name[:80],
                remedy="Export the bundle again.",
            )
        return data.reshape(shape)

    def _mapped(self, tensor: ExternalTensor) -> Bytes:
        path = self._folder / tensor.location
        length = path.stat().st_size - tensor.offset if tensor.length is None else tensor.length
        if length == 0:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, "r", tensor.offset, (length,)))


def _places(product: Product) -> Iterator[tuple[_Place, tuple[str, ...]]]:
    """The layers in the records of a product, if it has any, and how the tensors are called that they give."""
    if product.operator in INT4_MATRICES:
        for turn, layer in enumerate(layer_names(product.inputs[1])[: INT4_MATRICES[product.operator]]):
            yield _Place(layer, product, turn), (VALUES, SCALES)
    elif product.operator in INT8_INPUTS:
        yield _Place(product.inputs[1].removesuffix(INT8_RECORDS), product), (INT8_VALUES, SCALES, BIAS)


def _sizes(product: Product) -> tuple[int, int]:
    return product.attributes["N"], product.attributes["K"]


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    return array.view(np.uint8).reshape(-1)
