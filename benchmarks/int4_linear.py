"""Our int4 operators beside MatMulNBits, inside ONNX Runtime, on the linear layers of Llama-2-7B.

A layer is a graph of as many copies of one product as no cache holds, with random weights in groups and the same input;
its peer has MatMulNBits with int8 activations (accuracy level 4), and for the gate and up projection SiLU and the
multiplication, too. Both graphs hold the same weights, and before anything is timed their results are compared.

Every round probes the bandwidth, then both take a turn for each number of rows; who comes first alternates. A turn is
an untimed run and a timed one; ONNX Runtime is told to let its threads sleep at the end of a run. Ratios compare times
of the same round, above 1 where ours is faster. A round whose bandwidth is below 85 % of the best round's was
disturbed, and is left out of the medians; how many were is printed. A share is what reading the weights alone takes at
the highest bandwidth of the run; the column after it compares with the first number of rows.

Usage: python benchmarks/int4_linear.py [--threads 2] [--rounds 11] [--rows 1,4,8,128] [--group 128]
                                        [--shapes qkv,o,gate_up,down,head] [--json FILE] [--quick]
Needs `pip install -c constraints.txt '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto

import machine
from biomedgpt_edge import _native
from biomedgpt_edge.bench.counters import usable_processors
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_export.graphs.builder import CONTRIB, GraphBuilder
from biomedgpt_export.graphs.int4_ops import write_with_int4_ops
from biomedgpt_export.graphs.linear import Linears
from biomedgpt_export.quantize.int4 import GROUP_SIZES, Int4Weight

import onnxruntime as ort  # isort: skip  # after biomedgpt_edge, which switches its telemetry off

# Of the largest value. Both round activations to eight bits, ties and sums differently.
TOLERANCE = 0.02
UNDISTURBED = 0.85
OURS, PEER = "ours", "MatMulNBits"


@dataclass(frozen=True)
class Shape:
    """A linear layer [rows, columns], or a gate and an up projection of that size."""

    name: str
    rows: int
    columns: int
    gate_up: bool = False

    def bytes(self, group: int) -> int:
        panels, groups, record_bytes = _native.int4_records_shape(self.rows, self.columns, group)
        return panels * groups * record_bytes * (2 if self.gate_up else 1)


SHAPES = (
    Shape("qkv", 3 * 4096, 4096),
    Shape("o", 4096, 4096),
    Shape("gate_up", 11008, 4096, gate_up=True),
    Shape("down", 4096, 11008),
    Shape("head", 32000, 4096),
)
QUICK_SHAPES = (Shape("quick", 70, 256), Shape("quick_gate_up", 64, 256, gate_up=True))


@dataclass(frozen=True)
class Method:
    threads: int
    rounds: int
    rows: tuple[int, ...]
    group: int


@dataclass
class Measured:
    """Milliseconds of a layer's one product, by contestant and number of rows, and bytes/s, each by round."""

    shape: Shape
    copies: int
    bandwidth: list[float] = field(default_factory=list)
    milliseconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {OURS: {}, PEER: {}})


class WrongResult(Exception):
    """Ours and the peer's products differ by more than rounding explains."""


