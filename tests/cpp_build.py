"""The C++ tests and the emulation of a GPU, built once for all tests of a session, whichever process runs them."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]


def built(base: Path) -> Path:
    """The folder with ``kernel_tests``, ``gpu_tests`` and ``_emulated``; ``base`` is the same for all processes."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = base / "cpp"
    folder.mkdir(exist_ok=True)
    with (base / "cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    return folder


def _build(folder: Path) -> None:
    options = [
        "-DBIOMEDGPT_BUILD_TESTS=ON",
        "-DBIOMEDGPT_BUILD_PYTHON=ON",
        "-DBIOMEDGPT_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--parallel", "2", "--target", "kernel_tests", "gpu_tests", "_emulated"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout + done.stderr


def emulated(folder: Path) -> ModuleType:
    """The module ``_emulated``: the decoder's kernels for GPUs in an emulation of one."""
    path = next(folder.glob("_emulated.*"))
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
