"""Energy from the machine's own meters: RAPL on x86 servers and laptops, INA3221 on Jetson boards.

RAPL counts the joules of each processor package. An INA3221 tells the power of a board's rails at a moment, so a thread
reads it every 50 ms and adds up; the input rail holds all others.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

SYS = Path("/sys")
# By the rail's label, in the words of NVIDIA's device trees: what comes into the module.
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VDD_TOTAL")
_SECONDS_PER_READING = 0.05


class Meter(Protocol):
    """Counts joules from when it was made."""

    @property
    def source(self) -> str:
        """What is counted, in words."""
        ...

    def joules(self) -> float:
        """Since the meter was made."""
        ...

    def close(self) -> None: ...


def find_meter(sys: Path = SYS) -> Meter | str:
    """The machine's meter, or why there is none."""
    packages = _rapl_packages(sys)
    if packages:
        try:
            return RaplMeter(packages)
        except PermissionError:
            return f"not reported: {packages[0].parent}/*/energy_uj may be read by root alone"
    rails = _input_rails(sys)
    if rails:
        return RailMeter(rails)
    return "not reported: this machine has neither RAPL (powercap) nor an INA3221"


def _rapl_packages(sys: Path) -> list[Path]:
    """Domains of whole packages; intel-rapl:0:0 and the like are parts of them. AMD's go by the same name."""
    return sorted(path for path in (sys / "class" / "powercap").glob("intel-rapl:*") if path.name.count(":") == 1)


def _input_rails(sys: Path) -> list[tuple[Path, Path]]:
    """Files with millivolts and milliamperes of each input rail."""
    rails = []
    for label in sorted((sys / "bus" / "i2c" / "drivers" / "ina3221").glob("*/hwmon/hwmon*/in*_label")):
        if label.read_text().strip() in _INPUT_RAILS:
            number = label.name.removeprefix("in").removesuffix("_label")
            rails.append((label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")))
    return rails


class RaplMeter:
    """Joules of all processor packages.

    Raises:
        PermissionError: the counters are root's.
    """

    source = "RAPL, all processor packages"

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        self._last = self._readings()
        self._microjoules = 0

    def joules(self) -> float:
        """See :class:`Meter`; to be called more often than the counter runs over, which takes minutes."""
        now = self._readings()
        for new, old, limit in zip(now, self._last, self._ranges, strict=True):
            self._microjoules += new - old if new >= old else new - old + limit
        self._last = now
        return self._microjoules / 1e6

    def close(self) -> None:
        """Nothing is held."""

    def _readings(self) -> list[int]:
        return [int((path / "energy_uj").read_text()) for path in self._packages]


class RailMeter:
    """Joules into the module, added up by a thread until the meter is closed."""

    source = "INA3221, input rail"

    def __init__(self, rails: list[tuple[Path, Path]]) -> None:
        self._rails = rails
        self._lock = threading.Lock()
        self._joules = 0.0
        self._read_at = time.perf_counter()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """See :class:`Meter`."""
        with self._lock:
            now = time.perf_counter()
            watts = sum(int(volts.read_text()) * int(amperes.read_text()) for volts, amperes in self._rails) / 1e6
            self._joules += watts * (now - self._read_at)
            self._read_at = now
            return self._joules

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_SECONDS_PER_READING):
            self.joules()
