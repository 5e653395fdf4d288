"""The few calls of the CUDA runtime that decoders on a GPU need, over cuda-bindings, each checked.

Memory of a device is a :class:`Buffer`, memory that it copies from and to without a detour (page-locked) an array of
:func:`pinned`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PlatformError
from .memory import mebibytes

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: not ordered with the stream of other libraries


@cache
def runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        PlatformError: it is not installed.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError as error:
        raise PlatformError(
            f"the Python package cuda-bindings cannot be used: {error}.",
            seen="cuda-bindings",
            remedy="Install it: pip install cuda-bindings, of the CUDA version of this machine's driver "
            "('cuda-bindings<13' for CUDA 12, as on JetPack 6).",
        ) from error
    return module


def checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call gave beside its status: nothing, a value, or several.

    Raises:
        PlatformError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        code = getattr(status, "name", str(status))
        raise PlatformError(
            f"CUDA cannot {what}: {code}.",
            seen=code,
            remedy="Run 'biomedgpt-edge doctor': it says which driver and GPU there are.",
        )
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        capability: such as "8.9".
        memory, free: bytes.
        integrated: whether it shares the memory of the machine, as on a Jetson.
        driver: newest CUDA version that it runs, such as "13.0".
    """

    name: str
    capability: str
    memory: int
    free: int
    integrated: bool
    driver: str


def find_device() -> Device:
    """The first GPU.

    Raises:
        PlatformError: there is no driver, or no GPU; named.
    """
    cudart = runtime()
    status, count = cudart.cudaGetDeviceCount()
    if int(status) != 0 or count < 1:
        code = "no GPU" if int(status) == 0 else getattr(status, "name", str(status))
        driver = "no NVIDIA driver, or one that is too old for this CUDA" if "Driver" in code else "no NVIDIA GPU"
        raise PlatformError(
            f"this machine has {driver}: {code}.",
            seen=code,
            remedy="Install the NVIDIA driver, or use the device cpu.",
        )
    properties = checked(cudart.cudaGetDeviceProperties(0), "describe the GPU")
    free, total = checked(cudart.cudaMemGetInfo(), "tell the memory of the GPU")
    version = checked(cudart.cudaDriverGetVersion(), "tell the version of the driver")
    name = properties.name
    return Device(
        name=(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)).rstrip("\0"),
        capability=f"{properties.major}.{properties.minor}",
        memory=total,
        free=free,
        integrated=bool(properties.integrated),
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )


class Buffer:
    """Bytes in the memory of the GPU, freed with the object.

    Raises:
        PlatformError: there are not so many.
    """

    def __init__(self, size: int, what: str) -> None:
        cudart = runtime()
        self.size = size
        self.pointer = int(checked(cudart.cudaMalloc(max(size, 1)), f"allocate {mebibytes(size)} for {what}"))
        self._free = weakref.finalize(self, cudart.cudaFree, self.pointer)

    def clear(self, stream: Stream) -> None:
        """Fills it with zeros."""
        checked(runtime().cudaMemsetAsync(self.pointer, 0, self.size, stream.handle), "clear memory")

    def close(self) -> None:
        """Frees it now."""
        self._free()


def pinned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array whose pages stay where they are, so that the GPU copies from and to it by itself.

    Raises:
        PlatformError: the machine gives none.
    """
    cudart, size = runtime(), max(1, np.dtype(dtype).itemsize * math.prod(shape))
    pointer = int(checked(cudart.cudaMallocHost(size), f"lock {mebibytes(size)} of this machine's memory"))
    memory = (ctypes.c_ubyte * size).from_address(pointer)
    weakref.finalize(memory, cudart.cudaFreeHost, pointer)
    count = math.prod(shape)
    array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype, count).reshape(shape)
    return array


class Stream:
    """A queue of work for the GPU.

    Attributes:
        lock: held by whoever puts work into it that belongs together; another thread's copy in the midst of a capture
            would become part of that. A cache may be dropped by the same thread meanwhile.
    """

    def __init__(self) -> None:
        cudart = runtime()
        self.lock = threading.RLock()
        self.handle = int(checked(cudart.cudaStreamCreateWithFlags(_NON_BLOCKING), "make a stream"))
        weakref.finalize(self, cudart.cudaStreamDestroy, self.handle)

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copies an array, C-contiguous, to the GPU; it must stay as it is until :meth:`wait`."""
        self._copy(target, source.ctypes.data, source.nbytes, _TO_DEVICE)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copies from the GPU to an array, C-contiguous, that is filled after :meth:`wait`."""
        self._copy(target.ctypes.data, source, target.nbytes, _TO_HOST)

    def upload_rows(self, target: int, pitch: int, source: npt.NDArray[Any]) -> None:
        """Copies the rows of ``source`` [rows, ...], C-contiguous, to addresses that are ``pitch`` bytes apart."""
        width = source.nbytes // len(source)
        self._copy_rows(target, pitch, source.ctypes.data, width, width, len(source), _TO_DEVICE)

    def download_rows(self, target: npt.NDArray[Any], source: int, pitch: int) -> None:
        """The inverse of :meth:`upload_rows`."""
        width = target.nbytes // len(target)
        self._copy_rows(target.ctypes.data, width, source, pitch, width, len(target), _TO_HOST)

    def wait(self) -> None:
        """Until everything in the queue is done.

        Raises:
            PlatformError: something failed.
        """
        checked(runtime().cudaStreamSynchronize(self.handle), "finish what was asked of the GPU")

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        cudart = runtime()
        checked(cudart.cudaMemcpyAsync(target, source, size, cudart.cudaMemcpyKind(kind), self.handle), "copy")

    def _copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int
    ) -> None:
        cudart = runtime()
        checked(
            cudart.cudaMemcpy2DAsync(
                target, target_pitch, source, source_pitch, width, rows, cudart.cudaMemcpyKind(kind), self.handle
            ),
            "copy rows",
        )


class Capture:
    """What was put into a stream between two calls, to be put there again at once."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._executable: Any = None
        self._collecting = False

    def __enter__(self) -> Capture:
        cudart = runtime()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(cudart.cudaStreamBeginCapture(self._stream.handle, mode), "begin a CUDA graph")
        # What the collector frees would end the capture.
        self._collecting = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._collecting:
            gc.enable()
        cudart = runtime()
        graph = checked(cudart.cudaStreamEndCapture(self._stream.handle), "end a CUDA graph")
        self._executable = checked(cudart.cudaGraphInstantiate(graph, 0), "make a CUDA graph")
        checked(cudart.cudaGraphDestroy(graph), "free a CUDA graph")
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Puts it into the stream."""
        checked(runtime().cudaGraphLaunch(self._executable, self._stream.handle), "launch a CUDA graph")
