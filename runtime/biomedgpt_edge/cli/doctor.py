"""``biomedgpt-edge doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import TELEMETRY_SWITCH, _native
from ..errors import BundleError, PlatformError
from .output import printable

if TYPE_CHECKING:
    from ..bundle import Bundle


# module -> distributions that bring it, the usual one first
_PACKAGES = {
    "biomedgpt_edge": ("biomedgpt-edge",),
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "rdkit": ("rdkit",),
    "sentencepiece": ("sentencepiece",),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok`` False means that answers cannot be had until it is mended."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="B", help="bundle to check (default: the demo)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    findings = [*_machine(), *_packages(), *_accelerators(), *_bundle_and_cache(options.bundle)]
    if options.json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]}))
    else:
        for finding in findings:
            mark = "NOT OK" if not finding.ok else "note" if finding.remedy else "ok"
            line = f"{mark:<8}{finding.what:<18}{finding.found}"
            print(printable(f"{line}  -> {finding.remedy}" if finding.remedy else line))
    return 0 if all(finding.ok for finding in findings) else PlatformError.exit_code


def _machine() -> list[Finding]:
    features = [name for name, there in _native.cpu_features().items() if there]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    paths = {"splice": _native.splice_paths(), "int4": _native.int4_paths(), "int8": _native.int8_paths()}
    return [
        Finding("machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        Finding("processor", f"{threads} threads; {' '.join(features) or 'no known vector extensions'}"),
        Finding("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        Finding("kernels", "; ".join(f"{name}: {', '.join(names)}" for name, names in paths.items())),
    ]


def _packages() -> list[Finding]:
    findings = []
    for module, names in _PACKAGES.items():
        versions = [f"{name} {version}" for name in names if (version := _version(name))]
        there = importlib.util.find_spec(module) is not None
        found = ", ".join(versions) or ("importable, but not installed as a package" if there else "missing")
        findings.append(Finding(module, found, there, "" if there else f"pip install {names[0]}"))
    return findings


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


_CUDA_REMEDY = "For --device native: install from the sources where nvcc is on the PATH"


def _accelerators() -> list[Finding]:
    """What GPUs need. Answers come without, so that what is missing is a fact and no fault."""
    compiled = "compiled in" if _native.cuda_compiled() else "not compiled in"
    return [
        Finding("telemetry", f"of onnxruntime: off ({TELEMETRY_SWITCH}=1)"),
        Finding("CUDA kernels", compiled, remedy="" if _native.cuda_compiled() else _CUDA_REMEDY),
        *_gpu(),
        *_cuda_provider(),
        *_tensorrt(),
    ]


def _gpu() -> Iterator[Finding]:
    """The GPU and its driver, as both engines see them."""
    try:
        from ..cuda import find_device, runtime

        version = _version("cuda-bindings")
        runtime()
        yield Finding("cuda-bindings", version or "importable, but not installed as a package")
        gpu = find_device()
    except PlatformError as error:
        yield Finding("GPU", error.message, remedy=error.remedy)
        return
    shared = ", shared with the machine" if gpu.integrated else ""
    found = f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory / 2**30:.1f} GiB{shared}"
    yield Finding("GPU", f"{found}, driver for CUDA {gpu.driver}")


def _cuda_provider() -> Iterator[Finding]:
    """What --device cuda needs besides."""
    try:
        from ..ort_cuda import INSTALL, built_with, cuda_libraries, has_provider
    except ImportError:  # onnxruntime is missing, which was said above
        return
    if not has_provider():
        remedy = f"For --device cuda, and for the encoders of --device native: {INSTALL}"
        yield Finding("CUDA provider", "not in this onnxruntime", remedy=remedy)
        return
    version = built_with()
    yield Finding(
        "CUDA provider", f"in this onnxruntime, built with CUDA {version or 'of a version that it does not say'}"
    )
    for library in cuda_libraries():
        remedy = (
            f"For --device cuda and the encoders of --device native, install what brings it: {library.package}"
            if library.error
            else ""
        )
        yield Finding(library.name, "missing" if library.error else "there", remedy=remedy)


def _tensorrt() -> Iterator[Finding]:
    """What --device tensorrt needs besides."""
    from ..tensorrt.library import EXTRA, FLAVOURS, PACKAGES, load_tensorrt

    found = [flavour for flavour in FLAVOURS if importlib.util.find_spec(flavour) is not None]
    if not found:
        packages = " or ".join(PACKAGES.values())
        yield Finding("TensorRT", "not installed", remedy=f"For --device tensorrt, install {packages}: {EXTRA}")
    for flavour in found:
        try:
            library = load_tensorrt(flavour)
        except PlatformError as error:
            yield Finding("TensorRT", error.message, remedy=error.remedy)
            continue
        known = library.capabilities
        runs = f"; for compute capability {', '.join(known)}" if known else "; for the GPU of this machine"
        yield Finding("TensorRT", f"{library.name}{runs}")


def _bundle_and_cache(path: str | None) -> list[Finding]:
    """What needs the packages above; left out with a word if one is missing."""
    try:
        from ..bundle import Bundle
        from ..device_cache import cache_folder
        from ..engine import DEMO_BUNDLE
    except ImportError as error:
        return [Finding("bundle", f"not looked at: {error}", ok=False, remedy="Install what is missing above.")]
    return [_storage(cache_folder), *_bundle(Bundle.open, path or str(DEMO_BUNDLE))]


def _storage(cache_folder: Callable[[], Path]) -> Finding:
    try:
        folder = cache_folder()
        existing = next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))
        free = shutil.disk_usage(existing).free
    except (PlatformError, OSError) as error:
        return Finding("cache", f"not usable: {error}", remedy="Set BIOMEDGPT_EDGE_CACHE to a writable folder.")
    found = f"{folder} ({free / 1e9:.1f} GB free)"
    if os.access(existing, os.W_OK):
        return Finding("cache", found)
    return Finding(
        "cache", f"{found}, not writable", remedy="Set BIOMEDGPT_EDGE_CACHE, or hashes are checked every time."
    )


def _bundle(open_bundle: Callable[[str], Bundle], path: str) -> Iterator[Finding]:
    try:
        bundle = open_bundle(path)
        bundle.verify()
    except BundleError as error:
        yield Finding("bundle", f"{path}: {error.message}", ok=False, remedy=error.remedy)
        return
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files)
    yield Finding("bundle", f"{manifest.name}, {manifest.precision}, {size / 1e6:.1f} MB, every hash matches")
    yield from _decoder(bundle)


def _decoder(bundle: Bundle) -> Iterator[Finding]:
    """Which decoder is used, and what one in records needs for that."""
    from ..decoder.graph import choose
    from ..manifest import RECORDS

    try:
        choice = choose(bundle)
    except PlatformError as error:
        yield Finding("operators", error.message, ok=False, remedy=error.remedy)
        return
    yield Finding("decoder", choice.description)
    encoder = bundle.manifest.protein_encoder
    if encoder is not None and encoder.layout == RECORDS:
        yield Finding("protein encoder", choice.encoder_description(encoder))
    if choice.layout == RECORDS:
        paths = {"int4": _native.int4_paths, "int8": _native.int8_paths, "attention": _native.attention_paths}
        used = ", ".join(f"{name} {found()[0]}" for name, found in paths.items())
        yield Finding("operators", f"{used}; their self-tests passed")
    elif choice.obstacle:
        remedy = "Answers come slower. Install biomedgpt-edge again with a current onnxruntime."
        yield Finding("operators", choice.obstacle, remedy=remedy)
