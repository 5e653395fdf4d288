"""``biomedgpt-edge ask``: one question, one answer."""

from __future__ import annotations

import argparse
import json
import sys

from ..engine import Answer
from ..generate import Timings
from .arguments import add_engine, add_generation, add_inputs, generation_options, load_engine, read_inputs
from .output import note_length, policy_lines, say, tell


def configure(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    add_inputs(parser)
    add_generation(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    parser.add_argument("--timings", action="store_true", help="print the time of each stage on stderr")
    parser.add_argument("--quiet", action="store_true", help="no line about the model on stderr")
    parser.add_argument("question", metavar="QUESTION")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the answer as it comes, or as JSON once it is complete."""
    inputs = read_inputs(options)
    with load_engine(options) as engine:
        if not options.quiet and not options.json:
            tell(policy_lines(engine.bundle)[0])
        with engine.stream(options.question, *inputs, **generation_options(options)) as stream:
            for note in stream.notes:
                tell(f"note: {note}")
            for piece in stream:
                if not options.json:
                    say(piece.text)
        answer = stream.answer
    if options.json:
        print(json.dumps(as_json(answer, engine.bundle.manifest.name), ensure_ascii=False))
    else:
        print()
    sys.stdout.flush()
    note_length(answer, options.max_new_tokens)
    if options.timings:
        tell(timing_line(answer.timings))
    return 0


def as_json(answer: Answer, model: str) -> dict[str, object]:
    """The answer with its timings in seconds."""
    timings = answer.timings
    return {
        "model": model,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish": answer.finish,
        "notes": list(answer.notes),
        "timings": {**vars(timings), "tpot": timings.tpot},
    }


def timing_line(timings: Timings) -> str:
    """Stages in milliseconds, on one line."""
    stages = ("featurize", "encode", "splice", "prefill", "decode")
    parts = [f"{name} {getattr(timings, name) * 1e3:.1f}" for name in stages]
    tpot = "-" if timings.tpot is None else f"{timings.tpot * 1e3:.2f}"
    return (
        f"{', '.join(parts)} ms; TTFT {timings.ttft * 1e3:.1f} ms, TPOT {tpot} ms; "
        f"{timings.prompt_tokens} prompt positions, {timings.new_tokens} new tokens"
    )
