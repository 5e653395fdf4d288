"""Engines on our own kernels for GPUs, emulated, and what their decoders were asked for."""

from __future__ import annotations

from typing import Any

from biomedgpt_edge import Engine
from biomedgpt_edge.decoder.cuda import NativeDecoder


class Counting:
    """Which calls a decoder got, and how many KV caches are there."""

    def __init__(self, real: type[Any], model: dict[str, Any], capacity: int) -> None:
        self._real = real(model, capacity)
        self.capacity, self.caches, self.rows = capacity, 0, list[int]()

    def new_cache(self) -> int:
        self.caches += 1
        return int(self._real.new_cache())

    def free_cache(self, cache: int) -> None:
        self.caches -= 1
        self._real.free_cache(cache)

    def run(self, caches: list[int], *more: Any) -> Any:
        self.rows.append(len(caches))
        return self._real.run(caches, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def counted(engine: Engine) -> Counting:
    """What its decoder runs on."""
    assert isinstance(engine.decoder, NativeDecoder)
    native = engine.decoder._native
    assert isinstance(native, Counting)
    return native
