"""``biomedgpt-edge engines``: TensorRT engines of a bundle, built on the machine where they will run."""

from __future__ import annotations

import argparse
import json
import time

from ..bundle import Bundle
from ..engine import DEMO_BUNDLE
from ..errors import PlatformError
from ..tensorrt.build import GPU, Target, engines_for, find_target, plan_engines
from .output import tell


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    build = actions.add_parser(
        "build",
        help="build what --device tensorrt runs",
        description="Builds the engines of a bundle into the device cache, where --device tensorrt finds them; what is "
        "there already and fits is kept. Says first what it takes, and refuses what this machine is too small for.",
    )
    build.add_argument("bundle", metavar="BUNDLE", nargs="?", help="bundle folder (default: the packaged demo model)")
    build.add_argument(
        "--device",
        default=GPU,
        metavar="D",
        help="gpu, this machine's (default), or a compute capability such as sm89, for which TensorRT for RTX builds "
        "on a machine without a GPU, too",
    )
    build.add_argument("--context", type=int, metavar="N", help="positions of a KV cache (default: the model's own)")
    build.add_argument("--again", action="store_true", help="build them also where they are there already")
    build.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _target(device: str) -> Target:
    try:
        return find_target(device)
    except PlatformError as error:
        if device != GPU:
            raise
        remedy = f"{error.remedy} For the GPU of another machine, give its compute capability: --device sm89."
        raise PlatformError(error.message, seen=error.seen, limit=error.limit, remedy=remedy) from error


def run(options: argparse.Namespace) -> int:
    """Builds, and prints where the engines lie."""
    started = time.perf_counter()
    bundle = Bundle.open(options.bundle or DEMO_BUNDLE)
    plan = plan_engines(bundle, _target(options.device), options.context)
    lines = list[str]()

    def report(line: str) -> None:
        lines.append(line)
        tell(line)

    engines = engines_for(plan, "once", report, again=options.again)
    sizes = {name: path.stat().st_size for name, path in engines.files.items()}
    if options.json:
        facts = {
            "device": plan.target.device,
            "library": plan.target.library.name,
            "folder": str(engines.folder),
            "bytes": sizes,
            "built": bool(lines),
            "seconds": round(time.perf_counter() - started, 3),
        }
        print(json.dumps(facts))
        return 0
    print(f"{'built' if lines else 'already there'}: {engines.folder}")
    for name, size in sorted(sizes.items()):
        print(f"  {name:<18}{size / 1e6:>10.1f} MB")
    return 0
