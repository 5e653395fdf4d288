"""The manifest's types: what a bundle says about itself, read strictly and written by the exporter.

Numbers are annotated with their bounds, so that no size of a hostile manifest reaches an allocation unchecked.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from .errors import BundleVersionError, ManifestError
from .prompt import PromptTemplate

MANIFEST_NAME = "manifest.json"
SCHEMA = "biomedgpt-edge/bundle"
SCHEMA_VERSION = 5
PORTABLE, RECORDS = "portable", "records-1"
GRAPH_SUFFIX, DATA_SUFFIX = ".onnx", ".data"
LAYOUTS = (PORTABLE, RECORDS)
# What tensors of a derived graph begin at multiples of.
PAGE = 4096
MAX_MANIFEST_BYTES = 4 * 2**20
_EXACT_IN_FLOAT = 2**53
_RE_EXPORT = "Export or copy the bundle again."


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float


@dataclass(frozen=True)
class _Addition:
    """A field that version ``since`` has added to ``part``, and its value in bundles of older ones."""

    since: int
    part: str
    name: str
    default: Any


# What an older version can say is written in it, since older runtimes read it.
_ADDED = (
    _Addition(2, "decoder", "layout", PORTABLE),
    _Addition(3, "decoder", "portable", None),
    _Addition(4, "protein_encoder", "layout", PORTABLE),
    _Addition(4, "protein_encoder", "portable", None),
    _Addition(5, "decoder", "cuda", None),
    _Addition(5, "decoder", "standard", None),
    _Addition(5, "molecule_encoder", "standard", None),
    _Addition(5, "protein_encoder", "cuda", None),
    _Addition(5, "protein_encoder", "standard", None),
)


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle; ``path`` is relative, with forward slashes."""

    path: str
    size: Annotated[int, Range(0, 2**48)]
    sha256: str


@dataclass(frozen=True)
class DerivedGraph:
    """A graph that a part of a model has beside its own: ``graph`` is a file of the bundle.

    The tensors that it refers to lie in :attr:`data`, which is not in the bundle: what that holds is derived where it
    is needed (see :mod:`biomedgpt_edge.portable`), ``data_size`` bytes of SHA-256 ``data_sha256``.
    """

    graph: str
    data_size: Annotated[int, Range(0, 2**48)]
    data_sha256: str

    @property
    def data(self) -> str:
        """Name of the file with its tensors, beside it."""
        return PurePosixPath(self.graph).with_suffix(DATA_SUFFIX).name


@dataclass(frozen=True)
class DecoderSpec:
    """Llama-shaped decoder; ``vocabulary`` counts the rows of the logits, ``context`` the positions it may use.

    ``layout`` is ``portable`` where ONNX Runtime's own operators compute the graph, and ``records-1`` where matrices
    lie as those of csrc/int4 read them; another number would stand for other records. ``portable`` is for machines
    where the operators for records cannot be used. For GPUs, ``cuda`` is the portable graph with activations in
    float16, over the same data, and ``standard`` is one in operators of ONNX alone.
    """

    graph: str
    layers: Annotated[int, Range(1, 1024)]
    hidden_size: Annotated[int, Range(1, 2**17)]
    intermediate_size: Annotated[int, Range(1, 2**20)]
    heads: Annotated[int, Range(1, 4096)]
    kv_heads: Annotated[int, Range(1, 4096)]
    head_size: Annotated[int, Range(1, 4096)]
    vocabulary: Annotated[int, Range(1, 2**24)]
    context: Annotated[int, Range(1, 2**20)]
    rope_base: Annotated[float, Range(1.0, 1e12)]
    norm_eps: Annotated[float, Range(1e-30, 1.0)]
    attention_bias: bool = False
    layout: str = PORTABLE
    portable: DerivedGraph | None = None
    cuda: str | None = None
    standard: DerivedGraph | None = None


@dataclass(frozen=True)
class MoleculeEncoderSpec:
    """Dense-form GIN; ``standard`` is it in float16, for engines that take operators of ONNX alone."""

    graph: str
    layers: Annotated[int, Range(1, 1024)]
    width: Annotated[int, Range(1, 2**17)]
    standard: DerivedGraph | None = None


