"""Ours beside what people would use instead: the same shape with random weights, the same tokens, the same threads.

Every engine lives in a process of its own (see peer_engines.py) and stays loaded. Then they take turns in short bursts,
round by round, each round beginning with another one: prefill of 128 and 512 positions, some tokens at a depth, and the
time to the first token of a question of 94 positions, with nothing cached and with the template's 47 positions in the
cache. A probe of the memory opens each round. Ratios compare times of the same round, so that a slow moment of the
machine meets both sides; printed are their median and range. Rounds are dropped by the rule of `biomedgpt-edge bench`,
and counted.

An engine that is not installed, fails, or computes something else is named with the reason. OpenVINO GenAI is not among
them yet.

Usage: python benchmarks/peers.py [--shape tiny|1b|7b] [--layers N] [--bundle B] [--threads 2] [--rounds 7]
                                  [--engines ours,onnxruntime,...] [--work DIR] [--json FILE]
Peers need `pip install -c constraints.txt '.[peers]'`. --bundle takes the shape of a bundle that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

import peer_models
from biomedgpt_edge.bench.counters import Processors
from biomedgpt_edge.bench.host import describe
from biomedgpt_edge.bench.limits import probe, probe_bytes
from biomedgpt_edge.bench.statistics import Round, disturbances
from biomedgpt_edge.errors import BioMedGPTError
from peer_engines import ENGINES, PREFIX, QUESTION, SAME_WEIGHTS
from peer_models import Models

REFERENCE = "ours"
DEPTH = 128
PEER_PACKAGES = ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers")
# Threads that the engine before left spinning go to sleep meanwhile.
PAUSE = 0.1
# Of the largest logit: int8 activations, rounded by each engine in its own way, stay well below; other weights do not.
TOLERANCE = 0.05

# name -> request
BURSTS: dict[str, dict[str, Any]] = {
    "prefill 128": {"do": "prefill", "tokens": 128},
    "prefill 512": {"do": "prefill", "tokens": 512},
    f"decode @ {DEPTH}": {"do": "decode", "depth": DEPTH},
    f"TTFT {QUESTION}, cold": {"do": "ttft", "warm": False},
    f"TTFT {QUESTION}, {PREFIX} warm": {"do": "ttft", "warm": True},
}


class EngineFailed(Exception):
    """An engine gave no answer; the text says why, for the result."""


class Peer:
    """An engine's process."""

    def __init__(self, name: str, models: Models, threads: int) -> None:
        self.name = name
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close
        script = Path(__file__).with_name("peer_engines.py")
        paths = ["--bundle", str(models.bundle), "--models", str(models.folder)]
        command = [sys.executable, str(script), name, *paths, "--threads", str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            EngineFailed: it is not installed, or its process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise TypeError("the process was started without pipes")
        try:
            print(json.dumps(request), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def processor_seconds(self) -> float:
        """That this process has used so far."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"ended with status {status}"


@dataclass
class Standing:
    """What is known of an engine: how it loaded, its times by burst and round, and why it stopped if it did."""

    name: str
    load: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    tokens: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """Times of an engine over those of the reference in the same rounds."""

    median: float
    least: float
    largest: float
    rounds: int


def ratio(times: dict[int, float], reference: dict[int, float], counted: Sequence[int]) -> Ratio | None:
    """Over the rounds that count and that both have; None of none."""
    ratios = [times[turn] / reference[turn] for turn in counted if turn in times and turn in reference]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def difference(logits: Sequence[float], expected: Sequence[float]) -> float:
    """The largest, as a share of the largest expected one; infinite for another number of logits."""
    if len(logits) != len(expected):
        return float("inf")
    return float(np.max(np.abs(np.subtract(logits, expected))) / np.max(np.abs(expected)))


class Match:
    """All engines on one shape."""

    def __init__(self, names: Sequence[str], models: Models, threads: int, tokens: int) -> None:
        self._models, self._threads, self._tokens = models, threads, tokens
        self.standings = [Standing(name) for name in names]
        self.rounds: list[Round] = []
        self._peers: dict[str, Peer] = {}
        self._expected: tuple[str, list[float]] | None = None

    def load(self) -> None:
        """Starts the engines one after another."""
        for standing in self.standings:
            report(f"loading {standing.name}")
            self._peers[standing.name] = peer = Peer(standing.name, self._models, self._threads)
            try:
                standing.load = peer.ask(do="load")
                self._check(standing, standing.load.pop("logits"))
            except EngineFailed as error:
                self._stop(standing, error)

    def _check(self, standing: Standing, logits: list[float]) -> None:
        """Nobody is timed who is fast because it computes something else.

        Raises:
            EngineFailed: an engine on the bundle's weights does not give the logits of the first of them.
        """
        if standing.name not in SAME_WEIGHTS:
            return
        first, expected = self._expected = self._expected or (standing.name, logits)
        error = difference(logits, expected)
        if not error <= TOLERANCE:
            raise EngineFailed(
                f"computes something else: its logits are {error:.0%} of the largest off those of {first}"
            )

    def run_round(self, turn: int) -> None:
        """A probe, and every burst of every engine. Turn 0 warms up."""
        before = self._processors()
        limits = probe(self._threads, probe_bytes())
        shift = turn % len(self.standings)
        for standing in [*self.standings[shift:], *self.standings[:shift]]:
            if not standing.reason:
                self._bursts(standing, turn)
        after = self._processors()
        foreign, seconds = after.foreign_share(before), after.wall - before.wall
        self.rounds.append(Round(turn, "serve", seconds, foreign, limits.bandwidth, limits.arithmetic))
        speed = f"{self.rounds[-1].best_bandwidth / 1e9:.1f} GB/s"
        report(f"round {turn}: {seconds:.1f} s, {speed}, foreign CPU {_percent(foreign)}")

    def close(self) -> None:
        """Ends all processes."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def counted(self) -> tuple[list[int], bool]:
        """Rounds that count, and whether they are undisturbed; where none is, all count."""
        dropped = disturbances(self.rounds)
        good = [one.index for one, reasons in zip(self.rounds, dropped, strict=True) if not reasons]
        return (good, True) if good else ([one.index for one in self.rounds if one.index], False)

    def _bursts(self, standing: Standing, turn: int) -> None:
        for name, request in BURSTS.items():
            extra = {"tokens": self._tokens} if request["do"] == "decode" else {}
            time.sleep(PAUSE)
            try:
                answer = self._peers[standing.name].ask(**request, **extra, seed=turn)
            except EngineFailed as error:
                self._stop(standing, error)
                return
            standing.times.setdefault(name, {})[turn] = answer["seconds"]
            if "itl" in answer:
                standing.tokens[turn] = answer["itl"]

    def _stop(self, standing: Standing, error: EngineFailed) -> None:
        standing.reason = str(error)
        report(f"{standing.name}: {error}")
        self._peers.pop(standing.name).close()

    def _processors(self) -> Processors:
        now = Processors.now()
        return replace(now, own=now.own + sum(peer.processor_seconds() for peer in self._peers.values()))


def as_result(match: Match, facts: dict[str, Any]) -> dict[str, Any]:
    """Every time, and the ratios of the rounds that count."""
    counted, undisturbed = match.counted()
    reference = next((standing.times for standing in match.standings if standing.name == REFERENCE), {})
    engines = []
    for standing in match.standings:
        ratios = {name: ratio(times, reference.get(name, {}), counted) for name, times in standing.times.items()}
        shown = {name: None if value is None else asdict(value) for name, value in ratios.items()}
        engines.append({**asdict(standing), "ratios": shown})
    dropped = disturbances(match.rounds)
    rounds = [{**asdict(one), "dropped": list(why)} for one, why in zip(match.rounds, dropped, strict=True)]
    return {**facts, "rounds": rounds, "counted": counted, "undisturbed": undisturbed, "engines": engines}


def as_markdown(result: dict[str, Any]) -> str:
    """A row for each engine: median times in ms, and in brackets the ratio to ours with its range."""
    lines = [
        f"| | load, s | anonymous, MiB | {' | '.join(f'{name}, ms' for name in BURSTS)} |",
        f"|---|{'--:|' * (len(BURSTS) + 2)}",
        *[_row(engine, result["counted"]) for engine in result["engines"] if not engine["reason"]],
    ]
    failed = [f"- {engine['name']}: {engine['reason']}" for engine in result["engines"] if engine["reason"]]
    total = sum(1 for one in result["rounds"] if one["index"])
    state = "undisturbed" if result["undisturbed"] else "ALL OF THEM DISTURBED"
    lines += [
        "",
        f"{len(result['counted'])} of {total} rounds count, {state}; decode per token; × ours: median (range).",
    ]
    return "\n".join([*lines, *(["", "Not measured:", *failed] if failed else [])])


def _row(engine: dict[str, Any], counted: list[int]) -> str:
    anonymous = engine["load"]["anonymous"]
    memory = "–" if anonymous is None else f"{anonymous / 2**20:,.0f}"
    cells = [engine["name"], f"{engine['load']['seconds']:.2f}", memory]
    for name in BURSTS:
        times = [seconds for turn, seconds in engine["times"].get(name, {}).items() if turn in counted]
        against = engine["ratios"].get(name)
        spread = "" if against is None else " ({median:.2f}×, {least:.2f}–{largest:.2f})".format(**against)
        cells.append(f"{statistics.median(times) * 1e3:,.1f}{spread}" if times else "–")
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PEER_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=peer_models.SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--bundle", type=Path, help="take the shape of this bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="in a burst of decoding")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("peer-models"), help="where models are written")
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    if options.bundle is not None and options.layers is not None:
        parser.error("--layers cuts a --shape; a --bundle has the layers that it has")
    if min(options.threads, options.rounds, options.tokens, options.layers or 1) < 1:
        parser.error("--threads, --rounds, --tokens and --layers are 1 or more")
    try:
        models = (
            peer_models.models_of_shape(options.work, options.shape, options.layers, report)
            if options.bundle is None
            else peer_models.models_of_bundle(options.work, options.bundle)
        )
        spec = asdict(models.spec)
    except BioMedGPTError as error:
        raise SystemExit(f"error: {error}") from error
    facts = {"machine": describe(options.threads), "versions": _versions(), "shape": spec, "tokens": options.tokens}
    match = Match(names, models, options.threads, options.tokens)
    try:
        match.load()
        for turn in range(options.rounds + 1):
            match.run_round(turn)
    finally:
        match.close()
    result = as_result(match, facts)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
