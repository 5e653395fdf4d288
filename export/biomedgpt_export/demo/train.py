"""A training run: the encoders learn what their inputs look like, then everything learns to answer.

Each stage has its own learning-rate schedule, which ends at zero. A run saves itself every so often and, started again
with the same output folder, continues where it stopped.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from .data import file_hashes
from .molecules import PreparedMolecules, everyday_table, prepared_molecules
from .proteins import ProteinSplit, proteins
from .tokenizer import corpus, train_tokenizer
from .trainer import STAGES, Trainer, TrainOptions

STATE = "last.pt"
_STEPS_PER_JOINT_STEP = {"gin": 0.45, "esm": 1.2, "joint": 1.0, "everyday": 0.12}
# What a step costs on a CPU beside one of the joint stage.
_COST = {"gin": 0.16, "esm": 0.25, "joint": 1.0, "everyday": 0.6}
_WARMUP = 0.03
_TRIM_EVERY = 20


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    plan: dict[str, int] = field(default_factory=dict)
    stage: str = STAGES[0]
    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_gib: float = 0.0

    @property
    def done(self) -> int:
        """Steps of all stages so far."""
        return sum(self.plan[stage] for stage in STAGES[: STAGES.index(self.stage)]) + self.step

    def left(self, seconds: float) -> float:
        """Seconds to the end of the last stage, if a step of this one takes ``seconds``."""
        later = STAGES[STAGES.index(self.stage) + 1 :]
        steps = self.plan[self.stage] - self.step
        return seconds * (steps + sum(self.plan[stage] * _COST[stage] / _COST[self.stage] for stage in later))


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero; the last decay brings most of the accuracy."""
    warm = max(1.0, _WARMUP * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return max(0.0, (steps - step) / (steps - warm)) if steps > warm else 1.0


def train_step(
    trainer: Trainer, stage: str, step: int, steps: int, optimizers: list[torch.optim.Optimizer]
) -> dict[str, float]:
    """One update; returns the losses."""
    losses = trainer.loss(stage)(step)
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for optimizer in optimizers:
        optimizer.zero_grad()
    losses["total"].backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate_factor(step, steps)
        optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def plan_steps(options: TrainOptions) -> dict[str, int]:
    """Steps per stage."""
    return {stage: max(1, round(options.steps * share)) for stage, share in _STEPS_PER_JOINT_STEP.items()}


class Run:
    """A training run that saves itself every so often and continues from there."""

    def __init__(
        self, trainer: Trainer, progress: Progress, sources: dict[str, str], log: Callable[[str], None]
    ) -> None:
        self.trainer = trainer
        self.progress = progress
        self.sources = sources
        self.log = log
        self.state_file = trainer.options.out / "state" / STATE
        self.saved_optimizers: list[dict[str, Any]] | None = None
        self.steps_before = 0
        self._count_from(progress)

    def _count_from(self, progress: Progress) -> None:
        self._began = time.perf_counter() - progress.seconds
        # Of all threads: unlike the time that passes, it says little about what else the machine was doing.
        self._processor_began = time.process_time() - progress.processor_seconds

    def resume(self) -> bool:
        """Takes up the last saved state; False if there is none.

        Raises:
            TrainingDataError: the state is damaged, or was made with another seed, data or number of steps.
        """
        if not self.state_file.exists():
            return False
        try:
            state = torch.load(self.state_file, weights_only=True, map_location=self.trainer.device)
            made_with = state["settings"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise TrainingDataError(
                f"the saved state {self.state_file} cannot be read: {error}.", remedy="Remove it to start again."
            ) from error
        settings = self._settings()
        if made_with != settings:
            changed = [name for name in settings if made_with.get(name) != settings[name]]
            raise TrainingDataError(
                f"the saved state was made with another {' and '.join(changed)}.",
                seen={name: made_with.get(name) for name in changed},
                limit={name: settings[name] for name in changed},
                remedy="Use the same options, or another output folder.",
            )
        self.trainer.model.load_state_dict(state["model"])
        self.trainer.heads.load_state_dict(state["heads"])
        self.progress = Progress(**state["progress"])
        self.saved_optimizers = state["optimizers"]
        self.steps_before = self.progress.done
        self._count_from(self.progress)
        return True

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        options = self.trainer.options
        return {
            "seed": options.seed,
            "steps": options.steps,
            "precision": "bf16" if options.bf16 else "fp32",
            "device": options.device,
            "sizes": asdict(self.trainer.config),
            **self.sources,
        }

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Writes weights, optimizers and progress; the old state stays until the new one is whole."""
        self.progress.seconds = time.perf_counter() - self._began
        self.progress.processor_seconds = time.process_time() - self._processor_began
        self.progress.peak_gib = max(self.progress.peak_gib, _peak_gib())
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        staging = self.state_file.with_suffix(".tmp")
        state = {
            "model": self.trainer.model.state_dict(),
            "heads": self.trainer.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": asdict(self.progress),
            "settings": self._settings(),
        }
        torch.save(state, staging)
        staging.replace(self.state_file)

    def run(self, stop_after: int | None = None) -> bool:
        """All stages from where the run stands; ``stop_after`` many updates it pauses, saved, and returns False."""
        for stage in STAGES[STAGES.index(self.progress.stage) :]:
            if stage != self.progress.stage:
                self.progress.stage, self.progress.step = stage, 0
            left = self._run_stage(stage, stop_after)
            if left == 0 and stop_after is not None:
                return False
            stop_after = left
            if stage == "gin":
                self.trainer.measure_batch_statistics()
        return True

    def _run_stage(self, stage: str, stop_after: int | None) -> int | None:
        trainer, progress, options = self.trainer, self.progress, self.trainer.options
        optimizers = trainer.optimizers(stage)
        for optimizer, saved in zip(optimizers, self.saved_optimizers or [], strict=False):
            optimizer.load_state_dict(saved)
        self.saved_optimizers = None
        means: dict[str, float] = {}
        start = (time.perf_counter(), progress.step)
        while progress.step < progress.plan[stage]:
            trainer.set_mode(stage, progress.step, progress.plan[stage])
            losses = train_step(trainer, stage, progress.step, progress.plan[stage], optimizers)
            progress.step += 1
            if progress.step % _TRIM_EVERY == 0:
                _return_memory()
            for name, value in losses.items():
                means[name] = 0.98 * means.get(name, value) + 0.02 * value
            if progress.step % options.log_every == 0:
                self._report(stage, means, start)
            paused = stop_after is not None and stop_after <= 1
            if paused or progress.step % options.save_every == 0:
                self.save(optimizers)
            if stop_after is not None:
                stop_after -= 1
                if paused:
                    return 0
        self.save(optimizers)
        return stop_after

    def _report(self, stage: str, means: dict[str, float], start: tuple[float, int]) -> None:
        """``start``: when, and at which step, this process took up the stage."""
        progress = self.progress
        seconds = (time.perf_counter() - start[0]) / max(1, progress.step - start[1])
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "total")
        self.log(
            f"{stage} {progress.step}/{progress.plan[stage]}  {losses or format(means['total'], '.3f')}  "
            f"{seconds * 1000:.0f} ms/step  ends in about {progress.left(seconds) / 60:.0f} min  {_peak_gib():.1f} GiB"
        )


def _return_memory() -> None:
    """Gives freed memory back to the system: batches of ever other shapes leave holes in the heap that add up to
    gigabytes, and glibc keeps them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class Parts:
    """What a run is made from; ``sources`` identifies it."""

    molecules: PreparedMolecules
    split: ProteinSplit
    tokenizer: Tokenizer
    sources: dict[str, str]


def tokenizer_file(out: Path) -> Path:
    """Where a run keeps its tokenizer."""
    return out / "state" / "tokenizer.model"


def load_parts(options: TrainOptions, log: Callable[[str], None]) -> Parts:
    """Prepared data and the tokenizer, kept under ``state`` in the output folder.

    The tokenizer is made anew unless there is a run to be continued, which goes with the one it began with.
    """
    state = options.out / "state"
    molecules = prepared_molecules(options.data, state, options.threads, log)
    split = proteins(options.data)
    path = tokenizer_file(options.out)
    if not (path.exists() and (state / STATE).exists()):
        train_tokenizer(corpus(molecules.table, split, options.seed), path, options.pieces)
    tokenizer_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    sources = {**file_hashes(options.data), "molecules": molecules.fingerprint, "tokenizer": tokenizer_hash}
    return Parts(molecules, split, Tokenizer(path), sources)


def train(options: TrainOptions, log: Callable[[str], None], stop_after: int | None = None) -> Run:
    """Trains, or continues a run of the same output folder; writing the checkpoint is the caller's part.

    Raises:
        TrainingDataError: training files are missing or malformed, the output folder cannot be made, or it holds a run
            with other settings.
    """
    torch.set_num_threads(options.threads)
    try:
        (options.out / "state").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingDataError(
            f"the output folder cannot be made: {error}.", seen=str(options.out), remedy="Name another one with --out."
        ) from error
    parts = load_parts(options, log)
    molecules, split = parts.molecules, parts.split
    log(
        f"{len(molecules.training)} molecules in {len(molecules.table)} spellings; held out: "
        f"{len(molecules.same_source)} of the same sources, {len(molecules.chebi)} of ChEBI"
    )
    log(
        f"{len(split.located)} proteins with a location, {len(split.structured)} with a structure; held out: "
        f"{len(split.held_out_located)} and {len(split.held_out_structured)}"
    )
    for reason, count in (molecules.left_out | split.left_out).items():
        log(f"left out, {reason}: {count}")
    trainer = Trainer(options, molecules.table, everyday_table(), split, parts.tokenizer)
    run = Run(trainer, Progress(plan=plan_steps(options)), parts.sources, log)
    if run.resume():
        log(f"continues at {run.progress.stage}, step {run.progress.step}")
    log(f"planned steps: {json.dumps(run.progress.plan)}")
    if not run.run(stop_after):
        log(f"paused at {run.progress.stage}, step {run.progress.step}")
    return run
