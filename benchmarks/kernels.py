"""Our kernel beside what people would use instead: one prompt buffer, filled by NumPy, torch, ONNX Runtime and splice.

A prompt is text embeddings and projected encoder features (with or without a layer norm), [rows, 4096] float32. Every
contestant of a shape does that whole job, in this process, with the same number of threads and from the same numbers.

How it measures. Before anything is timed, every contestant's prompt is compared with float64; a wrong one ends the run.
Then they take turns, round by round, each round starting with another one. A turn is a pause, in which the threads that
the one before left spinning go to sleep (libgomp and OpenBLAS spin for up to some 30 ms, and ONNX Runtime is told to
stop at the end of a call), then an untimed call, which wakes the contestant's own threads and brings its data near,
then the timed one. Calls under 5 ms are repeated up to 20 times in a turn and averaged. With --cold the untimed call is
replaced by reading a large buffer: the caches are then as a decoder leaves them that has just run through its weights.

Ratios compare the times of the same round, so that a slow moment of the machine meets both sides; printed is the median
of them. The best peer is the one with the lowest median. Peaks and bandwidth are probed between the rounds, and a share
is of the highest rate a probe reached in the whole run.

Usage: python benchmarks/kernels.py [--threads 2] [--rounds 15] [--shapes molecule,protein-402] [--cold]
                                    [--json FILE] [--plot FILE.png] [--quick]
Peers and --plot need `pip install -c constraints.txt '.[bench]'`; a peer that is not installed is named as such.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import machine
from biomedgpt_edge import _native
from biomedgpt_edge.bench.counters import usable_processors
from biomedgpt_edge.splice import EmbeddingTable, FeaturePart, Projection, TokenPart, splice

Array = npt.NDArray[Any]

# Largest error against float64, as a share of the largest value. Float32 sums of 2560 terms stay well below the first;
# the second is a few roundings to bfloat16, and far below what a forgotten bias or a shifted row gives.
TOLERANCE_FP32 = 1e-5
TOLERANCE_16BIT = 1e-2
SECONDS_PER_TURN = 5e-3
MAX_CALLS_PER_TURN = 20
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WrongResult(Exception):
    """A contestant's prompt is not the prompt."""


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@dataclass(frozen=True)
class Shape:
    """One prompt: `before` and `after` text tokens around `count` feature rows of `width`, which may be none."""

    name: str
    about: str
    width: int = 0
    count: int = 0
    before: int = 60
    after: int = 14
    hidden: int = 4096
    vocab: int = 32000
    layer_norm_eps: float | None = None
    table: str = "float16"

    @property
    def rows(self) -> int:
        return self.before + self.count + self.after

    @property
    def flops(self) -> int:
        """Of the product; those of a norm are less than a thousandth of it."""
        return 2 * self.count * self.width * self.hidden


def _text(name: str, table: str) -> Shape:
    return Shape(name, f"512 embeddings, {table} table", before=512, after=0, table=table)


SHAPES = (
    Shape("molecule", "a molecule of 40 atoms (GIN, 300 wide)", 300, 40),
    Shape("protein-74", "a short protein (ESM-2 3B, 2560 wide)", 2560, 74),
    Shape("protein-402", "a protein of common length", 2560, 402),
    Shape("protein-402-norm", "the same, with the encoder's final layer norm", 2560, 402, layer_norm_eps=1e-5),
    Shape("protein-1024", "the longest protein", 2560, 1024),
    _text("text-float16", "float16"),
    _text("text-float32", "float32"),
    _text("text-int8", "int8"),
)
QUICK_SHAPES = (
    Shape("quick", "tiny", 64, 5, 3, 2, hidden=256, vocab=100),
    Shape("quick-norm", "tiny, with a layer norm and an int8 table", 64, 5, 3, 0, 256, 100, 1e-5, "int8"),
    Shape("quick-text", "tiny, text alone", 0, 0, 7, 0, 256, 100, table="float32"),
)


