"""What an ONNX file refers to and which operators it uses, read from its protobuf encoding without the onnx package.

ONNX Runtime resolves external data by the path in the file; a hostile graph could name any path, or an address in
memory. So every reference is checked against the manifest before a session is opened. And a graph is a program: it may
use the operators of our own exports only, none of which loops, branches or reads files. When a session is opened, ONNX
Runtime reads as many weights as a MatMulNBits declares; not all of its versions look how many there are, so that this
is compared, and likewise for the operators of csrc/ort (see :mod:`onnx_products`). Format: onnx.proto (ONNX 1.23)
over the protobuf wire format; what a parser may read in two ways is refused, since ONNX Runtime's reads it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from .errors import BundleCorruptError

# A graph file holds no weights, only nodes and references.
MAX_GRAPH_BYTES = 16 * 2**20
MAX_REFERENCES = 100_000
_MAX_DEPTH = 32
# Protobuf keeps 32 bits of a tag, so a larger one would be another field to a parser that keeps them all.
_MAX_TAG = 2**32

# message -> field number -> message it holds; fields that can hold no tensor are skipped.
_CHILDREN = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
# domain, operator
OPERATORS = frozenset(
    {
        *(("", name) for name in ("Add", "Cast", "Gather", "Identity", "LayerNormalization", "MatMul", "Mul", "Relu")),
        *(("", name) for name in ("SimplifiedLayerNormalization", "Squeeze")),
        *(("com.microsoft", name) for name in ("DynamicQuantizeMatMul", "Gelu", "GroupQueryAttention", "MatMulNBits")),
        *(("com.microsoft", name) for name in ("MultiHeadAttention", "QuickGelu", "RotaryEmbedding")),
        ("com.microsoft", "SkipSimplifiedLayerNormalization"),
    }
)
# Of graphs for ONNX Runtime's CUDA provider, which has no DynamicQuantizeMatMul.
CUDA_OPERATORS = OPERATORS | {("", "DequantizeLinear")}
# Of graphs for engines that know nothing of ONNX Runtime (see export's graphs/standard.py).
STANDARD_OPERATORS = frozenset(
    {
        *(("", name) for name in ("Add", "Attention", "Cast", "DequantizeLinear", "Gather", "Gelu", "Identity")),
        *(("", name) for name in ("LayerNormalization", "MatMul", "Mul", "Pad", "RMSNormalization", "Relu", "Reshape")),
        *(("", name) for name in ("RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Split", "Squeeze")),
        *(("", name) for name in ("TensorScatter", "Transpose")),
    }
)
# Those of csrc/ort, for bundles in records alone: of decoders, with how many matrices the records of each product hold,
# and of protein encoders, with how many inputs each has.
INT4_DOMAIN = "biomedgpt"
ATTENTION = (INT4_DOMAIN, "CausalAttention")
INT4_MATRICES = {(INT4_DOMAIN, "Int4Linear"): 1, (INT4_DOMAIN, "Int4GateUp"): 2}
INT8_INPUTS = {
    (INT4_DOMAIN, "Int8Linear"): 2,
    (INT4_DOMAIN, "Int8LinearGelu"): 2,
    (INT4_DOMAIN, "Int8LinearAdd"): 3,
}
DECODER_RECORDS_OPERATORS = frozenset({*INT4_MATRICES, ATTENTION})
PROTEIN_RECORDS_OPERATORS = frozenset(INT8_INPUTS)
_PRODUCTS, _CAST = {("com.microsoft", "MatMulNBits"), *INT4_MATRICES, *INT8_INPUTS}, ("", "Cast")
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3
_DIMENSION, _KIND, _NAME, _RAW, _EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 1, 2, 8, 9, 13, 14, 1
# Of a number, protobuf keeps so many bits.
_INTEGER = 2**64 - 1


@dataclass(frozen=True)
class ExternalTensor:
    """A reference to bytes outside the graph file; ``length`` is None where the file leaves it out."""

    name: str
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class Product:
    """A MatMulNBits or a product of csrc/ort: the names of its inputs, and its attributes that are numbers."""

    operator: tuple[str, str]
    inputs: tuple[str, ...]
    attributes: Mapping[str, int]


@dataclass
class Header:
    """What a graph file refers to, wherever in it that stands.

    Attributes:
        tensors: those outside it.
        operators: as (domain, name).
        products: every product with quantized weights.
        casts: by the name of what a Cast gives, that of what it reads; None where two differ.
        shapes: of tensors by name, whether they lie outside or not; None where two differ.
        kinds: of the same, their element types as TensorProto.DataType numbers them.
        inside: of those that lie inside, as bytes, how many; None where two differ.
    """

    tensors: list[ExternalTensor] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    products: list[Product] = field(default_factory=list)
    casts: dict[str, str | None] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    kinds: dict[str, int | None] = field(default_factory=dict)
    inside: dict[str, int | None] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """The largest number of anything above."""
        return max(map(len, (self.tensors, self.operators, self.products, self.casts, self.shapes)))


def read_header(path: Path) -> Header:
    """The external references and operators of the graph at ``path``, wherever in it they stand.

    Raises:
        BundleCorruptError: not a well-formed ONNX file, or larger than a graph without weights can be.
    """
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise BundleCorruptError(
            f"{path.name} has {size:,} bytes; a graph without weights has fewer than {MAX_GRAPH_BYTES:,}.",
            seen=size, limit=MAX_GRAPH_BYTES, remedy="Export the bundle again.",
        )  # fmt: skip
    header = Header()
    try:
        for message, data in _messages(memoryview(path.read_bytes()), "Model", 0):
            if message == "Node":
                _add_node(header, data)
            else:
                _add_tensor(header, data)
            if header.entries > MAX_REFERENCES:
                break
    except (_MalformedError, UnicodeDecodeError) as error:
        raise BundleCorruptError(
            f"{path.name} is not an ONNX graph: {error}.", remedy="Export or copy the bundle again."
        ) from error
    if header.entries > MAX_REFERENCES:
        raise BundleCorruptError(
            f"{path.name} has tensors or products in more than {MAX_REFERENCES:,} places.",
            limit=MAX_REFERENCES, remedy="Export the bundle again.",
        )  # fmt: skip
    return header


class _MalformedError(Exception):
    """The bytes are no protobuf message."""


def inside_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of tensors that lie in the graph file itself, of one whose header was read; of a name, the last."""
    found = dict[str, bytes]()
    for message, data in _messages(memoryview(path.read_bytes()), "Model", 0):
        if message == "Tensor":
            raw = [value for number, value in _fields(data) if number == _RAW and isinstance(value, memoryview)]
            found |= {_last(data, _NAME): bytes(value) for value in raw}
    return found


