"""What is derived on this box and can always be derived again.

* The stamp that says a bundle's hashes were checked once. It holds each file's inode, size and times, so a file that
  was replaced or rewritten is hashed again.
* The keys and values of the template's beginnings.
* The portable decoder and protein encoder of a bundle in records, where they are used (see :mod:`portable`).
* The engines that TensorRT built for this machine's GPU, and while it does, what it builds them of.
* The soft tokens of molecules and proteins, where that is asked for. Nothing else of a question is ever written here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from .bundle import Bundle, sha256_of
from .errors import PlatformError
from .manifest import FileEntry

# The folders inside the cache.
VERIFIED, PREFIXES, SOFT_TOKENS = "verified", "prefixes", "soft_tokens"
PORTABLE, STANDARD, ENGINES = "portable", "standard", "engines"
FOLDERS = (VERIFIED, PREFIXES, SOFT_TOKENS, PORTABLE, STANDARD, ENGINES)
_DIGEST_SIZE = hashlib.sha256().digest_size
# Of a folder of derived files: their states when their hashes were right.
_STAMP = "stamp.json"
_LOCK = ".lock"

# "once" hashes files the first time and again when one was replaced, "full" always, "sizes" never.
Verify = Literal["once", "full", "sizes"]


def cache_folder() -> Path:
    """``$BIOMEDGPT_EDGE_CACHE``, else ``biomedgpt-edge`` in the user's cache folder.

    Raises:
        PlatformError: this user has no home folder, as in a container with an arbitrary user id.
    """
    explicit = os.environ.get("BIOMEDGPT_EDGE_CACHE")
    if explicit:
        return Path(explicit)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biomedgpt-edge"
    except RuntimeError as error:
        raise PlatformError("this user has no home folder.", remedy="Set BIOMEDGPT_EDGE_CACHE.") from error


@dataclass(frozen=True)
class FolderUse:
    """What one folder of the cache holds."""

    name: str
    files: int
    bytes: int


def cache_use() -> list[FolderUse]:
    """What each folder of the cache holds; one that is not there holds nothing.

    Raises:
        PlatformError: see :func:`cache_folder`.
    """
    found = [(name, [path.stat().st_size for path in _files(name)]) for name in FOLDERS]
    return [FolderUse(name, len(sizes), sum(sizes)) for name, sizes in found]


def clear_cache() -> list[FolderUse]:
    """Removes everything that this program keeps in the cache, and nothing else; returns what that was.

    Raises:
        PlatformError: see :func:`cache_folder`.
        OSError: a file cannot be removed.
    """
    use = cache_use()
    for folder in use:
        for path in _files(folder.name):
            path.unlink(missing_ok=True)
    for left in (path for name in (PORTABLE, STANDARD, ENGINES) for path in (cache_folder() / name).glob("*/")):
        # One that something else was put into stays.
        with contextlib.suppress(OSError):
            left.rmdir()
    return use


def _files(name: str) -> list[Path]:
    # Locks, which are empty, stay: one that is held and removed would keep nobody from a new one.
    return [path for path in (cache_folder() / name).rglob("*") if path.is_file() and path.suffix != _LOCK]


def verify_once(bundle: Bundle) -> None:
    """Checks every hash of ``bundle`` unless a stamp says that these very files were checked before.

    Raises:
        BundleCorruptError: see :meth:`Bundle.verify`.
    """
    states = _stamp(bundle.path, bundle.manifest.files)
    try:
        # By place too: two copies of one bundle, as in A/B updates, each keep their stamp.
        place = hashlib.sha256(os.fsencode(bundle.path)).hexdigest()[:16]
        path = cache_folder() / VERIFIED / f"{bundle.digest}-{place}.json"
    except PlatformError:
        bundle.verify()
        return
    if _read(path) == states:
        return
    bundle.verify()
    _write_atomic(path, states.encode())


def _stamp(folder: Path, entries: Iterable[FileEntry]) -> str:
    states = {}
    for entry in entries:
        state = (folder / entry.path).stat()
        states[entry.path] = [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return json.dumps(states, sort_keys=True)


def holds(folder: Path, entries: Sequence[FileEntry], verify: Verify) -> bool:
    """Whether the files in ``folder``, which were derived, are the ones that ``entries`` expect."""
    try:
        # The size of a link is that of its text: ONNX Runtime follows none to a graph's data.
        if any((folder / entry.path).lstat().st_size != entry.size for entry in entries):
            return False
        if verify == "sizes" or (verify == "once" and _read(folder / _STAMP) == _stamp(folder, entries)):
            return True
        states = _stamp(folder, entries)
        if any(sha256_of(folder / entry.path) != entry.sha256 for entry in entries):
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    # As they were before they were hashed: a file that changed since then is hashed again.
    _write_atomic(folder / _STAMP, states.encode())
    return True


def stamp(folder: Path, entries: Iterable[FileEntry]) -> None:
    """Notes that these files in ``folder`` have the hashes that ``entries`` expect."""
    _write_atomic(folder / _STAMP, _stamp(folder, entries).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from filling ``folder``, which need not be there; waits until none of them does.

    Raises:
        OSError: nothing can be written beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with folder.with_name(f"{folder.name}{_LOCK}").open("wb") as file:
        # Closing the file unlocks it, and so does the end of a process.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> str:
    """The text of a stamp; "" where there is none, or none that can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass
class CacheCounts:
    """How often something was found in a folder of the cache, was absent, or was damaged: then it is made again."""

    found: int = 0
    absent: int = 0
    damaged: int = 0


class ArrayFolder:
    """Arrays that can be computed again, each a file of its own: SHA-256 of the values, then the values.

    The folder is private to the user. What was used longest ago goes first when the files take more than ``limit``
    bytes. A folder that cannot be written or read is an empty one.

    Attributes:
        counts: of :meth:`load`, since this object was made.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.counts = CacheCounts()
        self._name = name
        self._limit = limit

    def load(self, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any] | None:
        """The array called ``key``, mapped and read-only; None if it is absent, damaged or of another size."""
        try:
            path = self._path(key)
            with path.open("rb") as file:
                array = _intact(file, shape, np.dtype(dtype))
        except (OSError, PlatformError):
            self.counts.absent += 1
            return None
        if array is None:
            self.counts.damaged += 1
            return None
        self.counts.found += 1
        with contextlib.suppress(OSError):
            os.utime(path)
        return array

    def save(self, key: str, array: npt.NDArray[Any]) -> None:
        """Keeps ``array`` [any shape], C-contiguous, if there is room for it."""
        if array.nbytes + _DIGEST_SIZE > self._limit:
            return
        with contextlib.suppress(OSError, PlatformError):
            path = self._path(key)
            _write_atomic(path, hashlib.sha256(array.data).digest(), array.data)
            path.parent.chmod(0o700)
            self._evict(path.parent)

    def _path(self, key: str) -> Path:
        return cache_folder() / self._name / key

    def _evict(self, folder: Path) -> None:
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in folder.iterdir())
        excess = sum(size for _, size, _ in files) - self._limit
        for _, size, path in files:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _intact(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    if os.fstat(file.fileno()).st_size != _DIGEST_SIZE + dtype.itemsize * math.prod(shape):
        return None
    digest = file.read(_DIGEST_SIZE)
    array = np.asarray(np.memmap(file, dtype, "r", _DIGEST_SIZE, shape))
    return array if hashlib.sha256(array.data).digest() == digest else None


def _write_atomic(path: Path, *contents: bytes | memoryview) -> None:
    """Writes ``path`` whole or not at all; a box whose cache cannot be written derives it again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            for content in contents:
                file.write(content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
