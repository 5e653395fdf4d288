"""How much memory a long job may still take on this machine."""

from __future__ import annotations

import re
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping; None where the system does not say.

    The least of what the machine has and what the control groups (version 2) of this process leave. What they keep of
    files counts as free: it is given back when memory is asked for.

    Args:
        root: under which ``proc`` and ``sys`` lie.
    """
    found = [_machine(root), *_groups(root)]
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _machine(root: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def _groups(root: Path) -> list[int | None]:
    """What the group of this process leaves, and each one around it."""
    match = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    if match is None:
        return []
    top = root / "sys/fs/cgroup"
    group = top / match[1]
    return [_left(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]


def _left(group: Path) -> int | None:
    limit = _text(group / "memory.max").strip()
    used = re.search(r"^anon (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    if not limit.isdigit() or used is None:
        return None
    return max(0, int(limit) - int(used[1]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        # Another system, or a container that hides it: nothing is known.
        return ""
