"""``biomedgpt-edge doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass

from .. import _native
from ..bundle import Bundle
from ..device_cache import cache_folder
from ..engine import DEMO_BUNDLE
from ..errors import BundleError, PlatformError
from .output import printable

HELP = "show what this machine has for running bundles, and what is missing"

_PACKAGES = ("biomedgpt-edge", "numpy", "onnxruntime", "rdkit", "sentencepiece")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok`` False means that answers cannot be had until it is mended."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", default=str(DEMO_BUNDLE), metavar="B", help="bundle to check (default: the demo)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    findings = [*_machine(), *_packages(), *_accelerators(), *_storage(), _bundle(options.bundle)]
    if options.json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]}))
    else:
        for finding in findings:
            line = f"{'ok' if finding.ok else 'MISSING':<8}{finding.what:<16}{finding.found}"
            print(printable(f"{line}  -> {finding.remedy}" if finding.remedy else line))
    return 0 if all(finding.ok for finding in findings) else PlatformError.exit_code


def _machine() -> list[Finding]:
    features = [name for name, there in _native.cpu_features().items() if there]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        Finding("processor", f"{threads} threads; {' '.join(features) or 'no known vector extensions'}"),
        Finding("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        Finding("kernels", f"splice: {', '.join(_native.splice_paths())}"),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(
                Finding(name, "not installed as a package", remedy="" if name == "biomedgpt-edge" else name)
            )
    return findings


def _accelerators() -> list[Finding]:
    """CUDA is used by no decoder yet, so its absence is a fact and no fault."""
    compiled = "compiled in" if _native.cuda_compiled() else "not compiled in"
    return [Finding("cuda", f"{compiled}; {_native.cuda_device_count()} devices; answers are computed on the CPU")]


def _storage() -> list[Finding]:
    try:
        folder = cache_folder()
    except PlatformError as error:
        return [Finding("cache", error.message, remedy=error.remedy)]
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    writable = os.access(existing, os.W_OK)
    free = shutil.disk_usage(existing).free
    remedy = (
        ""
        if writable
        else "Set BIOMEDGPT_EDGE_CACHE to a writable folder; until then hashes are checked at every load."
    )
    return [
        Finding("cache", f"{folder} ({free / 1e9:.1f} GB free{'' if writable else ', not writable'})", True, remedy)
    ]


def _bundle(path: str) -> Finding:
    try:
        bundle = Bundle.open(path)
        bundle.verify()
    except BundleError as error:
        return Finding("bundle", f"{path}: {error.message}", ok=False, remedy=error.remedy)
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files)
    return Finding("bundle", f"{manifest.name}, {manifest.precision}, {size / 1e6:.1f} MB, every hash matches")
