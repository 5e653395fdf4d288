"""The yardsticks of benchmarks: what a probe says it did, it did."""

from __future__ import annotations

import numpy as np
import pytest

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError

WORDS = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 1003, np.int64)


@pytest.mark.parametrize("pattern", _native.read_patterns())
def test_a_pattern_reads_every_word_once(pattern: str) -> None:
    assert _native.read_memory(WORDS, pattern) == int(np.bitwise_xor.reduce(WORDS.view(np.uint64)))


def test_loops_are_those_of_this_processor() -> None:
    cpu = _native.cpu_features()
    loops = [(name, kind) for name, kind, _ in _native.arithmetic_loops()]
    for name, kind in loops:
        assert name == "portable" or cpu[name]
        assert kind in ("int8", "fp32")
    assert {("portable", "int8"), ("portable", "fp32")} <= set(loops)
    assert ("avx2", "fp32") in loops or not (cpu["avx2"] and cpu["fma"])


@pytest.mark.parametrize(("name", "kind", "operations"), _native.arithmetic_loops())
def test_a_loop_does_the_operations_it_is_counted_with(name: str, kind: str, operations: int) -> None:
    assert _native.run_arithmetic(name, kind, 100) == 100 * operations / 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _native.read_memory(WORDS, "zigzag"), "pattern: got 'zigzag'"),
        (lambda: _native.read_memory(WORDS[::2], "one stream"), "stride of 16 bytes"),
        (lambda: _native.read_memory(WORDS.view(np.float64), "one stream"), "expected int64"),
        (lambda: _native.read_memory(WORDS.view(np.int32), "one stream"), "expected int64"),
        (lambda: _native.run_arithmetic("portable", "int3", 1), "'portable' of int3"),
        (lambda: _native.run_arithmetic("portable", "int8", 0), "steps: got 0"),
    ],
)
def test_anything_else_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KernelArgumentError, match=words):
        call()
