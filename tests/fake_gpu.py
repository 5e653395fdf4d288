"""A GPU that is this machine's memory and ONNX Runtime: for what decoders on a GPU do beside their kernels.

:class:`FakeCuda` has the calls of ``cuda.bindings.runtime`` that the package uses, with addresses of ordinary memory;
what is put into a stream happens when somebody waits for it, and not before. :class:`FakeTensorRt` has the parts of
TensorRT's API that running an engine uses, where an "engine" names a standard graph, which ONNX Runtime computes on the
processor. Neither says anything about a real GPU or its numbers.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from biomedgpt_edge.tensorrt import build
from biomedgpt_edge.tensorrt.library import Flavour, Messages, TensorRt
from biomedgpt_edge.tensorrt.profiles import Profile

Work = Callable[[], object]


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
    """The calls, and what they did. What a call gives beside its status is None where it fails, as there.

    Attributes:
        memory: bytes that there are.
        refused: name of a call -> status that it gives.
        allocated: address -> bytes of the GPU that are taken there.
        pinned: the same of this machine's memory.
        graphs: CUDA graphs that can be launched.
        captured: how many there were altogether.
        launched: how often they were launched.
    """

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self) -> None:
        self.memory = 2**32
        self.refused = dict[str, Status]()
        self.allocated = dict[int, ctypes.Array[Any]]()
        self.pinned = dict[int, ctypes.Array[Any]]()
        self.graphs = dict[int, list[Work]]()
        self.captured = 0
        self.launched = 0
        self.recording: list[Work] | None = None
        self._lock = threading.RLock()
        self._queues = dict[int, list[Work]]()
        self._streams = itertools.count(1)

    def cudaMemcpyKind(self, kind: int) -> int:
        return kind

    def _status(self, name: str) -> Status:
        return self.refused.get(name, OK)

    def cudaGetDeviceCount(self) -> tuple[Status, int | None]:
        status = self._status("cudaGetDeviceCount")
        return status, None if status else 1

    def cudaGetDeviceProperties(self, _: int) -> tuple[Status, Any]:
        return OK, _Properties()

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return OK, self.memory - self.used, self.memory

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return OK, 13000

    # --- memory -------------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes of the GPU that are taken."""
        with self._lock:
            return sum(map(len, self.allocated.values()))

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        with self._lock:
            if self.used + size > self.memory:
                return Status.cudaErrorMemoryAllocation, None
            return self._take(self.allocated, size)

    def cudaMallocHost(self, size: int) -> tuple[Status, int | None]:
        return self._take(self.pinned, size)

    def _take(self, taken: dict[int, ctypes.Array[Any]], size: int) -> tuple[Status, int | None]:
        # What nobody has written is no number.
        memory = (ctypes.c_ubyte * size).from_buffer(np.full(size, 0xFF, np.uint8))
        address = ctypes.addressof(memory)
        taken[address] = memory
        return OK, address

    def cudaFree(self, address: int) -> tuple[Status]:
        with self._lock:
            for stream in self._queues:
                self.finish(stream)
            del self.allocated[address]
        return (OK,)

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        del self.pinned[address]
        return (OK,)

    def require(self, address: int, size: int) -> None:
        """Somebody has so much of the GPU's memory there."""
        with self._lock:
            taken = [(begin, begin + len(memory)) for begin, memory in self.allocated.items()]
        if not any(begin <= address and address + size <= end for begin, end in taken):
            raise AssertionError(f"{size} bytes at {address:#x} are nobody's")

    # --- streams ------------------------------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Status, int]:
        stream = next(self._streams)
        with self._lock:
            self._queues[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        with self._lock:
            del self._queues[stream]
        return (OK,)

    def put(self, stream: int, work: Work) -> None:
        """Puts something into a stream, or into the CUDA graph that is being captured."""
        with self._lock:
            (self._queues[stream] if self.recording is None else self.recording).append(work)

    def finish(self, stream: int) -> None:
        """Does what was put into a stream."""
        with self._lock:
            queue, self._queues[stream] = self._queues[stream], []
            for work in queue:
                work()

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        if self.recording is not None:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self.finish(stream)
        return (self._status("cudaStreamSynchronize"),)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Status]:
        return self._put_over(stream, address, size, lambda: ctypes.memset(address, value, size))

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        there = target if kind == 1 else source
        return self._put_over(stream, there, size, lambda: ctypes.memmove(target, source, size))

    def _put_over(self, stream: int, address: int, size: int, work: Work) -> tuple[Status]:
        """Puts something into a stream that needs memory of the GPU now and then."""
        self.require(address, size)
        self.put(stream, lambda: (self.require(address, size), work()))
        return (OK,)

    def cudaMemcpy2DAsync(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> tuple[Status]:
        assert width <= min(pitch, source_pitch)
        for row in range(rows):
            self.cudaMemcpyAsync(target + row * pitch, source + row * source_pitch, width, kind, stream)
        return (OK,)

    # --- CUDA graphs --------------------------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, _: int, __: Any) -> tuple[Status]:
        status = self._status("cudaStreamBeginCapture")
        self.recording = None if status else []
        return (status,)

    def cudaStreamEndCapture(self, _: int) -> tuple[Status, Any]:
        recorded, self.recording = self.recording, None
        status = self._status("cudaStreamEndCapture")
        return status, None if status else recorded

    def cudaGraphInstantiate(self, graph: list[Work], _: int) -> tuple[Status, int]:
        self.captured += 1
        self.graphs[self.captured] = list(graph)
        return OK, self.captured

    def cudaGraphDestroy(self, _: Any) -> tuple[Status]:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:
        self.launched += 1
        for work in self.graphs[graph]:
            self.put(stream, work)
        return (OK,)


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
        self.profile = -1

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.cuda.require(address, size)

    def set_optimization_profile_async(self, index: int, _: int) -> bool:
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return self._fits(name)

    def _fits(self, name: str) -> bool:
        shape = self.shapes[name]
        if name not in self.engine.profiles[self.profile]:
            return shape == self.engine.get_tensor_shape(name)
        low, _, high = self.engine.profiles[self.profile][name]
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, shapes, addresses, profile = self.engine, dict(self.shapes), dict(self.addresses), self.profile
        fitting = all(map(self._fits, shapes))
        if engine.broken or not fitting:
            engine.messages.errors.append("an error of this fake" if fitting else f"shapes of no profile: {shapes}")
            return False
        engine.cuda.put(stream, lambda: engine.compute(shapes, addresses, profile))
        return True


class FakeEngine:
    """A standard graph, computed by ONNX Runtime on the processor; its KV cache is written in place.

    Attributes:
        profiles: shapes by input.
        runs: of each, profile and shapes.
        broken: whether runs fail.
        settings: of its contexts, where it has some.
    """

    device_memory_size_v2 = 1024

    def __init__(self, cuda: FakeCuda, messages: Messages, graph: Path, profiles: list[dict[str, Any]]) -> None:
        self.cuda = cuda
        self.messages = messages
        self.profiles = profiles
        self.broken = False
        self.settings: FakeRuntimeConfig | None = None
        self.runs: list[tuple[int, dict[str, tuple[int, ...]]]] = []
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(graph), load_external_data=False).graph
        self.values = {value.name: value for value in (*model.input, *model.output)}
        self.inputs = [value.name for value in model.input]
        self.outputs = [value.name for value in model.output]

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], profile: int) -> None:
        self.runs.append((profile, shapes))
        binding, sizes = self._session.io_binding(), dict[str, int]()
        for name in self.inputs:
            shape = shapes.get(name) or self.get_tensor_shape(name)
            sizes |= {dim.dim_param: size for dim, size in zip(self._dims(name), shape, strict=True)}
            binding.bind_input(name, "cpu", 0, *self._at(addresses[name], shape, name))
        for name in self.outputs:
            shape = tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in self._dims(name))
            binding.bind_output(name, "cpu", 0, *self._at(addresses[name], shape, name))
        self._session.run_with_iobinding(binding)

    def _at(self, address: int, shape: tuple[int, ...], name: str) -> tuple[Any, tuple[int, ...], int]:
        dtype = self.get_tensor_dtype(name)
        self.cuda.require(address, math.prod(shape) * dtype.itemsize)
        return dtype, shape, address

    def _dims(self, name: str) -> Any:
        return self.values[name].type.tensor_type.shape.dim

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> FakeTensorRt.TensorIOMode:
        modes = FakeTensorRt.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in self._dims(name))

    def get_tensor_dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        self.settings = FakeRuntimeConfig()
        return self.settings

    def create_execution_context(self, given: Any) -> FakeContext:
        allocation = given.allocation if isinstance(given, FakeRuntimeConfig) else given
        assert allocation is FakeTensorRt.ExecutionContextAllocationStrategy.USER_MANAGED
        return FakeContext(self)


