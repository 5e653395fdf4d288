"""``biomedgpt-edge chat``: a conversation at the terminal."""

from __future__ import annotations

import argparse
import sys

from ..engine import Chat, Engine
from ..errors import BioMedGPTError
from ..prompt import Input
from ..sampling import OptionArguments
from .arguments import (
    add_engine,
    add_generation,
    add_inputs,
    generation_options,
    load_engine,
    read_inputs,
    read_molecule,
    read_protein,
)
from .output import note_length, policy_lines, say, tell

_COMMANDS = """\
/molecule SMILES|FILE.sdf     give a molecule with the next question
/protein SEQUENCE|FILE.fasta  give a protein with the next question
/reset                        forget everything
/help                         show this
/quit                         leave (so does end of input)
Ctrl-C stops an answer, or leaves when there is none."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    add_inputs(parser)
    add_generation(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads questions from stdin until it ends; answers stream to stdout."""
    inputs = read_inputs(options)
    with load_engine(options) as engine:
        for line in [*policy_lines(engine.bundle), "", *_COMMANDS.splitlines()]:
            tell(line)
        session = _Session(engine, inputs, generation_options(options), options.truncate)
        while session.turn(_read_line()):
            pass
    return 0


class _Session:
    def __init__(self, engine: Engine, inputs: list[Input], options: OptionArguments, truncate: bool) -> None:
        self._engine = engine
        self._chat: Chat = engine.chat()
        self._pending = inputs
        self._options = options
        self._truncate = truncate

    def turn(self, line: str | None) -> bool:
        """Handles one line; False ends the session. A mistake is reported and costs nothing else."""
        if line is None or line.strip() == "/quit":
            return False
        try:
            self._handle(line.strip())
        except BioMedGPTError as error:
            tell(f"error: {error}")
        return True

    def _handle(self, line: str) -> None:
        command, _, value = line.partition(" ")
        if not line:
            return
        if command == "/help":
            tell(_COMMANDS)
        elif command == "/reset":
            self._chat, self._pending = self._engine.chat(), []
        elif command == "/molecule":
            self._pending.append(read_molecule(value.strip()))
        elif command == "/protein":
            self._pending.append(read_protein(value.strip(), truncate=self._truncate))
        elif command.startswith("/"):
            tell(f"unknown command {command}; known are /molecule, /protein, /reset, /help and /quit")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        try:
            with self._chat.stream(question, *self._pending, **self._options) as stream:
                for note in stream.notes:
                    tell(f"note: {note}")
                for piece in stream:
                    say(piece.text)
        except KeyboardInterrupt:
            print(flush=True)
            tell("stopped; this answer is not remembered")
            return
        print(flush=True)
        note_length(stream.answer, self._options["max_new_tokens"])
        self._pending = []


def _read_line() -> str | None:
    """One line from stdin, with a prompt if a person is there; None at the end."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line if line else None
