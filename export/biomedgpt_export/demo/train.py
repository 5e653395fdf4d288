"""A training run: the encoders learn what their inputs look like, then everything learns to answer.

Each stage has its own learning-rate schedule, which ends at zero. A run saves itself every so often and, started again
with the same output folder, continues where it stopped.
"""

from __future__ import annotations

import json
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from .data import MoleculeTable, ProteinSplit, file_hashes, prepared_molecules, proteins
from .tokenizer import corpus, train_tokenizer
from .trainer import STAGES, Trainer, TrainOptions

# Shares of the time budget; in steps, for --steps, the first two follow from the last.
_TIME_SHARE = {"gin": 0.05, "esm": 0.12, "joint": 0.83}
_STEPS_PER_JOINT_STEP = {"gin": 0.45, "esm": 0.75, "joint": 1.0}
_TIMED_STEPS = {"gin": 5, "esm": 12, "joint": 24}
_WARMUP = 0.03


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    plan: dict[str, int] = field(default_factory=dict)
    stage: str = STAGES[0]
    step: int = 0
    seconds: float = 0.0
    replans: list[tuple[int, int]] = field(default_factory=list)


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
    torch.manual_seed(hash((trainer.options.seed, STAGES.index(stage), step)) % 2**31)
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


def plan_steps(options: TrainOptions, make: Callable[[], Trainer]) -> dict[str, int]:
    """Steps per stage: from ``steps``, or from ``minutes`` and a short timing with a model that is thrown away."""
    if options.steps is not None:
        return {stage: max(1, round(options.steps * share)) for stage, share in _STEPS_PER_JOINT_STEP.items()}
    trainer = make()
    plan = {}
    for stage in STAGES:
        trainer.set_mode(stage)
        optimizers = trainer.optimizers(stage)
        train_step(trainer, stage, 0, 1000, optimizers)
        start = time.perf_counter()
        for step in range(1, _TIMED_STEPS[stage] + 1):
            train_step(trainer, stage, step, 1000, optimizers)
        seconds = (time.perf_counter() - start) / _TIMED_STEPS[stage]
        plan[stage] = max(1, int(60 * options.minutes * _TIME_SHARE[stage] / seconds))
    return plan


class Run:
    """A training run that saves itself every so often and continues from there."""

    def __init__(self, trainer: Trainer, progress: Progress, log: Callable[[str], None]) -> None:
        self.trainer = trainer
        self.progress = progress
        self.log = log
        self.state_file = trainer.options.out / "state" / "last.pt"
        self.saved_optimizers: list[dict[str, Any]] | None = None
        self._began = time.perf_counter() - progress.seconds

    def resume(self) -> bool:
        """Takes up the last saved state; False if there is none.

        Raises:
            TrainingDataError: the state is damaged, or was made with another seed, data or number of steps.
        """
        if not self.state_file.exists():
            return False
        try:
            state = torch.load(self.state_file, weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise TrainingDataError(
                f"the saved state {self.state_file} cannot be read: {error}.", remedy="Remove it to start again."
            ) from error
        settings = self._settings()
        if state["settings"] != settings:
            raise TrainingDataError(
                f"the saved state was made with {state['settings']}, not {settings}.",
                remedy="Use the same options, or another output folder.",
            )
        self.trainer.model.load_state_dict(state["model"])
        self.trainer.heads.load_state_dict(state["heads"])
        self.progress = Progress(**state["progress"])
        self.saved_optimizers = state["optimizers"]
        self._began = time.perf_counter() - self.progress.seconds
        return True

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        options = self.trainer.options
        return {
            "seed": options.seed,
            "steps": options.steps,
            "precision": "bf16" if options.bf16 else "fp32",
            "data": file_hashes(options.data),
        }

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Writes weights, optimizers and progress; the old state stays until the new one is whole."""
        self.progress.seconds = time.perf_counter() - self._began
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
        trainer.set_mode(stage)
        optimizers = trainer.optimizers(stage)
        for optimizer, saved in zip(optimizers, self.saved_optimizers or [], strict=False):
            optimizer.load_state_dict(saved)
        self.saved_optimizers = None
        means: dict[str, float] = {}
        mark = (time.perf_counter(), progress.step)
        while progress.step < progress.plan[stage]:
            losses = train_step(trainer, stage, progress.step, progress.plan[stage], optimizers)
            progress.step += 1
            for name, value in losses.items():
                means[name] = 0.98 * means.get(name, value) + 0.02 * value
            if progress.step % options.log_every == 0:
                self._report(stage, means, mark)
            paused = stop_after is not None and stop_after <= 1
            if paused or progress.step % options.save_every == 0:
                self._replan(stage, mark)
                self.save(optimizers)
                mark = (time.perf_counter(), progress.step)
            if stop_after is not None:
                stop_after -= 1
                if paused:
                    return 0
        self.save(optimizers)
        return stop_after

    def _replan(self, stage: str, mark: tuple[float, int]) -> None:
        """With a time budget, the last stage's steps follow the machine's speed, which others may share."""
        options, progress = self.trainer.options, self.progress
        done = progress.step - mark[1]
        if options.steps is not None or stage != STAGES[-1] or done < options.save_every // 2:
            return
        left = 60 * options.minutes - (time.perf_counter() - self._began)
        seconds = (time.perf_counter() - mark[0]) / done
        progress.plan[stage] = progress.step + max(1, int(left / seconds))
        progress.replans.append((progress.step, progress.plan[stage]))

    def _report(self, stage: str, means: dict[str, float], mark: tuple[float, int]) -> None:
        progress = self.progress
        seconds = (time.perf_counter() - mark[0]) / max(1, progress.step - mark[1])
        left = seconds * (progress.plan[stage] - progress.step)
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "total")
        self.log(
            f"{stage} {progress.step}/{progress.plan[stage]}  {losses or format(means['total'], '.3f')}  "
            f"{seconds * 1000:.0f} ms/step  stage ends in {left / 60:.1f} min  {peak_gib():.1f} GiB"
        )


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load_parts(options: TrainOptions) -> tuple[MoleculeTable, ProteinSplit, Tokenizer]:
    """Prepared data and the tokenizer, both kept under ``state`` in the output folder."""
    state = options.out / "state"
    table = prepared_molecules(options.data, state, options.threads)
    split = proteins(options.data)
    path = state / "tokenizer.model"
    if not path.exists():
        train_tokenizer(corpus(table, split, options.data, options.seed), path, options.pieces)
    return table, split, Tokenizer(path)


def train(options: TrainOptions, log: Callable[[str], None], stop_after: int | None = None) -> Run:
    """Trains, or continues a run of the same output folder; writing the checkpoint is the caller's part."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    table, split, tokenizer = load_parts(options)
    held_out = int(table.held_out.sum())
    log(f"{len(table) - held_out} spellings of molecules, {held_out} molecules held out, {len(tokenizer)} pieces")
    log(f"{len(split.located)} proteins with a location, {len(split.structured)} with a structure")
    run = Run(Trainer(options, table, split, tokenizer), Progress(), log)
    if run.resume():
        log(f"continues at {run.progress.stage}, step {run.progress.step}")
    else:
        run.progress.plan = plan_steps(options, lambda: Trainer(options, table, split, tokenizer))
    log(f"planned steps: {json.dumps(run.progress.plan)}")
    if not run.run(stop_after):
        log(f"paused at {run.progress.stage}, step {run.progress.step}")
    return run