class Problem:
    """The numbers of a shape, and what float64 makes of them. Contestants share `out`."""

    def __init__(self, shape: Shape, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.ids = rng.integers(0, shape.vocab, shape.before + shape.after)
        self.table = _random_table(rng, shape)
        self.features = rng.standard_normal((shape.count, shape.width), np.float32)
        if shape.layer_norm_eps is not None:
            self.features = self.features * 3 + 1
        scale = 1 / np.sqrt(max(shape.width, 1))
        self.weight16 = (rng.standard_normal((shape.hidden, shape.width), np.float32) * scale).astype(np.float16)
        self.bias = rng.standard_normal(shape.hidden, np.float32)
        self.out = np.empty((shape.rows, shape.hidden), np.float32)

    @cached_property
    def weight32(self) -> Array:
        """The same values as `weight16`, so that one reference serves all."""
        weight: Array = self.weight16.astype(np.float32)
        return weight

    @property
    def before(self) -> Array:
        return self.ids[: self.shape.before]

    @property
    def after(self) -> Array:
        return self.ids[self.shape.before :]

    @property
    def feature_rows(self) -> slice:
        return slice(self.shape.before, self.shape.before + self.shape.count)

    @property
    def bytes_beside_weights(self) -> int:
        """What has to move whoever computes it: features and embeddings in, the prompt out."""
        row = self.shape.hidden * self.table.rows.itemsize
        return int(self.features.nbytes + len(self.ids) * row + self.out.nbytes)

    @cached_property
    def reference(self) -> tuple[Array, Array]:
        """Rows of the prompt, those at every seam among them, and their float64 values."""
        shape, start, stop = self.shape, self.feature_rows.start, self.feature_rows.stop
        seams = {0, start - 1, start, stop - 1, stop, shape.rows - 1}
        chosen = seams.union(np.random.default_rng(2).integers(0, shape.rows, 10).tolist())
        rows = np.array(sorted(row for row in chosen if 0 <= row < shape.rows))
        projected = (rows >= start) & (rows < stop)
        values = np.empty((len(rows), shape.hidden))
        text = rows[~projected]
        ids = self.ids[np.where(text < start, text, text - shape.count)]
        values[~projected] = self.table.rows[ids]
        if self.table.scales is not None:
            values[~projected] *= self.table.scales[ids][:, None].astype(np.float64)
        x = normalised(self.features[rows[projected] - start].astype(np.float64), shape.layer_norm_eps)
        values[projected] = x @ self.weight16.astype(np.float64).T + self.bias
        return rows, values

    def error(self, prompt: Array) -> float:
        """Largest error of the sampled rows, as a share of the largest value; not a number where a row is missing."""
        rows, values = self.reference
        if prompt.shape != self.out.shape:
            return float("nan")
        return float(np.max(np.abs(prompt[rows] - values)) / np.max(np.abs(values)))


def _random_table(rng: np.random.Generator, shape: Shape) -> EmbeddingTable:
    size = (shape.vocab, shape.hidden)
    if shape.table == "int8":
        scales = rng.uniform(1e-4, 1e-2, shape.vocab).astype(np.float32)
        return EmbeddingTable(rng.integers(-127, 128, size, dtype=np.int8), scales)
    return EmbeddingTable(rng.standard_normal(size, np.float32).astype(shape.table))


def normalised(x: Array, eps: float | None) -> Array:
    """The layer norm without gain and shift, which are part of the weights; `x` itself for no norm."""
    if eps is None:
        return x
    x = x - x.mean(axis=1, keepdims=True)
    x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Who computes it


@dataclass(frozen=True)
class Contestant:
    """One way to fill the prompt.

    Attributes:
        call: does the whole job and returns the prompt, in whatever type the library has.
        rounds: whether it may round operands of the product to 16 bits.
        weight_bytes: size of the weights it reads, in the type it was given them.
        read: the prompt as an array, outside the timing.
    """

    name: str
    call: Callable[[], Any]
    rounds: bool = False
    ours: bool = False
    weight_bytes: int = 0
    read: Callable[[Any], Array] = np.asarray


def numpy_peers(problem: Problem, threads: int) -> list[Contestant]:
    """NumPy with its BLAS, straight into the buffer."""

    def call() -> Array:
        numpy_text(problem)
        if problem.shape.count:
            rows = problem.out[problem.feature_rows]
            x = normalised(problem.features, problem.shape.layer_norm_eps)
            np.matmul(x, problem.weight32.T, out=rows)
            rows += problem.bias
        return problem.out

    if not problem.shape.count:
        return [Contestant("numpy, rows assigned to the buffer", call)]
    return [Contestant("numpy fp32, matmul into the buffer", call, weight_bytes=problem.weight32.nbytes)]


def numpy_text(problem: Problem) -> None:
    """The text rows of the prompt, as NumPy does them."""
    for ids, out in (
        (problem.before, problem.out[: problem.shape.before]),
        (problem.after, problem.out[problem.feature_rows.stop :]),
    ):
        if problem.table.scales is None:
            out[:] = problem.table.rows[ids]
        else:
            np.multiply(problem.table.rows[ids], problem.table.scales[ids][:, None], out=out)


class TorchProblem:
    """A problem as tensors that share its memory, and the steps torch's contestants are made of."""

    def __init__(self, problem: Problem) -> None:
        import torch

        self.problem = problem
        self.out = torch.from_numpy(problem.out)
        self.before, self.after = torch.from_numpy(problem.before), torch.from_numpy(problem.after)
        self.table = torch.from_numpy(problem.table.rows)
        self.scales = None if problem.table.scales is None else torch.from_numpy(problem.table.scales)
        self.x, self.bias = torch.from_numpy(problem.features), torch.from_numpy(problem.bias)
        self.w16, self.w32 = torch.from_numpy(problem.weight16), torch.from_numpy(problem.weight32)
        self.embedding, self.linear = torch.nn.functional.embedding, torch.nn.functional.linear

    def embed(self, ids: Any) -> Any:
        rows = self.embedding(ids, self.table)
        return rows if self.scales is None else rows * self.scales[ids].unsqueeze(1)

    def norm(self, x: Any) -> Any:
        import torch

        eps = self.problem.shape.layer_norm_eps
        return x if eps is None else torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps)

    def filling(self, project: Callable[[], Any]) -> Callable[[], Any]:
        return partial(self.into, self.out, project)

    def into(self, out: Any, project: Callable[[], Any]) -> Any:
        """Text copied into `out`, and what `project` returns, unless it has written it there itself."""
        rows = self.problem.feature_rows
        out[: rows.start] = self.embed(self.before)
        if len(self.after):
            out[rows.stop :] = self.embed(self.after)
        projected = project()
        if projected is not None:
            out[rows] = projected
        return out

    def eager(self, weight: Any) -> Any:
        """As one writes it first: lookup, linear, concatenate."""
        import torch

        projected = self.linear(self.norm(self.x), weight.float(), self.bias)
        return torch.cat([self.embed(self.before).float(), projected, self.embed(self.after).float()])

    def linear_fp32(self) -> Any:
        return self.linear(self.norm(self.x), self.w32, self.bias)

    def addmm_fp32(self) -> None:
        import torch

        torch.addmm(self.bias, self.norm(self.x), self.w32.T, out=self.out[self.problem.feature_rows])

    def linear_bf16_inside(self) -> Any:
        """Float32 tensors; oneDNN may use bfloat16 in the product, where it is told so and the processor can."""
        import torch

        setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        usual, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            return self.linear_fp32()
        finally:
            setting.fp32_precision = usual

    def linear_converted(self) -> Any:
        x, weight, bias = (tensor.bfloat16() for tensor in (self.norm(self.x), self.w16, self.bias))
        return self.linear(x, weight, bias)

    def kept(self, dtype: Any) -> Callable[[], Any]:
        """Everything converted beforehand, and the prompt left in that type: what a whole model in it does."""
        import torch

        x, weight, bias = self.x.to(dtype), self.w16.to(dtype), self.bias.to(dtype)
        out = torch.full(self.out.shape, float("nan"), dtype=dtype)
        return partial(self.into, out, lambda: self.linear(self.norm(x), weight, bias))


