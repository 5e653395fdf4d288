"""Decoder graphs that take KV caches of a fixed capacity, run on ONNX Runtime's CPU provider.

:class:`OrtRunner` runs standard graphs of float32 or float16, :class:`CountingRunner` portable ones and those for the
CUDA provider. New KV caches hold large numbers wherever nothing was written, so that a mask or a length that is wrong
shows in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto

from biomedgpt_edge.decoder.base import Embeddings, Logits
from biomedgpt_edge.decoder.kv_cache import KeyValues, KvLayout, Values
from biomedgpt_edge.decoder.static_kv import StaticState, explicit_inputs
from biomedgpt_edge.manifest import DecoderSpec
from biomedgpt_edge.splice import EmbeddingTable

Cache = dict[str, npt.NDArray[Any]]
# Far beyond what models compute. Of keys, a product with a query stays within what a mask of -65504 outweighs.
GARBAGE = {"key": 100.0, "value": 1e4}
# Positions by which what is attended to grows, so that there is garbage under the mask nearly always.
ATTENDED_STEP = 16


def open_exact(graph: Path) -> ort.InferenceSession:
    """A session whose products are computed with activations as they are: none is rounded to eight bits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if _has_int8(graph):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _has_int8(graph: Path) -> bool:
    weights = onnx.load(str(graph), load_external_data=False).graph.initializer
    return any(tensor.data_type == TensorProto.INT8 for tensor in weights)


class OrtRunner:
    """A :class:`biomedgpt_edge.decoder.static_kv.Runner` of a standard graph; its KV caches are updated in place.

    Attributes:
        table: for those who run tokens.
        kv: how they are read and written.
        caches: how many were made and not given back.
    """

    table: EmbeddingTable

    def __init__(self, graph: Path, spec: DecoderSpec, capacity: int | None = None) -> None:
        self.session = open_exact(graph)
        halves = any(value.type == "tensor(float16)" for value in self.session.get_inputs())
        self.kv = KvLayout.half_rows(spec) if halves else KvLayout.rows(spec)
        self.caches = 0
        self._capacity = spec.context if capacity is None else capacity
        self._rows = spec.vocabulary

    @property
    def capacity(self) -> int:
        return self._capacity

    def new_cache(self) -> Cache:
        self.caches += 1
        shape, signs = self.kv.shape(self.capacity), np.random.default_rng(0)
        return {
            name: (signs.choice([-1, 1], shape) * GARBAGE[name.partition(".")[0]]).astype(self.kv.dtype)
            for name in self.kv.names
        }

    def free_cache(self, cache: Cache) -> None:
        self.caches -= 1
        cache.clear()

    def read(self, cache: Cache, positions: int) -> Values:
        return np.stack([cache[name][0, :, :positions] for name in self.kv.names])

    def write(self, cache: Cache, values: Values) -> None:
        for name, array in zip(self.kv.names, values, strict=True):
            cache[name][0, :, : array.shape[1]] = array

    def run_tokens(self, cache: Cache, tokens: Sequence[int], start: int) -> Logits:
        return self.run(cache, self.table.lookup(tokens), start, np.arange(len(tokens)))

    def inputs(
        self, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]
    ) -> Mapping[str, npt.NDArray[Any]]:
        """Those of the graph beside the KV cache."""
        attended = min(self.capacity, -(-(start + len(embeddings)) // ATTENDED_STEP) * ATTENDED_STEP)
        given = explicit_inputs(embeddings, start, wanted, attended)
        return {**given, "mask": given["mask"].astype(self.kv.dtype)}

    def run(self, cache: Cache, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        binding, logits = self.session.io_binding(), np.empty((len(wanted), self._rows), np.float32)
        # Held until the run is over: it reads them by their addresses.
        given = {name: np.ascontiguousarray(array) for name, array in self.inputs(embeddings, start, wanted).items()}
        for name, array in {**given, **{f"past_{name}": array for name, array in cache.items()}}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in {"logits": logits, **{f"present_{name}": array for name, array in cache.items()}}.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)
        return logits


class CountingRunner(OrtRunner):
    """The same of a portable graph or one for the CUDA provider, which count positions instead of taking a mask."""

    def inputs(
        self, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]
    ) -> Mapping[str, npt.NDArray[Any]]:
        total = start + len(embeddings)
        return {
            "inputs_embeds": embeddings[np.newaxis],
            "logit_positions": wanted,
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array(total, np.int32),
        }


class RunnerDecoder:
    """A :class:`biomedgpt_edge.decoder.base.Decoder` over a runner."""

    tile = 16

    def __init__(self, runner: OrtRunner, spec: DecoderSpec, table: EmbeddingTable) -> None:
        self.runner = runner
        self.kv = runner.kv
        self.identity = "a test's"
        self._spec = spec
        runner.table = table

    def open(self, capacity: int, start: KeyValues | None = None) -> StaticState:
        return StaticState(self.runner, self._spec, self.kv, capacity, start)
