"""``python -m biomedgpt_export.demo train`` and ``... evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from biomedgpt_edge import Engine
from biomedgpt_edge.errors import BioMedGPTError

from . import answers
from .data import SOURCES, file_hashes
from .evaluate import evaluate
from .release import RECORD, read_record, write_record, write_release
from .train import Run, peak_gib, train
from .trainer import TrainOptions


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BioMedGPTError as error:
        _say(f"error: {error}")
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m biomedgpt_export.demo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train the demo model, or continue where the last run stopped")
    training.add_argument("--data", type=Path, required=True, help="folder with the training files")
    training.add_argument("--out", type=Path, required=True, help="checkpoint folder; the run's state lies in state/")
    training.add_argument("--minutes", type=float, default=45.0, help="time for training (default: 45)")
    training.add_argument("--steps", type=int, help="joint steps instead of a time: reproducible with a seed")
    training.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of matrix products")
    training.set_defaults(run=_train)
    scoring = commands.add_parser("evaluate", help="score a bundle of the demo on held-out data")
    scoring.add_argument("--data", type=Path, required=True, help="folder with the training files")
    scoring.add_argument("--bundle", type=Path, help="bundle to score (default: the packaged one)")
    scoring.add_argument("--cache", type=Path, required=True, help="folder for prepared data (a run's state/ has it)")
    scoring.add_argument("--record", type=Path, help="demo.json to write the scores into, under the bundle's precision")
    scoring.add_argument("--held-out", type=int, default=300, help="held-out molecules scored (default: 300)")
    scoring.add_argument("--threads", type=int, default=1)
    scoring.set_defaults(run=_evaluate)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    options = TrainOptions(
        data=arguments.data,
        out=arguments.out,
        minutes=arguments.minutes,
        steps=arguments.steps,
        threads=arguments.threads,
        seed=arguments.seed,
        bf16=arguments.precision == "bf16",
    )
    run = train(options, _say)
    record = training_record(run, options)
    write_release(run.trainer.model, options.out / "state" / "tokenizer.model", options.out, record)
    _say(f"wrote {options.out}; export it with --about {options.out / RECORD}, then score the bundle")
    return 0


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
            "steps": run.progress.plan,
            "steps_replanned": run.progress.replans,
            "threads": options.threads,
            "precision": "bf16" if options.bf16 else "fp32",
            "peak_memory_gib": round(peak_gib(), 2),
            "torch": torch.__version__,
        },
        "questions": [
            answers.DESCRIBE,
            answers.RING_QUESTIONS[0],
            answers.GROUP_QUESTIONS[0],
            answers.BOND_QUESTIONS[0],
            answers.FORMULA_QUESTIONS[0],
            answers.LOCATION,
            answers.STRUCTURE,
        ],
        "other_questions": answers.HONEST,
    }


def _evaluate(arguments: argparse.Namespace) -> int:
    with Engine.load(arguments.bundle, threads=arguments.threads) as engine:
        scores = evaluate(engine, arguments.data, arguments.cache, arguments.held_out, workers=arguments.threads)
    if arguments.record is not None:
        record = read_record(arguments.record)
        record.setdefault("scores", {})[scores["precision"]] = scores
        write_record(arguments.record, record)
    print(json.dumps(scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