class RandomInt4:
    """Random levels and scales of a group size, whatever the matrix, of which only the shape is looked at."""

    name = "random"

    def __init__(self, group: int) -> None:
        self._group = group
        self._rng = np.random.default_rng(1)

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        rows, columns = weight.shape
        groups = -(-columns // self._group)
        packed = np.frombuffer(self._rng.bytes(rows * groups * self._group // 2), np.uint8)
        scales = self._rng.uniform(1e-3, 4e-3, (rows, groups)).astype(np.float16)
        packed = packed.reshape(rows, groups, self._group // 2).copy()
        return Int4Weight(torch.from_numpy(packed), torch.from_numpy(scales), columns, self._group)


def write_peer(shape: Shape, copies: int, group: int, path: Path) -> None:
    linears = Linears("int4", RandomInt4(group), activations="int8")
    weight = torch.empty(shape.rows, shape.columns, device="meta")
    graph = GraphBuilder(path)
    source = graph.input("x", TensorProto.FLOAT, ["rows", shape.columns])
    for copy in range(copies):
        product = linears.emit(graph, source, f"layers.{copy}.first", weight)
        if shape.gate_up:
            up = linears.emit(graph, source, f"layers.{copy}.second", weight)
            product = graph.node("QuickGelu", [product], f"layers.{copy}.silu", domain=CONTRIB, alpha=1.0)
            product = graph.node("Mul", [product, up], f"layers.{copy}.gated")
        graph.output(product, TensorProto.FLOAT, ["rows", shape.rows])
    graph.save()


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register_int4_ops(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Run:
    """A run that allocates nothing. ``y`` is the result of the last copy, which every one writes over."""

    def __init__(self, session: ort.InferenceSession, x: npt.NDArray[np.float32], width: int) -> None:
        # The binding holds addresses only: both arrays must live as long as it does.
        self._x, self.y = x, np.empty((len(x), width), np.float32)
        self._session, self._binding = session, session.io_binding()
        self._binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        for output in session.get_outputs():
            self._binding.bind_output(output.name, "cpu", 0, np.float32, self.y.shape, self.y.ctypes.data)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


def check(shape: Shape, results: dict[str, npt.NDArray[np.float32]]) -> None:
    largest = float(np.abs(results[PEER]).max())
    off = float(np.abs(results[OURS] - results[PEER]).max())
    if not off <= TOLERANCE * largest:
        raise WrongResult(f"{shape.name}: results differ by {off:.1e} where the largest is {largest:.1e}")


def measure(shape: Shape, method: Method, buffer: npt.NDArray[np.float32], folder: Path) -> Measured:
    measured = Measured(shape, max(1, -(-buffer.nbytes // shape.bytes(method.group))))
    paths = {PEER: folder / "peer.onnx", OURS: folder / "ours.onnx"}
    write_peer(shape, measured.copies, method.group, paths[PEER])
    write_with_int4_ops(paths[PEER], paths[OURS])
    sessions = {name: open_session(path, method.threads) for name, path in paths.items()}
    rng = np.random.default_rng(2)
    inputs = {rows: rng.standard_normal((rows, shape.columns), np.float32) for rows in method.rows}
    runs: dict[int, dict[str, Run]] = {}
    for rows, x in inputs.items():
        runs[rows] = {name: Run(session, x, shape.rows) for name, session in sessions.items()}
        for run in runs[rows].values():
            run()
        check(shape, {name: run.y for name, run in runs[rows].items()})
    for number in range(method.rounds):
        measured.bandwidth.append(machine.probe_bandwidth(buffer, method.threads)["memory read"])
        for rows in method.rows:
            for name in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
                taken = turn(runs[rows][name]) / measured.copies
                measured.milliseconds[name].setdefault(rows, []).append(taken)
    return measured


def turn(run: Run) -> float:
    """Milliseconds of a run, after another one has woken the threads."""
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def undisturbed(all_measured: Sequence[Measured], measured: Measured) -> list[int]:
    best = max(rate for one in all_measured for rate in one.bandwidth)
    return [number for number, rate in enumerate(measured.bandwidth) if rate >= UNDISTURBED * best]


def table(all_measured: Sequence[Measured], method: Method) -> list[str]:
    best = max(rate for one in all_measured for rate in one.bandwidth)
    lines = [
        f"| layer | rows | ours ms | peer ms | ratio | range | of bandwidth | to {method.rows[0]} | left out |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for measured in all_measured:
        chosen = undisturbed(all_measured, measured)
        dropped = method.rounds - len(chosen)
        first = np.array(measured.milliseconds[OURS][method.rows[0]])
        for rows in method.rows:
            if not chosen:
                lines.append(f"| {measured.shape.name} | {rows} | – | – | – | – | – | – | {dropped} |")
                continue
            ours, peer = (np.array(measured.milliseconds[name][rows])[chosen] for name in (OURS, PEER))
            ratios = peer / ours
            share = measured.shape.bytes(method.group) / best / (np.median(ours) / 1e3)
            cells = (
                f"{measured.shape.name} | {rows} | {np.median(ours):.3f} | {np.median(peer):.3f} | "
                f"{np.median(ratios):.2f} | {ratios.min():.2f}–{ratios.max():.2f} | {share:.0%} | "
                f"{np.median(ours / first[chosen]):.2f} | {dropped}"
            )
            lines.append(f"| {cells} |")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--threads", type=int, default=min(2, len(usable_processors())))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", default="1,4,8,128", help="numbers of rows, the first of which is compared with")
    parser.add_argument("--shapes", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--group", type=int, choices=GROUP_SIZES, default=GROUP_SIZES[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single time, for later")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: does everything work?")
    options = parser.parse_args(arguments)
    unknown = set(options.shapes.split(",")) - set(names)
    if unknown:
        parser.error(f"unknown shapes: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    rows = options.rows.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in rows):
        parser.error(f"--rows is {options.rows!r}; give numbers from 1 with commas between them")
    options.rows = tuple(map(int, rows))
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    about: dict[str, Any] = machine.describe(options.threads) | {"int4 paths": _native.int4_paths()}
    method = Method(options.threads, 2 if options.quick else options.rounds, options.rows, options.group)
    wanted = options.shapes.split(",")
    shapes = QUICK_SHAPES if options.quick else [shape for shape in SHAPES if shape.name in wanted]
    buffer = machine.bandwidth_buffer(2**16 if options.quick else 2**30)
    all_measured = []
    for shape in shapes:
        print(f"measuring {shape.name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            try:
                all_measured.append(measure(shape, method, buffer, Path(folder)))
            except WrongResult as error:
                raise SystemExit(f"refused: {error}") from error
    print(f"{about['cpu']}, {about['threads used']} threads, groups of {method.group}, {method.rounds} rounds  ")
    print(
        f"paths, best first: {', '.join(about['int4 paths'])}; load average at start {about['load average at start']}\n"
    )
    print("\n".join(table(all_measured, method)))
    if options.json:
        shapes_json = [asdict(measured) for measured in all_measured]
        written = {"machine": about, "method": asdict(method), "layers": shapes_json}
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
