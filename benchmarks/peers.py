"""Ours beside what people would use instead: the same shape with random weights, the same tokens, the same threads.

Every engine lives in a process of its own (see peer_engines.py) and stays loaded. Then they take turns in short bursts,
round by round, each round beginning with another one: prefill of 128 and 512 positions, some tokens at a depth, and the
time to the first token of a question of 94 positions, with nothing cached and with the template's 47 positions in the
cache. A probe of the memory opens each round. Ratios compare times of the same round, so that a slow moment of the
machine meets both sides; printed are their median and range. Rounds are dropped by the rule of `biomedgpt-edge bench`,
and counted.

Engines that do not fit the memory together run in groups, one group after the other, and ours in each of them; which
ran together is printed. Ours alone has two more bursts, in the first group: several rows in one step, as speculation
has them, and the linear layers of a step without the rest, held against the bandwidth of their round.

All compute with the same weights, in the format of each; an engine whose logits are not ours is not timed. An engine
that is not installed or fails is named with the reason.

Usage: python benchmarks/peers.py [--shape tiny|1b|7b] [--layers N] [--bundle B] [--threads 2] [--rounds 5]
                                  [--engines ours,onnxruntime,...] [--work DIR] [--json FILE]
Peers need `pip install -c constraints.txt '.[peers]'`. --bundle takes the shape and weights of a bundle that is there.
The models of the 7b shape take 23 GB of disk; they stay in --work and are used again.
llama.cpp is compiled for this processor; where that has AMX and the compiler is GCC 12, see llama_cpp_amx.h.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

import peer_models
from biomedgpt_edge.bench.counters import Processors, available_memory
from biomedgpt_edge.bench.host import describe
from biomedgpt_edge.bench.limits import probe, probe_bytes
from biomedgpt_edge.bench.statistics import Round, disturbances
from biomedgpt_edge.errors import BioMedGPTError
from peer_engines import ENGINES, PREFIX, QUESTION
from peer_models import Models

REFERENCE = "ours"
DEPTH = 128
PEER_PACKAGES = ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "openvino", "torch", "transformers")
# Threads that the engine before left spinning go to sleep meanwhile.
PAUSE = 0.1
# Length of the difference as a share of the length of the logits. int8 activations, bfloat16 and scales of 6 bits stay
# below, also in deep models; positions that are missing or rotated in another way do not, nor do other weights.
TOLERANCE = 0.15
# What an engine needs while it runs, in bytes of the decoder in int4; formats with more bits have some more.
WEIGHTS = {REFERENCE: 1.0, "torch-bf16": 4.0}
WEIGHTS_OF_OTHERS = 1.2
# While an engine loads, the file that it reads competes for memory with what is made of it.
LOADING = 0.5

# name -> request
BURSTS: dict[str, dict[str, Any]] = {
    "prefill 128": {"do": "prefill", "tokens": 128},
    "prefill 512": {"do": "prefill", "tokens": 512},
    f"decode @ {DEPTH}": {"do": "decode", "depth": DEPTH},
    f"TTFT {QUESTION}, cold": {"do": "ttft", "warm": False},
    f"TTFT {QUESTION}, {PREFIX} warm": {"do": "ttft", "warm": True},
}
LINEAR_LAYERS = "linear layers"
BURSTS_OF_OURS: dict[str, dict[str, Any]] = {
    **{f"{rows} rows @ {DEPTH}": {"do": "rows", "depth": DEPTH, "rows": rows} for rows in (4, 8)},
    LINEAR_LAYERS: {"do": "linear_layers"},
}
REPEATED = ("decode", "rows", "linear_layers")
LONGEST = max(request.get("tokens", 0) for request in BURSTS.values())


class EngineFailed(Exception):
    """An engine gave no answer; the text says why, for the result."""


class Peer:
    """An engine's process."""

    def __init__(self, name: str, models: Models, threads: int) -> None:
        self.name = name
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close
        script = Path(__file__).with_name("peer_engines.py")
        paths = ["--records", str(models.records), "--portable", str(models.portable), "--models", str(models.folder)]
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
            with contextlib.suppress(BrokenPipeError):  # what was asked of a process that had ended
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
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
    """Of two figures of the same rounds."""

    median: float
    least: float
    largest: float
    rounds: int


def ratio(figures: dict[int, float], reference: dict[int, float], counted: Sequence[int]) -> Ratio | None:
    """Over the rounds that count and that both have; None of none."""
    ratios = [figures[turn] / reference[turn] for turn in counted if turn in figures and turn in reference]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def difference(logits: Sequence[float], expected: Sequence[float]) -> float:
    """Its length, as a share of that of the expected ones; infinite for another number of logits."""
    if len(logits) != len(expected):
        return float("inf")
    return float(np.linalg.norm(np.subtract(logits, expected)) / np.linalg.norm(expected))


def memory_of(name: str, models: Models) -> int:
    """Bytes that an engine is expected to take: its weights and its KV cache."""
    spec = models.spec
    cache = 2 * spec.layers * spec.kv_heads * spec.head_size * 4 * LONGEST
    return int(models.decoder_bytes * WEIGHTS.get(name, WEIGHTS_OF_OTHERS)) + cache


