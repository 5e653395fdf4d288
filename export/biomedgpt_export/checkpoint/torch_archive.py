"""Where the members of a ``torch.save`` archive lie in the file.

Since PyTorch 1.6 a checkpoint is a zip file of stored members under one folder: ``data.pkl``, ``byteorder``,
``version`` and ``data/0``, ``data/1``, ... with the raw bytes of one storage each, aligned to 64 bytes
(``caffe2/serialize/inline_container.h`` describes it). Zip itself is PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from .base import refuse_foreign_file

#: The central directory of the 10B is below 200 KB. zipfile reads it in one piece, at the size that the file declares.
MAX_DIRECTORY_BYTES = 8 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
_TRUNCATED_REMEDY = "The file is probably incomplete: compare its size with the original and copy it again."


@dataclass(frozen=True)
class Member:
    """A member's bytes: ``offset`` is absolute, ``crc`` is 0 where the writer recorded none."""

    name: str
    offset: int
    size: int
    crc: int


class _CappedReader:
    """A file whose reads are bounded, so that sizes declared in a zip directory cannot make zipfile allocate much."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path

    def read(self, size: int = -1) -> bytes:
        data = b"" if size > MAX_DIRECTORY_BYTES else self._file.read(size if size >= 0 else MAX_DIRECTORY_BYTES + 1)
        if max(size, len(data)) > MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"{self._path}: the zip directory is too large for a checkpoint.", seen=size, limit=MAX_DIRECTORY_BYTES
            )
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def locate_members(file: BinaryIO, path: Path) -> dict[str, Member]:
    """Members by their name below the archive's folder (``data.pkl``, ``data/0``), each checked against its headers.

    Raises:
        CheckpointError: this is not a ``torch.save`` archive, it is cut off, or its headers contradict each other.
    """
    head = file.read(64)
    refuse_foreign_file(path, head)
    if not head.startswith(_LOCAL_MAGIC):
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint: it does not start like a zip file.",
            seen=str(path),
            remedy="Give a file written by torch.save (PyTorch 1.6 or later) or a safetensors file.",
        )
    entries = _directory(file, path)
    folder = _folder_of(entries, path)
    members = {entry.filename.removeprefix(folder): _locate(file, entry, path) for entry in entries}
    _refuse_overlaps(list(members.values()), path)
    return members


def _directory(file: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    try:
        entries = zipfile.ZipFile(_CappedReader(file, path)).infolist()
    # ValueError: zipfile seeks to offsets it has not checked. NotImplementedError: versions of zip it does not know.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{path} starts like a PyTorch checkpoint, but its zip directory cannot be read: {error}.",
            seen=str(path),
            remedy=_TRUNCATED_REMEDY,
        ) from error
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        # orig_filename is what the file says; zipfile cuts it at NUL bytes and rewrites separators.
        if name != entry.orig_filename or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(f"{path} has a member with an unsafe name: {entry.orig_filename[:100]!r}.")
        if name in seen:
            raise CheckpointError(f"{path} has two members named {name[:100]!r}.")
        seen.add(name)
    return entries


def _folder_of(entries: list[zipfile.ZipInfo], path: Path) -> str:
    """The folder that all members share, after telling apart other things that are zip files."""
    names = [entry.filename for entry in entries]
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError(f"{path} is a NumPy archive.", remedy="Give the PyTorch or safetensors checkpoint.")
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive: a program with its weights.",
            remedy="Save its state dict instead: torch.save(torch.jit.load(path).state_dict(), new_path).",
        )
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is a zip file, but not one written by torch.save: it has {len(pickles)} data.pkl members.",
            remedy="Give the checkpoint itself, not an archive that contains it.",
        )
    folder = pickles[0].removesuffix("data.pkl")
    if strays := [name for name in names if not name.startswith(folder)]:
        raise CheckpointError(f"{path} has members outside its folder {folder!r}: {strays[0][:100]!r}.")
    return folder


def _locate(file: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> Member:
    """Find a member's first byte, which only the local header tells, and hold both headers against each other."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise CheckpointError(
            f"{path}: the member {entry.filename[:100]!r} is compressed or encrypted, which torch.save never does.",
            remedy="Unpack the archive and store it again without compression, or get the original file.",
        )
    # A zip64 entry may put any 64-bit number here.
    if not 0 <= entry.header_offset < 1 << 62:
        raise CheckpointError(f"{path}: the zip header of {entry.filename[:100]!r} lies outside the file.")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_MAGIC):
        raise CheckpointError(
            f"{path}: no zip header where the directory says {entry.filename[:100]!r} begins.",
            remedy=_TRUNCATED_REMEDY,
        )
    _, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = file.read(name_length)
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    size = entry.file_size
    consistent = (
        method == zipfile.ZIP_STORED
        and not flags & _ENCRYPTED
        and name == entry.filename.encode("utf-8")
        and size == entry.compress_size
        and 0 <= size <= os.fstat(file.fileno()).st_size - offset
    )
    if not consistent:
        raise CheckpointError(
            f"{path}: the zip headers of {entry.filename[:100]!r} contradict each other or the size of the file.",
            remedy=_TRUNCATED_REMEDY,
        )
    return Member(entry.filename, offset, size, entry.CRC)


def _refuse_overlaps(members: list[Member], path: Path) -> None:
    end = 0
    for member in sorted(members, key=lambda member: (member.offset, member.size)):
        if member.offset < end:
            raise CheckpointError(f"{path}: the member {member.name[:100]!r} overlaps another one.")
        end = member.offset + member.size
