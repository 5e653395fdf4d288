"""The splice op against float64 NumPy, on every path this machine can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError
from biomedgpt_edge.splice import EmbeddingTable, FeaturePart, Projection, TokenPart, splice

PATHS = _native.splice_paths()
# Words (of one number, or of two of 16 bits) that are added in sequence, before sums of them are. An error bound grows
# with that and not with the width.
WORDS_PER_SUM = 512
EPSILON = float(np.finfo(np.float32).eps)
# Half a unit in the last of bfloat16's eight binary digits.
BFLOAT16_ROUNDING = 2.0**-8

Array = np.ndarray[Any, Any]
Parts = list[TokenPart | FeaturePart]


def random_table(rng: np.random.Generator, vocab: int, hidden: int, dtype: str) -> EmbeddingTable:
    if dtype == "int8":
        rows = rng.integers(-127, 128, (vocab, hidden), dtype=np.int8)
        return EmbeddingTable(rows, rng.uniform(1e-4, 1e-2, vocab).astype(np.float32))
    return EmbeddingTable(rng.standard_normal((vocab, hidden)).astype(dtype))


def random_projection(
    rng: np.random.Generator, hidden: int, width: int, dtype: str = "float32", eps: float | None = None
) -> Projection:
    weight = (rng.standard_normal((hidden, width)) / np.sqrt(width)).astype(dtype)
    return Projection(weight, rng.standard_normal(hidden).astype(np.float32), eps)


def embedded(ids: Array, table: EmbeddingTable) -> Array:
    """Exactly what the op must give: one float32 multiplication per value, or none."""
    rows = table.rows[ids].astype(np.float32)
    return rows if table.scales is None else rows * table.scales[ids][:, None]


def projected(features: Array, projection: Projection) -> tuple[Array, Array]:
    """The projection in float64, and the sum of its terms' magnitudes, to which rounding errors are relative."""
    x = features.astype(np.float64)
    if projection.layer_norm_eps is not None:
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + projection.layer_norm_eps)
    weight = projection.weight.astype(np.float64)
    bias = projection.bias.astype(np.float64)
    return x @ weight.T + bias, np.abs(x) @ np.abs(weight).T + np.abs(bias)


