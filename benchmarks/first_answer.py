"""What a user waits for: whole processes from start to exit, each answering one question about aspirin.

Prints the median and the spread of processor time, wall time and peak memory, and the stages inside the process.
Usage: python benchmarks/first_answer.py [--bundle B] [--runs N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

QUESTION = ["--molecule", "CC(=O)Oc1ccccc1C(=O)O", "--json", "Please describe this molecule."]


def measure(command: list[str]) -> dict[str, float]:
    """One process: its own accounting by the kernel, and the timings it reports."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if process.stdout is None:
        raise RuntimeError("the process has no stdout")
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    timings = json.loads(output)["timings"]
    return {
        "processor s": usage.ru_utime + usage.ru_stime,
        "wall s": wall,
        "peak MiB": usage.ru_maxrss / 1024,
        "ttft ms": timings["ttft"] * 1e3,
        "tpot ms": timings["tpot"] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "biomedgpt_edge.cli.main", "ask", *QUESTION]
    if options.bundle:
        command += ["--bundle", options.bundle]
    measure(command)  # Fills the page cache and writes the stamp that skips hashing.
    runs = [measure(command) for _ in range(options.runs)]
    table: dict[str, Any] = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in ((name, [run[name] for run in runs]) for name in runs[0])
    }
    if options.json:
        print(json.dumps({"machine": platform.processor() or platform.machine(), "runs": runs, "table": table}))
        return
    for name, row in table.items():
        print(f"{name:<12} median {row['median']:8.2f}   min {row['min']:8.2f}   max {row['max']:8.2f}")


if __name__ == "__main__":
    main()
