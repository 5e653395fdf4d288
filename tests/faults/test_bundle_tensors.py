"""safetensors files: every deviation from the format has a typed error, and nothing large is allocated for it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_edge.tensor_file import MAX_HEADER_BYTES, map_tensors
from support import bounded_memory


def entry(begin: int, end: int, shape: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def content(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def mapped(folder: Path, data: bytes) -> dict[str, Any]:
    path = folder / "weights.safetensors"
    path.write_bytes(data)
    with bounded_memory(4 << 20):
        return map_tensors(path)


# --- well-formed files ------------------------------------------------------------------------------------------------


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((4, 2, 2)).astype(np.float16),
        "c": rng.integers(-128, 127, (8,), dtype=np.int8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.float32),
    }
    found = mapped(tmp_path, safetensors.numpy.save(arrays, {"note": "metadata is no tensor"}))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_arrays_are_views_of_the_file_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros((1024, 4096), np.float32)}))
    with bounded_memory(1 << 20):
        weight = map_tensors(path)["weight"]
    assert not weight.flags.writeable
    assert not weight.flags.owndata


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert mapped(tmp_path, content({})) == {}


# --- malformed files --------------------------------------------------------------------------------------------------


MALFORMED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "header claims 0 bytes"),
    "seven bytes": (b"\0" * 7, "header claims 0 bytes"),
    "header beyond the end": (struct.pack("<Q", 3) + b"{}", "header claims 3 bytes"),
    "header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "header claims 9,223,372,036,854,775,808"),
    "empty header": (struct.pack("<Q", 0), "not JSON"),
    "header not JSON": (content(b"nonsense"), "not JSON"),
    "header not UTF-8": (content(b'{"\xff": 1}'), "not JSON"),
    "header in UTF-16": (content("{}".encode("utf-16")), "not JSON"),
    "header a list": (content([]), "not an object"),
    "header null": (content(b"null"), "not an object"),
    "header nested deeply": (content(b"[" * 100_000), "not JSON"),
    "header with an endless number": (content(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "name twice": (
        content(
            b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, '
            b'"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        "a name appears twice",
    ),
    "field twice": (
        content(b'{"a": {"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "a name appears twice",
    ),
    "tensor no object": (content({"a": 3}), "'a' has no valid data_offsets"),
    "no offsets": (content({"a": {"dtype": "F32", "shape": []}}), "'a' has no valid data_offsets"),
    "one offset": (content({"a": {**entry(0, 0, [0]), "data_offsets": [0]}}), "no valid data_offsets"),
    "offsets no list": (content({"a": {**entry(0, 0, [0]), "data_offsets": 4}}), "no valid data_offsets"),
    "offset a float": (content({"a": {**entry(0, 0, [0]), "data_offsets": [0, 4.0]}}), "no valid data_offsets"),
    "offset true": (content({"a": {**entry(0, 0, [1]), "data_offsets": [0, True]}}), "no valid data_offsets"),
    "offset negative": (content({"a": entry(-4, 0, [1])}, b"\0" * 4), "no valid data_offsets"),
    "offsets reversed": (content({"a": entry(4, 0, [1])}, b"\0" * 4), "does not fill"),
    "no dtype": (content({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "has dtype 'None'"),
    "dtype unknown": (content({"a": entry(0, 4, [1], "F33")}, b"\0" * 4), "has dtype 'F33'; known are F32, F16, I8"),
    "dtype not in use": (content({"a": entry(0, 8, [1], "F64")}, b"\0" * 8), "has dtype 'F64'"),
    "dtype no text": (content({"a": entry(0, 4, [1], ["F32"])}, b"\0" * 4), "has dtype"),
    "no shape": (content({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "no valid shape"),
    "shape a number": (content({"a": entry(0, 4, 1)}, b"\0" * 4), "no valid shape"),
    "dimension negative": (content({"a": entry(0, 4, [-1, -1])}, b"\0" * 4), "no valid shape"),
    "dimension a float": (content({"a": entry(0, 4, [1.0])}, b"\0" * 4), "no valid shape"),
    "dimension true": (content({"a": entry(0, 4, [True])}, b"\0" * 4), "no valid shape"),
    "dimension of 2^40": (content({"a": entry(0, 4, [1 << 40])}, b"\0" * 4), "no valid shape"),
    "nine dimensions": (content({"a": entry(0, 4, [1] * 9)}, b"\0" * 4), "no valid shape"),
    "product beyond 64 bits": (content({"a": entry(0, 0, [1 << 39] * 8)}), "does not fill"),
    "too few bytes for its shape": (content({"a": entry(0, 4, [2])}, b"\0" * 4), "does not fill"),
    "too many bytes for its shape": (content({"a": entry(0, 8, [1])}, b"\0" * 8), "does not fill"),
    "hole at the start": (content({"a": entry(4, 8, [1])}, b"\0" * 8), "does not fill"),
    "hole in between": (content({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"\0" * 12), "'b' does not fill"),
    "overlap": (content({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12), "'b' does not fill"),
    "same bytes twice": (content({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"\0" * 4), "does not fill"),
    "beyond the end": (content({"a": entry(0, 8, [2])}, b"\0" * 4), "'a' ends at byte"),
    "far beyond the end": (content({"a": entry(0, 1 << 42, [1 << 39, 2])}), "'a' ends at byte"),
    "bytes left over": (content({"a": entry(0, 4, [1])}, b"\0" * 5), "its tensors end at byte"),
    "bytes without tensors": (content({}, b"\0"), "its tensors end at byte"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_its_name_and_what_is_wrong(tmp_path: Path, case: str) -> None:
    data, what = MALFORMED[case]
    with pytest.raises(BundleCorruptError) as caught:
        mapped(tmp_path, data)
    assert "weights.safetensors is corrupt" in str(caught.value)
    assert what in str(caught.value)


def test_a_tensor_that_starts_between_two_values_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": entry(0, 4, [1])}).encode()
    text += b" " * (1 + -len(text) % 8)
    with pytest.raises(BundleCorruptError, match="not aligned"):
        mapped(tmp_path, struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(BundleCorruptError, match=r"'b' starts at byte .* not aligned"):
        mapped(tmp_path, content({"a": entry(0, 1, [1], "I8"), "b": entry(1, 5, [1])}, b"\0" * 5))


def test_a_header_beyond_the_size_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 1 << 34)
    with bounded_memory(1 << 20), pytest.raises(BundleCorruptError, match="header claims 1,048,577 bytes"):
        map_tensors(path)


@given(data=st.binary(max_size=200), size=st.integers(0, 220))
def test_random_bytes_are_refused_with_a_typed_error(tmp_path: Path, data: bytes, size: int) -> None:
    path = tmp_path / "weights.safetensors"
    for text in (data, struct.pack("<Q", size) + data):
        path.write_bytes(text)
        with pytest.raises(BundleCorruptError, match=r"weights\.safetensors"):
            map_tensors(path)


@given(position=st.integers(0, 250), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_a_damaged_file_is_refused_or_has_tensors_inside_it(
    tmp_path: Path, position: int, value: int, cut: int
) -> None:
    path = tmp_path / "weights.safetensors"
    data = bytearray(content({"a": entry(0, 16, [2, 2]), "b": entry(16, 24, [4], "F16")}, bytes(24)))
    data[position % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        for array in map_tensors(path).values():
            array.sum()
    except BundleCorruptError as error:
        message = str(error)
    else:
        return
    assert "weights.safetensors" in message
