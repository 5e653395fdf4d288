"""The protein encoder's benchmark: what it measures, what it refuses, which rounds count. Nothing depends on a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge.bench.statistics import Round
from support import benchmark_script


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with benchmark_script("protein_encoder") as module:
        yield module


def test_every_engine_takes_a_turn_for_every_protein_in_every_round(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "esm.json"
    benchmark.main(["--quick", "--threads", "1", "--residues", "5,40", "--json", str(out)])
    written = json.loads(out.read_text())
    assert list(written["milliseconds"]) == list(benchmark.ENGINES)
    assert written["processor_milliseconds"].keys() == written["milliseconds"].keys()
    for by_residues in [*written["milliseconds"].values(), *written["processor_milliseconds"].values()]:
        assert {residues: list(times) for residues, times in by_residues.items()} == {
            "5": ["0", "1", "2"],
            "40": ["0", "1", "2"],
        }
    assert [one["index"] for one in written["rounds"]] == [0, 1, 2]
    for profile in written["profiles"].values():
        assert {"Int8Linear", "Int8LinearGelu", "Int8LinearAdd", "MultiHeadAttention"} <= profile.keys()
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    assert rows == [["| ours", "5"], ["| ours", "40"]]


def test_some_engines_are_measured_without_ours(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick", "--threads", "1", "--residues", "5", "--engines", "torch bf16"])
    printed = capsys.readouterr().out
    assert "| torch bf16 | 5 |" in printed
    assert "by operator" not in printed


def test_the_median_is_that_of_the_rounds_that_count(benchmark: Any) -> None:
    measured = benchmark.Measured()
    foreign_shares = (0.0, 0.0, 0.5, 0.01)
    measured.rounds = [Round(turn, "serve", 1.0, share, {"": 1.0}, {}) for turn, share in enumerate(foreign_shares)]
    measured.milliseconds = {"ours": {5: dict(enumerate([9.0, 1.0, 7.0, 2.0]))}}
    measured.milliseconds["peer"] = {5: dict(enumerate([9.0, 3.0, 7.0, 2.0]))}
    measured.processor_milliseconds = {name: {5: dict.fromkeys(range(4), 4.0)} for name in ("ours", "peer")}
    measured.distances = {"ours": 0.0, "peer": 0.0}
    assert measured.counted() == ([1, 3], True)
    lines = benchmark.table(benchmark.QUICK, measured)
    assert "| peer | 5 | 2.5 | 2.00 | 1.00–3.00 | 4.0 | 1.00 | 1.00–1.00 | 0.0e+00 |" in lines
    assert "2 of 3 rounds count, undisturbed; int8 peak 0.0 TOP/s at best." in lines


def test_features_of_another_model_end_the_run(benchmark: Any) -> None:
    right = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
    assert benchmark.check("peer", 3 * right + 1, right) < 1e-6, "the final norm makes them equal"
    for wrong in (-right, right + np.eye(7, 64, dtype=np.float32) * 5, np.full_like(right, np.nan)):
        with pytest.raises(benchmark.WrongResult, match="peer: features are up to"):
            benchmark.check("peer", wrong, right)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engines", "ours,none"], "no engine none"),
        (["--residues", "5,0"], "--residues is '5,0'"),
        (["--residues", "1025"], "--residues is '1025'"),
        (["--layers", "0"], "--threads, --rounds and --layers are 1 or more"),
    ],
)
def test_what_it_cannot_do_is_refused(
    benchmark: Any, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert reason in capsys.readouterr().err
