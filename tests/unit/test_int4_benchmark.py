"""The int4 benchmark's plumbing: what it writes, what it refuses, which rounds count. Nothing depends on a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import benchmark_script


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with benchmark_script("int4_linear") as module:
        yield module


def test_every_layer_is_timed_with_every_number_of_rows(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--quick", "--threads", "1", "--rows", "1,3,20", "--json", str(tmp_path / "int4.json")])
    written = json.loads((tmp_path / "int4.json").read_text())
    assert [layer["shape"]["name"] for layer in written["layers"]] == ["quick", "quick_gate_up"]
    for layer in written["layers"]:
        assert len(layer["bandwidth"]) == 2
        for times in layer["milliseconds"].values():
            assert {rows: len(samples) for rows, samples in times.items()} == {"1": 2, "3": 2, "20": 2}
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| quick")]
    assert rows == [[f"| {name}", count] for name in ("quick", "quick_gate_up") for count in ("1", "3", "20")]


def test_a_wrong_result_ends_the_run(benchmark: Any) -> None:
    right = np.linspace(-1, 1, 50, dtype=np.float32)
    shape = benchmark.QUICK_SHAPES[0]
    benchmark.check(shape, {benchmark.PEER: right, benchmark.OURS: right + 0.01})
    for wrong in (right + 0.1, np.full_like(right, np.nan)):
        with pytest.raises(benchmark.WrongResult, match="quick: results differ by"):
            benchmark.check(shape, {benchmark.PEER: right, benchmark.OURS: wrong})


def test_rounds_of_low_bandwidth_are_left_out(benchmark: Any) -> None:
    one, other = (
        benchmark.Measured(shape, 1, rates)
        for shape, rates in zip(benchmark.QUICK_SHAPES, ([90.0, 84.0, 86.0], [100.0, 10.0, 85.0]), strict=True)
    )
    assert benchmark.undisturbed([one, other], one) == [0, 2]
    assert benchmark.undisturbed([one, other], other) == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shapes", "qkv,none"], "unknown shapes: none"),
        (["--rows", "1,0"], "--rows is '1,0'"),
        (["--threads", "0"], "--threads and --rounds are at least 1"),
        (["--group", "256"], "invalid choice"),
    ],
)
def test_what_it_cannot_do_is_refused(
    benchmark: Any, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert reason in capsys.readouterr().err
