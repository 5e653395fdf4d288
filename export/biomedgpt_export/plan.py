"""What an export will write, known before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import ExportError
from .graphs.linear import GraphPrecision
from .graphs.matrices import Matrix
from .quantize.int4 import Int4Weight, chosen_group_size, group_bytes

# Graph files, rotary tables, norms, biases, tokenizer and manifest: what is not counted one by one below.
_REST = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """A part of the bundle: its linear layers, and how each is stored.

    Attributes:
        group_size: of int4, where one was asked for.
        stored_bytes: of a layer by its name, rows and columns, where they are not those of its precision alone.
    """

    name: str
    matrices: Collection[Matrix]
    prefix: str
    precision: GraphPrecision
    stored_bytes: Callable[[str, int, int], int] | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes on disk.

    Attributes:
        parts: by name, what each takes in the bundle.
        work: what lies beside the output, or in it, until the bundle is whole.
    """

    parts: dict[str, int]
    work: int

    @property
    def bundle(self) -> int:
        return sum(self.parts.values()) + _REST

    def require_space(self, folder: Path) -> None:
        """Compares with what is free where the bundle will lie.

        Raises:
            ExportError: too little.
        """
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free, needed = shutil.disk_usage(existing).free, self.bundle + self.work
        if free < needed:
            raise ExportError(
                f"the export will write about {gigabytes(needed)} below {folder}, where {gigabytes(free)} are free.",
                seen=free,
                limit=needed,
                remedy="Free some space, or give --out on another disk.",
            )

    def lines(self) -> Iterable[str]:
        """For people."""
        yield f"will write {gigabytes(self.bundle)}: " + ", ".join(
            f"{name} {gigabytes(size)}" for name, size in self.parts.items()
        )
        if self.work:
            yield f"and keep {gigabytes(self.work)} of work beside it until it is whole"


def plan(parts: Iterable[Part], tensors: dict[str, int], checkpoint: Checkpoint, again: Sequence[str]) -> Plan:
    """Adds up.

    Args:
        tensors: bytes of what lies outside the graphs, by name.
        again: names of the parts whose matrices lie on disk once more until the bundle is whole, as often as they do.

    Raises:
        QuantizationError: a group size was asked for that a matrix cannot have.
    """
    sizes, work = {}, 0
    for part in parts:
        sizes[part.name] = sum(_bytes(matrix, part, checkpoint) for matrix in part.matrices)
        work += sizes[part.name] * again.count(part.name)
    return Plan({**sizes, **tensors}, work)


def _bytes(matrix: Matrix, part: Part, checkpoint: Checkpoint) -> int:
    shapes = [checkpoint.shape(part.prefix + key) for key in matrix.keys]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    if part.stored_bytes is not None:
        return part.stored_bytes(matrix.name, rows, columns)
    if part.precision == "int4":
        size = chosen_group_size(matrix.name, columns, part.group_size)
        return group_bytes(rows, columns, size, Int4Weight.bits)
    return rows * columns * {"fp32": 4, "fp16": 2, "int8": 1}[part.precision]


def gigabytes(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB"
