"""Which TensorRT and CUDA this machine has, and what is said where one is missing or cannot be used."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import biomedgpt_edge.cuda
from biomedgpt_edge.cuda import Buffer, Capture, Stream, find_device, pinned
from biomedgpt_edge.errors import OptionError, PlatformError
from biomedgpt_edge.tensorrt import library as module
from biomedgpt_edge.tensorrt.build import find_target
from biomedgpt_edge.tensorrt.inspection import Layer, Tensor, products, read_layers, summary
from biomedgpt_edge.tensorrt.library import Messages, TensorRt, capability_of, load_tensorrt, require_capability
from fake_gpu import FakeCuda, Status

WORKING = """
__version__ = "10.9.1"


class ILogger:
    ERROR, WARNING = 1, 2

    def __init__(self):
        pass
"""


class Packages:
    """Python packages for TensorRT: those that a test makes, and no others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = set[str]()

    def add(self, name: str, code: str) -> None:
        (self.folder / name).mkdir()
        (self.folder / name / "__init__.py").write_text(code)
        self.names.add(name)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    made, real = Packages(tmp_path), importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return real(name) if name not in module.FLAVOURS or name in made.names else None

    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.syspath_prepend(str(tmp_path))
    hidden = {name: sys.modules.pop(name) for name in module.FLAVOURS if name in sys.modules}
    yield made
    for name in module.FLAVOURS:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


# --- which library ----------------------------------------------------------------------------------------------------


def test_without_tensorrt_it_is_said_what_brings_it(packages: Packages) -> None:
    with pytest.raises(PlatformError, match=r"TensorRT is not installed.*tensorrt-rtx-cu13.*pip install") as caught:
        load_tensorrt()
    assert caught.value.seen == ["tensorrt", "tensorrt_rtx"]
    with pytest.raises(PlatformError, match=r"no Python package tensorrt_rtx\. Install tensorrt-rtx-cu13: pip install"):
        load_tensorrt("tensorrt_rtx")
    with pytest.raises(PlatformError, match="TensorRT is not installed"):
        find_target("sm89")


def test_the_one_for_data_centres_is_taken_where_both_are_there(packages: Packages) -> None:
    for name in module.FLAVOURS:
        packages.add(name, WORKING)
    found = load_tensorrt()
    assert (found.flavour, found.name) == ("tensorrt", "TensorRT 10.9.1")
    assert load_tensorrt("tensorrt_rtx").name == "TensorRT for RTX 10.9.1"


def test_it_is_loaded_once(packages: Packages) -> None:
    packages.add("tensorrt_rtx", WORKING)
    assert load_tensorrt() is load_tensorrt() is load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", r"libnvinfer\.so\.10: cannot open"),
        ("raise OSError('libcudart.so.13 is too old')", "is too old"),
        ("raise RuntimeError('no such CUDA')", "no such CUDA"),
        ("", "__version__"),
        ("__version__ = '10.9.1'", "ILogger"),
    ],
    ids=["a library is missing", "a library is too old", "it refuses to run", "stubs", "half of it"],
)
def test_a_package_whose_library_cannot_be_loaded_is_named_with_the_reason(
    packages: Packages, code: str, reason: str
) -> None:
    packages.add("tensorrt", code)
    with pytest.raises(
        PlatformError,
        match=rf"package tensorrt is there, and its library cannot be loaded: .*{reason}.*Install it again",
    ) as caught:
        load_tensorrt()
    assert caught.value.seen == "tensorrt"


def test_the_other_one_is_taken_where_the_first_cannot_be_loaded(packages: Packages) -> None:
    packages.add("tensorrt", "raise ImportError('libnvinfer.so.10')")
    packages.add("tensorrt_rtx", WORKING)
    assert load_tensorrt().flavour == "tensorrt_rtx"
    with pytest.raises(PlatformError, match="package tensorrt is there"):
        load_tensorrt("tensorrt")


def test_the_first_reason_is_given_where_none_can_be_loaded(packages: Packages) -> None:
    packages.add("tensorrt", "raise ImportError('libnvinfer.so.10')")
    packages.add("tensorrt_rtx", "raise ImportError('libtensorrt_rtx.so.1')")
    with pytest.raises(PlatformError, match=r"libnvinfer\.so\.10"):
        load_tensorrt()