def torch_peers(problem: Problem, threads: int) -> list[Contestant]:
    """torch, from what one writes first to what one writes when every copy counts."""
    import torch

    torch.set_num_threads(threads)
    tensors = TorchProblem(problem)
    inference = torch.inference_mode()

    def contestant(name: str, call: Callable[[], Any], weight: Any = None, rounds: bool = False) -> Contestant:
        size = 0 if weight is None else weight.nbytes
        return Contestant(f"torch {name}", inference(call), rounds, False, size, lambda prompt: prompt.float().numpy())

    if not problem.shape.count:
        return [
            contestant("embedding().float()", lambda: tensors.embed(tensors.before).float()),
            contestant("embedding() into the buffer", lambda: tensors.out.copy_(tensors.embed(tensors.before))),
        ]
    w16, w32 = tensors.w16, tensors.w32
    peers = [
        contestant("fp32, linear into the buffer", tensors.filling(tensors.linear_fp32), w32),
        contestant("fp32, addmm(out=buffer)", tensors.filling(tensors.addmm_fp32), w32),
        contestant("eager, fp32 weights", partial(tensors.eager, w32), w32),
        contestant("eager, fp16 weights cast per call", partial(tensors.eager, w16), w16),
        contestant("bf16, cast per call", tensors.filling(tensors.linear_converted), w16, True),
        contestant("bf16 throughout (bf16 prompt)", tensors.kept(torch.bfloat16), w16, True),
        contestant("fp16 throughout (fp16 prompt)", tensors.kept(torch.float16), w16, True),
    ]
    if hasattr(torch.backends.mkldnn, "matmul"):  # since torch 2.9
        peers.append(contestant("fp32, bf16 inside oneDNN", tensors.filling(tensors.linear_bf16_inside), w32, True))
    return peers


