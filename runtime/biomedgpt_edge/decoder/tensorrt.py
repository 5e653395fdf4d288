"""The decoder as a TensorRT engine: KV caches on the GPU, updated in place, and CUDA graphs for single tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..tensorrt.build import Plan
from ..tensorrt.profiles import ATTENDED_STEP, STEP_TOKENS
from ..tensorrt.session import EngineSession
from ..tensorrt.store import Engines
from .base import Embeddings, Logits
from .gpu_cache import GpuCache, GpuCaches
from .kv_cache import KeyValues, KvLayout, Values
from .static_kv import StaticState, explicit_inputs

# See :attr:`Decoder.tile`: of bits nothing is promised here.
TILE = 16
DECODER = "decoder"


class TensorRtDecoder:
    """The decoder of a bundle, loaded on the GPU; a :class:`Decoder`, and the :class:`Runner` of its states.

    Attributes:
        capacity: positions of a KV cache, for which the engine was built.

    Raises:
        PlatformError: TensorRT or the GPU does not take the engine, or has too little memory.
    """

    tile = TILE

    def __init__(self, bundle: Bundle, plan: Plan, engines: Engines) -> None:
        self.spec = bundle.manifest.decoder
        self.table = bundle.embeddings
        self.kv = KvLayout.half_rows(self.spec)
        self.capacity = plan.context
        self.identity = f"{plan.key}"
        part = next(part for part in plan.parts if part.name == DECODER)
        self._session = EngineSession(
            plan.target.library,
            engines.files[DECODER],
            part.profiles,
            shared=[f"{side}_{name}" for name in self.kv.names for side in ("past", "present")],
            rows={"logits": STEP_TOKENS},
        )
        self._caches = GpuCaches(self.kv, self.capacity, self._session.stream, self._forget)

    def open(self, capacity: int, start: KeyValues | None = None) -> StaticState:
        """See :meth:`Decoder.open`.

        Raises:
            PromptTooLongError: the engine was built for fewer positions.
            PlatformError: the GPU has no memory for another KV cache.
            KernelArgumentError: ``start`` is not of this decoder.
        """
        return StaticState(self, self.spec, self.kv, self.table, capacity, start)

    def new_cache(self) -> GpuCache:
        """See :class:`Runner`."""
        return self._caches.new()

    def free_cache(self, cache: GpuCache) -> None:
        """See :class:`Runner`."""
        self._caches.free(cache)

    def read(self, cache: GpuCache, positions: int) -> Values:
        """See :class:`Runner`."""
        return self._caches.read(cache, positions)

    def write(self, cache: GpuCache, values: Values) -> None:
        """See :class:`Runner`."""
        self._caches.write(cache, values)

    def run(self, cache: GpuCache, embeddings: Embeddings, start: int, wanted: npt.NDArray[np.int64]) -> Logits:
        """See :class:`Runner`."""
        length = len(embeddings)
        attended = min(self.capacity, -(-(start + length) // ATTENDED_STEP) * ATTENDED_STEP)
        inputs = explicit_inputs(embeddings, start, wanted, attended)
        addresses = self._caches.addresses(cache).items()
        shared = {f"{side}_{name}": address for name, address in addresses for side in ("past", "present")}
        # Steps alone are worth a CUDA graph: prompts differ in length.
        key = (cache.number, length, attended, len(wanted)) if length <= STEP_TOKENS else None
        outputs = {"logits": (len(wanted), self.spec.vocabulary)}
        return self._session.run(length, inputs, outputs, shared, key)["logits"]

    def _forget(self, number: int) -> None:
        self._session.forget((number,))
