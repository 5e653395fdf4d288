"""The kernel benchmark's plumbing: what it writes, and what it refuses. Nothing here depends on a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge import _native
from support import BENCHMARKS, benchmark_script


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    with benchmark_script("kernels") as module:
        yield module


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One smoke run: its JSON and its table."""
    file = tmp_path_factory.mktemp("benchmark") / "kernels.json"
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--quick", "--threads", "1", "--json", str(file)]
    # The interpreter's own path, so that the package this test imports is the one that is measured.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text()), result.stdout


def test_every_contestant_is_timed_or_named_as_skipped(report: tuple[dict[str, Any], str]) -> None:
    written, table = report
    product = next(shape for shape in written["shapes"] if shape["shape"]["name"] == "quick")
    names = [result["name"] for result in product["results"]]
    for path in _native.splice_paths():
        assert {f"splice {path}, f16 weights", f"splice {path}, f32 weights"} <= set(names)
    for prefix, modules in {"numpy": ["numpy"], "torch": ["torch"], "ONNX Runtime": ["onnxruntime", "onnx"]}.items():
        installed = all(find_spec(module) for module in modules)
        assert any(name.startswith(prefix) for name in names) == installed
        assert (prefix in written["skipped"]) != installed
    for name in names:
        assert name in table


def test_the_json_holds_every_time_and_error(report: tuple[dict[str, Any], str]) -> None:
    written, _ = report
    rounds = written["method"]["rounds"]
    for shape in written["shapes"]:
        names = [result["name"] for result in shape["results"]]
        assert len(set(names)) == len(names)
        assert shape["best_peer"] in names
        assert shape["best_fp32_peer"] in names
        for result in shape["results"]:
            assert len(result["milliseconds"]) == rounds
            assert all(time > 0 for time in result["milliseconds"])
            assert result["error"] <= (1e-2 if result["rounds"] else 1e-5)
            assert result["ratio_peer"] > 0
    rates = written["probes"]["rates"]
    assert all(len(values) == rounds * len(written["shapes"]) for values in rates.values())
    assert {"memory read", "memory copy"} <= rates.keys()
    for kind in ("fp32", "bf16"):
        assert any(name.startswith(kind) for name in [*rates, *written["probes"]["missing"]])
    assert {"cpu", "flags", "threads used", "versions"} <= written["machine"].keys()


def no_bias(problem: Any, prompt: np.ndarray[Any, Any]) -> None:
    prompt[problem.feature_rows] -= problem.bias


def one_row_late(problem: Any, prompt: np.ndarray[Any, Any]) -> None:
    prompt[:] = np.roll(prompt, 1, axis=0)


def last_row_missing(problem: Any, prompt: np.ndarray[Any, Any]) -> None:
    prompt[-1] = np.nan


@pytest.mark.parametrize("spoil", [no_bias, one_row_late, last_row_missing])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_wrong_result_is_refused_and_nothing_is_timed(
    kernels: Any, spoil: Callable[[Any, Any], None], rounds: bool
) -> None:
    def build(problem: Any, threads: int) -> list[Any]:
        right = kernels.numpy_peers(problem, threads)[0]

        def call() -> Any:
            prompt = right.call()
            spoil(problem, prompt)
            return prompt

        return [right, kernels.Contestant("the wrong one", call, rounds=rounds)]

    method = kernels.Method(threads=1, rounds=1, pause=0, cold=False)
    with pytest.raises(kernels.WrongResult, match="quick: the wrong one is off by"):
        kernels.measure(kernels.QUICK_SHAPES[0], [kernels.Suite("test", (), build)], method, yardsticks=None)


def test_a_contestant_that_writes_nothing_is_refused(kernels: Any) -> None:
    """Although the buffer it returns held the right prompt a moment ago."""
    problem = kernels.Problem(kernels.QUICK_SHAPES[0])
    kernels.check(problem, kernels.numpy_peers(problem, 1)[0])
    with pytest.raises(kernels.WrongResult, match="idle"):
        kernels.check(problem, kernels.Contestant("idle", lambda: problem.out))


def test_16_bit_results_are_refused_where_float32_is_claimed(kernels: Any) -> None:
    problem = kernels.Problem(kernels.QUICK_SHAPES[0])
    right = kernels.numpy_peers(problem, 1)[0]

    def call() -> Any:
        return right.call().astype(np.float16)

    with pytest.raises(kernels.WrongResult, match="halved"):
        kernels.check(problem, kernels.Contestant("halved", call))
    kernels.check(problem, kernels.Contestant("halved", call, rounds=True))


def test_absent_peers_are_named(kernels: Any) -> None:
    there = kernels.Suite("there", ("json",), kernels.numpy_peers)
    absent = kernels.Suite("absent", ("json", "no_such_module"), kernels.numpy_peers)
    assert kernels.available([there, absent]) == ([there], {"absent": "no_such_module not installed"})


def test_ratios_are_of_the_same_round(kernels: Any) -> None:
    """A slow moment that meets both sides changes nothing."""
    results = [
        kernels.Result("fp32 peer", False, False, 0.0, 0, [2.0, 20.0, 2.0]),
        kernels.Result("other peer", False, True, 0.0, 0, [1.0, 1.0, 1.0]),
        kernels.Result("ours", True, False, 0.0, 0, [4.0, 40.0, 4.0]),
    ]
    assert kernels.compare(results) == ("fp32 peer", "other peer")
    assert [result.ratio_fp32_peer for result in results] == [1.0, 0.5, 2.0]
    assert [result.ratio_peer for result in results] == [2.0, 1.0, 4.0]


def test_without_a_compiler_peaks_are_missing_and_said_to_be(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    loops, missing = kernels.machine.compile_peak_loops(tmp_path)
    assert loops == []
    assert missing == {"fp32": "no compiler: not probed", "bf16": "no compiler: not probed"}
    yardsticks = kernels.Yardsticks(loops, missing, np.ones(1000, np.float32), threads=1)
    yardsticks.sample()
    assert math.isnan(yardsticks.peak("fp32"))
    assert kernels.share(1.0, yardsticks.peak("fp32")) == "–"
    assert "| fp32 | not probed | no compiler: not probed |" in kernels.probe_lines(yardsticks)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("count", [1, 5])
def test_a_picture_is_drawn(kernels: Any, tmp_path: Path, count: int) -> None:
    results = [
        kernels.Result(f"number {i}", i % 2 == 0, i % 3 == 0, 0.0, 0, [1.0 + 9**i, 2.0 + 9**i]) for i in range(6)
    ]
    file = tmp_path / "kernels.png"
    kernels.plot([kernels.ShapeResults(kernels.SHAPES[0], results)] * count, "a machine", file)
    assert file.read_bytes().startswith(b"\x89PNG")
