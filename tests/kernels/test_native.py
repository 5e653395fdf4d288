"""What the extension says about itself, and the C++ test runner."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from biomedgpt_edge import _native

ROOT = Path(__file__).resolve().parents[2]


def test_paths_are_best_first_and_supported() -> None:
    paths = list(_native.splice_paths())
    cpu = _native.cpu_features()
    assert paths[-1] == "portable"
    assert ("avx2" in paths) == (cpu["avx2"] and cpu["fma"] and cpu["f16c"])
    for name in ("amx_bf16", "avx512_bf16", "avx512", "neon_bf16", "neon_fp16", "neon"):
        assert (name in paths) <= cpu[name]
    pairs = ("avx512", "avx512_bf16") if cpu["amx"] else ("avx512_bf16", "avx512")
    order = ("amx_bf16", *pairs, "avx2", "neon_bf16", "neon", "neon_fp16", "portable")
    assert paths == [name for name in order if name in paths]


def test_cuda_questions_never_raise() -> None:
    assert _native.cuda_compiled() in (True, False)
    assert _native.cuda_device_count() >= 0


def test_version_is_the_one_in_pyproject() -> None:
    assert f'\nversion = "{_native.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("names", "cases"), [(["decoder_takes_every"], 1), (["no_such_case"], 0)])
def test_a_runner_runs_the_cases_that_are_named(cpp_folder: Path, names: list[str], cases: int) -> None:
    run = subprocess.run([cpp_folder / "gpu_tests", *names], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1] == f"{cases} cases, 0 failures"
    assert run.returncode == (0 if cases else 1), "what is misspelt is no success"


@pytest.mark.parametrize("runner", ["kernel_tests", "gpu_tests"])
def test_cpp_runners_pass(runner: str, cpp_folder: Path) -> None:
    done = subprocess.run([str(cpp_folder / runner)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
