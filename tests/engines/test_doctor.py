"""``doctor`` lists each piece that --device cuda and --device tensorrt need, and what brings one that is missing."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from biomedgpt_edge import ort_cuda
from biomedgpt_edge.cli.main import main
from biomedgpt_edge.cuda import Device
from biomedgpt_edge.errors import PlatformError
from biomedgpt_edge.tensorrt import library
from fake_gpu import FakeCuda, Status


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--json"]) == 0, "answers come without a GPU"
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    return {finding["what"]: finding for finding in report["findings"]}


def test_the_gpu_and_its_driver(gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["GPU"]["found"] == "Fake GPU, compute capability 8.9, 4.0 GiB, driver for CUDA 13.0"
    assert found["GPU"]["remedy"] == ""
    assert found["cuda-bindings"]["found"]


@pytest.mark.parametrize("status", [Status.cudaErrorInsufficientDriver, Status.cudaErrorNoDevice])
def test_no_driver_or_no_gpu_is_a_fact_with_a_remedy(
    gpu: FakeCuda, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.refused["cudaGetDeviceCount"] = status
    found = findings(capsys)["GPU"]
    assert status.name in found["found"]
    assert "Install the NVIDIA driver" in found["remedy"]


def test_without_cuda_bindings_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise PlatformError("the Python package cuda-bindings cannot be used.", remedy="pip install cuda-bindings")

    monkeypatch.setattr("biomedgpt_edge.cuda.runtime", missing)
    found = findings(capsys)
    assert "cuda-bindings" not in found
    assert found["GPU"]["remedy"] == "pip install cuda-bindings"


def test_an_onnxruntime_without_the_provider_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)["CUDA provider"]
    assert found["found"] == "not in this onnxruntime"
    assert "pip uninstall -y onnxruntime" in found["remedy"]


@pytest.mark.parametrize("version", ["13.0", "12.9"])
def test_each_library_of_the_provider_is_there_or_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
    monkeypatch.setattr(ort_cuda.build_and_package_info, "cuda_version", version, raising=False)
    monkeypatch.setattr(ort_cuda.ort, "preload_dlls", lambda: print("Failed to load"), raising=False)
    monkeypatch.setattr(ort_cuda, "_load_error", lambda name: "" if "cublas" in name else "no such file")
    found = findings(capsys)
    major = version.split(".")[0]
    assert found["CUDA provider"]["found"] == f"in this onnxruntime, built with CUDA {version}"
    assert found[f"libcublas.so.{major}"] == {
        "what": f"libcublas.so.{major}",
        "found": "there",
        "ok": True,
        "remedy": "",
    }
    assert found["libcuda.so.1"]["remedy"].endswith("the NVIDIA driver")
    assert found["libcudnn.so.9"]["remedy"].endswith(f"nvidia-cudnn-cu{major}")


def test_a_provider_of_an_unknown_cuda_lists_no_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort_cuda, "has_provider", lambda: True)
    monkeypatch.setattr(ort_cuda.build_and_package_info, "cuda_version", "", raising=False)
    found = findings(capsys)
    assert "does not say" in found["CUDA provider"]["found"]
    assert not [name for name in found if name.startswith("lib")]


def test_tensorrt_says_for_which_gpus_it_builds(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)["TensorRT"]["found"]
    assert found.startswith("TensorRT for RTX 1.")
    assert "8.9" in found
    assert "9.0" not in found


def test_without_tensorrt_the_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    hidden = library.FLAVOURS
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else real(name, *rest))
    found = findings(capsys)["TensorRT"]
    assert found["found"] == "not installed"
    assert "tensorrt-rtx-cu13" in found["remedy"]
    assert "JetPack" in found["remedy"]


def test_a_tensorrt_whose_library_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(flavour: str) -> None:
        raise PlatformError(
            f"the Python package {flavour} is there, and its library cannot be loaded.", remedy="Again."
        )

    monkeypatch.setattr(library, "load_tensorrt", broken)
    found = findings(capsys)["TensorRT"]
    assert "cannot be loaded" in found["found"]
    assert found["remedy"] == "Again."


def test_memory_that_is_shared_with_the_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: FakeCuda
) -> None:
    orin = Device("Orin", "8.7", 8 * 2**30, 6 * 2**30, True, "12.6")
    monkeypatch.setattr("biomedgpt_edge.cuda.find_device", lambda: orin)
    assert "8.0 GiB, shared with the machine" in findings(capsys)["GPU"]["found"]
