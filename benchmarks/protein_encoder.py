"""The protein encoder beside what people would use instead: layers of ESM-2 3B's width, random weights, equal threads.

All engines are in one process and take turns: each is run once untimed and once timed, and before every turn there is a
pause in which the threads of the one before go to sleep. A round is a turn of each for every number of residues, opened
by a probe of the memory and of the arithmetic; who comes first changes from round to round. Ratios compare times of the
same round, above 1 where ours is faster; printed are their median and range. Rounds are dropped by the rule of
`biomedgpt-edge bench`, and counted. Processor time is that of all threads, waiting ones included: with --threads 1,
where none waits for another, it stays comparable on a busy machine. Before anything is timed, the features of every
engine are compared with those of torch in float32.

`ours` is the int8 encoder of a bundle in records, `DynamicQuantizeMatMul` the one of a portable bundle; torch is
transformers' EsmModel. Afterwards ours is run once more under ONNX Runtime's profiler, for the time of each operator.

A layer takes .3 GB in float32 and a third of that in the others: all 36 of them need --engines in twos.

Usage: python benchmarks/protein_encoder.py [--layers 2] [--residues 400,1000] [--threads 2] [--rounds 7]
                                [--engines ours,...] [--json FILE] [--quick]
Needs `pip install -c constraints.txt '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from biomedgpt_edge import _native
from biomedgpt_edge.bench.counters import Processors, usable_processors
from biomedgpt_edge.bench.host import describe
from biomedgpt_edge.bench.limits import probe, probe_bytes
from biomedgpt_edge.bench.statistics import Round, disturbances
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.int8_ops import write_with_int8_ops
from biomedgpt_export.graphs.linear import GraphPrecision, Linears
from peers import ratio

import onnxruntime as ort  # isort: skip  # after biomedgpt_edge, which switches its telemetry off

Features = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# From residue ids [1, L + 2] to float32 [L + 2, hidden], the final LayerNorm applied or not.
Encode = Callable[[Ids], Features]

# By engine, number of residues and round.
Times = dict[str, dict[int, dict[int, float]]]

OURS, EXACT = "ours", "torch fp32"
PAUSE = 0.1
# 1 - cosine of any residue's features to those in float32. Eight bits stay well below in a few layers of random
# weights; other weights do not.
TOLERANCE = 0.05
BOS, EOS, RESIDUES = 0, 2, (4, 24)


class WrongResult(Exception):
    """An engine's features are not those of the model in float32."""


@dataclass(frozen=True)
class Shape:
    """Of ESM-2 3B, or of something tiny."""

    hidden: int = 2560
    heads: int = 40
    inner: int = 10240

    def config(self, layers: int) -> EsmConfig:
        return EsmConfig(self.hidden, self.inner, layers, self.heads, 33, 1026, 10000.0, 1e-5, token_dropout=True)

    def operations(self, positions: int) -> int:
        """Of one layer's matrices, a multiplication and an addition being two."""
        return 2 * positions * (4 * self.hidden**2 + 2 * self.hidden * self.inner)


QUICK = Shape(64, 4, 128)


def torch_model(config: EsmConfig) -> transformers.EsmModel:
    torch.manual_seed(0)
    settings = transformers.EsmConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        layer_norm_eps=config.norm_eps,
        position_embedding_type="rotary",
        token_dropout=config.token_dropout,
        mask_token_id=32,
        pad_token_id=1,
    )
    return transformers.EsmModel(settings, add_pooling_layer=False).eval()


class Engines:
    """Opens them by name; graphs are written to ``folder`` as they are needed."""

    def __init__(self, config: EsmConfig, folder: Path, threads: int) -> None:
        self._config, self._folder, self._threads = config, folder, threads
        torch.set_num_threads(threads)
        self._model = torch_model(config)
        self._state = self._model.state_dict()

    def open(self, name: str) -> Encode:
        return ENGINES[name](self)

    def ours(self) -> Encode:
        return self._encoder(self.session())

    def session(self, **settings: Any) -> ort.InferenceSession:
        """Of our graph, with further session options."""
        path = self._folder / "ours.onnx"
        if not path.exists():
            write_with_int8_ops(self._graph("int8"), path)
        return self._session(path, **settings)

    def portable(self) -> Encode:
        return self._encoder(self._session(self._graph("int8")))

    def plain(self) -> Encode:
        return self._encoder(self._session(self._graph("fp32")))

    def torch_bf16(self) -> Encode:
        half = torch_model(self._config)
        half.load_state_dict(self._state)
        return _torch_encoder(half.bfloat16())

    def torch_fp32(self) -> Encode:
        return _torch_encoder(self._model)

    def _graph(self, precision: GraphPrecision) -> Path:
        path = self._folder / f"{precision}.onnx"
        if not path.exists():
            graph = GraphBuilder(path)
            build_esm(graph, self._config, self._state.__getitem__, Linears(precision), lambda line: None)
            graph.save()
        return path

    def _session(self, path: Path, **settings: Any) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for name, value in settings.items():
            setattr(options, name, value)
        register_int4_ops(options)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _encoder(self, session: ort.InferenceSession) -> Encode:
        def encode(ids: Ids) -> Features:
            features: Features = session.run(None, {"residue_ids": ids})[0][0]
            return features

        return encode


