"""The decoder on ONNX Runtime's CUDA provider: everything bound on the GPU, and a CUDA graph for single tokens."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..bundle import Bundle
from ..cuda import Buffer, Stream, pinned
from ..device_cache import Verify
from ..errors import BioMedGPTError, OptionError
from ..generate import PREFILL_CHUNK
from ..manifest import DecoderSpec, ProteinEncoderSpec
from ..ort_cuda import GPU, PROVIDER, open_cuda_session
from ..ort_session import Signature, running
from ..portable import Derivation, derived_graph, of_decoder
from ..speculation import DRAFT
from .base import Embeddings, Logits
from .gpu_cache import GpuCache, GpuCaches
from .gpu_decoder import GpuDecoder
from .kv_cache import KvLayout

# Rows of logits in one call: a token and those that may be drafted behind it.
STEP_TOKENS = 1 + DRAFT
# Of runs that are not to become CUDA graphs.
_NO_GRAPH = "-1"
# By which a step may differ when it is launched as a CUDA graph: kernels may be chosen otherwise, in float16.
_TOLERANCE = 1e-2
_log = logging.getLogger(__name__)


class CudaDecoder(GpuDecoder):
    """The decoder of a bundle, loaded on the GPU; a :class:`Decoder`, and the :class:`Runner` of its states.

    Attributes:
        capacity: positions of a KV cache: those of the model.

    Raises:
        OptionError: the bundle has no graph for this provider.
        PlatformError: the provider or what it needs is missing, or the GPU has too little memory.
        BundleCorruptError: the graph cannot be loaded or does not fit the manifest.
    """

    def __init__(self, bundle: Bundle, *, verify: Verify = "once") -> None:
        self.spec = bundle.manifest.decoder
        path = cuda_graph(bundle, self.spec, of_decoder(bundle), verify)
        self.table = bundle.embeddings
        self.kv = KvLayout.half_rows(self.spec)
        self.capacity = self.spec.context
        self.identity = f"{bundle.digest}, onnxruntime {ort.__version__}, {PROVIDER}, float16"
        self._stream = Stream()
        inputs, outputs = _signature(self.spec, self.kv)
        self._session = open_cuda_session(
            path, inputs=inputs, outputs=outputs, stream=self._stream.handle, cuda_graphs=True
        )
        self._buffers = _Buffers(self.spec)
        self._caches = GpuCaches(self.kv, self.capacity, self._stream, self._forget)
        self._bindings = dict[tuple[int, int, int], ort.IOBinding]()
        self._graphs = dict[int, int]()
        self._numbers = itertools.count(1)
        self._capturing = True
        self._check_graphs()

    def run(self, cache: GpuCache, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        """See :class:`Runner`."""
        with self._stream.lock:
            return self._run(cache, embeddings, start, wanted)

    def _run(self, cache: GpuCache, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        length, count, buffers = len(embeddings), len(wanted), self._buffers
        captured = self._capturing and length == 1
        buffers.fill(self._stream, embeddings, wanted, start + length - 1)
        # Only a bound of the work, which a CUDA graph holds for ever: positions are counted by seqlens_k.
        buffers.total[()] = self.capacity if captured else start + length
        key = (cache.number, length, count)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bind(cache, length, count)
            if length <= STEP_TOKENS:
                self._bindings[key] = binding
        options = ort.RunOptions()
        if captured and cache.number not in self._graphs:
            self._graphs[cache.number] = next(self._numbers)
        options.add_run_config_entry("gpu_graph_id", str(self._graphs[cache.number]) if captured else _NO_GRAPH)
        with running(self.spec.graph):
            self._session.run_with_iobinding(binding, options)
        logits = buffers.host_logits[:count]
        self._stream.download(logits, buffers.logits.pointer)
        self._stream.wait()
        # Another sequence may run next, in the same memory.
        own: Logits = logits.copy()
        return own

    def _bind(self, cache: GpuCache, length: int, count: int) -> ort.IOBinding:
        binding, spec, buffers = self._session.io_binding(), self.spec, self._buffers
        for name, dtype, shape, buffer in (
            ("inputs_embeds", np.float32, [1, length, spec.hidden_size], buffers.embeddings),
            ("logit_positions", np.int64, [count], buffers.wanted),
            ("seqlens_k", np.int32, [1], buffers.last),
        ):
            binding.bind_input(name, *GPU, dtype, shape, buffer.pointer)
        # The provider reads this one on the processor.
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, [], buffers.total.ctypes.data)
        binding.bind_output("logits", *GPU, np.float32, [count, spec.vocabulary], buffers.logits.pointer)
        shape = list(self.kv.shape(self.capacity))
        for name, address in self._caches.addresses(cache).items():
            binding.bind_input(f"past_{name}", *GPU, np.float16, shape, address)
            binding.bind_output(f"present_{name}", *GPU, np.float16, shape, address)
        return binding

    def _forget(self, number: int) -> None:
        with self._stream.lock:
            self._bindings = {key: binding for key, binding in self._bindings.items() if key[0] != number}
            graph = self._graphs.pop(number, None)
            # Older versions of ONNX Runtime keep a captured graph as long as the session.
            if graph is not None and hasattr(self._session, "release_captured_graph"):
                self._session.release_captured_graph(graph)

    def _check_graphs(self) -> None:
        """Compares steps as CUDA graphs with plain ones, at two lengths, and gives them up where they differ."""
        given = np.random.default_rng(0).standard_normal((6, self.spec.hidden_size)).astype(np.float32) * 0.02
        last = np.zeros(1, np.int64)
        with self.open(len(given)) as state:
            cache = state.cache
            logits = dict[bool, list[Logits]]()
            for captured in (False, True):
                self._capturing = captured
                try:
                    self.run(cache, given[:3], 0, last)
                    logits[captured] = [self.run(cache, given[at : at + 1], at, last) for at in (3, 4, 5)]
                except BioMedGPTError as error:
                    if not captured:
                        raise
                    _log.warning("no CUDA graphs: %s", error.message)
                    self._capturing = False
                    return
        for plain, graph in zip(logits[False], logits[True], strict=True):
            difference = float(np.abs(plain - graph).max()) / max(float(np.abs(plain).max()), 1e-9)
            if not difference <= _TOLERANCE:
                _log.warning("no CUDA graphs: a step as one differs by %.1e of the largest logit", difference)
                self._capturing = False
                return


class _Buffers:
    """What runs read and write, here in memory that stays in place, and on the GPU."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.host_embeddings = pinned((PREFILL_CHUNK, spec.hidden_size), np.float32)
        self.host_logits: npt.NDArray[np.float32] = pinned((STEP_TOKENS, spec.vocabulary), np.float32)
        self.host_wanted = pinned((STEP_TOKENS,), np.int64)
        self.host_last = pinned((1,), np.int32)
        self.total = np.zeros((), np.int32)
        self.embeddings = Buffer(self.host_embeddings.nbytes, "embeddings")
        self.logits = Buffer(self.host_logits.nbytes, "logits")
        self.wanted = Buffer(self.host_wanted.nbytes, "positions")
        self.last = Buffer(self.host_last.nbytes, "a length")

    def fill(self, stream: Stream, embeddings: Embeddings, wanted: npt.NDArray[np.int64], last: int) -> None:
        """Puts what a run reads into the stream."""
        self.host_embeddings[: len(embeddings)] = embeddings
        self.host_wanted[: len(wanted)] = wanted
        self.host_last[0] = last
        stream.upload(self.embeddings.pointer, self.host_embeddings[: len(embeddings)])
        stream.upload(self.wanted.pointer, self.host_wanted[: len(wanted)])
        stream.upload(self.last.pointer, self.host_last)


