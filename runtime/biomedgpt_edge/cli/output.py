"""What commands share: where text goes, and the words about a bundle."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..engine import Answer


def printable(text: str) -> str:
    """``text`` with control characters shown as escapes: a bundle or an answer must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def tell(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A part of the answer, on stdout: as it is for a program that reads it, printable for a person."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


class _Tells(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        tell(f"warning: {record.getMessage()}" if warning else record.getMessage())


@contextmanager
def telling() -> Iterator[None]:
    """Tells what the package logs meanwhile, from information upwards."""
    logger, handler = logging.getLogger(__package__.partition(".")[0]), _Tells()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def note_length(answer: Answer, limit: int) -> None:
    """Says so if the answer ended because it was long enough, not because it was complete."""
    if answer.finish == "length":
        tell(f"note: the answer was cut at {limit} tokens (--max-new-tokens)")


def policy_lines(bundle: Bundle) -> list[str]:
    """The terms under which the bundle's model may be used."""
    manifest = bundle.manifest
    return [
        f"{manifest.name} ({manifest.family}, {manifest.precision}). {manifest.policy.notice}",
        f"Use policy: {manifest.policy.use_policy}  Licence: {manifest.policy.licence}",
    ]
