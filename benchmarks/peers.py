"""Ours beside what people would use instead: the same shape with random weights, the same tokens, the same threads.

Every engine lives in a process of its own (see peer_engines.py) and stays loaded. Then they take turns in short bursts:
prefill of 128 and 512 positions, some tokens at a depth, and the time to the first token of a question of 94 positions,
with nothing cached and with the template's 47 positions in the cache. A round is one burst of every engine, begun by
another one each time and opened by a probe of the memory. Ratios compare times of the same round, so that a slow moment
of the machine meets both sides; printed are their median and range. Rounds are dropped by the rule of `biomedgpt-edge
bench`, counted, and repeated until --rounds of each burst count or --most-rounds were run.

Engines that do not fit the memory together run in groups, one group after the other, and ours in each of them; which
ran together is printed. Ours alone has more bursts, in the rounds of decoding of the first group: several rows in one
step, as speculation has them, and the linear layers of a step without the rest, held against the bandwidth of their
round.

All compute with the same weights, in the format of each; an engine whose logits are not ours is not timed. An engine
that is not installed or fails is named with the reason.

Usage: python benchmarks/peers.py [--shape tiny|1b|7b] [--layers N] [--bundle B] [--threads 2] [--rounds 3]
                                  [--most-rounds 9] [--engines ours,onnxruntime,...] [--work DIR]
                                  [--json FILE]
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
DECODE = f"decode @ {DEPTH}"
BURSTS: dict[str, dict[str, Any]] = {
    "prefill 128": {"do": "prefill", "tokens": 128},
    "prefill 512": {"do": "prefill", "tokens": 512},
    DECODE: {"do": "decode", "depth": DEPTH},
    f"TTFT {QUESTION}, cold": {"do": "ttft", "warm": False},
    f"TTFT {QUESTION}, {PREFIX} warm": {"do": "ttft", "warm": True},
}
LINEAR_LAYERS = "linear layers"
# In the rounds of DECODE, whose steps they are compared with.
BURSTS_OF_OURS: dict[str, dict[str, Any]] = {
    **{f"{rows} rows @ {DEPTH}": {"do": "rows", "depth": DEPTH, "rows": rows} for rows in (4, 8)},
    LINEAR_LAYERS: {"do": "linear_layers"},
}
DISTURBED = "†"
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
class Turn:
    """One burst of every engine of a group."""

    group: int
    burst: str
    round: Round


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

    def __init__(
        self, names: Sequence[str], models: Models, threads: int, tokens: int, history: list[Turn], group: int = 0
    ) -> None:
        self._models, self._threads, self._tokens = models, threads, tokens
        self._history = history  # of all groups
        self.group = group
        self.standings = [Standing(name) for name in names]
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

    def run_round(self, burst: str, index: int) -> None:
        """A probe, and the burst of every engine. Round 0 warms up."""
        before = self._processors()
        limits = probe(self._threads, probe_bytes())
        shift = index % len(self.standings)
        for standing in [*self.standings[shift:], *self.standings[:shift]]:
            for name, request in self._requests(standing.name, burst).items():
                if not standing.reason:
                    self._burst(standing, name, request, index)
        after = self._processors()
        foreign, seconds = after.foreign_share(before), after.wall - before.wall
        one = Round(index, "serve", seconds, foreign, limits.bandwidth, limits.arithmetic)
        self._history.append(Turn(self.group, burst, one))
        speed = f"{one.best_bandwidth / 1e9:.1f} GB/s"
        report(f"{burst}, round {index}: {seconds:.1f} s, {speed}, foreign CPU {_percent(foreign)}")

    def run(self, rounds: int, most: int) -> None:
        """Loads all, runs a warm-up, then ``most`` rounds of each burst or fewer, if ``rounds`` count; ends all."""
        try:
            self.load()
            for index in range(most + 1):
                for burst in BURSTS:
                    lacking = len(undisturbed(self._history, self.group, burst)) < rounds
                    if lacking and not all(standing.reason for standing in self.standings):
                        self.run_round(burst, index)
        finally:
            self.close()

    def close(self) -> None:
        """Ends all processes."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _requests(self, engine: str, burst: str) -> dict[str, dict[str, Any]]:
        """Name -> request, of what an engine does in a round of ``burst``."""
        more = BURSTS_OF_OURS if engine == REFERENCE and burst == DECODE and self.group == 0 else {}
        return {burst: BURSTS[burst], **more}

    def _burst(self, standing: Standing, name: str, request: dict[str, Any], index: int) -> None:
        extra = {"tokens": self._tokens if index else 1} if request["do"] in REPEATED else {}
        time.sleep(PAUSE)
        try:
            answer = self._peers[standing.name].ask(**request, **extra, seed=index)
        except EngineFailed as error:
            self._stop(standing, error)
            return
        standing.times.setdefault(name, {})[index] = answer["seconds"]
        if "itl" in answer:
            standing.tokens[index] = answer["itl"]
        self.linear_bytes = answer.get("bytes", self.linear_bytes)

    def _stop(self, standing: Standing, error: EngineFailed) -> None:
        standing.reason = str(error)
        report(f"{standing.name}: {error}")
        self._peers.pop(standing.name).close()

    def _processors(self) -> Processors:
        now = Processors.now()
        return replace(now, own=now.own + sum(peer.processor_seconds() for peer in self._peers.values()))


