"""Open, verify and memory-map a bundle.

Opening executes nothing, follows nothing out of the folder and allocates nothing that has not been declared and
checked: manifest, every path, every size, every header and every offset. Hashes are checked by :meth:`Bundle.verify`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BundleCorruptError, BundleError, BundleNotFoundError, ManifestError, UnsafePathError
from .manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PAGE,
    RECORDS,
    DecoderSpec,
    DerivedGraph,
    FileEntry,
    Manifest,
    ProteinEncoderSpec,
    parse_manifest,
)
from .onnx_header import (
    CUDA_OPERATORS,
    DECODER_RECORDS_OPERATORS,
    OPERATORS,
    PROTEIN_RECORDS_OPERATORS,
    STANDARD_OPERATORS,
    ExternalTensor,
    Header,
    read_header,
)
from .onnx_products import contradictions, misfits
from .splice import EmbeddingTable, Projection
from .tensor_file import map_tensors
from .tensor_names import ROPE_COS, ROPE_SIN
from .tokenizer import Tokenizer

_CHUNK = 2**22
_MOST_BITS, _LEAST_BITS = 16, 4
# How the exporter names the folder that it writes into until the bundle is whole.
_STAGING = re.compile(r"\..*\.partial-[0-9a-f]{8}")
_RE_EXPORT = "Export or copy the bundle again."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its checked manifest and its folder.

    Attributes:
        path: the folder.
        manifest: what it says about itself.
        digest: SHA-256 of the manifest, which holds every other file's hash; the bundle's identity.
    """

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens the bundle in folder ``path`` and checks everything but hashes.

        Raises:
            BundleNotFoundError: no such folder, no manifest, or a listed file is missing.
            ManifestError, BundleVersionError: see :func:`parse_manifest`.
            UnsafePathError: a listed path leaves the folder or goes through a link.
            BundleCorruptError: a size, header or offset contradicts the manifest.
        """
        # Encoders open later, when the working directory may be another.
        root = Path(os.path.abspath(path))
        if _STAGING.fullmatch(root.name):
            raise BundleNotFoundError(
                f"{root} is what an interrupted export left behind.",
                seen=str(root),
                remedy="Remove it and export again.",
            )
        if not os.path.isdir(root):
            what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise BundleNotFoundError(
                f"the bundle {root} {what}.", seen=str(root), remedy="Give the folder that holds manifest.json."
            )
        text = _manifest_bytes(root)
        bundle = cls(root, parse_manifest(_utf8(text)), hashlib.sha256(text).hexdigest())
        bundle.check()
        return bundle

    def check(self) -> None:
        """Compares every file's size, headers, references and shapes with the manifest; hashes are not computed.

        Raises:
            BundleError: see :meth:`open`.
        """
        with _reading(self.path):
            self._check_files()
            self._check_graphs()
            self._check_tensors()

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        if name not in self._entries:
            raise ManifestError(f"the manifest uses '{name}' but does not list it.", seen=name, remedy=_RE_EXPORT)
        return self.path / name

    def verify(self, report: Callable[[FileEntry, bool], None] | None = None) -> None:
        """Compares every file's SHA-256 with the manifest.

        Raises:
            BundleCorruptError: names every file that differs.
        """
        bad = []
        for entry in self.manifest.files:
            with _reading(self.path):
                good = sha256_of(self.path / entry.path) == entry.sha256
            if report is not None:
                report(entry, good)
            if not good:
                bad.append(entry.path)
        if bad:
            raise BundleCorruptError(
                f"the contents of {', '.join(bad)} differ from the manifest (SHA-256).", seen=bad, remedy=_RE_EXPORT
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.file(self.manifest.tensors.tokenizer))

    @cached_property
    def embeddings(self) -> EmbeddingTable:
        """The token embedding table, memory-mapped, one row per vocabulary entry."""
        tensors = map_tensors(self.file(self.manifest.tensors.embeddings))
        decoder = self.manifest.decoder
        weight = _tensor(tensors, "weight", (decoder.vocabulary, decoder.hidden_size), ("f4", "f2", "i1"))
        scales = _tensor(tensors, "scale", (decoder.vocabulary,), ("f4",)) if weight.dtype.kind == "i" else None
        return EmbeddingTable(weight, scales)

    @cached_property
    def molecule_projection(self) -> Projection | None:
        """Molecule encoder width -> hidden size; None in a bundle without molecules."""
        spec = self.manifest.molecule_encoder
        return None if spec is None else self._projection("molecule", spec.width, None)

    @cached_property
    def protein_projection(self) -> Projection | None:
        """Protein encoder width -> hidden size, the final LayerNorm folded in; None in a bundle without proteins."""
        spec = self.manifest.protein_encoder
        return None if spec is None else self._projection("protein", spec.width, spec.norm_eps)

    def _projection(self, name: str, width: int, norm_eps: float | None) -> Projection:
        hidden = self.manifest.decoder.hidden_size
        weight = _tensor(self._projections, f"{name}.weight", (hidden, width), ("f4", "f2"))
        bias = _tensor(self._projections, f"{name}.bias", (hidden,), ("f4",))
        return Projection(weight, bias, norm_eps)

    @cached_property
    def _projections(self) -> dict[str, npt.NDArray[Any]]:
        return map_tensors(self.file(self.manifest.tensors.projections))

    @cached_property
    def _entries(self) -> Mapping[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {entry.path: entry.size for entry in self.manifest.files}

    def _check_files(self) -> None:
        # Two names that differ in case alone are one file on some file systems.
        if len({entry.path.casefold() for entry in self.manifest.files}) != len(self.manifest.files):
            raise ManifestError("the manifest lists a file twice.", remedy=_RE_EXPORT)
        for entry in self.manifest.files:
            size = _regular_file_size(self.path, entry.path)
            if size != entry.size:
                where = f"it ends at byte {size:,}" if size < entry.size else "it is longer"
                raise BundleCorruptError(
                    f"{entry.path} has {size:,} bytes, but the manifest says {entry.size:,}: {where}.",
                    seen=size,
                    limit=entry.size,
                    remedy=_RE_EXPORT,
                )

    def _check_graphs(self) -> None:
        """External tensors lie inside listed files, operators are those of bundles, quantized matrices as declared."""
        manifest = self.manifest
        header = self._check_layouts(manifest.decoder, DECODER_RECORDS_OPERATORS)
        if manifest.decoder.layout == RECORDS:
            _check_rotations(header, manifest.decoder)
        if manifest.molecule_encoder is not None:
            self._check_graph(manifest.molecule_encoder.graph, OPERATORS)
            self._check_standard(manifest.molecule_encoder.standard)
        if manifest.protein_encoder is not None:
            self._check_layouts(manifest.protein_encoder, PROTEIN_RECORDS_OPERATORS)

    def _check_layouts(self, spec: DecoderSpec | ProteinEncoderSpec, own: Set[tuple[str, str]]) -> Header:
        """A graph, which may have operators of its ``own`` where it lies in records, and those beside it."""
        if spec.portable is not None:
            self._check_derived(spec.portable, OPERATORS)
        if spec.cuda is not None:
            # Over the same data as the portable graph, wherever that is.
            derived = spec.portable
            sizes = None if derived is None else {_beside(derived.graph, derived.data): derived.data_size}
            self._check_graph(spec.cuda, CUDA_OPERATORS, sizes)
        self._check_standard(spec.standard)
        return self._check_graph(spec.graph, OPERATORS | own if spec.layout == RECORDS else OPERATORS)

    def _check_standard(self, standard: DerivedGraph | None) -> None:
        if standard is None:
            return
        self._check_derived(standard, STANDARD_OPERATORS)

    def _check_derived(self, derived: DerivedGraph, operators: Set[tuple[str, str]]) -> None:
        """Its tensors lie in the file that is derived for it, and nowhere in the bundle."""
        data = _beside(derived.graph, derived.data)
        if data in self._entries:
            raise ManifestError(
                f"the manifest lists {data}, which is to be derived.", seen=data[:80], remedy=_RE_EXPORT
            )
        header = self._check_graph(derived.graph, operators, {data: derived.data_size})
        # What is derived is what the bundle holds, unpacked, each tensor on a page: nobody's disk is to be filled. What
        # has 4 bits and no place in a standard graph so takes 16 there.
        held = sum(self._sizes.values()) * (1 if operators == OPERATORS else _MOST_BITS // _LEAST_BITS)
        limit = held + PAGE * len(header.tensors)
        if derived.data_size > limit:
            raise ManifestError(
                f"the manifest says that {data} has {derived.data_size:,} bytes, and the bundle has "
                f"{sum(self._sizes.values()):,}.",
                seen=derived.data_size,
                limit=limit,
                remedy=_RE_EXPORT,
            )
        wrong = next(misfits(header), None)
        if wrong is not None:
            raise BundleCorruptError(
                f"{derived.graph} contradicts itself: {wrong[:200]!r}.", seen=wrong[:200], remedy=_RE_EXPORT
            )

    def _check_graph(
        self, graph: str, operators: Set[tuple[str, str]], sizes: Mapping[str, int] | None = None
    ) -> Header:
        """``sizes`` are those of the files that it may refer to; left out, those of the bundle."""
        header = read_header(self.file(graph))
        for tensor in header.tensors:
            _check_reference(graph, tensor, self._sizes if sizes is None else sizes)
        foreign = sorted(".".join(filter(None, operator)) for operator in header.operators - operators)
        if foreign:
            raise BundleCorruptError(
                f"{graph} uses operators that no bundle needs: {', '.join(foreign)[:120]!r}.",
                seen=[name[:80] for name in foreign[:8]],
                remedy="Use bundles of biomedgpt-export only; a newer one may need a newer biomedgpt-edge.",
            )
        wrong = next(contradictions(header), None)
        if wrong is not None:
            raise BundleCorruptError(
                f"{graph} contradicts itself: {wrong[:200]!r}.", seen=wrong[:200], remedy=_RE_EXPORT
            )
        return header

    def _check_tensors(self) -> None:
        """Headers and shapes of what lies outside the graphs; maps the files and reads none of their tensors."""
        vocabulary, tokenizer = len(self.embeddings.rows), self.tokenizer
        _ = self.molecule_projection, self.protein_projection
        if len(tokenizer) > vocabulary or min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise BundleCorruptError(
                f"{self.manifest.tensors.tokenizer} has {len(tokenizer):,} pieces, BOS {tokenizer.bos_id} and EOS "
                f"{tokenizer.eos_id}; the embedding table has {vocabulary:,} rows.",
                seen=len(tokenizer),
                limit=vocabulary,
                remedy=_RE_EXPORT,
            )


def _beside(graph: str, location: str) -> str:
    """Path in the bundle of what a graph refers to: locations are relative to the graph's own folder."""
    return str(PurePosixPath(graph).parent / location)


