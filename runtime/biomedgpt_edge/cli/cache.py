"""``biomedgpt-edge cache``: what is derived on this machine, and how to be rid of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..device_cache import cache_folder, cache_use, clear_cache

_MEANING = {
    "verified": "bundles whose hashes were checked",
    "prefixes": "keys and values of prompt templates",
    "portable": "portable decoders and protein encoders of bundles in records",
    "standard": "what TensorRT builds engines of, while it does",
    "engines": "engines that TensorRT built",
    "soft_tokens": "molecules and proteins, with --keep-soft-tokens",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["info", "clear"], help="show what there is, or remove all of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what each folder of the cache holds, or held before it was cleared."""
    clearing = options.action == "clear"
    use = clear_cache() if clearing else cache_use()
    if options.json:
        print(json.dumps({"folder": str(cache_folder()), "cleared": clearing, "holds": [asdict(one) for one in use]}))
        return 0
    print(f"{cache_folder()}{' (cleared; it held:)' if clearing else ''}")
    for one in use:
        print(f"{one.name:<12}{one.files:>6} files{one.bytes / 1e6:>10.1f} MB  {_MEANING[one.name]}")
    return 0
