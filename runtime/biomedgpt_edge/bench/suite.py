"""Runs the stages in rounds and makes the result: every sample, what counts of it, and how near the limits it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..decoder.graph import Wanted, choose
from ..decoder.kv_cache import KvElement
from ..devices import DeviceName, EncodersWanted
from ..engine import Engine, available_threads
from ..errors import MissingModalityError, OptionError, PromptTooLongError
from .counters import Memory, Processors
from .energy import Meter, find_meter
from .host import describe, describe_model
from .limits import PROBE_BYTES, Limits, probe, probe_bytes
from .stages import GROUPS, UNITS, LoadOptions, NotMeasured, Samples, Stage, load_stages, serve_stages
from .statistics import (
    MAX_FOREIGN_CPU,
    MIN_BANDWIDTH,
    PERCENTILE_METHOD,
    Round,
    Summary,
    disturbances,
    summarize,
)
from .work import bound_in_turn

SCHEMA = "biomedgpt-edge/bench"
SCHEMA_VERSION = 3
DEFAULT_ROUNDS = 5
MAX_ROUNDS = 1000
# Threads that a stage leaves spinning go to sleep meanwhile, so that the next one, or a probe, has the processors.
_PAUSE = 0.05

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        bundle: its folder; None for the packaged demo.
        threads: of the engine and of the probes; None for all that this process may use.
        rounds: how often each stage is timed, after one that only warms up.
        groups: of ``GROUPS``.
        decoder, kv_cache, device, encoders: as for :meth:`Engine.load`. Limits are those of the processor and its
            memory, so that nothing is compared with them on another device.

    Raises:
        OptionError: a value outside its range.
    """

    bundle: Path | None = None
    threads: int | None = None
    rounds: int = DEFAULT_ROUNDS
    groups: tuple[str, ...] = GROUPS
    decoder: Wanted = "auto"
    kv_cache: KvElement | None = None
    device: DeviceName = "cpu"
    encoders: EncodersWanted = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= MAX_ROUNDS:
            limit = f"1 to {MAX_ROUNDS}"
            raise OptionError(f"rounds is {self.rounds}.", seen=self.rounds, limit=limit, remedy=f"Give {limit}.")
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown or not self.groups:
            given = ", ".join(unknown) or "nothing"
            known = ", ".join(GROUPS)
            raise OptionError(f"stages names {given}.", seen=given, limit=known, remedy=f"There are {known}.")


@dataclass
class _Record:
    """What is known of a stage so far."""

    stage: Stage
    reason: str = ""
    samples: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)
    joules: list[tuple[int, float]] = field(default_factory=list)
    peak_rss: int | None = None
    anonymous: int | None = None
    peak_is_of_stage: bool = False

    def add(self, turn: int, samples: Samples) -> None:
        for metric, values in samples.items():
            self.samples.setdefault(metric, []).append((turn, values))

    def take_memory(self, memory: Memory) -> None:
        self.peak_rss = max(filter(None, (self.peak_rss, memory.peak_rss)), default=None)
        self.anonymous = max(filter(None, (self.anonymous, memory.anonymous)), default=None)
        self.peak_is_of_stage = memory.peak_is_of_stage


