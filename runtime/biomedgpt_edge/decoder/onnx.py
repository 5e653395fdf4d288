"""The decoder on ONNX Runtime's CPU provider.

The KV cache is one buffer per layer and side, bound as the graph's input and output at once, so that a step appends
in place and copies nothing. Steps reuse a binding and a set of buffers for each number of tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..bundle import Bundle
from ..errors import ClosedError, KernelArgumentError, PlatformError
from ..int4_ops import register_int4_ops
from ..manifest import RECORDS, DecoderSpec
from ..onnx_header import Header, read_header
from ..ort_session import Signature, identity, open_session, running
from ..splice import EmbeddingTable
from .base import Embeddings, Logits
from .graph import ChosenGraph
from .kv_cache import KeyValues, KvElement, KvLayout, Values, kv_layout

# Positions by which a KV cache grows. One large buffer would not grow by itself: numpy asks for huge pages from 4 MiB
# on, and since each head has its own stretch, the first position alone would touch nearly all of them. Small pages
# would keep to what is used, but then attention reads them slower, which costs more than growing does.
GROWTH = 256
# MLAS computes rows of a matrix in blocks of 4 or more that differ by instruction set, and what is left over by another
# kernel; a single row is attended to by yet another one. So rows agree where calls are cut at multiples of the blocks.
# With the operators of csrc/ort nothing that a row goes through depends on the number of rows, unless some products of
# a decoder in records are not theirs: a head in int8, or matrices with zero points.
TILE, RECORDS_TILE = 16, 1
_IN_BLOCKS = {("com.microsoft", "MatMulNBits"), ("com.microsoft", "GroupQueryAttention"), ("", "MatMul")}
CACHE_LINE = 64


class OnnxDecoder:
    """The decoder of a bundle, loaded: its own graph, or another one of the same model.

    Attributes:
        layout: of the graph.
        tile: see :class:`Decoder`.

    Args:
        kv_cache: what keys and values are stored as; see :func:`kv_layout`.

    Raises:
        BundleCorruptError: the graph cannot be loaded or does not fit the manifest.
        OptionError: the KV cache of this graph cannot be stored so.
        PlatformError: it lies in records, and the operators for these cannot be used here.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        graph: ChosenGraph | None = None,
        kv_cache: KvElement | None = None,
    ) -> None:
        graph = ChosenGraph.of(bundle, bundle.manifest.decoder) if graph is None else graph
        self.spec = bundle.manifest.decoder
        self.layout = graph.layout
        self.table = bundle.embeddings
        self.kv = kv_layout(self.spec, self.layout, kv_cache)
        inputs, outputs = _signature(self.spec, self.kv)
        header = read_header(graph.path)
        self.tile = TILE if header.operators & _IN_BLOCKS else RECORDS_TILE
        if self.layout == RECORDS:
            _read_ahead(graph.path.parent, header)
        self.session = open_session(
            graph.path,
            threads=threads,
            inputs=inputs,
            outputs=outputs,
            register=register_int4_ops if self.layout == RECORDS else None,
        )
        self.identity = f"{identity(threads)}, {self.layout}, KV cache {self.kv.element}"

    def open(self, capacity: int, start: KeyValues | None = None) -> OnnxState:
        """See :meth:`Decoder.open`.

        Raises:
            KernelArgumentError: ``start`` is not of this decoder.
        """
        return OnnxState(self.session, self.spec, self.kv, self.table, capacity, start)


@dataclass(frozen=True, eq=False)
class _Steps:
    """A binding for n tokens, and the buffers that it holds addresses of: [n, hidden], [n] and [n, vocabulary]."""

    embeddings: Embeddings
    positions: npt.NDArray[np.int64]
    logits: Logits
    binding: ort.IOBinding