class OrtGraph:
    """A graph under construction, with a problem's arrays as initializers, and its session."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: dict[str, Array] = {}

    def constant(self, name: str, value: Array) -> str:
        import onnx

        self.initializers.append(onnx.numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        import onnx

        output = f"{op}{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def input(self, name: str, value: Array) -> str:
        self.inputs[name] = value
        return name

    def embed(self, name: str, ids: Array) -> str:
        """Rows of the table, as float32. The table is an input: as an initializer it would only be copied."""
        import onnx

        index = self.input(name, ids)
        rows = self.node("Gather", [self.input("table", self.problem.table.rows), index])
        if self.problem.table.rows.dtype != np.float32:
            rows = self.node("Cast", [rows], to=onnx.TensorProto.FLOAT)
        if self.problem.table.scales is None:
            return rows
        scales = self.input("scales", self.problem.table.scales[:, None])
        return self.node("Mul", [rows, self.node("Gather", [scales, index])])

    def project(self) -> str:
        """The product. Its weights are initializers, which ONNX Runtime packs once when the session is made."""
        problem, shape = self.problem, self.problem.shape
        x = self.input("features", problem.features)
        if shape.layer_norm_eps is not None:
            gain = self.constant("gain", np.ones(shape.width, np.float32))
            x = self.node("LayerNormalization", [x, gain], epsilon=shape.layer_norm_eps)
        weight, bias = self.constant("weight", problem.weight32), self.constant("bias", problem.bias)
        return self.node("Gemm", [x, weight, bias], transB=1)

    def into(self, output: str, out: Array, threads: int) -> Callable[[], Array]:
        """A call of the graph that reads its inputs where they are, writes `output` to `out` and returns the prompt."""
        import onnx
        import onnxruntime

        def value_info(name: str, value: Array) -> Any:
            return onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )

        graph = onnx.helper.make_graph(
            self.nodes,
            "prompt",
            [value_info(name, value) for name, value in self.inputs.items()],
            [value_info(output, out)],
            self.initializers,
        )
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads spin within a call and no longer: they would take processors from whoever is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, value in self.inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(output, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)

        def call() -> Array:
            session.run_with_iobinding(binding)
            return self.problem.out

        return call


def ort_peers(problem: Problem, threads: int) -> list[Contestant]:
    """ONNX Runtime in float32: the product alone with NumPy's text beside it, and one graph for everything."""
    graph = OrtGraph(problem)
    if not problem.shape.count:
        lookup = graph.into(graph.embed("before", problem.before), problem.out, threads)
        return [Contestant("ONNX Runtime, Gather + Cast", lookup)]
    product = graph.into(graph.project(), problem.out[problem.feature_rows], threads)
    graph = OrtGraph(problem)
    parts = [graph.embed("before", problem.before), graph.project()]
    if len(problem.after):
        parts.append(graph.embed("after", problem.after))
    everything = graph.into(graph.node("Concat", parts, axis=0), problem.out, threads)
    size = problem.weight32.nbytes

    def beside_numpy() -> Array:
        numpy_text(problem)
        return product()

    return [
        Contestant("ONNX Runtime fp32, Gemm; text by numpy", beside_numpy, weight_bytes=size),
        Contestant("ONNX Runtime fp32, one graph", everything, weight_bytes=size),
    ]