def _torch_encoder(model: transformers.EsmModel) -> Encode:
    def encode(ids: Ids) -> Features:
        with torch.inference_mode():
            features: Features = model(torch.from_numpy(ids)).last_hidden_state[0].float().numpy()
        return features

    return encode


ENGINES: dict[str, Callable[[Engines], Encode]] = {
    OURS: Engines.ours,
    "DynamicQuantizeMatMul": Engines.portable,
    "ONNX Runtime fp32": Engines.plain,
    "torch bf16": Engines.torch_bf16,
    EXACT: Engines.torch_fp32,
}


@dataclass
class Measured:
    """Milliseconds per layer, of the clock and of the processors, by engine, number of residues and round; milliseconds
    per layer by operator of ours."""

    rounds: list[Round] = field(default_factory=list)
    milliseconds: Times = field(default_factory=dict)
    processor_milliseconds: Times = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    profiles: dict[int, dict[str, float]] = field(default_factory=dict)

    def counted(self) -> tuple[list[int], bool]:
        """Rounds that count, and whether they are undisturbed; where none is, all count."""
        dropped = disturbances(self.rounds)
        good = [one.index for one, reasons in zip(self.rounds, dropped, strict=True) if not reasons]
        return (good, True) if good else ([one.index for one in self.rounds if one.index], False)


def protein(residues: int) -> Ids:
    inner = np.random.default_rng(residues).integers(*RESIDUES, residues)
    return np.concatenate([[BOS], inner, [EOS]])[np.newaxis].astype(np.int64)


def normed(features: Features) -> npt.NDArray[np.float64]:
    """What the final LayerNorm, of gain 1 and shift 0, makes of them; applied twice it is as if once."""
    centred = features.astype(np.float64) - features.mean(-1, keepdims=True, dtype=np.float64)
    result: npt.NDArray[np.float64] = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    return result


def check(name: str, found: Features, expected: Features) -> float:
    """The largest 1 - cosine of a residue's features.

    Raises:
        WrongResult: it is beyond the tolerance, or features are not finite.
    """
    distance = float((1 - (normed(found) * normed(expected)).sum(-1)).max())
    if not distance <= TOLERANCE:
        raise WrongResult(f"{name}: features are up to {distance:.1e} off by cosine, and {TOLERANCE} is allowed")
    return distance


def measure(shape: Shape, options: argparse.Namespace, folder: Path) -> Measured:
    engines, measured = Engines(shape.config(options.layers), folder, options.threads), Measured()
    proteins = {residues: protein(residues) for residues in options.residues}
    expected = engines.torch_fp32()(proteins[options.residues[0]])
    runs = {}
    for name in options.engines:
        report(f"opening {name}")
        runs[name] = engines.open(name)
        measured.distances[name] = check(name, runs[name](proteins[options.residues[0]]), expected)
    for turn in range(options.rounds + 1):
        _round(turn, runs, proteins, options, measured)
    if OURS in runs:
        measured.profiles = {
            residues: profile(engines, ids, options.rounds, options.layers) for residues, ids in proteins.items()
        }
    return measured


def _round(
    turn: int, runs: dict[str, Encode], proteins: dict[int, Ids], options: argparse.Namespace, measured: Measured
) -> None:
    before = Processors.now()
    limits = probe(options.threads, options.probe_bytes)
    names = list(runs)
    shift = turn % len(names)
    for residues, ids in proteins.items():
        for name in [*names[shift:], *names[:shift]]:
            time.sleep(PAUSE)
            runs[name](ids)
            start, processors = time.perf_counter(), time.process_time()
            runs[name](ids)
            taken, used = time.perf_counter() - start, time.process_time() - processors
            for times, seconds in ((measured.milliseconds, taken), (measured.processor_milliseconds, used)):
                times.setdefault(name, {}).setdefault(residues, {})[turn] = seconds * 1e3 / options.layers
    after = Processors.now()
    foreign, whole = after.foreign_share(before), after.wall - before.wall
    measured.rounds.append(Round(turn, "serve", whole, foreign, limits.bandwidth, limits.arithmetic))
    report(f"round {turn}: {whole:.1f} s, foreign CPU {'unknown' if foreign is None else f'{foreign:.0%}'}")


