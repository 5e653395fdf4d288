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
from .gpu_decoder import GpuDecoder
from .kv_cache import KvLayout
from .static_kv import explicit_inputs

DECODER = "decoder"


class TensorRtDecoder(GpuDecoder):
    """The decoder of a bundle, loaded on the GPU; a :class:`Decoder`, and the :class:`Runner` of its states.

    Attributes:
        capacity: positions of a KV cache, for which the engine was built.

    Raises:
        PlatformError: TensorRT or the GPU does not take the engine, or has too little memory.
    """

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
