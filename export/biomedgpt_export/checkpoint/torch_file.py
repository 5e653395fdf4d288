"""Tensors of a ``torch.save`` file (``.pth``, ``.pt``, ``.bin``), without running any of its pickle."""

from __future__ import annotations

import mmap
import sys
import zlib
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from biomedgpt_edge.errors import ClosedError

from ..errors import CheckpointError
from .base import Checkpoint, missing_key, require_regular_file
from .torch_archive import Member, locate_members
from .torch_pickle import MAX_PICKLE_BYTES, StorageRef, TensorView, read_pickle

if TYPE_CHECKING:
    import torch

_MAX_DIMENSIONS = 64
_MAX_EXTENT = 1 << 48
#: Views may repeat elements (``expand``); a few bytes must not turn into a tensor that no machine can hold.
MAX_REPEATED_ELEMENTS = 1 << 24
_MAX_FORMAT_VERSION = 10
_CRC_BLOCK = 16 << 20


class TorchCheckpoint(Checkpoint):
    """A state dict written by ``torch.save``, memory-mapped.

    Everything the file declares is checked on opening: opcodes and names of the pickle, every storage against its
    member, every view against its storage. The bytes of a storage are held against the archive's CRC when it is first
    read, so that a damaged download does not pass as weights. Archives written with
    ``torch.serialization.set_crc32_options(False)`` carry no CRC and are taken as they are.

    Args:
        path: the file.
        root: the entry of the saved dict that holds the state dict (``"model"``, ``"state_dict"``); None if the
            saved object is the state dict itself.

    What lies inside the state dict must be tensors: an epoch counter among them is an error, because leaving entries
    out silently is how half a model gets exported. Entries beside ``root`` (optimizer, epoch, ...) are not looked at,
    but the whole pickle has to be free of foreign names, theirs included.
    """

    def __init__(self, path: Path, *, root: str | None = None) -> None:
        require_regular_file(path)
        self.files = [path]
        self._path = path
        self._verified: set[str] = set()
        try:
            file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error}.", seen=str(path)) from error
        with file:
            self._members = locate_members(file, path)
            self._require_known_layout(file)
            state = read_pickle(self._read(file, "data.pkl", MAX_PICKLE_BYTES), f"{path}: data.pkl")
            self._views = _tensors_of(state, root, path)
            for key, view in self._views.items():
                self._require_storage(key, view.storage)
                _require_view_inside(key, view, path)
            self._map: mmap.mmap | None = _map_file(file, path)

    def keys(self) -> list[str]:
        return list(self._views)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._view(key).size

    def dtype(self, key: str) -> str:
        return self._view(key).storage.type.dtype

    def tensor(self, key: str) -> torch.Tensor:
        import torch

        view = self._view(key)
        if self._map is None:
            raise ClosedError(f"{self._path.name} is closed.")
        dtype: torch.dtype = getattr(torch, view.storage.type.dtype)
        flat = torch.empty(0, dtype=dtype)
        if view.storage.elements:
            member = self._members[f"data/{view.storage.key}"]
            self._require_crc(member)
            if member.offset % view.storage.type.item_bytes == 0:
                flat = torch.frombuffer(self._map, dtype=dtype, count=view.storage.elements, offset=member.offset)
            else:
                # Archives repacked by other tools lose torch's alignment, and torch assumes aligned elements.
                raw = torch.frombuffer(self._map, dtype=torch.uint8, count=member.size, offset=member.offset)
                flat = raw.clone().view(dtype)
        return torch.as_strided(flat, view.size, view.stride, view.offset)

    def close(self) -> None:
        # Not mmap.close(): it fails while tensors are views of the map. The last of them releases it.
        self._map = None

    def _view(self, key: str) -> TensorView:
        if key not in self._views:
            raise missing_key(self._path, key)
        return self._views[key]

    def _read(self, file: BinaryIO, name: str, limit: int) -> bytes:
        """A small member, whole and checked."""
        member = self._members[name]
        if member.size > limit:
            raise CheckpointError(f"{self._path}: {name} is too large.", seen=member.size, limit=limit)
        file.seek(member.offset)
        data = file.read(member.size)
        if member.crc and zlib.crc32(data) != member.crc:
            raise _damaged(self._path, name)
        return data

    def _require_known_layout(self, file: BinaryIO) -> None:
        if "byteorder" in self._members and self._read(file, "byteorder", 64) != b"little":
            raise CheckpointError(
                f"{self._path} was not written on a little-endian machine.",
                remedy="Save it again on one, or as safetensors.",
            )
        if "version" in self._members:
            version = self._read(file, "version", 64).strip()
            if not (version.isdigit() and 1 <= int(version) <= _MAX_FORMAT_VERSION):
                raise CheckpointError(
                    f"{self._path} has the unknown archive version {version!r}.",
                    seen=repr(version),
                    limit=_MAX_FORMAT_VERSION,
                )

    def _require_storage(self, key: str, storage: StorageRef) -> None:
        member = self._members.get(f"data/{storage.key}")
        if member is None:
            raise CheckpointError(f"{self._path}: the data of {key!r} (data/{storage.key}) is missing.")
        if storage.elements * storage.type.item_bytes != member.size:
            raise CheckpointError(
                f"{self._path}: the pickle says that data/{storage.key} holds {storage.elements} elements of "
                f"{storage.type.dtype}, the archive says {member.size} bytes.",
                seen=key,
            )

    def _require_crc(self, member: Member) -> None:
        if member.crc == 0 or member.name in self._verified or self._map is None:
            return
        crc = 0
        with memoryview(self._map) as whole:
            for start in range(member.offset, member.offset + member.size, _CRC_BLOCK):
                with whole[start : min(start + _CRC_BLOCK, member.offset + member.size)] as block:
                    crc = zlib.crc32(block, crc)
        if crc != member.crc:
            raise _damaged(self._path, member.name)
        self._verified.add(member.name)


