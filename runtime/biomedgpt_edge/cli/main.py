"""The command's entry: parses the line, runs one command, turns typed errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

from .. import _native
from ..errors import BioMedGPTError, PlatformError
from .output import tell, telling

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


_COMMANDS = {
    "ask": "answer one question about molecules and proteins",
    "chat": "talk about molecules and proteins, with memory of what was said",
    "inspect": "show what a bundle holds, how it was made and under which terms it may be used",
    "verify": "compare every file of a bundle with the hashes in its manifest",
    "bench": "measure load, encoders, prefill, decode and whole requests against this machine's limits",
    "engines": "build what runs a bundle with TensorRT on this machine's NVIDIA GPU",
    "cache": "show what is derived on this machine, or remove it",
    "doctor": "show what this machine has for running bundles, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Answers go to stdout, everything else to stderr."""
    # A service may have closed them; Python then has None there.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer that the terminal cannot show is better shown in part than not at all.
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser(given[0] if given else "")
    except ModuleNotFoundError as error:
        tell(f"error: the Python package {error.name} is missing. Install it, or run 'biomedgpt-edge doctor'.")
        return PlatformError.exit_code
    return _run(parser.parse_args(given))


def _run(options: argparse.Namespace) -> int:
    try:
        with telling():
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
    except OSError as error:
        tell(f"error: {error.strerror or error}.")
        return BioMedGPTError.exit_code
    return code


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser with the options of the ``chosen`` command; the others need not be importable."""
    parser = argparse.ArgumentParser(
        prog="biomedgpt-edge",
        description="Ask questions about molecules and proteins, offline.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_native.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if name == chosen:
            importlib.import_module(f".{name}", __package__).configure(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