# --- what it says -----------------------------------------------------------------------------------------------------


def test_what_the_library_says_is_kept_and_not_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    library = load_tensorrt("tensorrt_rtx")
    logger, kinds = library.logger, library.api.ILogger
    library.messages.begin()
    with caplog.at_level(logging.DEBUG, logger="biomedgpt_edge"):
        logger.log(kinds.INTERNAL_ERROR, "out of\n   memory")
        logger.log(kinds.ERROR, "x" * 1000)
        logger.log(kinds.WARNING, "slow")
        logger.log(kinds.INFO, "Layers:\nName: a, LayerType: gemm\nBindings:")
        logger.log(kinds.VERBOSE, "details")
    assert library.messages.errors == ["out of memory", "x" * 400]
    assert library.messages.layers == ["Name: a, LayerType: gemm"]
    assert caplog.messages == ["slow"]
    assert capfd.readouterr() == ("", "")
    library.messages.begin()
    assert (library.messages.errors, library.messages.layers) == ([], [])


LINES = [
    "Name: _gemm_myl0_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,-1,64], Strides: [-1,64,1], "
    "Datatype: Half, Format: (Linear) Row major }], Constants: [ { Name: w, Dimensions: [64,32], Datatype: Int4 }, "
    "{ Name: s, Dimensions: [32], Datatype: Half }], Outputs: [ { Name: y, Dimensions: [], Datatype: Float }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a.product][ONNX Layer: b]",
    "Name: __mye1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: ",
    "Name: something else",
]


def test_layers_are_read_from_the_log_of_a_builder() -> None:
    layers = read_layers(LINES)
    assert layers == [
        Layer(
            "_gemm_myl0_3",
            "gemm",
            (Tensor("x", (1, -1, 64), "Half"),),
            (Tensor("w", (64, 32), "Int4"), Tensor("s", (32,), "Half")),
            (Tensor("y", (), "Float"),),
            ("a.product", "b"),
        ),
        Layer("__mye1_0", "shape_call", (), (), (), ()),
    ]
    assert products(layers, ["a.product", "b", "c"]) == {"a.product": {"Int4"}, "b": {"Int4"}, "c": set()}
    assert summary(layers) == "2 layers, weights in Half, Int4, values in Float"


# --- for which GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sm89", "SM89", "sm_89", "8.9", "89"])
def test_a_compute_capability_has_several_spellings(name: str) -> None:
    assert capability_of(name, load_tensorrt("tensorrt_rtx")) == "8.9"


def test_tensorrt_for_rtx_builds_for_the_gpus_that_it_names() -> None:
    library = load_tensorrt("tensorrt_rtx")
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(library.capabilities)
    for capability in library.capabilities:
        require_capability(capability, library)
        assert capability_of(capability, library) == capability


@pytest.mark.parametrize(("device", "words"), [("sm87", r"8\.7 \(Jetson Orin\)"), ("sm90", r"9\.0 \(Hopper\)")])
def test_other_gpus_are_refused_with_what_runs_there(device: str, words: str) -> None:
    with pytest.raises(OptionError, match=rf"and not on {words}\. Use the package tensorrt there.*--device cuda"):
        find_target(device)


@pytest.mark.parametrize("device", ["", "sm", "rtx4090", "sm8900", "-8.9", "8.9.1", "9" * 60])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(OptionError, match="device is '") as caught:
        find_target(device)
    assert len(str(caught.value.seen)) <= 40


def test_tensorrt_for_data_centres_builds_for_the_gpu_that_is_there_alone() -> None:
    library = TensorRt("tensorrt", object(), "11.0", None, Messages())
    assert library.capabilities == ()
    require_capability("9.0", library)
    with pytest.raises(OptionError, match=r"TensorRT 11\.0 builds for the GPU of this machine alone, and sm89 was"):
        capability_of("sm89", library)