def profile(engines: Engines, ids: Ids, runs: int, layers: int) -> dict[str, float]:
    """Milliseconds per layer of each operator of ours, the largest first: medians over the runs after the first one."""
    with tempfile.TemporaryDirectory() as folder:
        session = engines.session(enable_profiling=True, profile_file_prefix=f"{folder}/profile")
        for _ in range(runs + 1):
            session.run(None, {"residue_ids": ids})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    per_run = len(kernels) // (runs + 1)
    samples = defaultdict(list)
    for first in range(per_run, len(kernels), per_run):
        totals = defaultdict(float)
        for event in kernels[first : first + per_run]:
            totals[event["args"]["op_name"]] += event["dur"] / 1e3 / layers
        for operator, milliseconds in totals.items():
            samples[operator].append(milliseconds)
    medians = {operator: statistics.median(values) for operator, values in samples.items()}
    return dict(sorted(medians.items(), key=lambda one: -one[1]))


def table(shape: Shape, measured: Measured) -> list[str]:
    counted, undisturbed = measured.counted()
    total = sum(1 for one in measured.rounds if one.index)
    peak = max(
        (rate for one in measured.rounds for name, rate in one.arithmetic.items() if name.startswith("int8")),
        default=0.0,
    )
    lines = [
        "| engine | residues | ms per layer | × ours | range | processor ms | × ours | range | off by cosine |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, by_residues in measured.milliseconds.items():
        for residues in by_residues:
            both = (measured.milliseconds, measured.processor_milliseconds)
            cells = " | ".join(_cells(times, name, residues, counted) for times in both)
            lines.append(f"| {name} | {residues} | {cells} | {measured.distances[name]:.1e} |")
    state = "undisturbed" if undisturbed else "ALL OF THEM DISTURBED"
    lines += ["", f"{len(counted)} of {total} rounds count, {state}; int8 peak {peak / 1e12:.1f} TOP/s at best."]
    for residues, operators in measured.profiles.items():
        products = sum(time for name, time in operators.items() if name.startswith("Int8"))
        rate = shape.operations(residues + 2) / products * 1e3
        share = f", {rate / peak:.0%} of the peak" if peak else ""
        shown = ", ".join(f"{name} {time:.2f}" for name, time in operators.items())
        lines.append(f"\nOurs by operator, {residues} residues, ms per layer: {shown}; ")
        lines.append(f"in its products {rate / 1e12:.2f} TOP/s{share}.")
    return lines


def _cells(times: Times, name: str, residues: int, counted: Sequence[int]) -> str:
    """Median, and the ratio to ours with its range."""
    mine, ours = times[name][residues], times.get(OURS, {}).get(residues, {})
    against = ratio(mine, ours, counted)
    spread = "– | –" if against is None else f"{against.median:.2f} | {against.least:.2f}–{against.largest:.2f}"
    return f"{statistics.median(mine[turn] for turn in counted):.1f} | {spread}"


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="ESM-2 3B has 36")
    parser.add_argument("--residues", default="400,1000", help="lengths of proteins (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, len(usable_processors())))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single time, for later")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two rounds: does everything work?")
    options = parser.parse_args(arguments)
    options.engines = options.engines.split(",")
    unknown = [name for name in options.engines if name not in ENGINES]
    if unknown:
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    residues = options.residues.split(",")
    if not all(number.isdecimal() and 1 <= int(number) <= 1024 for number in residues):
        parser.error(f"--residues is {options.residues!r}; give numbers from 1 to 1024 with commas between them")
    options.residues = tuple(map(int, residues))
    if min(options.threads, options.rounds, options.layers) < 1:
        parser.error("--threads, --rounds and --layers are 1 or more")
    options.rounds = 2 if options.quick else options.rounds
    options.probe_bytes = 2**20 if options.quick else probe_bytes()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    shape = QUICK if options.quick else Shape()
    with tempfile.TemporaryDirectory() as folder:
        try:
            measured = measure(shape, options, Path(folder))
        except WrongResult as error:
            raise SystemExit(f"refused: {error}") from error
    print(f"{options.layers} layers, {options.threads} threads; int8 path {_native.int8_paths()[0]}\n")
    print("\n".join(table(shape, measured)))
    if options.json is not None:
        facts = {"machine": describe(options.threads), "shape": asdict(shape), "layers": options.layers}
        versions = {module.__name__: module.__version__ for module in (torch, transformers, ort, np)}
        options.json.write_text(json.dumps(facts | {"versions": versions} | asdict(measured), indent=1) + "\n")


if __name__ == "__main__":
    main()