def _check_rotations(header: Header, decoder: DecoderSpec) -> None:
    """In records, the KV cache is bytes to a graph, and the table of rotations is what says how long a head is.

    A graph without one is no such decoder; its inputs are not those of one either, which is said when it is loaded.
    """
    expected = decoder.context, decoder.head_size // 2
    for name in (ROPE_COS, ROPE_SIN):
        if header.shapes.get(name, expected) != expected:
            raise BundleCorruptError(
                f"{name} of {decoder.graph} is {header.shapes.get(name)}, and the manifest declares heads of "
                f"{decoder.head_size} and {decoder.context:,} positions.",
                seen=str(header.shapes.get(name)),
                limit=str(expected),
                remedy=_RE_EXPORT,
            )


def _check_reference(graph: str, tensor: ExternalTensor, sizes: Mapping[str, int]) -> None:
    location = _beside(graph, tensor.location)
    size = sizes.get(location)
    if size is None:
        raise UnsafePathError(
            f"{graph} refers to {tensor.location[:80]!r}, which the manifest does not list for it.",
            seen=tensor.location[:80],
            remedy=_RE_EXPORT,
        )
    length = size - tensor.offset if tensor.length is None else tensor.length
    if length < 0 or tensor.offset + length > size:
        raise BundleCorruptError(
            f"{graph} places tensor {tensor.name[:80]!r} at bytes {tensor.offset:,} to "
            f"{tensor.offset + length:,} of {location}, which has {size:,}.",
            remedy=_RE_EXPORT,
        )


