"""How fast this machine reads memory and multiplies in registers: no stage can be faster than that.

Probing takes a process of its own: its 2 GiB are gone when it ends and count in no stage's memory, and its threads meet
nobody else's.
"""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from .. import _native
from ..errors import PlatformError
from .counters import available_memory

# No cache holds this, however many virtual machines share it.
PROBE_BYTES = 2 * 2**30
_LEAST_BYTES = 2**26
_SECONDS_PER_LOOP = 0.02
_PASSES = 2


@dataclass(frozen=True)
class Limits:
    """What one probe found.

    Attributes:
        buffer: bytes that were read.
        bandwidth: bytes/s by read pattern, all threads together.
        arithmetic: operations/s by "kind instruction-set", all threads together.
    """

    buffer: int
    bandwidth: dict[str, float]
    arithmetic: dict[str, float]


def probe_bytes() -> int:
    """Size of the probe's buffer: ``PROBE_BYTES``, or half of the available memory where that is less."""
    available = available_memory()
    return PROBE_BYTES if available is None else max(_LEAST_BYTES, min(PROBE_BYTES, available // 2))


def probe(threads: int, size: int) -> Limits:
    """Probes in a process of its own.

    Raises:
        PlatformError: that process failed; mostly for want of memory.
    """
    command = [sys.executable, "-m", __name__, "--threads", str(threads), "--bytes", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise PlatformError(
            f"the probe of memory and arithmetic failed: {reason}.", remedy="Close other programs and try again."
        )
    return Limits(**json.loads(done.stdout))


def _probe_here(threads: int, size: int) -> Limits:
    words = _touched_words(size)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.001] * threads))  # so that the threads exist
        bandwidth = {pattern: _bandwidth(pool, words, threads, pattern) for pattern in _native.read_patterns()}
        arithmetic = {
            f"{kind} {name}": _rate(pool, threads, name, kind, operations)
            for name, kind, operations in _native.arithmetic_loops()
        }
    return Limits(words.nbytes, bandwidth, arithmetic)


def _touched_words(size: int) -> npt.NDArray[np.int64]:
    """Memory whose pages exist, large ones where the kernel gives them, so that walks of page tables do not count."""
    memory = mmap.mmap(-1, size // 8 * 8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(memory, np.int64)
    words[:] = 1
    return words


def _bandwidth(pool: ThreadPoolExecutor, words: npt.NDArray[np.int64], threads: int, pattern: str) -> float:
    parts = np.array_split(words, threads)
    times = [_seconds(lambda: list(pool.map(_native.read_memory, parts, [pattern] * threads))) for _ in range(_PASSES)]
    return words.nbytes / min(times)


def _rate(pool: ThreadPoolExecutor, threads: int, name: str, kind: str, operations: int) -> float:
    steps = 1000
    while (seconds := _seconds(partial(_native.run_arithmetic, name, kind, steps))) < _SECONDS_PER_LOOP / 4:
        steps *= 4
    steps = int(steps * _SECONDS_PER_LOOP / seconds) + 1
    work = ([name] * threads, [kind] * threads, [steps] * threads)
    together = _seconds(lambda: list(pool.map(_native.run_arithmetic, *work)))
    return threads * steps * operations / together


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(vars(_probe_here(options.threads, options.bytes))))


if __name__ == "__main__":
    _main()
