"""``biomedgpt-edge bench``: how fast a bundle is here, and how near to what the machine allows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..bench.plot import as_svg
from ..bench.report import Result, as_csv, as_markdown, as_table
from ..bench.stages import GROUPS
from ..bench.suite import DEFAULT_ROUNDS, Plan, Suite
from ..errors import OptionError
from .arguments import add_bundle, add_kv_cache
from .output import printable, tell

_FORMATS: dict[str, Callable[[Result], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "json": lambda result: json.dumps(result, indent=1, ensure_ascii=False) + "\n",
    "csv": as_csv,
}


def configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_kv_cache(parser)
    parser.add_argument(
        "--rounds",
        type=int,
        default=DEFAULT_ROUNDS,
        metavar="R",
        help="times each stage is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--stages", default=",".join(GROUPS), metavar="NAMES", help="some of %(default)s, separated by commas"
    )
    parser.add_argument("--format", choices=_FORMATS, default="table", help="of what is printed, or written to --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, and print the table besides")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw percentiles and the stages of a request")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, then writes; files that cannot be written are refused before anything is measured."""
    options.json = options.format == "json"  # errors too are JSON then
    if options.plot is not None and options.plot.suffix != ".svg":
        raise OptionError(f"--plot is {str(options.plot)!r}.", seen=str(options.plot), remedy="Give a name in .svg.")
    for path in filter(None, (options.out, options.plot)):
        _check_writable(path)
    bundle = None if options.bundle is None else Path(options.bundle)
    groups = tuple(dict.fromkeys(options.stages.split(",")))
    plan = Plan(
        bundle,
        options.threads,
        options.rounds,
        groups,
        options.decoder,
        options.kv_cache,
        options.device,
        options.encoders,
    )
    result = Suite(plan, tell).run()
    text = _FORMATS[options.format](result)
    if options.out is None:
        print(text if options.json else printable(text), end="")
    else:
        options.out.write_text(text, encoding="utf-8")
        print(printable(as_table(result)), end="")
    if options.plot is not None:
        options.plot.write_text(as_svg(result), encoding="utf-8")
    return 0


def _check_writable(path: Path) -> None:
    """A run takes minutes; where its result goes is looked at first."""
    try:
        path.touch()
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written: {error.strerror}.", seen=str(path), remedy="Give a file in a folder of yours."
        ) from error