class FakeRuntimeConfig:
    """What TensorRT for RTX has for contexts, and its cache of compiled kernels."""

    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None
        self.allocation: Any = None
        self.read = b""
        self._cache: FakeRuntimeConfig | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> bool:
        self.allocation = strategy
        return True

    def create_runtime_cache(self) -> FakeRuntimeConfig:
        return self

    def set_runtime_cache(self, cache: FakeRuntimeConfig) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> FakeRuntimeConfig | None:
        return self._cache

    def deserialize(self, data: bytes) -> bool:
        self.read = bytes(data)
        return self.read.startswith(b"kernels")

    def serialize(self) -> bytes:
        return b"kernels after " + self.read


class FakeTensorRt:
    """TensorRT's API, as far as sessions need it, and engines for it.

    Args:
        folder: where the graphs of engines are kept.

    Attributes:
        library: which has this one as its module.
        built: names of engines, in order.
        engines: that were loaded last, by name.
    """

    class ExecutionContextAllocationStrategy(enum.Enum):
        USER_MANAGED = 2

    class CudaGraphStrategy(enum.Enum):
        WHOLE_GRAPH_CAPTURE = 1

    class ComputeCapability(enum.Enum):
        SM89 = 8009

    class Builder:
        build_serialized_network_to_stream = None

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    def __init__(self, cuda: FakeCuda, folder: Path, flavour: Flavour) -> None:
        self.cuda = cuda
        self.messages = Messages()
        self.library = TensorRt(flavour, self, "11.0", None, self.messages)
        self.built = list[str]()
        self.engines = dict[str, FakeEngine]()
        self._folder = folder

    def install(self, patch: pytest.MonkeyPatch) -> FakeTensorRt:
        """Takes the place of the library, its builder included."""
        patch.setattr(build, "load_tensorrt", lambda wanted=None: self.library)
        patch.setattr(build, "require_supported", lambda *arguments: None)
        patch.setattr(build, "build_engine", self.build)
        return self

    def nptype(self, dtype: Any) -> Any:
        return dtype

    def Runtime(self, _: Any) -> FakeTensorRt:
        return self

    def deserialize_cuda_engine(self, data: Any) -> FakeEngine | None:
        try:
            listing = json.loads(bytes(data))
        except ValueError:
            self.messages.errors.append("Error Code 1: the engine is not one of these")
            return None
        engine = FakeEngine(self.cuda, self.messages, Path(listing["graph"]), listing["profiles"])
        self.engines[listing["name"]] = engine
        return engine

    def build(
        self, target: Any, graph: Path, profiles: Sequence[Profile], out: Path, context: int, report: Any
    ) -> list[Any]:
        """Writes what stands for an engine, whose graph is kept; see ``build_engine``."""
        self.built.append(out.stem)
        kept = Path(shutil.copytree(graph.parent, self._folder / str(len(self.built)))) / graph.name
        model = onnx.load(str(kept), load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past_", "present_")):
                value.type.tensor_type.shape.dim[2].dim_value = context
        kept.write_bytes(model.SerializeToString())
        shapes = [dict(profile.shapes) for profile in profiles]
        out.write_text(json.dumps({"name": out.stem, "graph": str(kept), "profiles": shapes}))
        return []
