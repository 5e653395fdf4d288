"""A GPU that is this machine's memory and ONNX Runtime: for what decoders on a GPU do beside their kernels.

:class:`FakeCuda` has the calls of ``cuda.bindings.runtime`` that the package uses, with addresses of ordinary memory;
:class:`FakeTensorRt` has the parts of TensorRT's API that running an engine uses, where an "engine" is the path of a
standard graph, which ONNX Runtime computes on the processor. Neither says anything about a real GPU or its numbers.
"""

from __future__ import annotations

import ctypes
import enum
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort


class Status(enum.IntEnum):
    """As cudaError_t."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


OK = Status.cudaSuccess


class _Properties:
    name = b"Fake GPU\0\0"
    major, minor = 8, 9
    integrated = 0


class FakeCuda:
    """The calls, and what they did.

    Attributes:
        memory: bytes that there are.
        refused: name of a call -> status that it gives.
        allocated: address -> bytes that are taken there.
        copies: bytes that were copied to and from it.
        launched: how many CUDA graphs were launched.
    """

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self) -> None:
        self.memory = 2**32
        self.refused = dict[str, Status]()
        self.allocated = dict[int, ctypes.Array[Any]]()
        self.copies = 0
        self.launched = 0
        self.recording: list[Callable[[], None]] | None = None

    def cudaMemcpyKind(self, kind: int) -> int:
        return kind

    def _status(self, name: str) -> Status:
        return self.refused.get(name, OK)

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        status = self._status("cudaGetDeviceCount")
        return status, 0 if status else 1

    def cudaGetDeviceProperties(self, _: int) -> tuple[Status, Any]:
        return OK, _Properties()

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return OK, self.memory - self.used, self.memory

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return OK, 13000

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return sum(map(len, self.allocated.values()))

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        if self.used + size > self.memory:
            return Status.cudaErrorMemoryAllocation, 0
        # What nobody has written is no number.
        memory = (ctypes.c_ubyte * size).from_buffer(bytearray(b"\xff" * size))
        address = ctypes.addressof(memory)
        self.allocated[address] = memory
        return OK, address

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.allocated[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Status, int]:
        return OK, 1

    def cudaStreamDestroy(self, _: int) -> tuple[Status]:
        return (OK,)

    def cudaStreamSynchronize(self, _: int) -> tuple[Status]:
        return (self._status("cudaStreamSynchronize"),)

    def cudaMemsetAsync(self, address: int, value: int, size: int, _: int) -> tuple[Status]:
        self._require(address, size)
        ctypes.memset(address, value, size)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, _: int) -> tuple[Status]:
        self._require(target if kind == 1 else source, size)
        ctypes.memmove(target, source, size)
        self.copies += size
        return (OK,)

    def cudaMemcpy2DAsync(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> tuple[Status]:
        for row in range(rows):
            self.cudaMemcpyAsync(target + row * pitch, source + row * source_pitch, width, kind, stream)
        return (OK,)

    def cudaStreamBeginCapture(self, _: int, __: Any) -> tuple[Status]:
        self.recording = []
        return (self._status("cudaStreamBeginCapture"),)

    def cudaStreamEndCapture(self, _: int) -> tuple[Status, Any]:
        recorded, self.recording = self.recording, None
        return OK, recorded

    def cudaGraphInstantiate(self, graph: Any, _: int) -> tuple[Status, Any]:
        return OK, graph

    def cudaGraphDestroy(self, _: Any) -> tuple[Status]:
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: Any, _: int) -> tuple[Status]:
        self.launched += 1
        for work in graph:
            work()
        return (OK,)

    def _require(self, address: int, size: int) -> None:
        """Whether somebody has so much memory there."""
        if not any(begin <= address and address + size <= begin + len(m) for begin, m in self.allocated.items()):
            raise AssertionError(f"{size} bytes at {address:#x} are nobody's")


def array_at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The memory of the fake GPU at ``address``, as an array."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


class FakeContext:
    """Runs a standard graph on what lies at the addresses that it was told."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses = dict[str, int]()
        self.shapes = dict[str, tuple[int, ...]]()
        self.profile: int | None = None

    def set_device_memory(self, _: int, __: int) -> None:
        pass

    def set_optimization_profile_async(self, index: int, _: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _: int) -> bool:
        shapes, addresses, profile = dict(self.shapes), dict(self.addresses), self.profile

        def work() -> None:
            self.engine.compute(shapes, addresses, profile)

        cuda = self.engine.cuda
        if cuda.recording is not None:
            if "cudaGraph" in cuda.refused:
                cuda.refused["cudaStreamBeginCapture"] = cuda.refused["cudaGraph"]
            cuda.recording.append(work)
        else:
            work()
        return not self.engine.broken


class FakeEngine:
    """A standard graph, computed by ONNX Runtime on the processor; its KV cache is written in place.

    Attributes:
        runs: of each, profile and shapes.
        broken: whether runs fail.
    """

    device_memory_size_v2 = 1024

    def __init__(self, cuda: FakeCuda, graph: Path) -> None:
        self.cuda = cuda
        self.broken = False
        self.runs: list[tuple[int | None, dict[str, tuple[int, ...]]]] = []
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(graph), load_external_data=False).graph
        self.values = {value.name: value for value in (*model.input, *model.output)}
        self.inputs = [value.name for value in model.input]
        self.outputs = [value.name for value in model.output]

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], profile: int | None) -> None:
        self.runs.append((profile, shapes))
        feeds = {}
        for name in self.inputs:
            shape = shapes.get(name) or self.get_tensor_shape(name)
            feeds[name] = array_at(addresses[name], shape, self.get_tensor_dtype(name)).copy()
        for name, array in zip(self.outputs, self._session.run(self.outputs, feeds), strict=True):
            array_at(addresses[name], array.shape, array.dtype)[...] = array

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.values[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

    def get_tensor_dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)

    def create_execution_context(self, _: Any) -> FakeContext:
        return FakeContext(self)


class FakeTensorRt:
    """TensorRT's API, as far as sessions need it; an engine file holds the path of a standard graph.

    Attributes:
        engines: that were loaded, by the name of their file.
    """

    class ExecutionContextAllocationStrategy(enum.Enum):
        USER_MANAGED = 2

    class TensorIOMode:
        __members__: ClassVar[dict[str, str]] = {"INPUT": "INPUT", "OUTPUT": "OUTPUT"}

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.engines = dict[str, FakeEngine]()

    def nptype(self, dtype: Any) -> Any:
        return dtype

    def Runtime(self, _: Any) -> FakeTensorRt:
        return self

    def deserialize_cuda_engine(self, data: Any) -> FakeEngine | None:
        path = Path(bytes(data).decode())
        if not path.exists():
            return None
        self.engines[path.name] = FakeEngine(self.cuda, path)
        return self.engines[path.name]
