"""A bundle is written into a staging folder and appears at its place at once, its manifest last.

Nothing opens as a bundle before it is whole: the manifest carries another name until everything else is on disk.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from biomedgpt_edge.bundle import sha256_of
from biomedgpt_edge.manifest import MANIFEST_NAME, FileEntry, Manifest

from .errors import OutputExistsError

_STAGED_MANIFEST = f"{MANIFEST_NAME}.staged"


class BundleWriter:
    """The staging folder beside the output; a context manager that removes it unless :meth:`commit` was reached.

    Raises:
        OutputExistsError: the output path is taken; a bundle is never written over, a box may be running from it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._refuse_existing()
        self.staging = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        self.staging.mkdir(parents=True)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.out):
            raise OutputExistsError(
                f"{self.out} exists already.", seen=str(self.out), remedy="Give a new folder, or remove this one first."
            )

    def entries(self, report: Callable[[str], None]) -> tuple[FileEntry, ...]:
        """Every staged file with its size and hash, sorted by path."""
        entries = []
        # A bundle that is laid out anew may have folders.
        files = {path.relative_to(self.staging).as_posix(): path for path in self.staging.rglob("*") if path.is_file()}
        for name, path in sorted(files.items()):
            report(f"hashing {name} ({path.stat().st_size:,} bytes)")
            entries.append(file_entry(path, name))
        return tuple(entries)

    def commit(self, manifest: Manifest) -> None:
        """Writes the manifest, brings everything to disk and moves the bundle to its place."""
        (self.staging / _STAGED_MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in [*self.staging.rglob("*"), self.staging]:
            _sync(path)
        os.rename(self.staging / _STAGED_MANIFEST, self.staging / MANIFEST_NAME)
        _sync(self.staging)
        # rename() replaces an empty folder without a word, so this cannot rest on the first check alone.
        self._refuse_existing()
        os.rename(self.staging, self.out)
        _sync(self.out.parent)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.staging.exists():
            shutil.rmtree(self.staging)


def file_entry(path: Path, name: str) -> FileEntry:
    """Size and SHA-256 of a file, under the name it shall be listed with."""
    return FileEntry(name, path.stat().st_size, sha256_of(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