class OnnxState:
    """One sequence: KV buffers that grow up to a capacity."""

    def __init__(
        self,
        session: ort.InferenceSession,
        spec: DecoderSpec,
        kv: KvLayout,
        table: EmbeddingTable,
        capacity: int,
        start: KeyValues | None = None,
    ) -> None:
        self._session = session
        self._spec = spec
        self._kv = kv
        self._table = table
        self._length = 0
        self._capacity = capacity
        self._room = 0
        self._cache = dict.fromkeys(kv.names, np.zeros(kv.shape(0), kv.dtype))
        self._last_position = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._steps: dict[int, _Steps] = {}
        if start is not None:
            self._begin(start)

    @property
    def length(self) -> int:
        """See :class:`DecoderState`."""
        return self._length

    def reserve(self, positions: int) -> None:
        """See :class:`DecoderState`."""
        if not self._cache:
            raise ClosedError("the decoder state is closed.")
        if positions > self._capacity:
            raise ValueError(f"{positions} positions do not fit a KV cache of {self._capacity}")
        if positions <= self._room:
            return
        room = min(self._capacity, -(-positions // GROWTH) * GROWTH)
        self._steps = {}
        held = self._kv.entries(self._length)
        for name, old in self._cache.items():
            buffer = _allocate(self._kv, room)
            buffer[..., :held, :] = old[..., :held, :]
            self._cache[name] = buffer
        self._room = room

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
        logits: Logits = self.steps((token,))[0]
        return logits

    def steps(self, tokens: Sequence[int]) -> Logits:
        """See :class:`DecoderState`."""
        self._advance(len(tokens))
        call = self._steps.get(len(tokens))
        if call is None:
            call = self._steps[len(tokens)] = self._bound_steps(len(tokens))
        for row, token in enumerate(tokens):
            self._table.lookup_into(token, call.embeddings[row : row + 1])
        self._run(call.binding)
        return call.logits

    def truncate(self, length: int) -> None:
        """See :class:`DecoderState`."""
        if not 0 <= length <= self._length:
            raise ValueError(f"a KV cache of {self._length} positions cannot be cut to {length}")
        self._length = length

    def key_values(self) -> KeyValues:
        """See :class:`DecoderState`."""
        held, leading = self._kv.entries(self._length), (0,) * len(self._kv.leading)
        return KeyValues(self._length, np.stack([buffer[leading][:, :held] for buffer in self._cache.values()]))

    def close(self) -> None:
        """See :class:`DecoderState`."""
        self._cache = {}
        self._steps = {}
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

    def _begin(self, start: KeyValues) -> None:
        array, shape = start.array, self._kv.stacked(start.positions)
        if array.dtype != self._kv.dtype or array.shape != shape:
            raise KernelArgumentError(
                f"keys and values are {array.dtype}{list(array.shape)}.",
                seen=str(list(array.shape)),
                limit=f"{self._kv.dtype} {list(shape)} for {start.positions} positions",
                remedy="Take them from a state of the same decoder.",
            )
        self.reserve(start.positions)
        self._length = start.positions
        for buffer, values in zip(self._cache.values(), array, strict=True):
            buffer[..., : values.shape[1], :] = values

    def _bound_steps(self, count: int) -> _Steps:
        spec = self._spec
        embeddings = np.zeros((count, spec.hidden_size), np.float32)
        logits = np.zeros((count, spec.vocabulary), np.float32)
        positions = np.arange(count, dtype=np.int64)
        return _Steps(embeddings, positions, logits, self._bind(embeddings, positions, logits))

    def _advance(self, positions: int) -> None:
        self.reserve(self._length + positions)
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
        if not self._kv.in_blocks:  # says nothing that the last position does not
            _bind_input(binding, "total_sequence_length", self._total_length)
        _bind_output(binding, "logits", logits)
        for name, buffer in self._cache.items():
            _bind_input(binding, f"past_{name}", buffer)
            _bind_output(binding, f"present_{name}", buffer)
        return binding

    def _run(self, binding: ort.IOBinding) -> None:
        with running(self._spec.graph):
            self._session.run_with_iobinding(binding)


def _read_ahead(folder: Path, header: Header) -> None:
    """Has the system read weights that will be mapped while the session is made; what is in memory it leaves alone.

    The first token needs all of them. Read page by page as it comes to them, they took half as long again.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for name in {tensor.location for tensor in header.tensors}:
        with (folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _allocate(kv: KvLayout, room: int) -> Values:
    """One side of one layer, on a cache line: vectors of 64 bytes would be read from two lines each otherwise."""
    shape = kv.shape(room)
    size = kv.dtype.itemsize * math.prod(shape)
    try:
        memory = np.zeros(size + CACHE_LINE, np.uint8)
    except (MemoryError, ValueError) as error:
        size = kv.bytes(room)
        raise PlatformError(
            f"the KV cache of {room:,} positions takes {size / 2**30:,.1f} GiB, which this machine does not give.",
            seen=size,
            remedy="Ask for fewer new tokens, or shorten the prompt.",
        ) from error
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(kv.dtype).reshape(shape)


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _signature(spec: DecoderSpec, kv: KvLayout) -> tuple[Signature, Signature]:
    *leading, heads, _, width = kv.shape(0)
    # The width of a block says the element type, which the graph leaves open.
    shape: list[int | None] = [*leading, heads, None, None if kv.in_blocks else width]
    cache = "tensor(uint8)" if kv.in_blocks else "tensor(float)", shape
    inputs: dict[str, tuple[str, list[int | None]]] = {
        "inputs_embeds": ("tensor(float)", [1, None, spec.hidden_size]),
        "logit_positions": ("tensor(int64)", [None]),
        "seqlens_k": ("tensor(int32)", [1]),
        **({} if kv.in_blocks else {"total_sequence_length": ("tensor(int32)", [])}),
        **{f"past_{name}": cache for name in kv.names},
    }
    outputs: dict[str, tuple[str, list[int | None]]] = {
        "logits": ("tensor(float)", [None, spec.vocabulary]),
        **{f"present_{name}": cache for name in kv.names},
    }
    return inputs, outputs
