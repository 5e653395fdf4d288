"""The decoder on ONNX Runtime's CPU provider.

The KV cache is one buffer per layer and side, bound as the graph's input and output at once, so that a step appends
in place and copies nothing. A step reuses one binding and one set of buffers.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..bundle import Bundle
from ..errors import ClosedError, KernelArgumentError, PlatformError
from ..int4_ops import register_int4_ops
from ..manifest import RECORDS, DecoderSpec
from ..ort_session import Signature, open_session, running
from ..splice import EmbeddingTable
from .base import Embeddings, Logits


class OnnxDecoder:
    """The decoder graph of a bundle, loaded.

    Raises:
        BundleCorruptError: the graph cannot be loaded or does not fit the manifest.
        PlatformError: it lies in records, and the operators for these cannot be used here.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self.spec = bundle.manifest.decoder
        self.table = bundle.embeddings
        inputs, outputs = _signature(self.spec)
        self.session = open_session(
            bundle.file(self.spec.graph),
            threads=threads,
            inputs=inputs,
            outputs=outputs,
            register=register_int4_ops if self.spec.layout == RECORDS else None,
        )

    def open(self, capacity: int) -> OnnxState:
        """See :meth:`Decoder.open`."""
        return OnnxState(self.session, self.spec, self.table, capacity)


class OnnxState:
    """One sequence: KV buffers of fixed capacity, float32 as the CPU kernels are fastest with."""

    def __init__(self, session: ort.InferenceSession, spec: DecoderSpec, table: EmbeddingTable, capacity: int) -> None:
        self._session = session
        self._spec = spec
        self._table = table
        self._length = 0
        self._capacity = capacity
        self._cache = _allocate(spec, capacity)
        self._last_position = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._token = np.zeros((1, spec.hidden_size), np.float32)
        self._step_logits = np.zeros((1, spec.vocabulary), np.float32)
        # Bindings hold addresses: what they point to must live as long as the state does.
        self._step_position = np.zeros(1, np.int64)
        self._step_binding: ort.IOBinding | None = None

    @property
    def length(self) -> int:
        """See :class:`DecoderState`."""
        return self._length

    def prefill(self, embeddings: Embeddings) -> Logits:
        """See :class:`DecoderState`."""
        logits: Logits = self.logits(embeddings, np.array([len(embeddings) - 1], np.int64))[0]
        return logits

    def logits(self, embeddings: Embeddings, positions: npt.NDArray[np.int64]) -> Logits:
        """Appends ``embeddings`` float32 ``[T, hidden]``; returns logits ``[n, vocabulary]`` at ``positions``."""
        self._check_embeddings(embeddings)
        logits = np.empty((len(positions), self._spec.vocabulary), np.float32)
        self._advance(len(embeddings))
        self._run(self._bind(embeddings, positions, logits))
        return logits

    def step(self, token: int) -> Logits:
        """See :class:`DecoderState`."""
        if self._step_binding is None:
            self._step_binding = self._bind(self._token, self._step_position, self._step_logits)
        self._advance(1)
        self._table.lookup_into(token, self._token)
        self._run(self._step_binding)
        logits: Logits = self._step_logits[0]
        return logits

    def close(self) -> None:
        """See :class:`DecoderState`."""
        self._cache = {}
        self._step_binding = None
        self._capacity = 0

    def __enter__(self) -> OnnxState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_embeddings(self, embeddings: Embeddings) -> None:
        """The graph reads them by address, so nothing else would notice other strides or types."""
        shape = (max(1, len(embeddings)), self._spec.hidden_size)
        if embeddings.dtype != np.float32 or embeddings.shape != shape or not embeddings.flags.c_contiguous:
            order = "" if embeddings.flags.c_contiguous else ", not contiguous"
            raise KernelArgumentError(
                f"embeddings are {embeddings.dtype}{list(embeddings.shape)}{order}.",
                seen=str(list(embeddings.shape)),
                limit=f"float32 [T, {self._spec.hidden_size}], contiguous, T at least 1",
                remedy=f"Give float32 [T, {self._spec.hidden_size}] in C order (numpy.ascontiguousarray).",
            )

    def _advance(self, positions: int) -> None:
        if not self._cache:
            raise ClosedError("the decoder state is closed.")
        if self._length + positions > self._capacity:
            raise ValueError(f"{self._length} + {positions} positions do not fit a KV cache of {self._capacity}")
        self._length += positions
        self._last_position[0] = self._length - 1
        self._total_length[()] = self._length

    def _bind(
        self, embeddings: Embeddings, positions: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]
    ) -> ort.IOBinding:
        binding = self._session.io_binding()
        _bind_input(binding, "inputs_embeds", embeddings[np.newaxis])
        _bind_input(binding, "logit_positions", positions)
        _bind_input(binding, "seqlens_k", self._last_position)
        _bind_input(binding, "total_sequence_length", self._total_length)
        _bind_output(binding, "logits", logits)
        for name, buffer in self._cache.items():
            _bind_input(binding, f"past_{name}", buffer)
            _bind_output(binding, f"present_{name}", buffer)
        return binding

    def _run(self, binding: ort.IOBinding) -> None:
        with running(self._spec.graph):
            self._session.run_with_iobinding(binding)


def _allocate(spec: DecoderSpec, capacity: int) -> dict[str, npt.NDArray[np.float32]]:
    """The KV buffers; calloc'ed, so pages that no position has reached cost address space, not memory."""
    shape = (1, spec.kv_heads, capacity, spec.head_size)
    names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("key", "value")]
    try:
        return {name: np.zeros(shape, np.float32) for name in names}
    except (MemoryError, ValueError) as error:
        size = len(names) * 4 * math.prod(shape)
        raise PlatformError(
            f"the KV cache of {capacity:,} positions takes {size / 2**30:,.1f} GiB, which this machine does not give.",
            seen=size,
            remedy="Ask for fewer new tokens, or shorten the prompt.",
        ) from error


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _signature(spec: DecoderSpec) -> tuple[Signature, Signature]:
    cache: tuple[str, list[int | None]] = ("tensor(float)", [1, spec.kv_heads, None, spec.head_size])
    names = [f"{part}.{layer}" for layer in range(spec.layers) for part in ("key", "value")]
    inputs: dict[str, tuple[str, list[int | None]]] = {
        "inputs_embeds": ("tensor(float)", [1, None, spec.hidden_size]),
        "logit_positions": ("tensor(int64)", [None]),
        "seqlens_k": ("tensor(int32)", [1]),
        "total_sequence_length": ("tensor(int32)", []),
        **{f"past_{name}": cache for name in names},
    }
    outputs: dict[str, tuple[str, list[int | None]]] = {
        "logits": ("tensor(float)", [None, spec.vocabulary]),
        **{f"present_{name}": cache for name in names},
    }
    return inputs, outputs
