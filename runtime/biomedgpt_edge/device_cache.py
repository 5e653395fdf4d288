"""What is derived on this box and can always be derived again.

So far that is one thing: the stamp that says a bundle's hashes were checked once. The stamp holds each file's inode,
size and times, so a file that was replaced or rewritten is hashed again. Nothing of a question is ever written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from .bundle import Bundle
from .errors import PlatformError


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


def verify_once(bundle: Bundle) -> None:
    """Checks every hash of ``bundle`` unless a stamp says that these very files were checked before.

    Raises:
        BundleCorruptError: see :meth:`Bundle.verify`.
    """
    stamp = _stamp(bundle)
    try:
        # By place too: two copies of one bundle, as in A/B updates, each keep their stamp.
        place = hashlib.sha256(os.fsencode(bundle.path)).hexdigest()[:16]
        path = cache_folder() / "verified" / f"{bundle.digest}-{place}.json"
        if path.read_text(encoding="utf-8") == stamp:
            return
    except PlatformError:
        bundle.verify()
        return
    except (OSError, UnicodeDecodeError):
        pass  # No stamp, or none that can be read: check the hashes.
    bundle.verify()
    _write_atomic(path, stamp)


def _stamp(bundle: Bundle) -> str:
    states = {}
    for entry in bundle.manifest.files:
        state = (bundle.path / entry.path).stat()
        states[entry.path] = [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return json.dumps(states, sort_keys=True)


def _write_atomic(path: Path, text: str) -> None:
    """Writes ``path`` whole or not at all; a box whose cache cannot be written only hashes again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
