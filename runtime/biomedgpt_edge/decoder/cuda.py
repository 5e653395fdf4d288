"""The decoder on our own CUDA kernels (csrc/decoder): the bundle's int4 records as they are, and a graph per token.

It takes the records that the processor reads, so that nothing is derived for it, and needs no library but the driver.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _native
from .._native import CudaArray
from ..bundle import Bundle
from ..errors import KernelArgumentError, OptionError, PlatformError
from ..manifest import RECORDS, DecoderSpec
from ..onnx_header import INT4_MATRICES, Product, inside_tensors, read_header
from ..portable import Sources, group_size_of
from ..sampling import Choice
from ..tensor_names import BIAS, INT8_VALUES, ROPE_COS, ROPE_SIN, SCALES, records_name
from .base import Embeddings, Logits
from .kv_cache import KeyValues, KvLayout, Values
from .static_kv import StaticState

_HEAD, _WEIGHT = "lm_head", ".weight"
# What else a decoder's graph holds: the axis of a Squeeze.
_CONSTANTS = frozenset({"axis_0"})
# As TensorProto.DataType numbers it.
_FLOAT = 1

_Matrix = tuple[npt.NDArray[np.uint8], int, int, int, int, npt.NDArray[np.float32] | None]


def require_gpu() -> None:
    """Whether our kernels can run here.

    Raises:
        PlatformError: not; says why.
    """
    if not _native.cuda_compiled():
        raise PlatformError(
            "this installation has no CUDA kernels: there was no CUDA compiler where it was built.",
            remedy="Install it again from its sources where nvcc is on the PATH, or use --device cuda or tensorrt.",
        )
    if not _native.cuda_device_count():
        raise PlatformError(
            "there is no NVIDIA GPU that CUDA can use.",
            remedy="Look at 'nvidia-smi': the driver has to be there, and not older than the CUDA toolkit that "
            "the kernels were built with. Or use --device cpu.",
        )


class NativeDecoder:
    """The decoder of a bundle, loaded on the GPU; a :class:`Decoder`, and the :class:`Runner` of its states.

    Args:
        context: positions of a KV cache; left out, those of the model.
        native: the class to use; left out, that of csrc.

    Attributes:
        capacity: positions of a KV cache.
        lock: held by whoever else puts work into :attr:`stream`, which may be captured at other times.

    Raises:
        OptionError: the bundle's decoder is nothing that the kernels compute; named.
        PlatformError: this build has no CUDA kernels, there is no GPU, or it has too little memory: with sizes.
    """

    # Few and many rows take different kernels; see :attr:`Decoder.tile`.
    tile = 16

    def __init__(self, bundle: Bundle, *, context: int | None = None, native: type[Any] | None = None) -> None:
        if native is None:
            require_gpu()
        self.spec = bundle.manifest.decoder
        self.kv = KvLayout.half_rows(self.spec)
        self.capacity = self.spec.context if context is None else context
        if isinstance(context, bool) or not 0 < self.capacity <= self.spec.context:
            raise OptionError(
                f"context is {context}.",
                seen=context,
                limit=f"1 to {self.spec.context}",
                remedy="Leave it out for the model's own.",
            )
        model = _Model(bundle).read()
        self._rows = model["head"][1]
        try:
            self._native = (native or _native.CudaDecoder)(model, self.capacity)
        except KernelArgumentError as error:
            raise _unfit(bundle, error.message) from error
        self.identity = f"{bundle.digest}, csrc/decoder {_native.__version__}, {self._native.device}, float16"
        self.lock = threading.RLock()
        self._starts = list[tuple[weakref.ref[Values], CudaArray]]()

    @property
    def stream(self) -> int:
        """The ``cudaStream_t`` that everything is put into."""
        return int(self._native.stream)

    def wait(self) -> None:
        """Until everything that was put into it is done.

        Raises:
            PlatformError: something of it failed.
        """
        self._native.wait()

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> CudaArray:
        """Memory of the GPU, whatever it holds.

        Raises:
            PlatformError: there is not so much.
        """
        array: CudaArray = self._native.array(shape, dtype)
        return array

    def splice(self, out: CudaArray, segments: tuple[Any, ...], *, allow_16bit: bool) -> None:
        """Queues a splice with the decoder's own table; see ``_native.CudaDecoder.splice``."""
        self._native.splice(out, segments, allow_16bit)

    def open(self, capacity: int, start: KeyValues | None = None) -> NativeState:
        """See :meth:`Decoder.open`.

        Raises:
            PromptTooLongError: KV caches have fewer positions.
            PlatformError: the GPU has no memory for another KV cache.
            KernelArgumentError: ``start`` is not of this decoder.
        """
        return NativeState(self, self.spec, self.kv, capacity, start)

    def new_cache(self) -> int:
        """See :class:`Runner`."""
        return int(self._native.new_cache())

    def free_cache(self, cache: int) -> None:
        """See :class:`Runner`."""
        self._native.free_cache(cache)

    def trim(self) -> None:
        """Frees what waits for the next sequence: somebody else is about to need memory."""
        self._native.trim()

    def read(self, cache: int, positions: int) -> Values:
        """See :class:`Runner`."""
        values = np.empty(self.kv.stacked(positions), self.kv.dtype)
        self._native.read_cache(cache, self._by_head(values))
        return values

    def write(self, cache: int, values: Values) -> None:
        """See :class:`Runner`. What many sequences begin with is brought to the GPU once, for as long as it is here."""
        with self.lock:
            # Looked at now, and not told when they end: whoever keeps them is not to keep the decoder.
            self._starts = [start for start in self._starts if start[0]() is not None]
            there = next((brought for known, brought in self._starts if known() is values), None)
            if there is None:
                rows = self._by_head(np.ascontiguousarray(values))
                there = self.array(rows.shape, "float16")
                there.upload(rows)
                self._starts.append((weakref.ref(values), there))
            self._native.write_cache(cache, there)

    def _by_head(self, values: Values) -> Values:
        return values.reshape(2 * self.spec.layers * self.spec.kv_heads, -1)

    def run(self, cache: int, embeddings: Embeddings | CudaArray, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        """See :class:`Runner`; at most 8 are wanted. Embeddings may lie on the GPU, where :meth:`array` made them."""
        return self._run(cache, embeddings, len(embeddings), start, [int(row) for row in wanted])

    def run_tokens(self, cache: int, tokens: Sequence[int], start: int) -> Logits:
        """See :class:`Runner`; at most 8."""
        return self._run(cache, [int(token) for token in tokens], len(tokens), start, list(range(len(tokens))))

    def run_chosen(self, cache: int, token: int, start: int, choice: Choice) -> tuple[int, float]:
        """Appends a token; the one chosen behind it, and the largest logit. Nothing else comes back."""
        with self.lock:
            return self._native.run([cache], [start], [int(token)], [0], None, [choice])[0]

    def _run(
        self, cache: int, x: Embeddings | CudaArray | list[int], count: int, start: int, wanted: list[int]
    ) -> Logits:
        logits = np.empty((len(wanted), self._rows), np.float32)
        with self.lock:
            self._native.run([cache] * count, list(range(start, start + count)), x, wanted, logits)
        return logits


class NativeState(StaticState):
    """One sequence; see :class:`DecoderState` and :class:`ChoosingState`."""

    _runner: NativeDecoder

    def step_chosen(self, token: int, choice: Choice) -> tuple[int, float]:
        """See :class:`ChoosingState`."""
        chosen = self._runner.run_chosen(self._cache_for(1), token, self._length, choice)
        self._length += 1
        return chosen


@dataclass
class _Layer:
    norm: str
    next_norm: str

    @classmethod
    def of(cls, index: int) -> _Layer:
        before = "layers.0.input_layernorm" if index == 0 else f"layers.{index - 1}.next_layernorm"
        return cls(before, f"layers.{index}.next_layernorm")


class _Model:
    """A bundle's decoder as the kernels take it; every tensor that its graph holds has to have a place in it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._spec: DecoderSpec = bundle.manifest.decoder
        if self._spec.layout != RECORDS:
            precision = bundle.manifest.precision
            make = (
                "relayout B --decoder-layout records --out C" if precision == "int4" else "bundle --precision int4 ..."
            )
            raise OptionError(
                f"the decoder of {bundle.path} ({precision}) does not lie in records, which the kernels for GPUs read.",
                seen=self._spec.layout,
                limit=RECORDS,
                remedy=f"Make a bundle in records with 'biomedgpt-export {make}', or use --device cuda.",
            )
        path = bundle.file(self._spec.graph)
        self._header = read_header(path)
        self._sources = Sources(path.parent, self._header)
        # Small ones, as all but matrices are in small models.
        self._inside = inside_tensors(path)
        self._products = {product.inputs[1]: product for product in self._header.products}
        self._used = set[str](_CONSTANTS)

    def read(self) -> dict[str, Any]:
        """What ``_native.CudaDecoder`` takes.

        Raises:
            OptionError: the graph lacks something that a decoder has, or has something beside it.
        """
        spec, table = self._spec, self._bundle.embeddings
        layers = tuple(self._layer(index) for index in range(spec.layers))
        half = spec.head_size // 2
        model = {
            "hidden": spec.hidden_size,
            "intermediate": spec.intermediate_size,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_size": spec.head_size,
            "epsilon": spec.norm_eps,
            "choosable": len(self._bundle.tokenizer),
            "rope_cos": self._floats(ROPE_COS).reshape(-1, half),
            "rope_sin": self._floats(ROPE_SIN).reshape(-1, half),
            "final_norm": self._floats(_Layer.of(spec.layers - 1).next_norm + _WEIGHT),
            "embeddings": table.rows,
            "embedding_scales": table.scales,
            "head": self._head(),
            "layers": layers,
        }
        unused = sorted(set(self._header.shapes) - self._used)
        if unused:
            raise _unfit(self._bundle, f"its graph holds {', '.join(name[:60] for name in unused[:3])}")
        return model

    def _layer(self, index: int) -> tuple[Any, ...]:
        name, norms = f"layers.{index}", _Layer.of(index)
        return (
            self._floats(norms.norm + _WEIGHT),
            self._matrix(f"{name}.qkv_proj"),
            self._matrix(f"{name}.o_proj"),
            self._floats(f"{name}.post_attention_layernorm{_WEIGHT}"),
            self._matrix(f"{name}.gate_proj", f"{name}.up_proj"),
            self._matrix(f"{name}.down_proj"),
        )

    def _floats(self, name: str) -> npt.NDArray[np.float32]:
        stored = self._bytes(name)
        if stored is None or self._header.kinds.get(name) != _FLOAT or len(stored) % 4:
            raise _unfit(self._bundle, f"its graph holds no float32 {name}")
        return stored.view(np.float32)

    def _bytes(self, name: str) -> npt.NDArray[np.uint8] | None:
        """Of a tensor, wherever it lies."""
        self._used.add(name)
        inside = self._inside.get(name)
        return self._sources.bytes_of(name) if inside is None else np.frombuffer(inside, np.uint8)

    def _matrix(self, *layers: str) -> _Matrix:
        """One linear layer, or several whose panels lie by turns."""
        name = records_name(layers)
        product = self._products.get(name)
        if product is None or INT4_MATRICES.get(product.operator) != len(layers):
            raise _unfit(self._bundle, f"its {' and '.join(layers)} do not lie in records")
        self._used.add(name)
        records = self._sources.records(product)
        rows, columns = product.attributes["N"], product.attributes["K"]
        panels, groups, size = records.shape
        group = group_size_of(rows, columns, (panels // len(layers), groups, size))
        return records.reshape(panels, groups * size), rows, columns, group, 4, self._bias(layers[0])

    def _bias(self, layer: str) -> npt.NDArray[np.float32] | None:
        return self._floats(layer + BIAS) if layer + BIAS in self._header.shapes else None

    def _head(self) -> _Matrix:
        product = self._products.get(_HEAD + INT8_VALUES)
        return self._matrix(_HEAD) if product is None else self._int8_head(product)

    def _int8_head(self, product: Product) -> _Matrix:
        rows, columns, group = (product.attributes[name] for name in ("N", "K", "block_size"))
        values, scales = (self._bytes(_HEAD + suffix) for suffix in (INT8_VALUES, SCALES))
        if values is None or scales is None or product.attributes.get("bits") != 8:
            raise _unfit(self._bundle, f"its {_HEAD} has no values or scales of eight bits")
        records = np.empty(_native.int8_head_shape(rows, columns, group), np.uint8)
        by_row = values.reshape(rows, -1)
        _native.int8_head_pack(records, by_row, scales.view(np.float16).reshape(rows, -1), group)
        return records, rows, columns, group, 8, None


def _unfit(bundle: Bundle, what: str) -> OptionError:
    return OptionError(
        f"the kernels for GPUs do not compute the decoder of {bundle.path}: {what}.",
        seen=what,
        remedy="Use --device cuda, tensorrt or cpu.",
    )