class Suite:
    """One run of the benchmark."""

    def __init__(self, plan: Plan, report: Report, *, probing: Callable[[int, int], Limits] = probe) -> None:
        self._plan = plan
        self._report = report
        self._probing = probing
        self._threads = available_threads() if plan.threads is None else plan.threads
        self._rounds: list[Round] = []
        self._records: list[_Record] = []
        self._memory = Memory()
        self._probe_bytes = probe_bytes()

    def run(self) -> dict[str, Any]:
        """The result, as ``benchmarks/bench.schema.json`` describes it.

        Raises:
            BioMedGPTError: the bundle cannot be loaded, or a probe fails.
        """
        plan = self._plan
        machine = describe(self._threads)
        with self._engine() as engine:  # a bundle that is broken is refused at once
            layout = choose(engine.bundle, plan.decoder).layout if plan.device == "cpu" else plan.device
            model = describe_model(engine.bundle, layout, engine.decoder.kv.element)
        del engine
        found = find_meter()
        meter = None if isinstance(found, str) else found
        try:
            if "load" in plan.groups:
                self._phase("load", load_stages(plan.bundle, self._threads, self._options()), meter)
            if set(plan.groups) - {"load"}:
                with self._engine() as engine:
                    self._phase("serve", serve_stages(engine, plan.groups), meter)
        finally:
            if meter is not None:
                meter.close()
        energy = {"source": meter.source} if meter is not None else {"source": None, "reason": found}
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "machine": machine,
            "model": model,
            "method": self._method(),
            "energy": energy,
            **self._figures(),
        }

    def _engine(self) -> Engine:
        return Engine.load(self._plan.bundle, threads=self._threads, **self._options())

    def _options(self) -> LoadOptions:
        plan = self._plan
        return LoadOptions(decoder=plan.decoder, kv_cache=plan.kv_cache, device=plan.device, encoders=plan.encoders)

    def _method(self) -> dict[str, Any]:
        return {
            "threads": self._threads,
            "device": self._plan.device,
            "encoders": self._plan.encoders,
            "rounds": self._plan.rounds,
            "warm_up_rounds": 1,
            "stages": list(self._plan.groups),
            "percentiles": PERCENTILE_METHOD,
            "dropped_when": {"foreign_cpu_over": MAX_FOREIGN_CPU, "bandwidth_under_share_of_best": MIN_BANDWIDTH},
            "probe_bytes": self._probe_bytes,
            "probe_bytes_wanted": PROBE_BYTES,
        }

    def _phase(self, phase: str, stages: Sequence[Stage], meter: Meter | None) -> None:
        records = [_Record(stage) for stage in stages]
        self._records += records
        for turn in range(self._plan.rounds + 1):
            before = Processors.now()
            limits = self._probing(self._threads, self._probe_bytes)
            for record in records:
                if not record.reason:
                    self._turn(record, turn, meter)
            after = Processors.now()
            foreign = after.foreign_share(before)
            seconds = after.wall - before.wall
            self._rounds.append(Round(turn, phase, seconds, foreign, limits.bandwidth, limits.arithmetic))
            self._report(_round_line(self._rounds[-1], self._plan.rounds))

    def _turn(self, record: _Record, turn: int, meter: Meter | None) -> None:
        time.sleep(_PAUSE)
        self._memory.restart()
        joules = 0.0 if meter is None else meter.joules()
        try:
            samples = record.stage.run(turn, self._memory.look)
        except (NotMeasured, MissingModalityError, PromptTooLongError) as error:
            record.reason = str(error)
            return
        if meter is not None:
            record.joules.append((turn, meter.joules() - joules))
        self._memory.look()
        record.take_memory(self._memory)
        record.add(turn, samples)

    def _figures(self) -> dict[str, Any]:
        dropped = disturbances(self._rounds)
        counted = _counted(self._rounds, dropped)
        bandwidth = _best(one.bandwidth for one in self._rounds)
        arithmetic = _best(one.arithmetic for one in self._rounds)
        return {
            "rounds": [
                {**asdict(one), "dropped": list(reasons)} for one, reasons in zip(self._rounds, dropped, strict=True)
            ],
            "counted": {
                phase: {"rounds": list(rounds), "undisturbed": good} for phase, (rounds, good) in counted.items()
            },
            "limits": {"bandwidth": bandwidth, "arithmetic": arithmetic},
            "stages": [
                _stage_figures(record, counted, max(bandwidth.values()), arithmetic, self._plan.device)
                for record in self._records
            ],
        }


def _counted(rounds: Sequence[Round], dropped: Sequence[tuple[str, ...]]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """By phase, the rounds whose samples make the figures, and whether they are undisturbed ones.

    Where a machine was never left alone, all rounds count, and the result says so: figures of a busy machine are worth
    more than none, if nobody can take them for others.
    """
    chosen = {}
    for phase in dict.fromkeys(one.phase for one in rounds):
        of_phase = [(one, why) for one, why in zip(rounds, dropped, strict=True) if one.phase == phase and one.index]
        good = tuple(one.index for one, why in of_phase if not why)
        chosen[phase] = (good, True) if good else (tuple(one.index for one, _ in of_phase), False)
    return chosen


def _stage_figures(
    record: _Record,
    counted: dict[str, tuple[tuple[int, ...], bool]],
    bandwidth: float,
    arithmetic: dict[str, float],
    device: DeviceName,
) -> dict[str, Any]:
    stage = record.stage
    turns = counted["load" if stage.group == "load" else "serve"][0]
    figures: dict[str, Any] = {"group": stage.group, "name": stage.name}
    if record.reason:
        return {**figures, "measured": False, "reason": record.reason}
    works = stage.works()
    least = bound_in_turn(works, bandwidth, arithmetic) if device == "cpu" else None
    metrics = []
    for name, samples in record.samples.items():
        summary = summarize([value for turn, values in samples if turn in turns for value in values])
        entry: dict[str, Any] = {"name": name, "unit": UNITS[name], "summary": _summary(summary)}
        if name == stage.bounded and least is not None and summary is not None:
            share = least.seconds / summary.percentiles[50] if summary.percentiles[50] else None
            entry["bound"] = {"limit": least.limit, "seconds": least.seconds, "share_reached": share}
        entry["samples"] = [{"round": turn, "values": values} for turn, values in samples]
        metrics.append(entry)
    return {
        **figures,
        "measured": True,
        "positions": stage.positions,
        "work": [asdict(work) for work in works],
        "memory": {
            "peak_rss": record.peak_rss,
            "peak_is_of": "stage" if record.peak_is_of_stage else "process",
            "anonymous": record.anonymous,
        },
        "joules": [{"round": turn, "value": value} for turn, value in record.joules] or None,
        "metrics": metrics,
    }


def _summary(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    percentiles = {f"p{number}": value for number, value in summary.percentiles.items()}
    return {"count": summary.count, "mean": summary.mean, "min": summary.minimum, **percentiles, "max": summary.maximum}


def _best(rates: Iterable[dict[str, float]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for one in rates:
        for name, rate in one.items():
            best[name] = max(rate, best.get(name, 0.0))
    return best


def _round_line(one: Round, rounds: int) -> str:
    name = f"round {one.index} of {rounds}" if one.index else "warm-up"
    foreign = "unknown" if one.foreign_cpu is None else f"{one.foreign_cpu:.1%}"
    return f"{one.phase}, {name}: {one.seconds:.1f} s, {one.best_bandwidth / 1e9:.1f} GB/s, foreign CPU {foreign}"
