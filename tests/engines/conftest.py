"""What tests of engines for GPUs share: a GPU that is this machine's memory, and answers to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import biomedgpt_edge.cuda
from biomedgpt_edge import Engine, _native
from emulated_engine import Counting
from engine_answers import ANSWERS, random_logits
from fake_gpu import FakeCuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Takes the place of the CUDA runtime."""
    cuda = FakeCuda()
    monkeypatch.setattr(biomedgpt_edge.cuda, "runtime", lambda: cuda)
    return cuda


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device cache of its own, which holds nothing yet."""
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def expected() -> Iterator[Callable[[str], object]]:
    """What the processor answers with the packaged demo, by name of what is asked."""
    found = dict[str, object]()
    with Engine.load(threads=1) as engine:

        def answer(name: str) -> object:
            if name not in found:
                found[name] = ANSWERS[name](engine)
            return found[name]

        yield answer


@pytest.fixture(scope="session")
def expected_logits() -> np.ndarray:
    """What the portable decoder of the packaged demo computes for :func:`random_logits`."""
    with Engine.load(threads=1, decoder="portable") as engine:
        return random_logits(engine)


@pytest.fixture(scope="module")
def kernels(emulated_decoder: type[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with a GPU, and a build with kernels for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(_native, "CudaDecoder", partial(Counting, emulated_decoder), raising=False)
        patch.setattr(_native, "cuda_compiled", lambda: True)
        patch.setattr(_native, "cuda_device_count", lambda: 1)
        yield