def _manifest_bytes(root: Path) -> bytes:
    try:
        size = _regular_file_size(root, MANIFEST_NAME)
    except BundleNotFoundError as error:
        raise BundleNotFoundError(
            f"{root} holds no {MANIFEST_NAME}, so it is not a bundle.",
            seen=str(root),
            remedy="An interrupted export or copy leaves none; export or copy the bundle again.",
        ) from error
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{MANIFEST_NAME} has {size:,} bytes.", seen=size, limit=MAX_MANIFEST_BYTES)
    try:
        return (root / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise BundleError(f"{MANIFEST_NAME} in {root} cannot be read: {error.strerror}.", seen=str(root)) from error


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{MANIFEST_NAME} is not UTF-8 at byte {error.start}.", remedy=_RE_EXPORT) from error


def _regular_file_size(root: Path, name: str) -> int:
    """Size of a regular file below ``root`` that is reached without leaving it and without links."""
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and "\\" not in name and not PureWindowsPath(name).drive and "\0" not in name
    if not parts or not plain or not name.isprintable() or name.startswith("/") or ".." in parts:
        raise UnsafePathError(f"the manifest lists the path {name[:80]!r}.", seen=name[:80], remedy=_RE_EXPORT)
    current = root
    for part in parts:
        current = current / part
        try:
            mode = current.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleNotFoundError(
                f"{name} is missing from the bundle {root}.", seen=name, remedy=_RE_EXPORT
            ) from error
        except OSError as error:
            raise BundleError(f"{name[:80]!r} in {root} cannot be read: {error.strerror}.", seen=name[:80]) from error
        if stat.S_ISLNK(mode):
            raise UnsafePathError(
                f"{name} in the bundle {root} is reached through a link.", seen=name, remedy="Copy the file itself."
            )
    if not stat.S_ISREG(mode):
        raise UnsafePathError(f"{name} in the bundle {root} is not a regular file.", seen=name, remedy=_RE_EXPORT)
    return current.lstat().st_size


def _tensor(
    tensors: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> npt.NDArray[Any]:
    tensor = tensors.get(name)
    if tensor is None:
        raise BundleCorruptError(f"the bundle has no tensor '{name}'.", seen=name, remedy=_RE_EXPORT)
    if tensor.shape != shape or tensor.dtype not in [np.dtype(d) for d in dtypes]:
        raise BundleCorruptError(
            f"tensor '{name}' is {tensor.dtype}{list(tensor.shape)}; the manifest wants "
            f"{list(shape)} of {', '.join(str(np.dtype(d)) for d in dtypes)}.",
            seen=str(list(tensor.shape)),
            remedy=_RE_EXPORT,
        )
    return tensor


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a typed error that names the file."""
    try:
        yield
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, (str, os.PathLike)) else "a file"
        raise BundleError(
            f"{name} in the bundle {root} cannot be read: {error.strerror}.", seen=name, remedy="Check its permissions."
        ) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