def test_engines_are_for_the_gpu_of_this_machine_or_for_its_compute_capability(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = load_tensorrt("tensorrt_rtx")
    monkeypatch.setattr(module, "_loaded", {"tensorrt_rtx": rtx})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    target = find_target()
    assert (target.device, target.capability) == ("8.9", "8.9")
    assert target.description == f"Fake GPU (8.9), with {rtx.name}"
    assert find_target("sm86").description == f"compute capability 8.6, with {rtx.name}"
    other = TensorRt("tensorrt", object(), "11.0", None, Messages())
    monkeypatch.setattr(module, "_loaded", {"tensorrt": other})
    # Its engines run on the very model that they were built on.
    assert find_target().device == "8.9 Fake GPU"


# --- CUDA -------------------------------------------------------------------------------------------------------------


def test_without_the_package_of_cuda_it_is_said_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    biomedgpt_edge.cuda.runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(PlatformError, match=r"cuda-bindings cannot be used: .*pip install cuda-bindings.*JetPack"):
        find_device()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.cudaErrorInsufficientDriver, "this machine has no NVIDIA driver, or one that is too old for this CUDA"),
        (Status.cudaErrorNoDevice, "this machine has no NVIDIA GPU"),
    ],
)
def test_a_missing_driver_and_a_missing_gpu_are_named(gpu: FakeCuda, status: Status, words: str) -> None:
    gpu.refused["cudaGetDeviceCount"] = status
    with pytest.raises(PlatformError, match=rf"{words}: {status.name}\. Install the NVIDIA driver") as caught:
        find_device()
    assert caught.value.seen == status.name


def test_no_gpu_at_all_is_named(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cudaGetDeviceCount", lambda: (Status.cudaSuccess, 0))
    with pytest.raises(PlatformError, match="this machine has no NVIDIA GPU: no GPU"):
        find_device()


def test_the_gpu_is_described(gpu: FakeCuda) -> None:
    buffer = Buffer(2**20, "a test")
    device = find_device()
    assert (device.name, device.capability, device.integrated, device.driver) == ("Fake GPU", "8.9", False, "13.0")
    assert (device.memory, device.free) == (2**32, 2**32 - 2**20)
    buffer.close()
    buffer.close()
    assert find_device().free == 2**32


def test_memory_that_there_is_not_is_a_typed_error_with_its_purpose(gpu: FakeCuda) -> None:
    with pytest.raises(PlatformError, match=r"allocate 8,192 MiB for a test: cudaErrorMemoryAllocation") as caught:
        Buffer(2**33, "a test")
    assert caught.value.seen == "cudaErrorMemoryAllocation"


def test_memory_goes_with_what_has_it(gpu: FakeCuda) -> None:
    buffer, array = Buffer(0, "nothing"), pinned((3, 4), "float16")
    part = array[1:]
    assert (array.shape, len(gpu.allocated), len(gpu.pinned)) == ((3, 4), 1, 1)
    del buffer, array
    assert (len(gpu.allocated), len(gpu.pinned)) == (0, 1)
    del part
    assert gpu.pinned == {}


def test_rows_go_to_addresses_that_are_a_pitch_apart_and_back(gpu: FakeCuda) -> None:
    buffer, stream = Buffer(5 * 64, "rows"), Stream()
    given = pinned((5, 7), "float32")
    given[:] = [[10 * row + column for column in range(7)] for row in range(5)]
    found = pinned((5, 7), "float32")
    buffer.clear(stream)
    stream.upload_rows(buffer.pointer, 64, given)
    stream.download_rows(found, buffer.pointer, 64)
    whole = pinned((5, 16), "float32")
    stream.download(whole, buffer.pointer)
    stream.wait()
    assert found.tolist() == given.tolist()
    assert whole[:, :7].tolist() == given.tolist()
    assert not whole[:, 7:].any()


def test_what_fails_while_it_is_captured_leaves_the_stream_usable(gpu: FakeCuda) -> None:
    stream, buffer = Stream(), Buffer(4, "a number")
    with pytest.raises(ValueError, match="this"), Capture(stream):
        raise ValueError("this")
    array = pinned((1,), "float32")
    array[0] = 3
    stream.upload(buffer.pointer, array)
    array_back = pinned((1,), "float32")
    stream.download(array_back, buffer.pointer)
    stream.wait()
    assert array_back[0] == 3
    assert gpu.graphs == {}
