"""Causal attention over a KV cache against float64 NumPy, on every path this machine can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError

Array = npt.NDArray[Any]
PATHS = _native.attention_paths()
BLOCK = 16
# Bytes of a block of 16 positions, by element type and head size.
BLOCK_BYTES = {
    "f32": lambda size: BLOCK * size * 4,
    "f16": lambda size: BLOCK * size * 2,
    "i8": lambda size: BLOCK * (size + 4),
}
FORMATS = tuple(BLOCK_BYTES)


def rope_table(positions: int, head_size: int) -> tuple[Array, Array]:
    angles = np.outer(np.arange(positions), 10000.0 ** (-np.arange(0, head_size, 2) / head_size))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Sequence:
    """A cache, and calls that append to it."""

    heads: int
    kv_heads: int
    head_size: int
    positions: int
    format: str = "f32"
    path: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        self.block_bytes = BLOCK_BYTES[self.format](self.head_size)
        blocks = -(-self.positions // BLOCK)
        # What was never written is no number: nothing may come of it.
        self.keys, self.values = (np.full((self.kv_heads, blocks * self.block_bytes), 0xFF, np.uint8) for _ in range(2))
        self.cos, self.sin = rope_table(self.positions, self.head_size)
        self.length = 0

    def append(self, qkv: Array) -> Array:
        y = np.full((len(qkv), self.heads * self.head_size), np.nan, np.float32)
        _native.causal_attention(
            y, qkv, self.keys, self.values, self.block_bytes, self.length, self.cos, self.sin, self.threads, self.path
        )
        self.length += len(qkv)
        return y


def random_qkv(rng: np.random.Generator, rows: int, heads: int, kv_heads: int, size: int, scale: float = 1.0) -> Array:
    return (rng.standard_normal((rows, (heads + 2 * kv_heads) * size)) * scale).astype(np.float32)


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """[positions, heads, size]"""
    first, second = np.split(x, 2, axis=-1)
    c, s = cos[: len(x), None].astype(np.float64), sin[: len(x), None].astype(np.float64)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def stored(x: Array, format: str) -> Array:
    """What a cache of that element type makes of head vectors."""
    if format == "f16":
        return x.astype(np.float32).astype(np.float16).astype(np.float64)
    if format == "i8":
        scale = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / np.where(scale == 0, 1, scale)) * scale
    return x


def expected(qkv: Array, sequence: Sequence) -> tuple[Array, Array]:
    """By the definition, in float64, and the sum of the magnitudes of what was added up."""
    heads, kv_heads, size = sequence.heads, sequence.kv_heads, sequence.head_size
    rows = qkv.astype(np.float64).reshape(len(qkv), heads + 2 * kv_heads, size)
    queries, keys, values = np.split(rows, [heads, heads + kv_heads], axis=1)
    queries = rotated(queries, sequence.cos, sequence.sin)
    keys = stored(rotated(keys, sequence.cos, sequence.sin), sequence.format)
    values = stored(values, sequence.format)
    group = heads // kv_heads
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(size)
    scores[:, np.triu(np.ones((len(qkv), len(qkv)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("hqk,khd->qhd", weights, values)
    return y.reshape(len(qkv), -1), np.einsum("hqk,khd->qhd", weights, np.abs(values)).reshape(len(qkv), -1)


def test_paths_are_best_first_and_supported() -> None:
    cpu = _native.cpu_features()
    assert PATHS[-1] == "portable"
    assert ("avx2" in PATHS) == (cpu["avx2"] and cpu["fma"] and cpu["f16c"])
    assert ("neon" in PATHS) == cpu["neon"]
    assert [name for name in ("avx512", "avx2", "neon", "portable") if name in PATHS] == PATHS


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129, 150])),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_size=st.sampled_from([16, 32, 48, 64, 128, 256]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_it_is_attention(
    path: str, format: str, seed: int, rows: int, kv_heads: int, group: int, head_size: int, scale: float
) -> None:
    if path == "portable":  # without fused multiply-add in the processor it takes its time
        rows = min(rows, 40)
    rng = np.random.default_rng(seed)
    sequence = Sequence(kv_heads * group, kv_heads, head_size, rows, format, path, threads=2)
    qkv = random_qkv(rng, rows, kv_heads * group, kv_heads, head_size, scale)
    y = sequence.append(qkv)
    wanted, magnitude = expected(qkv, sequence)
    # Rounding of a score, by which weights are off: it is a sum of products of float32; a step of int8 may fall on the
    # other side, too.
    score = scale * scale * np.sqrt(head_size) * 2.0**-20
    bound = (score + 2.0**-19) * magnitude.max() + (0 if format == "f32" else 2.0**-10 if format == "f16" else 0.02) * (
        magnitude.max() * (1 + scale * scale * 4)
    )
    assert np.abs(y - wanted).max() <= bound


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_row_has_the_same_bits_however_calls_are_cut_and_on_every_path(
    format: str, seed: int, data: st.DataObject
) -> None:
    heads, kv_heads, size = data.draw(st.sampled_from([(2, 2, 32), (4, 2, 64), (3, 1, 128), (2, 1, 48)]))
    rows = data.draw(st.sampled_from([9, 40, 133, 270]))
    qkv = random_qkv(np.random.default_rng(seed), rows, heads, kv_heads, size)
    whole = Sequence(heads, kv_heads, size, rows + 20, format)
    wanted = whole.append(qkv)
    sequence = Sequence(
        heads,
        kv_heads,
        size,
        rows,
        format,
        path=data.draw(st.sampled_from(PATHS)),
        threads=data.draw(st.integers(1, 3)),
    )
    parts = []
    while sequence.length < rows:
        count = data.draw(st.one_of(st.integers(1, 12), st.integers(1, rows)))
        parts.append(sequence.append(qkv[sequence.length : sequence.length + count]))
    np.testing.assert_array_equal(np.concatenate(parts).view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_cache_lies_as_documented(path: str, format: str) -> None:
    sequence = Sequence(1, 1, 16, 40, format, path)
    qkv = random_qkv(np.random.default_rng(1), 20, 1, 1, 16)
    sequence.append(qkv)
    keys = rotated(qkv[:, None, 16:32], sequence.cos, sequence.sin)[:, 0]
    element = {"f32": np.float32, "f16": np.float16, "i8": np.int8}[format]
    for position in (0, 7, 15, 16, 19):
        block, row = divmod(position, BLOCK)
        start = block * sequence.block_bytes
        for array, values in ((sequence.keys, keys), (sequence.values, qkv[:, 32:])):
            data = array[0, start : start + sequence.block_bytes]
            elements = data[: 16 * 16 * np.dtype(element).itemsize].view(element).astype(np.float64).reshape(16, 16)
            found = elements[:, row] if array is sequence.keys else elements[row]
            if format == "i8":
                found = found * data[16 * 16 :].view(np.float32)[row]
            tolerance = {"f32": 1e-6, "f16": 2e-3, "i8": np.abs(values[position]).max() / 127 * 0.51}[format]
            np.testing.assert_allclose(found, values[position], atol=tolerance)
    assert (sequence.keys[:, 2 * sequence.block_bytes :] == 0xFF).all()  # and nothing else is touched


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_reaches_its_own_row_and_later_ones_alone(path: str, format: str, bad: float) -> None:
    qkv = random_qkv(np.random.default_rng(2), 40, 2, 1, 32)
    good = Sequence(2, 1, 32, 40, format, path).append(qkv)

    def with_bad(column: int) -> Array:
        changed = qkv.copy()
        changed[20, column] = bad
        return Sequence(2, 1, 32, 40, format, path).append(changed)

    y = with_bad(70)  # a key: scores that are -inf are none, all others are no numbers
    np.testing.assert_array_equal(y[:20], good[:20])
    assert np.isnan(y[20:]).any()
    assert (np.isnan(y[20:]) | np.isfinite(y[20:])).all()
    y = with_bad(100)  # a value
    np.testing.assert_array_equal(y[:20], good[:20])
    assert not np.isfinite(y[20:]).all(axis=1).any()
    y = with_bad(0)  # a query: that row alone, and that head
    assert np.isnan(y[20, :32]).all()
    np.testing.assert_array_equal(np.delete(y, 20, axis=0), np.delete(good, 20, axis=0))
    np.testing.assert_array_equal(y[20, 32:], good[20, 32:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_scores_choose_one_position(path: str, format: str) -> None:
    """Differences of scores beyond what an exponential can hold: the largest has all the weight, wherever it stands."""
    rng = np.random.default_rng(3)
    for chosen in (0, 15, 127, 128, 199):
        qkv = random_qkv(rng, 200, 1, 1, 32, 1e-3)
        sequence = Sequence(1, 1, 32, 200, format, path)
        sequence.cos, sequence.sin = np.ones_like(sequence.cos), np.zeros_like(sequence.sin)
        qkv[:, 0] = 1e3
        qkv[chosen, 32] = 1e3
        y = sequence.append(qkv)
        np.testing.assert_allclose(y[199], stored(qkv[chosen : chosen + 1, 64:], format)[0], rtol=1e-5, atol=1e-9)


def arguments() -> dict[str, Any]:
    cos, sin = rope_table(32, 32)
    return {
        "y": np.full((2, 64), 7, np.float32),
        "qkv": np.zeros((2, 128), np.float32),
        "keys": np.zeros((1, 2 * 16 * 32 * 4), np.uint8),
        "values": np.zeros((1, 2 * 16 * 32 * 4), np.uint8),
        "block_bytes": 16 * 32 * 4,
        "first": 0,
        "cos": cos,
        "sin": sin,
    }


OVERLAPPING = np.zeros(4096, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.zeros((2, 65), np.float32)}, r"y: got float32 \[2, 65\] where \[2, 64\] is needed"),
        ({"y": np.zeros((2, 64), np.float64)}, "y: got float64"),
        ({"qkv": np.zeros((2, 129), np.float32)}, r"qkv: got float32 \[2, 129\] where \[2, 128\]"),
        ({"qkv": np.zeros((2, 256), np.float32)[:, ::2]}, "qkv: got .*not contiguous"),
        ({"keys": np.zeros((1, 4097), np.uint8)}, r"keys: got uint8 \[1, 4097\] where \[1, 4096\]"),
        ({"values": np.zeros((1, 2048), np.uint8)}, r"values: got uint8 \[1, 2048\] where \[1, 4096\]"),
        ({"block_bytes": 100}, "cache: got blocks of 100 bytes, expected blocks of 2048, 1024, 576 bytes"),
        ({"block_bytes": 0}, "cache: got blocks of 0 bytes"),
        ({"first": -1}, "first: got -1, expected 0 to"),
        ({"first": 31}, "rows: got positions up to 33, expected up to 32, the room of the cache"),
        ({"cos": np.ones((1, 16), np.float32), "sin": np.ones((1, 16), np.float32)}, "the end of the table"),
        ({"sin": np.ones((31, 16), np.float32)}, r"sin: got float32 \[31, 16\] where \[32, 16\]"),
        ({"cos": np.ones((32, 0), np.float32), "sin": np.ones((32, 0), np.float32)}, "head_size: got 0"),
        ({"cos": np.ones((32, 12), np.float32), "sin": np.ones((32, 12), np.float32)}, "head_size: got 24"),
        ({"y": np.zeros((2, 0), np.float32)}, "heads|qkv"),
        ({"path": "mmx"}, 'path: got "mmx", expected "auto"'),
        ({"threads": 0}, "threads: got 0"),
        ({"y": OVERLAPPING[:128].reshape(2, 64), "qkv": OVERLAPPING[:256].reshape(2, 128)}, "qkv: got memory"),
        ({"y": OVERLAPPING[:128].reshape(2, 64), "keys": OVERLAPPING[:1024].view(np.uint8)[None]}, "overlaps"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes: dict[str, Any], message: str) -> None:
    given = arguments() | changes
    before = {name: np.copy(given[name]) for name in ("y", "keys", "values")}
    with pytest.raises(KernelArgumentError, match=message):
        _native.causal_attention(**given)
    for name, array in before.items():
        np.testing.assert_array_equal(given[name], array)


def test_no_rows_are_no_work() -> None:
    given = arguments() | {"y": np.zeros((0, 64), np.float32), "qkv": np.zeros((0, 128), np.float32), "first": 32}
    _native.causal_attention(**given)
    assert not given["keys"].any()