def our_paths(problem: Problem, threads: int) -> list[Contestant]:
    """Every path this machine can run, with weights as a bundle stores them and with float32 ones."""
    shape = problem.shape
    weights = {", f16 weights": problem.weight16, ", f32 weights": problem.weight32} if shape.count else {"": None}
    contestants = []
    for path, rounds in _native.splice_paths().items():
        for suffix, weight in weights.items():
            parts: list[TokenPart | FeaturePart] = [TokenPart(problem.before)]
            if weight is not None:
                projection = Projection(weight, problem.bias, shape.layer_norm_eps)
                parts.append(FeaturePart(problem.features, projection))
            parts.append(TokenPart(problem.after))
            options = {"threads": threads, "out": problem.out, "path": path, "allow_16bit": rounds}
            call = partial(splice, parts, problem.table, **options)
            size = 0 if weight is None else weight.nbytes
            contestants.append(Contestant(f"splice {path}{suffix}", call, rounds and bool(shape.count), True, size))
    return contestants


Builder = Callable[[Problem, int], list[Contestant]]


@dataclass(frozen=True)
class Suite:
    """Contestants that need the same modules."""

    name: str
    modules: tuple[str, ...]
    build: Builder


SUITES = (
    Suite("numpy", ("numpy",), numpy_peers),
    Suite("torch", ("torch",), torch_peers),
    Suite("ONNX Runtime", ("onnxruntime", "onnx"), ort_peers),
    Suite("splice", (), our_paths),
)


def available(suites: Sequence[Suite]) -> tuple[list[Suite], dict[str, str]]:
    """The suites that can run, and why the others cannot. Imports what the first need, so that no timing does."""
    usable, skipped = [], {}
    for suite in suites:
        missing = [module for module in suite.modules if find_spec(module) is None]
        if missing:
            skipped[suite.name] = f"{' and '.join(missing)} not installed"
            continue
        for module in suite.modules:
            importlib.import_module(module)
        usable.append(suite)
    return usable, skipped


# ---------------------------------------------------------------------------------------------------------------------
# How it is measured


@dataclass
class Result:
    """What one contestant did in one shape. Ratios are below one where it is faster than the peer."""

    name: str
    ours: bool
    rounds: bool
    error: float
    bytes_moved: int
    milliseconds: list[float] = field(default_factory=list)
    ratio_fp32_peer: float = float("nan")
    ratio_peer: float = float("nan")

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.milliseconds, percent))

    @property
    def median(self) -> float:
        return self.percentile(50)


@dataclass
class ShapeResults:
    """All contestants of a shape, in the order they were made."""

    shape: Shape
    results: list[Result]
    best_fp32_peer: str = ""
    best_peer: str = ""