@dataclass(frozen=True)
class ProteinEncoderSpec:
    """ESM-2 without its final LayerNorm, which is folded into the projection; ``norm_eps`` is that norm's.

    ``layout`` is ``records-1`` where matrices lie as the operators of csrc/int8 read them, which they do beside a
    decoder in records alone; ``portable`` is there then, too. ``cuda`` and ``standard`` are as those of a decoder.
    """

    graph: str
    layers: Annotated[int, Range(1, 1024)]
    width: Annotated[int, Range(1, 2**17)]
    heads: Annotated[int, Range(1, 4096)]
    intermediate_size: Annotated[int, Range(1, 2**20)]
    norm_eps: Annotated[float, Range(1e-30, 1.0)]
    layout: str = PORTABLE
    portable: DerivedGraph | None = None
    cuda: str | None = None
    standard: DerivedGraph | None = None


@dataclass(frozen=True)
class TensorFiles:
    """Where the tensors outside the graphs lie.

    ``embeddings`` holds ``weight`` (fp32, fp16, or int8 with ``scale`` per row); ``projections`` holds
    ``molecule.weight``, ``molecule.bias``, ``protein.weight``, ``protein.bias``, as far as there is an encoder.
    """

    embeddings: str
    projections: str
    tokenizer: str


@dataclass(frozen=True)
class Policy:
    """Under which terms the model may be used; shown before the first interactive use."""

    licence: str
    use_policy: str
    notice: str


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know about a bundle; nothing of it is hard-coded anywhere else.

    ``precision`` is fp32, fp16 or int4; ``quantization`` and ``parity`` are the exporter's record of what it did and
    measured, for people and tools, not read by the runtime. ``sources`` are the files it was made from.
    """

    family: str
    name: str
    precision: str
    decoder: DecoderSpec
    tensors: TensorFiles
    prompt: PromptTemplate
    policy: Policy
    files: tuple[FileEntry, ...]
    sources: tuple[FileEntry, ...]
    quantization: dict[str, Any]
    parity: dict[str, Any]
    about: dict[str, Any]
    molecule_encoder: MoleculeEncoderSpec | None = None
    protein_encoder: ProteinEncoderSpec | None = None

    def to_json(self) -> str:
        """Canonical text: the same manifest always gives the same bytes."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        there = [added for added in _ADDED if fields[added.part] is not None]
        used = [added.since for added in there if fields[added.part][added.name] != added.default]
        version = max(used, default=1)
        for added in there:
            if added.since > version:
                del fields[added.part][added.name]
        fields |= {"schema": SCHEMA, "schema_version": version}
        return json.dumps(fields, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Reads a manifest strictly: unknown, missing, mistyped and out-of-range fields are all errors.

    Raises:
        ManifestError: not JSON, not a manifest, or a wrong field (named by its path).
        BundleVersionError: written for a newer schema, or with a layout that is not known here.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        # What cannot be written again cannot be shown either: half a surrogate pair, a float beyond the largest.
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST_NAME} is not JSON: {error}.", remedy=_RE_EXPORT) from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise ManifestError(
            f"{MANIFEST_NAME} is not a biomedgpt-edge manifest: its 'schema' is not {SCHEMA!r}.",
            remedy="Check that this folder is a bundle.",
        )
    version = raw.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ManifestError(f"'schema_version' of {MANIFEST_NAME} is not a positive number.", remedy=_RE_EXPORT)
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"the bundle has schema version {version}, and this biomedgpt-edge reads versions 1 to {SCHEMA_VERSION}.",
            seen=version,
            limit=SCHEMA_VERSION,
            remedy="Update biomedgpt-edge.",
        )
    body = {key: value for key, value in raw.items() if key not in ("schema", "schema_version")}
    manifest: Manifest = _read(Manifest, _with_additions(body, version), "manifest")
    _check_layout("decoder", manifest.decoder)
    if manifest.protein_encoder is not None:
        _check_layout("protein_encoder", manifest.protein_encoder)
        _check_encoder(manifest.protein_encoder, manifest.decoder)
    _check_names(manifest)
    return manifest


def _check_layout(part: str, spec: DecoderSpec | ProteinEncoderSpec) -> None:
    what = part.replace("_", " ")
    if spec.layout not in LAYOUTS:
        raise BundleVersionError(
            f"the {what} lies in the layout {spec.layout[:60]!r}, and this biomedgpt-edge reads "
            f"{' and '.join(LAYOUTS)}.",
            seen=spec.layout[:60],
            limit=", ".join(LAYOUTS),
            remedy="Update biomedgpt-edge, or export the bundle with --decoder-layout portable.",
        )
    if spec.portable is not None and spec.layout == PORTABLE:
        graph = spec.portable.graph
        raise ManifestError(
            f"'manifest.{part}.portable' of {MANIFEST_NAME} is {graph[:60]!r}, and the {what} is portable itself.",
            seen=graph[:60],
            remedy=_RE_EXPORT,
        )