def judged(history: Sequence[Turn], group: int, burst: str) -> list[tuple[Round, tuple[str, ...]]]:
    """Rounds of a burst, and why each is dropped, if it is; the best bandwidth is that of all groups."""
    dropped = disturbances([turn.round for turn in history])
    return [
        (turn.round, reasons)
        for turn, reasons in zip(history, dropped, strict=True)
        if (turn.group, turn.burst) == (group, burst)
    ]


def undisturbed(history: Sequence[Turn], group: int, burst: str) -> list[int]:
    """Rounds of a burst that count."""
    return [one.index for one, reasons in judged(history, group, burst) if not reasons]


def as_result(
    matches: Sequence[Match], history: Sequence[Turn], left_out: Mapping[str, str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Every time of every group, and the ratios of the rounds that count."""
    groups = [_group(match, history) for match in matches]
    failed = {one["name"]: one["reason"] for group in groups for one in group["engines"] if one["reason"]}
    alone = _ours_alone(matches[0], groups[0]["rounds"][DECODE])
    return {**facts, "groups": groups, "ours_alone": alone, "failed": failed | left_out}


def _group(match: Match, history: Sequence[Turn]) -> dict[str, Any]:
    rounds = {burst: _rounds(match.group, burst, history) for burst in BURSTS}
    reference = _times_of_ours(match)
    engines = []
    for standing in match.standings:
        ratios = {
            burst: ratio(standing.times.get(burst, {}), reference.get(burst, {}), rounds[burst]["counted"])
            for burst in BURSTS
        }
        shown = {name: None if value is None else asdict(value) for name, value in ratios.items()}
        engines.append({**asdict(standing), "ratios": shown})
    return {"rounds": rounds, "engines": engines}


def _rounds(group: int, burst: str, history: Sequence[Turn]) -> dict[str, Any]:
    """All of a burst, and those that count; where all are disturbed, all count, and it is said."""
    mine = [{**asdict(one), "dropped": list(reasons)} for one, reasons in judged(history, group, burst)]
    good = undisturbed(history, group, burst)
    counted = good or [one["index"] for one in mine if one["index"]]
    return {"all": mine, "counted": counted, "undisturbed": bool(good)}


def _times_of_ours(match: Match) -> dict[str, dict[int, float]]:
    return next((standing.times for standing in match.standings if standing.name == REFERENCE), {})


def _ours_alone(match: Match, rounds: dict[str, Any]) -> dict[str, Any]:
    """Several rows over one row, and the share of the bandwidth that the linear layers alone reach."""
    times, counted = _times_of_ours(match), rounds["counted"]
    one = times.get(DECODE, {})
    found = {f"{name} over 1": ratio(times.get(name, {}), one, counted) for name in BURSTS_OF_OURS if name in times}
    linear = times.get(LINEAR_LAYERS)
    if linear is not None and match.linear_bytes is not None:
        rates = {index: match.linear_bytes / seconds for index, seconds in linear.items()}
        bandwidth = {one["index"]: max(one["bandwidth"].values()) for one in rounds["all"]}
        del found[f"{LINEAR_LAYERS} over 1"]
        found["linear layers over a step"] = ratio(linear, one, counted)
        found["linear layers, share of the bandwidth"] = ratio(rates, bandwidth, counted)
    return {name: None if value is None else asdict(value) for name, value in found.items()}


def as_markdown(result: dict[str, Any]) -> str:
    """Where it ran, the ratios, the times that they come from, and what ran together."""
    groups = result["groups"]
    rows = [(engine, group["rounds"]) for group in groups for engine in group["engines"] if not engine["reason"]]
    head = f"|---|{'--:|' * len(BURSTS)}"
    lines = [
        *_about(result),
        f"| time over ours | {' | '.join(BURSTS)} |",
        head,
        *[_ratios(engine, rounds) for engine, rounds in rows if engine["name"] != REFERENCE],
        "",
        f"| ms (decode: per token) | {' | '.join(BURSTS)} | load, s | and first step | anonymous, MiB |",
        f"{head}--:|--:|--:|",
        *[_times(engine, rounds) for engine, rounds in rows],
        "",
        *[f"- {name}: {_ratio(value)}" for name, value in result["ours_alone"].items()],
        "",
        f"| together: rounds that count of all, GB/s | {' | '.join(BURSTS)} |",
        head,
        *[_together(group) for group in groups],
        "",
        f"{DISTURBED} All rounds were disturbed: no figure to quote.",
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


def _ratios(engine: dict[str, Any], rounds: dict[str, Any]) -> str:
    cells = [_ratio(engine["ratios"].get(name)) + _mark(rounds[name]) for name in BURSTS]
    return f"| {' | '.join([engine['name'], *cells])} |"


def _mark(rounds: dict[str, Any]) -> str:
    return "" if rounds["undisturbed"] else f" {DISTURBED}"


def _times(engine: dict[str, Any], rounds: dict[str, Any]) -> str:
    cells = [engine["name"]]
    for name in BURSTS:
        times = [time for index, time in engine["times"].get(name, {}).items() if index in rounds[name]["counted"]]
        cells.append((f"{statistics.median(times) * 1e3:,.1f}" if times else "–") + _mark(rounds[name]))
    load = engine["load"]
    anonymous = load["anonymous"]
    cells += [
        f"{load['seconds']:.2f}",
        f"{load['with_first_step']:.2f}",
        "–" if anonymous is None else f"{anonymous / 2**20:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _together(group: dict[str, Any]) -> str:
    cells = [", ".join(engine["name"] for engine in group["engines"])]
    for name in BURSTS:
        rounds = group["rounds"][name]
        total = sum(1 for one in rounds["all"] if one["index"])
        speeds = [max(one["bandwidth"].values()) / 1e9 for one in rounds["all"] if one["index"] in rounds["counted"]]
        speed = f"{min(speeds):.1f} to {max(speeds):.1f}" if speeds else "–"
        cells.append(f"{len(rounds['counted'])} of {total}, {speed}{_mark(rounds)}")
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
    parser.add_argument("--bundle", type=Path, help="take the shape and the weights of this bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of each burst that must count (default: %(default)s)")
    parser.add_argument(
        "--most-rounds", type=int, help="of each burst, disturbed ones included (default: 3 x --rounds)"
    )
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
    most = 3 * options.rounds if options.most_rounds is None else options.most_rounds
    if most < options.rounds:
        parser.error(f"--most-rounds {most} is less than --rounds {options.rounds}")
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
    matches: list[Match] = []
    history: list[Turn] = []
    for number, group in enumerate(groups):
        report(f"together: {', '.join(group)}")
        matches.append(Match(group, models, options.threads, options.tokens, history, number))
        matches[-1].run(options.rounds, most)
        result = as_result(matches, history, left_out, facts)
        if options.json is not None:  # after each group, since the next one may take an hour
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