def grouped(names: Sequence[str], sizes: Mapping[str, int], room: int) -> tuple[list[list[str]], list[str]]:
    """Engines that fit ``room`` bytes together, the reference in every group, in the order given; and who fits none."""
    always = [REFERENCE] if REFERENCE in names else []
    left = room - sum(sizes[name] for name in always)
    others = [name for name in names if name not in always]
    groups: list[list[str]] = []
    free = 0
    for name in others:
        if sizes[name] > left:
            continue
        if not groups or sizes[name] > free:
            groups.append([*always])
            free = left
        groups[-1].append(name)
        free -= sizes[name]
    return groups or [always], [name for name in others if sizes[name] > left]


class Match:
    """Engines that run together, on one shape."""

    def __init__(self, names: Sequence[str], models: Models, threads: int, tokens: int, *, first: bool = True) -> None:
        self._models, self._threads, self._tokens = models, threads, tokens
        self._bursts_of_ours = BURSTS_OF_OURS if first else {}
        self.standings = [Standing(name) for name in names]
        self.rounds: list[Round] = []
        self.linear_bytes: int | None = None
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
            EngineFailed: an engine does not give the logits of the first of them.
        """
        first, expected = self._expected = self._expected or (standing.name, logits)
        error = difference(logits, expected)
        if not error <= TOLERANCE:
            raise EngineFailed(f"computes something else: its logits are {error:.0%} off those of {first}")

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

    def run(self, rounds: int) -> None:
        """Loads all, runs a warm-up and ``rounds``, and ends all processes."""
        try:
            self.load()
            for turn in range(rounds + 1):
                self.run_round(turn)
        finally:
            self.close()

    def close(self) -> None:
        """Ends all processes."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _bursts(self, standing: Standing, turn: int) -> None:
        for name, request in (BURSTS | (self._bursts_of_ours if standing.name == REFERENCE else {})).items():
            extra = {"tokens": self._tokens if turn else 1} if request["do"] in REPEATED else {}
            time.sleep(PAUSE)
            try:
                answer = self._peers[standing.name].ask(**request, **extra, seed=turn)
            except EngineFailed as error:
                self._stop(standing, error)
                return
            standing.times.setdefault(name, {})[turn] = answer["seconds"]
            if "itl" in answer:
                standing.tokens[turn] = answer["itl"]
            self.linear_bytes = answer.get("bytes", self.linear_bytes)

    def _stop(self, standing: Standing, error: EngineFailed) -> None:
        standing.reason = str(error)
        report(f"{standing.name}: {error}")
        self._peers.pop(standing.name).close()

    def _processors(self) -> Processors:
        now = Processors.now()
        return replace(now, own=now.own + sum(peer.processor_seconds() for peer in self._peers.values()))


