"""What tests of engines for GPUs share: a GPU that is this machine's memory, and answers to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import biomedgpt_edge.cuda
from biomedgpt_edge import Engine
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
