"""Engines in the device cache: a folder for each bundle, device and library, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import _native
from ..bundle import Bundle, sha256_of
from ..device_cache import ENGINES, Verify, cache_folder, holds, locked, stamp
from ..errors import PlatformError
from ..manifest import FileEntry
from .library import TensorRt

# Of profiles and file names; engines of another one are built again.
FORMAT = 1
LISTING = "engines.json"
# What TensorRT for RTX compiled for this very GPU; it is written when an engine has run.
RUNTIME_CACHE = "runtime.cache"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Key:
    """What engines depend on.

    Attributes:
        bundle: its digest.
        device: compute capability, such as "8.9"; with ``tensorrt``, the name of the GPU behind it.
        library: its flavour and version.
        context: positions of a KV cache.
    """

    bundle: str
    device: str
    library: str
    context: int
    format: int = FORMAT
    runtime: str = _native.__version__

    @classmethod
    def of(cls, bundle: Bundle, library: TensorRt, device: str, context: int) -> Key:
        """The key of engines that would be built now."""
        return cls(bundle.digest, device, f"{library.flavour} {library.version}", context)

    @property
    def folder(self) -> Path:
        """Where they lie once they were built.

        Raises:
            PlatformError: see :func:`cache_folder`.
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / ENGINES / f"{_beginning(self)}-{digest[:16]}"


@dataclass(frozen=True)
class Engines:
    """Those of one key: by part, the file."""

    folder: Path
    files: dict[str, Path]


def stored_engines(key: Key, verify: Verify) -> Engines | None:
    """What is there for ``key``, intact; None where it has to be built.

    Args:
        verify: as in :meth:`Engine.load`: whether their hashes are looked at again.
    """
    folder = key.folder
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        if listing["key"] != asdict(key):
            return None
        entries = [FileEntry(str(e["path"]), int(e["size"]), str(e["sha256"])) for e in listing["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(Path(entry.path).name != entry.path for entry in entries) or not holds(folder, entries, verify):
        return None
    return Engines(folder, {entry.path.removesuffix(".engine"): folder / entry.path for entry in entries})


def stored_context(key: Key) -> int | None:
    """The positions for which engines were built last that fit ``key`` in all else; None where there are none."""
    wanted = {**asdict(key), "context": None}
    found = sorted(key.folder.parent.glob(f"{_beginning(key)}-*/{LISTING}"), key=_modified, reverse=True)
    for path in found:
        try:
            given = json.loads(path.read_text(encoding="utf-8"))["key"]
            if {**given, "context": None} == wanted and isinstance(given["context"], int):
                return given["context"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _beginning(key: Key) -> str:
    """Of the names of folders for one bundle and device."""
    return f"{key.bundle[:16]}-{re.sub(r'[^A-Za-z0-9.]+', '_', key.device)[:40]}"


@contextlib.contextmanager
def new_engines(key: Key) -> Iterator[Path]:
    """A folder for engines, which takes its place when the block ends; nothing is left when it fails.

    Raises:
        PlatformError: the cache cannot be written.
    """
    folder = key.folder
    partial = folder.with_name(f"{folder.name}{_PARTIAL}")
    try:
        _remove(partial)
        partial.mkdir(parents=True, mode=0o700)
        try:
            yield partial
            _finish(key, partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise PlatformError(
            f"engines cannot be kept in {folder.parent}: {error.strerror or error}.",
            seen=str(folder.parent),
            remedy="Set BIOMEDGPT_EDGE_CACHE to a writable folder with more room.",
        ) from error
    _forget_others(folder)


def _remove(path: Path) -> None:
    """Whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def building(key: Key) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from building engines of this bundle meanwhile: they are made of the same derived data."""
    return locked(key.folder.with_name(key.bundle[:16]))


def _finish(key: Key, partial: Path, folder: Path) -> None:
    paths = sorted(partial.glob("*.engine"))
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    entries = [FileEntry(path.name, path.stat().st_size, sha256_of(path)) for path in paths]
    listing = {"key": asdict(key), "files": [asdict(entry) for entry in entries]}
    (partial / LISTING).write_text(json.dumps(listing, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stamp(partial, entries)
    # Those that are there serve until then, also where building new ones fails.
    _remove(folder)
    os.rename(partial, folder)


def _forget_others(folder: Path) -> None:
    """Removes stale engines of this bundle and device, and those of other bundles but the last: updates may go back.

    What was built for other devices stays.
    """
    bundle, device, _ = folder.name.split("-")
    others = [path for path in folder.parent.glob(f"*-{device}-*") if path.is_dir() and path.suffix != _PARTIAL]
    stale = [path for path in others if path.name.startswith(f"{bundle}-") and path != folder]
    elsewhere = sorted((path for path in others if not path.name.startswith(f"{bundle}-")), key=_modified, reverse=True)
    for path in (*stale, *elsewhere[1:]):
        shutil.rmtree(path, ignore_errors=True)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