def assert_projected(actual: Array, features: Array, projection: Projection, path: str) -> None:
    expected, magnitude = projected(features, projection)
    width = features.shape[1]
    roundings = min(2 * WORDS_PER_SUM, width) + width / WORDS_PER_SUM + 8
    allowed = roundings * EPSILON / 2 + (2 * BFLOAT16_ROUNDING if PATHS[path] else 0)
    if actual.dtype == np.float16:
        allowed += float(np.finfo(np.float16).eps) / 2
    worst = np.max(np.abs(actual - expected) / (magnitude + 1e-30), initial=0.0)
    assert worst <= allowed


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    hidden=st.sampled_from([1, 2, 7, 47, 48, 49, 100, 300]),
    width=st.sampled_from([1, 7, 8, 9, 300, 511, 512, 520, 1280, 2560]),
    count=st.one_of(st.integers(0, 9), st.sampled_from([127, 128, 131])),
    id_count=st.integers(0, 20),
    table_dtype=st.sampled_from(["float16", "float32", "int8"]),
    dtypes=st.tuples(*[st.sampled_from(["float16", "float32"])] * 2),
    id_dtype=st.sampled_from(["int32", "int64"]),
    eps=st.sampled_from([None, 1e-5, 1e-12]),
    out_dtype=st.sampled_from(["float16", "float32"]),
)
def test_against_float64(
    path: str,
    seed: int,
    hidden: int,
    width: int,
    count: int,
    id_count: int,
    table_dtype: str,
    dtypes: tuple[str, str],
    id_dtype: str,
    eps: float | None,
    out_dtype: str,
) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, 13, hidden, table_dtype)
    ids = rng.integers(0, 13, id_count).astype(id_dtype)
    features = (rng.standard_normal((count, width)) + 1.5).astype(dtypes[0])
    projection = random_projection(rng, hidden, width, dtypes[1], eps)
    parts: Parts = [TokenPart(ids), FeaturePart(features, projection), TokenPart(ids[:2])]
    out = np.empty((sum(map(len, parts)), hidden), out_dtype)
    splice(parts, table, threads=1, path=path, allow_16bit=True, out=out)
    np.testing.assert_array_equal(out[:id_count], embedded(ids, table).astype(out_dtype))
    assert_projected(out[id_count : id_count + count], features, projection, path)
    np.testing.assert_array_equal(out[id_count + count :], embedded(ids[:2], table).astype(out_dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_thread_counts_give_the_same_bits(path: str, eps: float | None) -> None:
    """Sizes above the threshold where threads are used, with a hidden width no split divides evenly."""
    rng = np.random.default_rng(5)
    table = random_table(rng, 500, 1021, "int8")
    ids = rng.integers(0, 500, 13000)
    features = rng.standard_normal((37, 2560)).astype(np.float32)
    parts: Parts = [TokenPart(ids), FeaturePart(features, random_projection(rng, 1021, 2560, "float16", eps))]
    first = splice(parts, table, threads=1, path=path, allow_16bit=True)
    for threads in (2, 3):
        np.testing.assert_array_equal(splice(parts, table, threads=threads, path=path, allow_16bit=True), first)


@pytest.mark.parametrize("path", PATHS)
def test_norm_survives_a_large_mean(path: str) -> None:
    """Normalising after the product would cancel here: the mean is a thousand times the deviation."""
    rng = np.random.default_rng(6)
    features = (rng.standard_normal((3, 640)) + 1000).astype(np.float32)
    projection = random_projection(rng, 24, 640, eps=1e-5)
    out = splice(
        [FeaturePart(features, projection)], random_table(rng, 1, 24, "float32"), threads=1, path=path, allow_16bit=True
    )
    assert_projected(out, features, projection, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_nan_reaches_its_own_row_only(path: str, eps: float | None) -> None:
    rng = np.random.default_rng(7)
    features = rng.standard_normal((6, 301)).astype(np.float32)
    features[2, 300] = np.nan
    part = FeaturePart(features, random_projection(rng, 50, 301, eps=eps))
    out = splice([part], random_table(rng, 1, 50, "float32"), threads=1, path=path, allow_16bit=True)
    np.testing.assert_array_equal(np.isnan(out), np.arange(6)[:, None].repeat(50, axis=1) == 2)


@pytest.mark.parametrize("path", PATHS)
def test_every_half_value_is_widened_exactly(path: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, -1)
    out = splice([TokenPart(np.zeros(1, np.int64))], EmbeddingTable(halves), threads=1, path=path, allow_16bit=True)
    np.testing.assert_array_equal(out, halves.astype(np.float32))


def test_operands_are_rounded_only_where_that_is_allowed() -> None:
    rng = np.random.default_rng(12)
    features = rng.standard_normal((40, 300)).astype(np.float32)
    part = FeaturePart(features, random_projection(rng, 64, 300, "float16"))
    table = random_table(rng, 1, 64, "float32")
    exact = next(path for path, rounds in PATHS.items() if not rounds)
    np.testing.assert_array_equal(splice([part], table, threads=1), splice([part], table, threads=1, path=exact))
    best = splice([part], table, threads=1, path=next(iter(PATHS)), allow_16bit=True)
    np.testing.assert_array_equal(splice([part], table, threads=1, allow_16bit=True), best)
    for path, rounds in PATHS.items():
        if rounds:
            with pytest.raises(KernelArgumentError, match="without 16-bit operands"):
                splice([part], table, threads=1, path=path)


def test_strided_features_equal_their_copy() -> None:
    rng = np.random.default_rng(8)
    wide = rng.standard_normal((10, 400)).astype(np.float16)
    view = wide[::2, 50:350]
    projection = random_projection(rng, 33, 300)
    table = random_table(rng, 1, 33, "float32")
    copied = splice([FeaturePart(np.ascontiguousarray(view), projection)], table, threads=1)
    np.testing.assert_array_equal(splice([FeaturePart(view, projection)], table, threads=1), copied)


def test_one_column_may_be_cut_out_of_a_wider_array() -> None:
    rng = np.random.default_rng(9)
    column = rng.standard_normal((5, 4)).astype(np.float32)[:, 1:2]
    projection = random_projection(rng, 3, 1)
    out = splice([FeaturePart(column, projection)], random_table(rng, 1, 3, "float32"), threads=1)
    assert_projected(out, column, projection, "portable")


def test_read_only_memory_maps_are_read_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    table = random_table(rng, 9, 20, "float16")
    projection = random_projection(rng, 20, 30, "float16")
    mapped: list[Array] = []
    for name, array in {"table": table.rows, "weight": projection.weight}.items():
        array.tofile(tmp_path / name)
        mapped.append(np.memmap(tmp_path / name, dtype=np.float16, mode="r", shape=array.shape))
    ids, features = np.arange(9), rng.standard_normal((4, 30)).astype(np.float32)
    parts: Parts = [TokenPart(ids), FeaturePart(features, projection)]
    from_maps: Parts = [TokenPart(ids), FeaturePart(features, Projection(mapped[1], projection.bias))]
    np.testing.assert_array_equal(
        splice(from_maps, EmbeddingTable(mapped[0]), threads=1), splice(parts, table, threads=1)
    )


def test_segments_may_come_in_any_order() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    out = np.empty((3, 3), np.float32)
    _native.splice(out, table, None, [("tokens", 2, np.array([1])), ("tokens", 0, np.array([3, 0]))])
    np.testing.assert_array_equal(out, table[[3, 0, 1]])


def test_an_empty_prompt_is_an_empty_buffer() -> None:
    table = EmbeddingTable(np.ones((2, 3), np.float32))
    assert splice([], table, threads=1).shape == (0, 3)
    assert splice([TokenPart(np.empty(0, np.int64))], table, threads=1).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_lookup_into_writes_one_row(dtype: str) -> None:
    table = random_table(np.random.default_rng(11), 7, 19, dtype)
    out = np.empty((1, 19), np.float32)
    table.lookup_into(5, out)
    np.testing.assert_array_equal(out, embedded(np.array([5]), table))


def test_the_given_buffer_is_filled_and_returned() -> None:
    table = EmbeddingTable(np.ones((2, 3), np.float32))
    out = np.zeros((1, 3), np.float32)
    assert splice([TokenPart(np.array([1]))], table, threads=1, out=out) is out
    assert out.min() == 1