def _check_names(manifest: Manifest) -> None:
    """Graphs that are not a part's own are called what their data's name is made of, and each has a name of its own."""
    named = dict[str, str]()
    for part in ("decoder", "molecule_encoder", "protein_encoder"):
        spec = getattr(manifest, part)
        for field in ("portable", "cuda", "standard"):
            graph = getattr(spec, field, None)
            if graph is not None:
                where = f"manifest.{part}.{field}" + ".graph" * (field != "cuda")
                named[where] = graph if isinstance(graph, str) else graph.graph
    for where, graph in named.items():
        if PurePosixPath(graph).suffix != GRAPH_SUFFIX:
            raise ManifestError(
                f"'{where}' of {MANIFEST_NAME} is {graph[:60]!r}, which does not end in {GRAPH_SUFFIX}.",
                seen=graph[:60],
                remedy=_RE_EXPORT,
            )
    own = [spec.graph for spec in (manifest.decoder, manifest.molecule_encoder, manifest.protein_encoder) if spec]
    if len({*named.values(), *own}) != len(named) + len(set(own)):
        raise ManifestError(f"{MANIFEST_NAME} gives two parts the same graph.", remedy=_RE_EXPORT)


def _check_encoder(encoder: ProteinEncoderSpec, decoder: DecoderSpec) -> None:
    """Which graphs are used is chosen once for both."""
    if encoder.layout == RECORDS and (decoder.layout != RECORDS or encoder.portable is None):
        missing = "a portable graph" if decoder.layout == RECORDS else "a decoder that does"
        raise ManifestError(
            f"the protein encoder lies in {encoder.layout} without {missing}.", seen=encoder.layout, remedy=_RE_EXPORT
        )


def _with_additions(body: dict[str, Any], version: int) -> dict[str, Any]:
    """The fields of ``version`` with those that were added to its parts since."""
    extended = dict(body)
    for part in dict.fromkeys(added.part for added in _ADDED):
        fields = body.get(part)
        if not isinstance(fields, dict):
            continue
        added = {entry.name: entry.default for entry in _ADDED if entry.part == part and version < entry.since}
        unknown = sorted(added.keys() & fields.keys())
        if unknown:
            raise ManifestError(
                f"'manifest.{part}' of {MANIFEST_NAME} has unknown {', '.join(unknown)}: schema version {version} "
                "knows none.",
                remedy=_RE_EXPORT,
            )
        extended[part] = {**fields, **added}
    return extended


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ManifestError(f"{MANIFEST_NAME} names a field twice.", remedy=_RE_EXPORT)
    return seen


def _no_constant(name: str) -> Any:
    raise ManifestError(f"{MANIFEST_NAME} holds the number {name}.", remedy=_RE_EXPORT)


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, a scalar, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]`` or ``dict``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _read_number(arguments[0], arguments[1], value, where)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is dict:
        return _scalar(dict, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    return _scalar(kind, value, where)


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _scalar(list, value, where)
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise _wrong(where, f"a list of {len(arguments)}", value)
    return tuple(
        _read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _scalar(dict, value, where)
    hints = typing.get_type_hints(kind, include_extras=True)
    missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise ManifestError(f"'{where}' of {MANIFEST_NAME} {' and '.join(parts)}.", remedy=_RE_EXPORT)
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _read_number(kind: Any, bounds: Range, value: Any, where: str) -> Any:
    number = _scalar(kind, value, where)
    if not bounds.low <= number <= bounds.high:
        raise ManifestError(
            f"'{where}' of {MANIFEST_NAME} is {str(number)[:60]}.",
            seen=str(number)[:60],
            limit=f"{bounds.low} to {bounds.high}",
            remedy=f"It must lie between {bounds.low} and {bounds.high}. {_RE_EXPORT}",
        )
    return number


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _EXACT_IN_FLOAT:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, f"of type {kind.__name__}", value)
    return value


def _wrong(where: str, expected: str, value: Any) -> ManifestError:
    return ManifestError(
        f"'{where}' of {MANIFEST_NAME} should be {expected}, and is {str(value)[:60]!r}.", remedy=_RE_EXPORT
    )
