"""What was measured, and on what: the facts that figures mean nothing without."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import _native
from ..bundle import Bundle
from .counters import PROC, total_memory, usable_processors

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_LIBRARIES = ("biomedgpt-edge", "numpy", "onnxruntime")


def describe(threads: int) -> dict[str, Any]:
    """The machine and the libraries; sizes in bytes, None where the system does not say."""
    return {
        "cpu": _cpu_name(PROC / "cpuinfo") or platform.processor() or platform.machine(),
        "features": [name for name, there in _native.cpu_features().items() if there],
        "usable_processors": len(usable_processors()),
        "threads_used": threads,
        "memory": total_memory(),
        "last_level_cache": last_level_cache(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "load_average": os.getloadavg()[0],
    }


def describe_model(bundle: Bundle, layout: str, kv_cache: str) -> dict[str, Any]:
    """The bundle by its identity, and what its speed depends on; layout and KV cache are those that are used."""
    manifest = bundle.manifest
    decoder = manifest.decoder
    return {
        "name": manifest.name,
        "digest": bundle.digest,
        "precision": manifest.precision,
        "bytes": sum(entry.size for entry in manifest.files),
        "layers": decoder.layers,
        "hidden": decoder.hidden_size,
        "context": decoder.context,
        "decoder": layout,
        "kv_cache": kv_cache,
        "encoders": [
            name
            for name, spec in (("molecule", manifest.molecule_encoder), ("protein", manifest.protein_encoder))
            if spec is not None
        ],
    }


def last_level_cache(caches: Path = _CACHES) -> int | None:
    """Of the first processor. Virtual machines share it with others."""
    texts = [file.read_text().strip() for file in caches.glob("index*/size")]
    return max((int(text[:-1]) * _UNITS[text[-1]] for text in texts if text[-1:] in _UNITS), default=None)


def _cpu_name(cpuinfo: Path) -> str:
    if not cpuinfo.exists():
        return ""
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
