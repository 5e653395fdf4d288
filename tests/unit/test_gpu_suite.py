"""The suite for GPUs, on a machine without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biomedgpt_edge import _native
from support import benchmark_script


@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    with benchmark_script("gpu_suite") as module:
        yield module


@pytest.fixture(scope="module")
def dry(suite: Any, cpp_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a dry run prints, and its JSON."""
    path = tmp_path_factory.mktemp("suite") / "found.json"
    command = [sys.executable, str(suite.__file__), "--dry", "--work", str(cpp_folder), "--json", str(path)]
    # The same numbers each time: with others, a tolerance is missed once in some hundred runs.
    environment = {**os.environ, "BIOMEDGPT_TEST_SEED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_a_dry_run_goes_through_every_step(dry: tuple[str, dict[str, Any]]) -> None:
    printed, found = dry
    names = {figure["name"] for figure in found["figures"]}
    assert {"copy", "norm and qkv", "gate_up", "attend at 128", "token at 0", "prompt to token"} <= names
    assert {"choose, greedy", "step with logits", "torch: token at 128, bf16, eager"} <= names
    assert found["failed"] == {}
    assert "seed 1: " in printed
    assert "0 failures" in printed
    # Prompts are others in every run, and near ties among them.
    for bundle in ("the demo bundle", "the tiny reference"):
        assert re.search(rf"{bundle}: [012] of 2 greedy tokens are the processor's, 2 within 3 %", printed)
    first = sorted(name for name in names if name.startswith("first token"))
    assert [name.partition(", its encoder ")[2] for name in first] == [
        "on the processor",
        "by onnxruntime, float16",
        "by torch, float16",
    ]
    # Each names what it lacks; with it missing, the graph of the last one was written and loaded all the same.
    assert found["skipped"]["onnxruntime"] == "dry: the graph is written and loaded, and not run"


def test_a_dry_run_says_that_its_times_mean_nothing(dry: tuple[str, dict[str, Any]]) -> None:
    printed, found = dry
    assert found["dry"] is True
    assert "mean nothing" in printed
    assert all(figure["share"] is None for figure in found["figures"])


def test_a_failed_check_names_its_numbers(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_tests").write_text("#!/bin/sh\necho a check failed\nexit 1\n")
    (tmp_path / "gpu_tests").chmod(0o700)
    monkeypatch.delenv("BIOMEDGPT_TEST_SEED", raising=False)
    monkeypatch.setattr(suite.time, "time_ns", lambda: 41)
    with pytest.raises(suite.Failed, match="BIOMEDGPT_TEST_SEED=41: gpu_tests exited with 1: a check failed"):
        suite.check_kernels(suite.Run(dry=True, work=tmp_path, rounds=1))
    monkeypatch.setenv("BIOMEDGPT_TEST_SEED", "7")
    with pytest.raises(suite.Failed, match="BIOMEDGPT_TEST_SEED=7: "):
        suite.check_kernels(suite.Run(dry=True, work=tmp_path, rounds=1))


def test_without_rdkit_only_the_tiny_reference_is_left_out(cpp_folder: Path, suite: Any) -> None:
    """As on a machine that has torch and onnxruntime, and nothing of ours."""
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name.partition('.')[0] == 'rdkit': raise ImportError(name, name='rdkit')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.path.insert(0, {str(Path(suite.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import gpu_suite\n"
        f"run = gpu_suite.Run(dry=True, work=Path({str(cpp_folder)!r}), rounds=1)\n"
        "gpu_suite.check_tokens(run)\n"
        "print(run.skipped)"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert re.search("the demo bundle: [012] of 2 greedy tokens are the processor's", done.stdout), done.stderr
    assert "{'tokens of the tiny reference': 'rdkit is not installed'}" in done.stdout


SANITIZER = """#!/bin/sh
echo "$@" >>{calls}
case "$2" in
    memcheck) echo '========= ERROR SUMMARY: 0 errors' ;;
    racecheck) echo '========= RACECHECK SUMMARY: 1 hazard displayed'; exit 9 ;;
    *) exec sleep 60 ;;
esac
"""


def test_the_sanitizer_looks_at_cases_on_the_gpu_and_has_its_time(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = suite.Run(dry=False, work=tmp_path, rounds=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(suite.Skip, match="compute-sanitizer is not on the PATH"):
        suite.check_sanitizer(run)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    played, calls = tmp_path / "compute-sanitizer", tmp_path / "calls"
    played.write_text(SANITIZER.format(calls=calls))
    played.chmod(0o700)
    monkeypatch.setattr(suite, "_SANITIZER_LIMIT", 1)
    suite.check_sanitizer(run)
    assert "memcheck: ========= ERROR SUMMARY: 0 errors" in capsys.readouterr().out
    assert list(run.failed) == ["sanitizer, racecheck"]
    assert "1 hazard" in run.failed["sanitizer, racecheck"]
    assert run.skipped == {"sanitizer, synccheck": "it took more than 1 s"}
    assert calls.read_text().splitlines()[0].endswith("/gpu_tests _on_the_gpu cuda_")
    late = suite.Run(dry=False, work=tmp_path, rounds=1, began=suite.time.monotonic() - suite._SUITE_SECONDS)
    suite.check_sanitizer(late)
    assert set(late.skipped.values()) == {"the other steps left no time for it"}
    assert len(late.skipped) == 3


def test_what_was_measured_before_a_run_is_cut_off_is_kept(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(run: Any) -> None:
        run.figures.append(suite.Figure("a step", 1, 5.0))

    def cut_off(run: Any) -> None:
        raise KeyboardInterrupt

    for name in ("find_device", "build", "check_kernels"):
        monkeypatch.setattr(suite, name, lambda run: None)
    monkeypatch.setattr(suite, "check_tokens", found)
    monkeypatch.setattr(suite, "time_kernels", cut_off)
    path = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--dry", "--json", str(path)])
    assert [figure["name"] for figure in json.loads(path.read_text())["figures"]] == ["a step"]


def test_without_a_gpu_the_suite_says_so(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "found.json"
    assert suite.main(["--json", str(path)]) == 1
    failed = json.loads(path.read_text(encoding="utf-8"))["failed"]
    assert "nvidia-smi cannot be asked" in failed["device"]
    assert "--dry" in failed["device"]


@pytest.mark.parametrize("arguments", [["--without", "everything"], ["--rounds", "0"]])
def test_what_cannot_be_is_refused(suite: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        suite.main(arguments)
    assert caught.value.code == 2
    assert "--without takes checks, tokens" in capsys.readouterr().err


def test_shares_are_of_the_limit_that_binds(suite: Any) -> None:
    run = suite.Run(dry=False, work=Path(), rounds=1, rates={"bytes": 4e12, "operations": 8e14})
    run.figures = [
        suite.Figure("token", 1, 1000, bytes=3.4e9),
        suite.Figure("prompt", 512, 10_000, bytes=3.4e9, operations=6.8e12),
        suite.Figure("choose", 1, 5),
    ]
    suite.add_shares(run)
    assert [figure.share for figure in run.figures] == [pytest.approx(0.85), pytest.approx(0.85), None]


def test_matrices_have_the_size_of_their_records(suite: Any) -> None:
    import numpy as np

    for rows, columns, matrices in ((40, 200, 1), (64, 128, 2)):
        records, *_ = suite.random_matrix(np.random.default_rng(0), rows, columns, 128, matrices)
        panels, groups, size = _native.int4_records_shape(rows, columns, 128)
        assert records.shape == (matrices * panels, groups * size)


def test_a_token_of_the_full_shape_reads_the_weights_of_a_7b(suite: Any) -> None:
    # 6.6 billion weights of four bits, with a scale of 16 bits for 128 of them.
    assert suite.weight_bytes(suite.FULL) == pytest.approx(6.607e9 * (0.5 + 2 / 128), rel=1e-3)
    assert suite.weight_bytes(suite.Shape(128, 256, 4, 32, 300, 0, 10)) == 300 * 128 * (0.5 + 2 / 128)