def _damaged(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is damaged, its CRC-32 does not match.", seen=name, remedy="Copy or download the file again."
    )


def _map_file(file: BinaryIO, path: Path) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # Private and writable, as torch's own mmap loading has it: a write by mistake stays in this process, where a
        # read-only map would end it with a signal. Without NORESERVE Linux refuses a private map larger than its RAM.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        flags = mmap.MAP_PRIVATE | no_reserve
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot map {path} into memory: {error}.", seen=str(path)) from error


def _tensors_of(state: object, root: str | None, path: Path) -> dict[str, TensorView]:
    """The tensors of the state dict, and nothing but tensors in it."""
    where = "" if root is None else f" under {root!r}"
    if root is not None:
        if not isinstance(state, dict) or root not in state:
            found = f"it has {_some_keys(state)}" if isinstance(state, dict) else "it is not a dict"
            raise CheckpointError(f"{path} has no entry {root!r}: {found}.", seen=root)
        state = state[root]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state dict{where}, but a {_kind(state)}.")
    tensors: dict[str, TensorView] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, TensorView):
            raise CheckpointError(
                f"{path}: the entry {key!r:.100}{where} is a {_kind(value)}, not a tensor.",
                seen=str(key)[:100],
                remedy=_root_remedy(state),
            )
        tensors[key] = value
    return tensors


def _root_remedy(state: dict[object, object]) -> str:
    """Point at the nested state dict if there is one."""
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, dict) and any(isinstance(v, TensorView) for v in value.values()):
            return f"The tensors seem to lie under {key[:100]!r}: name it as the root."
    return "Save the state dict without other entries: torch.save(model.state_dict(), path)."


def _some_keys(state: dict[object, object]) -> str:
    shown = [f"{key!r:.60}" for key in list(state)[:8]]
    return ", ".join(shown) + (", ..." if len(state) > len(shown) else "") if shown else "no entries"


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TensorView) else type(value).__name__


def _require_view_inside(key: str, view: TensorView, path: Path) -> None:
    """Python integers do not overflow, so the bounds can be computed as they stand, before torch sees them."""
    elements = view.storage.elements
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=False))
    count = prod(view.size)
    fits = (
        len(view.size) == len(view.stride) <= _MAX_DIMENSIONS
        and all(0 <= number <= _MAX_EXTENT for number in (*view.size, *view.stride))
        and 0 <= view.offset <= _MAX_EXTENT
        # Slices of empty tensors keep offsets past the end, and touch nothing.
        and (count == 0 or last < elements)
        and prod(size for size in view.size if size) <= max(elements, MAX_REPEATED_ELEMENTS)
    )
    if not fits:
        # Only shortened: a hostile pickle can declare integers of hundreds of digits and thousands of dimensions.
        raise CheckpointError(
            f"{path}: the tensor {key[:100]!r} does not fit its storage of {elements} elements: offset "
            f"{view.offset!s:.30}, size {list(view.size[:8])!s:.200}, stride {list(view.stride[:8])!s:.200}.",
            seen=key[:100],
        )