def _messages(data: memoryview, message: str, depth: int) -> Iterator[tuple[str, memoryview]]:
    """Every node and every tensor, however deep."""
    if depth > _MAX_DEPTH:
        raise _MalformedError(f"messages are nested more than {_MAX_DEPTH} deep")
    if message in ("Node", "Tensor"):
        yield message, data
    if message == "Tensor":
        return
    children = _CHILDREN[message]
    for number, value in _fields(data):
        child = children.get(number)
        if child is not None and isinstance(value, memoryview):
            yield from _messages(value, child, depth + 1)


def _add_node(header: Header, data: memoryview) -> None:
    operator = _last(data, _NODE_DOMAIN), _last(data, _NODE_OPERATOR)
    header.operators.add(operator)
    if operator in _PRODUCTS:
        header.products.append(Product(operator, tuple(_texts(data, _NODE_INPUT)), _numbers(data)))
    elif operator == _CAST:
        given, read = _last(data, _NODE_OUTPUT), _last(data, _NODE_INPUT)
        header.casts[given] = read if header.casts.get(given, read) == read else None


def _texts(data: memoryview, wanted: int) -> list[str]:
    fields = _fields(data)
    return [bytes(value).decode("utf-8") for number, value in fields if number == wanted and not isinstance(value, int)]


def _last(data: memoryview, wanted: int) -> str:
    """Of a field that comes twice, protobuf keeps the last."""
    return next(reversed(_texts(data, wanted)), "")


def _numbers(node: memoryview) -> dict[str, int]:
    numbers = dict[str, int]()
    for number, value in _fields(node):
        if number == _NODE_ATTRIBUTE and isinstance(value, memoryview):
            name = _last(value, _ATTRIBUTE_NAME)
            if name in numbers:
                raise _MalformedError(f"a node has two values for '{name[:20]}'")
            found = [v & _INTEGER for n, v in _fields(value) if n == _ATTRIBUTE_INTEGER and isinstance(v, int)]
            numbers[name] = next(reversed(found), 0)
    return numbers


def _add_tensor(header: Header, data: memoryview) -> None:
    header.tensors.extend(islice(_reference(data), MAX_REFERENCES + 1 - len(header.tensors)))
    name, shape = _last(data, _NAME), _shape(data)
    header.shapes[name] = shape if header.shapes.get(name, shape) == shape else None
    kinds = [value & _INTEGER for number, value in _fields(data) if number == _KIND and isinstance(value, int)]
    kind = next(reversed(kinds), 0)
    header.kinds[name] = kind if header.kinds.get(name, kind) == kind else None
    raw = [len(value) for number, value in _fields(data) if number == _RAW and isinstance(value, memoryview)]
    if raw:
        header.inside[name] = raw[-1] if header.inside.get(name, raw[-1]) == raw[-1] else None


def _shape(data: memoryview) -> tuple[int, ...]:
    shape = list[int]()
    for number, value in _fields(data):
        if number == _DIMENSION and isinstance(value, int):
            shape.append(value & _INTEGER)
        elif number == _DIMENSION and isinstance(value, memoryview):
            position = 0
            while position < len(value):
                dimension, position = _varint(value, position)
                shape.append(dimension & _INTEGER)
    return tuple(shape)


def _reference(data: memoryview) -> Iterator[ExternalTensor]:
    name, entries, external = "", dict[str, str](), False
    for number, value in _fields(data):
        if number == _NAME and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8")
        elif number == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {n: bytes(v).decode("utf-8") for n, v in _fields(value) if isinstance(v, memoryview)}
            key = pair.get(1, "")
            if key in entries:
                raise _MalformedError(f"a tensor has two values for '{key[:20]}'")
            entries[key] = pair.get(2, "")
        elif number == _DATA_LOCATION:
            external = value == _EXTERNAL
    if external or entries:
        length = _number(entries["length"]) if "length" in entries else None
        yield ExternalTensor(name, entries.get("location", ""), _number(entries.get("offset", "0")), length)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _MalformedError(f"{text[:20]!r} is no offset or length")
    return int(text)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field: an int, or the bytes of a length-delimited one."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >= _MAX_TAG:
            raise _MalformedError(f"a field at byte {position} has no valid number")
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _MalformedError(f"unknown wire type {wire} at byte {position}")
        if position + size > len(data):
            raise _MalformedError(f"a field of {size:,} bytes at byte {position} passes the end")
        if wire == 2:
            yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise _MalformedError(f"a number at byte {position} does not end")
