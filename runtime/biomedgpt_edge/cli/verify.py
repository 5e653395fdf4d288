"""``biomedgpt-edge verify``: every hash of a bundle."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..engine import DEMO_BUNDLE
from ..errors import BundleCorruptError
from ..manifest import FileEntry
from .output import tell


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", default=str(DEMO_BUNDLE), metavar="B", help="default: the demo model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    results: dict[str, bool] = {}

    def report(entry: FileEntry, good: bool) -> None:
        results[entry.path] = good
        if not options.json:
            print(f"{'ok      ' if good else 'DIFFERS '} {entry.path}", flush=True)

    try:
        bundle.verify(report)
    except BundleCorruptError as error:
        if options.json:
            print(json.dumps({"bundle": bundle.digest, "ok": False, "files": results}))
        tell(f"error: {error}")
        return error.exit_code
    if options.json:
        print(json.dumps({"bundle": bundle.digest, "ok": True, "files": results}))
    else:
        print(f"{len(results)} files match; bundle {bundle.digest}")
    return 0