@dataclass
class Yardsticks:
    """The probes and every rate they reached: FLOP/s by name of the loop, bytes/s by kind of access."""

    loops: list[machine.PeakLoop]
    missing: dict[str, str]
    buffer: npt.NDArray[np.float32]
    threads: int
    rates: dict[str, list[float]] = field(default_factory=dict)

    def sample(self) -> None:
        bandwidth = machine.probe_bandwidth(self.buffer, self.threads)
        for name, rate in (bandwidth | machine.probe_peaks(self.loops, self.threads)).items():
            self.rates.setdefault(name, []).append(rate)

    def peak(self, kind: str) -> float:
        """The highest rate a loop of that kind reached; not a number where none was probed."""
        names = [loop.name for loop in self.loops if loop.kind == kind]
        return max((rate for name in names for rate in self.rates[name]), default=float("nan"))

    def bandwidth(self) -> float:
        """The highest rate of either kind of access."""
        return max(self.rates["memory read"] + self.rates["memory copy"])

    def evict(self) -> None:
        """Reads the buffer, in this thread alone: whatever the caches held is gone, and no pool has been woken."""
        np.max(self.buffer)


@dataclass(frozen=True)
class Method:
    """How often and in what state of the machine contestants are called."""

    threads: int
    rounds: int
    pause: float
    cold: bool


def check(problem: Problem, contestant: Contestant) -> tuple[Result, int]:
    """Compares a contestant with float64 and finds how many of its calls make a turn.

    Raises:
        WrongResult: it is off by more than its precision explains.
    """
    problem.out.fill(np.nan)  # else a contestant that writes nothing would have the result of the one before
    error = problem.error(contestant.read(contestant.call()))
    tolerance = TOLERANCE_16BIT if contestant.rounds else TOLERANCE_FP32
    if not error <= tolerance:
        off = f"is off by {error:.1e} of the largest value, where {tolerance:.0e} is allowed"
        raise WrongResult(f"{problem.shape.name}: {contestant.name} {off}")
    start = time.perf_counter()
    contestant.call()
    seconds = time.perf_counter() - start
    result = Result(
        contestant.name,
        contestant.ours,
        contestant.rounds,
        error,
        contestant.weight_bytes + problem.bytes_beside_weights,
    )
    return result, int(np.clip(SECONDS_PER_TURN / seconds, 1, MAX_CALLS_PER_TURN))


def turn(contestant: Contestant, calls: int, method: Method, yardsticks: Yardsticks) -> float:
    """Milliseconds of a call."""
    time.sleep(method.pause)
    if method.cold:
        calls = 1
        yardsticks.evict()
    else:
        contestant.call()
    start = time.perf_counter()
    for _ in range(calls):
        contestant.call()
    return (time.perf_counter() - start) / calls * 1e3


def compare(results: list[Result]) -> tuple[str, str]:
    """Sets every result's ratios; returns the best peers, with float32 operands and of any kind."""
    peers = [result for result in results if not result.ours]
    best = min(peers, key=lambda peer: peer.median)
    best_fp32 = min((peer for peer in peers if not peer.rounds), key=lambda peer: peer.median)

    def ratio(result: Result, peer: Result) -> float:
        return float(np.median(np.divide(result.milliseconds, peer.milliseconds)))

    for result in results:
        result.ratio_fp32_peer, result.ratio_peer = ratio(result, best_fp32), ratio(result, best)
    return best_fp32.name, best.name


def measure(shape: Shape, suites: Sequence[Suite], method: Method, yardsticks: Yardsticks) -> ShapeResults:
    """Checks, then times, every contestant of a shape."""
    problem = Problem(shape)
    contestants = [contestant for suite in suites for contestant in suite.build(problem, method.threads)]
    checked = [check(problem, contestant) for contestant in contestants]
    gc.collect()
    gc.disable()
    try:
        for number in range(method.rounds):
            yardsticks.sample()
            for place in range(len(contestants)):
                index = (place + number) % len(contestants)
                result, calls = checked[index]
                result.milliseconds.append(turn(contestants[index], calls, method, yardsticks))
    finally:
        gc.enable()
    results = [result for result, _ in checked]
    return ShapeResults(shape, results, *compare(results))


# ---------------------------------------------------------------------------------------------------------------------
# How it is told


