"""The command's entry: parses the line, runs one command, turns typed errors into exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .. import _native
from ..errors import BioMedGPTError
from . import ask, chat, doctor, inspect, verify
from .output import tell

EXIT_CODES = """\
exit codes:
  0    done
  1    unexpected failure
  2    wrong usage of the command line
  3    an input cannot be used (question, molecule, protein, option, prompt too long)
  4    the bundle cannot be used (missing, corrupt, unsafe, wrong version)
  5    this machine lacks something that is needed
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Answers go to stdout, everything else to stderr."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BioMedGPTError as error:
        if getattr(options, "json", False):
            print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
        tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="biomedgpt-edge",
        description="Ask questions about molecules and proteins, offline.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_native.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (ask, chat, inspect, verify, doctor):
        name = command.__name__.rpartition(".")[2]
        command.configure(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


if __name__ == "__main__":
    sys.exit(main())
