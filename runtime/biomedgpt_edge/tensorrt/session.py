"""An engine on the GPU: its contexts, its memory, and one way to run it.

Each profile has an execution context of its own, so that prompts and single tokens follow each other without switching;
they share the memory for what is computed on the way. Inputs and outputs have buffers for the largest shapes, here in
memory that stays in place, and there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cuda import Buffer, Capture, Stream, pinned
from ..errors import PlatformError
from .library import TensorRt
from .profiles import Profile, profile_for
from .store import RUNTIME_CACHE

Array = npt.NDArray[Any]
_Key = tuple[Any, ...]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    """A run, captured, and the context that it belongs to."""

    context: Any
    capture: Capture


class EngineSession:
    """An engine that was built for this GPU.

    Args:
        path: the file, which is mapped while it is read.
        profiles: those that it was built for.
        shared: inputs and outputs whose memory is given with each run.
        rows: by output, how many rows it has at most; its other dimensions are fixed.

    Raises:
        PlatformError: TensorRT or the GPU does not take it.
    """

    def __init__(
        self,
        library: TensorRt,
        path: Path,
        profiles: Sequence[Profile],
        *,
        shared: Sequence[str] = (),
        rows: Mapping[str, int],
    ) -> None:
        self._library = library
        self._profiles = list(profiles)
        self.stream = Stream()
        library.messages.begin()
        self._runtime = library.api.Runtime(library.logger)
        self._engine = self._made(self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r")), path.name)
        self._cache_file = path.with_name(f"{path.stem}.{RUNTIME_CACHE}")
        self._settings = self._runtime_settings()
        self._scratch = Buffer(max(1, self._engine.device_memory_size_v2), f"what {path.stem} computes on the way")
        self._contexts = [self._context(index) for index in range(len(self._profiles))]
        self._inputs = {
            name: self._buffers(name, max(math.prod(p.shapes[name][2]) for p in self._profiles if name in p.shapes))
            for name in self._names("INPUT", shared)
            if any(name in profile.shapes for profile in self._profiles)
        }
        self._fixed = {
            name: self._buffers(name, math.prod(self._engine.get_tensor_shape(name)))
            for name in self._names("INPUT", shared)
            if name not in self._inputs
        }
        self._outputs = {
            name: self._buffers(name, count * self._row(name))
            for name, count in rows.items()
            if name in self._names("OUTPUT", shared)
        }
        self._seen = set[_Key]()
        self._graphs = dict[_Key, _Graph]()
        self._capturing = library.flavour == "tensorrt"
        self._ran = set[int]()

    def run(
        self,
        length: int,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, int] | None = None,
        key: tuple[Any, ...] | None = None,
    ) -> dict[str, Array]:
        """Runs it once, and waits for it.

        Args:
            length: positions, by which the profile is chosen.
            inputs: by name, C-contiguous arrays of the engine's element types.
            outputs: by name, the shape of each that is wanted.
            shared: addresses on the GPU.
            key: runs with equal keys have equal shapes and addresses, and become a CUDA graph where the engine allows.

        Raises:
            PlatformError: the GPU failed.
        """
        index = profile_for(self._profiles, length)
        if index is None:
            raise ValueError(f"no profile takes {length} positions")
        with self.stream.lock:
            for name, array in inputs.items():
                self._upload(name, array)
            shapes = {name: array.shape for name, array in inputs.items()}
            self._enqueue(index, shapes, shared or {}, None if key is None else (index, *key))
            found = {name: self._download(name, shape) for name, shape in outputs.items()}
            self.stream.wait()
            if index not in self._ran:
                self._ran.add(index)
                self._save_runtime_cache()
            # Another thread may run it next, in the same memory.
            return {name: array.copy() for name, array in found.items()}

    def _upload(self, name: str, array: Array) -> None:
        memory, buffer = self._inputs.get(name) or self._fixed[name]
        staged = memory[: array.size].reshape(array.shape)
        np.copyto(staged, array, casting="no")
        self.stream.upload(buffer.pointer, staged)

    def _download(self, name: str, shape: tuple[int, ...]) -> Array:
        memory, buffer = self._outputs[name]
        found: Array = memory[: math.prod(shape)].reshape(shape)
        self.stream.download(found, buffer.pointer)
        return found

    def _save_runtime_cache(self) -> None:
        """Keeps what was compiled for this GPU when a profile ran first: the next start does not compile it again."""
        if self._settings is None:
            return
        cache = self._settings.get_runtime_cache()
        data = None if cache is None else cache.serialize()
        if data is not None:
            partial = self._cache_file.with_name(f"{self._cache_file.name}.partial")
            # A cache that cannot be written is compiled again next time.
            with contextlib.suppress(OSError):
                partial.write_bytes(memoryview(data))
                partial.replace(self._cache_file)

    def _enqueue(
        self, index: int, shapes: Mapping[str, tuple[int, ...]], shared: Mapping[str, int], key: _Key | None
    ) -> None:
        """Puts a run into the stream; one whose key comes for the second time becomes a CUDA graph, from then on."""
        if key is not None and key in self._graphs:
            self._graphs[key].capture.launch()
            return
        self._execute(self._contexts[index], shapes, shared)
        if key is None or not self._capturing:
            return
        if key not in self._seen:
            self._seen.add(key)
            return
        try:
            self._graphs[key] = self._captured(index, shapes, shared)
        except PlatformError as error:
            _log.warning("no CUDA graphs: %s", error.message)
            self._capturing = False

    def _captured(self, index: int, shapes: Mapping[str, tuple[int, ...]], shared: Mapping[str, int]) -> _Graph:
        """A run as a CUDA graph, with a context of its own: what a context chose for other shapes would be lost."""
        context = self._context(index)
        for name, (_, buffer) in (self._inputs | self._fixed | self._outputs).items():
            self._require(context.set_tensor_address(name, buffer.pointer), f"take the address of {name}")
        # What is chosen and copied in a context's first run must not be captured. The same run again changes nothing.
        self._execute(context, shapes, shared)
        self.stream.wait()
        with Capture(self.stream) as capture:
            self._require(context.execute_async_v3(self.stream.handle), "run an engine")
        return _Graph(context, capture)

    def _execute(self, context: Any, shapes: Mapping[str, tuple[int, ...]], shared: Mapping[str, int]) -> None:
        for name, shape in shapes.items():
            self._require(context.set_input_shape(name, shape), f"take {name} of {list(shape)}")
        for name, pointer in shared.items():
            self._require(context.set_tensor_address(name, pointer), f"take the address of {name}")
        self._require(context.execute_async_v3(self.stream.handle), "run an engine")

    def forget(self, key: tuple[Any, ...]) -> None:
        """Drops CUDA graphs whose keys begin so: their addresses are no longer valid."""
        with self.stream.lock:
            self._graphs = {known: graph for known, graph in self._graphs.items() if known[1 : 1 + len(key)] != key}
            self._seen = {known for known in self._seen if known[1 : 1 + len(key)] != key}

    def _runtime_settings(self) -> Any:
        """What ``tensorrt_rtx`` has for its contexts: CUDA graphs of its own, and kernels compiled when first run."""
        if self._library.flavour == "tensorrt":
            return None
        settings = self._engine.create_runtime_config()
        settings.cuda_graph_strategy = self._library.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        allocation = self._library.api.ExecutionContextAllocationStrategy.USER_MANAGED
        settings.set_execution_context_allocation_strategy(allocation)
        cache = settings.create_runtime_cache()
        if self._cache_file.exists():
            cache.deserialize(self._cache_file.read_bytes())  # one that does not fit is ignored
        settings.set_runtime_cache(cache)
        return settings

    def _context(self, index: int) -> Any:
        strategy = self._library.api.ExecutionContextAllocationStrategy.USER_MANAGED
        given = strategy if self._settings is None else self._settings
        context = self._made(self._engine.create_execution_context(given), f"profile {index}")
        context.set_device_memory(self._scratch.pointer, self._scratch.size)
        self._require(context.set_optimization_profile_async(index, self.stream.handle), f"use profile {index}")
        self.stream.wait()
        return context

    def _names(self, mode: str, shared: Sequence[str]) -> list[str]:
        wanted = self._library.api.TensorIOMode.__members__[mode]
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [name for name in names if self._engine.get_tensor_mode(name) == wanted and name not in shared]

    def _row(self, name: str) -> int:
        return math.prod(size for size in self._engine.get_tensor_shape(name) if size > 0)

    def _buffers(self, name: str, count: int) -> tuple[Array, Buffer]:
        """Memory here and on the GPU for an input or output of so many elements, which the contexts are told."""
        dtype = np.dtype(self._library.api.nptype(self._engine.get_tensor_dtype(name)))
        memory, buffer = pinned((count,), dtype), Buffer(count * dtype.itemsize, name)
        for context in self._contexts:
            self._require(context.set_tensor_address(name, buffer.pointer), f"take the address of {name}")
        return memory, buffer

    def _made(self, made: Any, what: str) -> Any:
        if made is None:
            raise self._failure(f"load {what}")
        return made

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise self._failure(what)

    def _failure(self, what: str) -> PlatformError:
        said = "; ".join(self._library.messages.errors[-2:]) or "no reason given"
        return PlatformError(
            f"{self._library.name} cannot {what}: {said}.",
            seen=said,
            remedy="Build the engines again ('biomedgpt-edge engines build --again'), or use --device cuda.",
        )
