"""The commands of ``python -m biomedgpt_export.demo``; imported once the extra's packages are known to be there."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from biomedgpt_edge import Engine
from biomedgpt_edge.errors import BioMedGPTError, PlatformError

from ..families.biomedgpt_10b import WEIGHTS
from . import answers
from .data import SOURCES, file_hashes
from .molecules import prepared_molecules, well_known
from .proteins import proteins
from .questions import WORDINGS
from .release import RECORD, read_record, write_record, write_release
from .scoring.panel import EngineAnswerer, HeldOut, Training
from .scoring.scores import score, with_recorded_fp32
from .scoring.table import table
from .train import Run, tokenizer_file, train
from .trainer import TrainOptions


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(arguments: Sequence[str] | None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BioMedGPTError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; a training run continues where it last saved itself, when it is started again")
        return 130
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and {2**31 - 1}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomedgpt_export.demo", description="Train the demo model, and score its bundle."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train the demo model, or continue where the last run stopped")
    training.add_argument("--data", type=Path, required=True, help="folder with the training files")
    training.add_argument(
        "--out", type=Path, default=Path("demo-checkpoint"),
        help="checkpoint folder; the run's state lies in state/ (default: demo-checkpoint)",
    )  # fmt: skip
    training.add_argument(
        "--steps",
        type=_positive,
        default=TrainOptions.steps,
        help="joint steps; all else follows (default: %(default)s)",
    )
    training.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    training.add_argument("--seed", type=_seed, default=0)
    training.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of matrix products")
    training.set_defaults(run=_train)
    scoring = commands.add_parser("scores", help="score a bundle of the demo on what is held out; prints the table")
    scoring.add_argument("--data", type=Path, required=True, help="folder with the training files")
    scoring.add_argument("--bundle", type=Path, help="bundle to score (default: the packaged one)")
    scoring.add_argument("--fp32", type=Path, metavar="BUNDLE", help="fp32 bundle of the same checkpoint, beside it")
    scoring.add_argument(
        "--cache", type=Path, default=Path("demo-checkpoint/state"),
        help="folder for prepared data; a training run's state/ has it (default: %(default)s)",
    )  # fmt: skip
    scoring.add_argument("--record", type=Path, help="demo.json to write the scores into")
    scoring.add_argument("--threads", type=_positive, default=1)
    scoring.set_defaults(run=_scores)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            "PyTorch sees no CUDA device.", remedy="Leave out --device cuda, or install its CUDA build."
        )
    options = TrainOptions(
        data=arguments.data,
        out=arguments.out,
        steps=arguments.steps,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        bf16=arguments.precision == "bf16",
    )
    run = train(options, _say)
    if run.progress.done == run.steps_before and (options.out / WEIGHTS).exists():
        _say(f"{options.out} is complete; nothing was left to train")
        return
    write_release(run.trainer.model, tokenizer_file(options.out), options.out, training_record(run, options))
    _say(f"wrote {options.out}; export it with --about {options.out / RECORD}, then score the bundle")


def training_record(run: Run, options: TrainOptions) -> dict[str, Any]:
    """What the model was trained on and how."""
    hashes = file_hashes(options.data)
    return {
        "policy": {
            "licence": "Apache-2.0; trained on data under MIT, BSD-3-Clause, AFL-3.0, CC BY 4.0 and CC BY-SA 3.0",
            "use_policy": "none beyond the licence",
            "notice": f"{answers.HONEST} Answers can be wrong and are no medical advice.",
        },
        "data": {name: {"sha256": hashes[name], **SOURCES[name]} for name in hashes},
        "training": {
            "seed": options.seed,
            "minutes": round(run.progress.seconds / 60, 1),
            "processor_minutes": round(run.progress.processor_seconds / 60, 1),
            "steps": run.progress.plan,
            "threads": options.threads,
            "device": options.device,
            "precision": "bf16" if options.bf16 else "fp32",
            "peak_memory_gib": round(run.progress.peak_gib, 2),
            "torch": torch.__version__,
        },
        "questions": [wordings[0] for wordings in WORDINGS.values()],
        "other_questions": answers.HONEST,
    }


def _scores(arguments: argparse.Namespace) -> None:
    # Read before the scoring, which takes a while, so that a wrong path does not cost it.
    record = None if arguments.record is None else read_record(arguments.record)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine.load(arguments.bundle, threads=arguments.threads))
        reference = None
        if arguments.fp32 is not None:
            reference = EngineAnswerer(stack.enter_context(Engine.load(arguments.fp32, threads=arguments.threads)))
        held_out, training = held_out_and_training(arguments.data, arguments.cache, arguments.threads, _say)
        found = score(EngineAnswerer(engine), reference, held_out, training, _say)
        if reference is None:
            found = with_recorded_fp32(found, engine.bundle.manifest.about)
    if record is not None:
        write_record(arguments.record, record | {"scores": found.to_json()})
    print(table(found), end="")


def held_out_and_training(
    data: Path, cache: Path, workers: int, report: Callable[[str], None]
) -> tuple[HeldOut, Training]:
    """What the scores ask about, and what the simple methods learn from."""
    molecules, split = prepared_molecules(data, cache, workers, report), proteins(data)
    held_out = HeldOut(
        same_source=molecules.same_source,
        chebi=molecules.chebi,
        well_known_shown={one.name: one.smiles for one in well_known() if one.shown},
        well_known_held_out={one.name: one.smiles for one in well_known() if not one.shown},
        located=split.held_out_located,
        structured=split.held_out_structured,
    )
    return held_out, Training(molecules.training, split.located, split.structured)