def machine_lines(about: dict[str, Any], method: Method) -> list[str]:
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in about["versions"].items())
    state = "caches flushed before each call" if method.cold else "caches warm"
    lines = [
        f"{about['cpu']}, {about['cores usable']} cores usable, {about['threads used']} threads used, "
        f"last-level cache {about['last-level cache MiB']:.0f} MiB; {' '.join(about['flags']) or 'no known flags'}",
        f"Python {about['python']}, {versions}; {about['system']}",
        f"splice's paths, best first: {', '.join(about['splice paths'])}",
        f"{method.rounds} rounds, {state}; below 1 is faster than the peer, shares are of the highest rate probed",
    ]
    if about["load average at start"] > 0.5:
        lines.append(
            f"**The machine was not idle: load average {about['load average at start']:.1f} at the start. "
            "Do not quote these times.**"
        )
    return [f"{line}  " for line in lines]


def probe_lines(yardsticks: Yardsticks) -> list[str]:
    size = yardsticks.buffer.nbytes / 2**20
    lines = ["| probe | highest | median |", "|---|--:|--:|"]
    for name, rates in yardsticks.rates.items():
        label, unit = (f"{name}, {size:.0f} MiB", "GB/s") if name.startswith("memory") else (f"{name} loop", "GFLOP/s")
        lines.append(f"| {label} | {max(rates) / 1e9:.1f} {unit} | {np.median(rates) / 1e9:.1f} {unit} |")
    lines += [f"| {name} | not probed | {reason} |" for name, reason in yardsticks.missing.items()]
    return lines


def share(part: float, whole: float) -> str:
    """In percent; a dash where there is nothing to share or nothing was probed."""
    if not part or math.isnan(whole):
        return "–"
    return f"{part / whole:.0%}" if part / whole >= 0.005 else "<1%"