def as_result(matches: Sequence[Match], left_out: Mapping[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    """Every time of every group, and the ratios of the rounds that count."""
    dropped = iter(disturbances([one for match in matches for one in match.rounds]))
    groups = [_group(match, [next(dropped) for _ in match.rounds]) for match in matches]
    failed = {one["name"]: one["reason"] for group in groups for one in group["engines"] if one["reason"]}
    return {**facts, "groups": groups, "ours_alone": _ours_alone(matches[0], groups[0]), "failed": failed | left_out}


def counted(rounds: Sequence[Round], dropped: Sequence[tuple[str, ...]]) -> tuple[list[int], bool]:
    """Rounds that count, and whether they are undisturbed; where none is, all count."""
    good = [one.index for one, reasons in zip(rounds, dropped, strict=True) if not reasons]
    return (good, True) if good else ([one.index for one in rounds if one.index], False)


def _group(match: Match, dropped: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    turns, undisturbed = counted(match.rounds, dropped)
    reference = _times_of_ours(match)
    engines = []
    for standing in match.standings:
        ratios = {name: ratio(standing.times.get(name, {}), reference.get(name, {}), turns) for name in BURSTS}
        shown = {name: None if value is None else asdict(value) for name, value in ratios.items()}
        engines.append({**asdict(standing), "ratios": shown})
    rounds = [{**asdict(one), "dropped": list(why)} for one, why in zip(match.rounds, dropped, strict=True)]
    return {"rounds": rounds, "counted": turns, "undisturbed": undisturbed, "engines": engines}


def _times_of_ours(match: Match) -> dict[str, dict[int, float]]:
    return next((standing.times for standing in match.standings if standing.name == REFERENCE), {})


def _ours_alone(match: Match, group: dict[str, Any]) -> dict[str, Any]:
    """Several rows over one row, and the share of the bandwidth that the linear layers alone reach."""
    times, turns = _times_of_ours(match), group["counted"]
    one = times.get(f"decode @ {DEPTH}", {})
    found = {f"{name} over 1": ratio(times.get(name, {}), one, turns) for name in BURSTS_OF_OURS if name in times}
    linear = times.get(LINEAR_LAYERS)
    if linear is not None and match.linear_bytes is not None:
        rates = {turn: match.linear_bytes / seconds for turn, seconds in linear.items()}
        bandwidth = {one.index: one.best_bandwidth for one in match.rounds}
        del found[f"{LINEAR_LAYERS} over 1"]
        found["linear layers over a step"] = ratio(linear, one, turns)
        found["linear layers, share of the bandwidth"] = ratio(rates, bandwidth, turns)
    return {name: None if value is None else asdict(value) for name, value in found.items()}


def as_markdown(result: dict[str, Any]) -> str:
    """Where it ran, the ratios, the times that they come from, and what ran together."""
    groups = result["groups"]
    rows = [(engine, group["counted"]) for group in groups for engine in group["engines"] if not engine["reason"]]
    head = f"|---|{'--:|' * len(BURSTS)}"
    lines = [
        *_about(result),
        f"| time over ours | {' | '.join(BURSTS)} |",
        head,
        *[_ratios(engine) for engine, _ in rows if engine["name"] != REFERENCE],
        "",
        f"| ms (decode: per token) | {' | '.join(BURSTS)} | load, s | and first step | anonymous, MiB |",
        f"{head}--:|--:|--:|",
        *[_times(engine, turns) for engine, turns in rows],
        "",
        *[f"- {name}: {_ratio(value)}" for name, value in result["ours_alone"].items()],
        *["- " + _together(group) for group in groups],
    ]
    failed = [f"- {name}: {reason}" for name, reason in result["failed"].items()]
    return "\n".join([*lines, *(["", "Not measured:", *failed] if failed else [])])


def _about(result: dict[str, Any]) -> list[str]:
    machine, shape = result["machine"], result["shape"]
    memory = machine["memory"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return [
        f"{machine['cpu']}, {machine['threads_used']} threads on {machine['usable_processors']} processors, "
        f"{'unknown memory' if memory is None else f'{memory / 2**30:.0f} GiB'}, {machine['system']}, "
        f"Python {machine['python']}; {versions}",
        "",
        f"{shape['layers']} layers of width {shape['hidden_size']}, {shape['intermediate_size']} in the feed-forward "
        f"part, {shape['vocabulary']} rows in the head. Medians and ranges of the rounds that count.",
        "",
    ]


def _ratio(value: dict[str, Any] | None) -> str:
    return "–" if value is None else "{median:.2f} ({least:.2f}–{largest:.2f})".format(**value)


def _ratios(engine: dict[str, Any]) -> str:
    return f"| {' | '.join([engine['name'], *(_ratio(engine['ratios'].get(name)) for name in BURSTS)])} |"


def _times(engine: dict[str, Any], turns: Sequence[int]) -> str:
    cells = [engine["name"]]
    for name in BURSTS:
        times = [seconds for turn, seconds in engine["times"].get(name, {}).items() if turn in turns]
        cells.append(f"{statistics.median(times) * 1e3:,.1f}" if times else "–")
    load = engine["load"]
    anonymous = load["anonymous"]
    cells += [
        f"{load['seconds']:.2f}",
        f"{load['with_first_step']:.2f}",
        "–" if anonymous is None else f"{anonymous / 2**20:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _together(group: dict[str, Any]) -> str:
    total = sum(1 for one in group["rounds"] if one["index"])
    state = "undisturbed" if group["undisturbed"] else "ALL OF THEM DISTURBED"
    speeds = [max(one["bandwidth"].values()) / 1e9 for one in group["rounds"] if one["index"] in group["counted"]]
    speed = f"{min(speeds):.1f} to {max(speeds):.1f} GB/s" if speeds else "no bandwidth"
    names = ", ".join(engine["name"] for engine in group["engines"])
    return f"together: {names}; {len(group['counted'])} of {total} rounds count, {state}, {speed}"


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
    parser.add_argument("--bundle", type=Path, help="take the shape and the weights of this bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="steps in a burst of decoding")
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
            else peer_models.models_of_bundle(options.work, options.bundle, report)
        )
        shape = asdict(models.spec)
    except BioMedGPTError as error:
        raise SystemExit(f"error: {error}") from error
    facts = {"machine": describe(options.threads), "versions": _versions(), "shape": shape, "tokens": options.tokens}
    sizes = {name: memory_of(name, models) for name in names}
    room = _room(models)
    groups, too_large = grouped(names, sizes, room)
    left_out = {name: f"takes {sizes[name] / 2**30:.1f} GiB, too much beside ours" for name in too_large}
    matches = []
    for number, group in enumerate(groups):
        report(f"together: {', '.join(group)}")
        match = Match(group, models, options.threads, options.tokens, first=number == 0)
        matches.append(match)
        match.run(options.rounds)
    result = as_result(matches, left_out, facts)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(as_markdown(result))


def _room(models: Models) -> int:
    """Bytes for engines: what is free, without the probe's and what loading takes for a while."""
    available = available_memory()
    if available is None:
        raise SystemExit("error: this system does not say how much memory is free, so that groups cannot be formed")
    return int(0.95 * available - probe_bytes() - LOADING * models.decoder_bytes)


if __name__ == "__main__":
    main()