def cuda_graph(
    bundle: Bundle, spec: DecoderSpec | ProteinEncoderSpec, derivation: Derivation | None, verify: Verify
) -> Path:
    """The graph for this provider, over the bundle's data or over what is derived from it.

    Raises:
        OptionError: the bundle has none.
        PlatformError, BundleCorruptError: see :func:`derived_graph`.
    """
    if spec.cuda is None:
        raise OptionError(
            f"{bundle.path} holds no graphs for the CUDA provider.",
            seen=bundle.manifest.precision,
            remedy="Export it with this version and precision int4 or fp16, or add them with 'biomedgpt-export "
            "relayout' on a workstation.",
        )
    if derivation is None:
        return bundle.file(spec.cuda)
    return derived_graph(derivation, verify).with_name(Path(spec.cuda).name)


def _signature(spec: DecoderSpec, kv: KvLayout) -> tuple[Signature, Signature]:
    cache: tuple[str, list[int | None]] = ("tensor(float16)", [1, kv.kv_heads, None, kv.width])
    inputs: dict[str, Any] = {
        "inputs_embeds": ("tensor(float)", [1, None, spec.hidden_size]),
        "logit_positions": ("tensor(int64)", [None]),
        "seqlens_k": ("tensor(int32)", [1]),
        "total_sequence_length": ("tensor(int32)", []),
        **{f"past_{name}": cache for name in kv.names},
    }
    outputs: dict[str, Any] = {
        "logits": ("tensor(float)", [None, spec.vocabulary]),
        **{f"present_{name}": cache for name in kv.names},
    }
    return inputs, outputs