def result_row(result: Result, shape: Shape, yardsticks: Yardsticks) -> str:
    seconds = result.median / 1e3
    kind = "bf16" if result.rounds else "fp32"
    rate = shape.flops / seconds
    of_peak = share(rate, yardsticks.peak(kind))
    cells = [
        f"**{result.name}**" if result.ours else result.name,
        f"{result.median:.3f}",
        f"{result.percentile(10):.3f}–{result.percentile(90):.3f}",
        f"{result.ratio_fp32_peer:.2f}",
        f"{result.ratio_peer:.2f}",
        f"{rate / 1e9:.0f}" if rate else "–",
        of_peak if of_peak == "–" else f"{of_peak} {kind}",
        share(result.bytes_moved / seconds, yardsticks.bandwidth()),
        f"{result.error:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def shape_lines(measured: ShapeResults, yardsticks: Yardsticks) -> list[str]:
    shape = measured.shape
    product = f"{shape.count} × {shape.width} → {shape.hidden}, " if shape.count else ""
    norm = "" if shape.layer_norm_eps is None else "layer norm, "
    lines = [
        f"### {shape.name}: {shape.about}",
        "",
        f"{product}{norm}{shape.before + shape.after} text tokens, {shape.table} table. Best peer with float32 "
        f"operands: {measured.best_fp32_peer}; of any kind: {measured.best_peer}.",
        "",
        "| | median ms | p10–p90 | ÷ best fp32 peer | ÷ best peer | GFLOP/s | of peak | of bandwidth | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ordered = sorted(measured.results, key=lambda result: result.median)
    return lines + [result_row(result, shape, yardsticks) for result in ordered] + [""]


def as_json(
    about: dict[str, Any],
    method: Method,
    yardsticks: Yardsticks,
    skipped: dict[str, str],
    measured: Sequence[ShapeResults],
) -> dict[str, Any]:
    return {
        "machine": about,
        "method": dataclasses.asdict(method),
        "probes": {
            "rates": yardsticks.rates,
            "missing": yardsticks.missing,
            "buffer bytes": yardsticks.buffer.nbytes,
        },
        "skipped": skipped,
        "shapes": [dataclasses.asdict(shape) for shape in measured],
    }


COLOURS = {  # (ours, 16-bit operands)
    (True, False): ("#1f5fa8", "splice, fp32 operands"),
    (True, True): ("#7fb2e5", "splice, 16-bit operands"),
    (False, False): ("#7a7a7a", "others, fp32 operands"),
    (False, True): ("#c4c4c4", "others, 16-bit operands"),
}
BAR_INCHES = 0.2
COLUMN_INCHES = 8


def plot(measured: Sequence[ShapeResults], title: str, file: Path) -> None:
    """Bars of the medians, with p10 to p90 as whiskers, fastest first; two columns where there are many shapes."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    columns = 1 if len(measured) < 4 else 2
    bars = [len(shape.results) for shape in measured]
    heights = [max(bars[first : first + columns]) for first in range(0, len(bars), columns)]
    inches = sum(heights) * BAR_INCHES + len(heights) * 0.6 + 1.2
    figure, axes = pyplot.subplots(
        len(heights),
        columns,
        figsize=(COLUMN_INCHES * columns, inches),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, shape in zip_longest(axes.flat, measured):
        if shape is None:
            axis.remove()
        else:
            _draw_bars(axis, shape)
    handles = [Patch(color=colour) for colour, _ in COLOURS.values()]
    labels = [label for _, label in COLOURS.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=8)
    figure.suptitle(f"{title}; milliseconds a call, median and p10–p90", fontsize=10)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _three_digits(number: float) -> str:
    return f"{number:#.3g}" if number < 100 else f"{number:.0f}"


def _draw_bars(axis: Any, measured: ShapeResults) -> None:
    results = sorted(measured.results, key=lambda result: result.median)
    # The slowest would squeeze all others: the axis ends at three times the median contestant, numbers tell the rest.
    limit = min(3 * float(np.median([result.median for result in results])), 1.2 * results[-1].percentile(90))
    for place, result in enumerate(results):
        low, high = result.percentile(10), result.percentile(90)
        axis.barh(place, result.median, color=COLOURS[result.ours, result.rounds][0], height=0.8)
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        beyond = max(high, result.median) > 0.9 * limit
        end = limit if beyond else max(high, result.median) + 0.01 * limit
        label = axis.text(end, place, _three_digits(result.median), va="center", fontsize=7)
        if beyond:
            label.set(ha="right", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axis.set_yticks(range(len(results)), [result.name for result in results], fontsize=7)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.set_xlim(0, limit)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(f"{measured.shape.name}: {measured.shape.about}", fontsize=8, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------


def fix_thread_counts(threads: int) -> None:
    """Starts this process over with the variables that OpenMP and OpenBLAS read when they are loaded."""
    if all(os.environ.get(name) == str(threads) for name in THREAD_VARIABLES):
        return
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--threads", type=int, default=min(2, len(usable_processors())))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before a turn (default 0.05)")
    parser.add_argument("--cold", action="store_true", help="flush the caches before every call")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single time, for later")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: does everything work?")
    options = parser.parse_args(arguments)
    unknown = set(options.shapes.split(",")) - set(names)
    if unknown:
        parser.error(f"unknown shapes: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    fix_thread_counts(options.threads)
    about = machine.describe(options.threads) | {"splice paths": _native.splice_paths()}
    method = Method(options.threads, options.rounds, options.pause, options.cold)
    shapes: Sequence[Shape] = [shape for shape in SHAPES if shape.name in options.shapes.split(",")]
    if options.quick:
        method, shapes = Method(options.threads, 2, 0, options.cold), QUICK_SHAPES
    suites, skipped = available(SUITES)
    with tempfile.TemporaryDirectory() as folder:
        loops, missing = machine.compile_peak_loops(Path(folder))
    buffer = machine.bandwidth_buffer(2**24 if options.quick else 2**30)
    yardsticks = Yardsticks(loops, missing, buffer, options.threads)
    measured = []
    for shape in shapes:
        print(f"measuring {shape.name}", file=sys.stderr)
        try:
            measured.append(measure(shape, suites, method, yardsticks))
        except WrongResult as error:
            raise SystemExit(f"refused: {error}") from error
    lines = [*machine_lines(about, method), ""]
    lines += [f"Skipped: {name} ({reason})." for name, reason in skipped.items()]
    lines += [*probe_lines(yardsticks), ""]
    lines += [line for shape in measured for line in shape_lines(shape, yardsticks)]
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps(as_json(about, method, yardsticks, skipped, measured), indent=1) + "\n")
    if options.plot:
        plot(measured, f"{about['cpu']}, {options.threads} threads", options.plot)


if __name__ == "__main__":
    main()
