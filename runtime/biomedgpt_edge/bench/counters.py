"""What Linux counts: processor time, memory and reads of this process, and processor time of all.

Where a counter is missing (another system, a locked-down container), the answer is None, never a guess.
"""

from __future__ import annotations

import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Of a line in /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal; guest time is in the first two.
_IDLE_FIELDS = (3, 4)
_COUNTED_FIELDS = 8
_RESET_PEAK = "5"


def usable_processors() -> tuple[int, ...]:
    """Numbers of the processors this process may run on, which a container or taskset may have cut down."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Processors:
    """Seconds at one moment: on the clock, of all processes on the usable processors, and of this one with children."""

    wall: float
    busy: float | None
    own: float

    @classmethod
    def now(cls, proc: Path = PROC) -> Processors:
        return cls(time.perf_counter(), _busy_seconds(proc, usable_processors()), _own_seconds())

    def foreign_share(self, before: Processors) -> float | None:
        """What others used since ``before``, stolen time included, as a share of the time of all usable processors."""
        if self.busy is None or before.busy is None:
            return None
        available = (self.wall - before.wall) * len(usable_processors())
        foreign = (self.busy - before.busy) - (self.own - before.own)
        # The kernel counts in ticks of some milliseconds, so that a little less than nothing is nothing.
        return max(0.0, foreign / available)


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _busy_seconds(proc: Path, processors: tuple[int, ...]) -> float | None:
    wanted = {f"cpu{number}" for number in processors}
    text = _text(proc / "stat")
    rows = [line.split() for line in text.splitlines() if line.startswith("cpu")]
    ticks = [_busy_ticks([int(field) for field in row[1:]]) for row in rows if row[0] in wanted]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if len(ticks) == len(wanted) else None


def _busy_ticks(fields: list[int]) -> int:
    counted = fields[:_COUNTED_FIELDS]
    return sum(counted) - sum(counted[i] for i in _IDLE_FIELDS)


class Memory:
    """Peak resident and anonymous memory of this process over a stretch of work, in bytes."""

    def __init__(self, proc: Path = PROC) -> None:
        self._status = proc / "self" / "status"
        self._reset = proc / "self" / "clear_refs"
        self.peak_is_of_stage = False
        self.peak_rss: int | None = None
        self.anonymous: int | None = None

    def restart(self) -> None:
        """Begins a stretch. Where the kernel does not let the peak be set back, it stays that of the whole process."""
        self.peak_rss = self.anonymous = None
        try:
            self._reset.write_text(_RESET_PEAK)
            self.peak_is_of_stage = True
        except OSError:
            self.peak_is_of_stage = False

    def look(self) -> None:
        """Takes in what is there now; called where a stage holds the most, since only the peak has a counter."""
        text = _text(self._status)
        self.peak_rss = _larger(self.peak_rss, _status_bytes(text, "VmHWM"))
        self.anonymous = _larger(self.anonymous, _status_bytes(text, "RssAnon"))


def available_memory(proc: Path = PROC) -> int | None:
    """Bytes that can be had without swapping."""
    return _status_bytes(_text(proc / "meminfo"), "MemAvailable")


def total_memory(proc: Path = PROC) -> int | None:
    """Bytes of the machine."""
    return _status_bytes(_text(proc / "meminfo"), "MemTotal")


def bytes_read_from_storage(proc: Path = PROC) -> int | None:
    """Bytes that this process caused to be read from storage, mapped files included."""
    match = re.search(r"^read_bytes: (\d+)$", _text(proc / "self" / "io"), re.MULTILINE)
    return int(match.group(1)) if match else None


def _status_bytes(text: str, key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
