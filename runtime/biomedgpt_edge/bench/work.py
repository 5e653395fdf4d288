"""What a stage has to read and to compute at the least, and the time that the machine's limits leave for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..bundle import Bundle
from ..decoder.kv_cache import KvLayout
from ..manifest import DecoderSpec, MoleculeEncoderSpec, ProteinEncoderSpec
from ..onnx_header import INT4_MATRICES, INT8_INPUTS, read_header
from ..splice import Projection

_QUANTIZED_PRODUCTS = {
    *INT4_MATRICES,
    *INT8_INPUTS,
    ("com.microsoft", "DynamicQuantizeMatMul"),
    ("com.microsoft", "MatMulNBits"),
}


@dataclass(frozen=True)
class Work:
    """The least that one run of a stage takes.

    Attributes:
        bytes: read from memory, once each.
        operations: a multiplication and an addition are two.
        kind: of the arithmetic limit that holds: "int8" or "fp32".
    """

    bytes: int
    operations: int
    kind: str


@dataclass(frozen=True)
class Bound:
    """Seconds that no implementation can go below, and which limit says so ("bandwidth" or an arithmetic kind)."""

    seconds: float
    limit: str


def bound(work: Work, bandwidth: float, arithmetic: dict[str, float]) -> Bound:
    """The roofline: the larger of the times that ``bandwidth``, bytes/s, and the best loop of the kind leave."""
    rate = max(value for name, value in arithmetic.items() if name.split()[0] == work.kind)
    memory, compute = work.bytes / bandwidth, work.operations / rate
    return Bound(memory, "bandwidth") if memory >= compute else Bound(compute, f"{work.kind} arithmetic")


def bound_in_turn(works: Sequence[Work], bandwidth: float, arithmetic: dict[str, float]) -> Bound | None:
    """Of works that follow each other; the limit is that of the longest. None of no work."""
    bounds = [bound(work, bandwidth, arithmetic) for work in works]
    if not bounds:
        return None
    longest = max(bounds, key=lambda one: one.seconds)
    return Bound(sum(one.seconds for one in bounds), longest.limit)


def molecule_work(bundle: Bundle, spec: MoleculeEncoderSpec, atoms: int) -> Work:
    """Of the molecule encoder: of each layer the multilayer perceptron, which is twice as wide inside."""
    operations = 2 * atoms * spec.layers * 4 * spec.width**2
    return Work(graph_bytes(bundle, spec.graph), operations, _kind(bundle, spec.graph))


def splice_work(projection: Projection, rows: int) -> Work:
    """Of ``rows`` feature rows to soft tokens: weights, features and results, each once.

    No arithmetic is counted: 16-bit operands have a limit of their own, which is not probed.
    """
    hidden, width = projection.weight.shape
    return Work(projection.weight.nbytes + projection.bias.nbytes + 4 * rows * (width + hidden), 0, "fp32")


def prefill_work(bundle: Bundle, positions: int) -> Work:
    """Of ``positions`` of a prompt, with the logits of the last."""
    spec = bundle.manifest.decoder
    attention = 2 * spec.layers * spec.heads * spec.head_size * positions * (positions + 1)
    operations = 2 * positions * _layer_weights(spec) + 2 * _head_weights(spec) + attention
    return Work(graph_bytes(bundle, spec.graph), operations, _kind(bundle, spec.graph))


def decode_work(bundle: Bundle, kv: KvLayout, depth: int, tokens: int) -> Work:
    """Of one token, the mean over ``tokens`` after ``depth`` positions; each reads all weights and its past."""
    spec = bundle.manifest.decoder
    past = depth + (tokens + 1) / 2
    operations = 2 * (_layer_weights(spec) + _head_weights(spec)) + 4 * spec.layers * spec.heads * spec.head_size * past
    return Work(
        graph_bytes(bundle, spec.graph) + round(kv.bytes_per_position * past),
        round(operations),
        _kind(bundle, spec.graph),
    )


def protein_work(bundle: Bundle, spec: ProteinEncoderSpec, positions: int) -> Work:
    """Of a protein encoder over residues and both ends."""
    weights = spec.layers * (4 * spec.width**2 + 2 * spec.width * spec.intermediate_size)
    operations = 2 * positions * weights + 4 * spec.layers * spec.width * positions**2
    return Work(graph_bytes(bundle, spec.graph), operations, _kind(bundle, spec.graph))


def graph_bytes(bundle: Bundle, graph: str) -> int:
    """Bytes of a graph's tensors, each range of a file counted once."""
    ranges = set()
    for tensor in read_header(bundle.file(graph)).tensors:
        path = bundle.path / PurePosixPath(graph).parent / tensor.location
        length = path.stat().st_size - tensor.offset if tensor.length is None else tensor.length
        ranges.add((tensor.location, tensor.offset, length))
    return sum(length for _, _, length in ranges)


def _layer_weights(spec: DecoderSpec) -> int:
    attention = spec.hidden_size * spec.head_size * 2 * (spec.heads + spec.kv_heads)
    return spec.layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def _head_weights(spec: DecoderSpec) -> int:
    return spec.hidden_size * spec.vocabulary


def _kind(bundle: Bundle, graph: str) -> str:
    """Quantized weights are multiplied with activations in int8, all others in float32."""
    quantized = read_header(bundle.file(graph)).operators & _QUANTIZED_PRODUCTS
    return "int8" if quantized else "fp32"
