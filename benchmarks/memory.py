"""How much memory whole answers take: about a molecule up to 512 positions, about a protein up to 1,344.

Each runs in a process of its own, the protein with encoders that leave before the answer (`low_memory`). Printed is the
most that was resident, and the most that was the process's own (anonymous); the rest are mapped files, which the system
takes back when it needs to. To see an answer under a hard limit of everything, run this in a control group:
`systemd-run --scope -p MemoryMax=4608M python benchmarks/memory.py --cases molecule ...`. The bundle leaves the page
cache first, so that all that is read counts there.

Usage: python benchmarks/memory.py --bundle B [--cases molecule,protein] [--threads 2] [--kv-cache fp16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biomedgpt_edge import Engine, Molecule
from biomedgpt_edge.bench.counters import Memory
from biomedgpt_edge.bench.stages import (
    MOLECULE_QUESTION,
    PROTEIN_QUESTION,
    LoadOptions,
    drop_from_page_cache,
    protein_maker,
)
from biomedgpt_edge.decoder.kv_cache import KV_ELEMENTS
from biomedgpt_edge.prompt import Input

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
# Positions of prompt and answer together.
POSITIONS = {"molecule": 512, "protein": 1344}
RESIDUES = 1000


def asked(case: str) -> tuple[str, Input]:
    """A question and what it is about."""
    if case == "molecule":
        return MOLECULE_QUESTION, Molecule.from_smiles(ASPIRIN)
    return PROTEIN_QUESTION, protein_maker("request", RESIDUES)(0)


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """One answer, in this process: seconds and bytes."""
    memory = Memory()
    question, item = asked(case)
    drop_from_page_cache(options.bundle, LoadOptions(decoder="auto", kv_cache=None, device="cpu"))
    started = time.perf_counter()
    with Engine.load(
        options.bundle, threads=options.threads, kv_cache=options.kv_cache, low_memory=case == "protein", verify="sizes"
    ) as engine:
        ready = time.perf_counter() - started
        prompt = len(engine.prepare(question, item))
        # A model with random weights seldom ends an answer by itself; what it does say is counted.
        stream = engine.stream(question, item, max_new_tokens=POSITIONS[case] - prompt)
        for _ in stream:
            memory.look()
    tokens = stream.answer.timings.new_tokens
    return {
        "case": case,
        "ready": ready,
        "seconds": time.perf_counter() - started,
        "positions": prompt + tokens,
        "peak_rss": memory.peak_rss,
        "anonymous": memory.anonymous,
    }


def row(result: dict[str, Any]) -> str:
    """Of a table in Markdown."""
    cells = [result["case"], f"{result['positions']:,}", f"{result['ready']:.2f}", f"{result['seconds']:.0f}"]
    cells += [f"{result[name] / 2**20:,.0f}" if result[name] else "unknown" for name in ("peak_rss", "anonymous")]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, metavar="B")
    parser.add_argument("--cases", default=",".join(POSITIONS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-cache", choices=KV_ELEMENTS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = options.cases.split(",")
    unknown = [case for case in cases if case not in POSITIONS]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(POSITIONS)}")
    if options.in_this_process:
        print(json.dumps(measure(options, cases[0])))
        return
    given = sys.argv[1:] if arguments is None else list(arguments)
    print("| | positions | ready, s | answered, s | most resident, MiB | anonymous, MiB |\n|---|---|---|---|---|---|")
    results = []
    for case in cases:
        command = [sys.executable, __file__, *given, "--cases", case, "--in-this-process"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {case} ended with status {done.returncode}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
