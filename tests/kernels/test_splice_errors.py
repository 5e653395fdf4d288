"""Every way to call splice wrongly: the error names the argument, and the buffer stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError
from biomedgpt_edge.splice import EmbeddingTable, TokenPart, splice

HIDDEN, WIDTH, VOCAB = 6, 10, 8


def misaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view: np.ndarray[Any, Any] = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


class Call:
    """A valid call, one argument of which a test replaces."""

    def __init__(self) -> None:
        self.out = np.full((5, HIDDEN), 7, np.float32)
        self.table: Any = zeros(VOCAB, HIDDEN, dtype=np.float16)
        self.scales: Any = None
        self.tokens: dict[str, Any] = {"row": 0, "ids": np.array([1, 2, 3])}
        self.features: dict[str, Any] = {
            "row": 3,
            "features": zeros(2, WIDTH),
            "weight": zeros(HIDDEN, WIDTH),
            "bias": zeros(HIDDEN),
            "eps": 1e-5,
        }
        self.options: dict[str, Any] = {}

    def run(self) -> None:
        segments = [("tokens", *self.tokens.values()), ("features", *self.features.values())]
        _native.splice(self.out, self.table, self.scales, segments, **self.options)


def test_the_valid_call_is_valid() -> None:
    Call().run()


@pytest.mark.parametrize(
    ("group", "key", "value", "named"),
    [
        ("table", None, [[1.0]], "table: got list"),
        ("table", None, zeros(HIDDEN), "table: got float32 [6], expected float32, float16 or int8 [vocab, hidden]"),
        ("table", None, zeros(VOCAB, HIDDEN, dtype=np.float64), "table: got float64"),
        ("table", None, zeros(VOCAB, HIDDEN, dtype=">f4"), "table: got >f4"),
        ("table", None, zeros(VOCAB, HIDDEN, dtype=np.int32), "table: got int32"),
        ("table", None, zeros(VOCAB, HIDDEN + 1), "table: got float32 [8, 7]"),
        ("table", None, zeros(VOCAB * 2, HIDDEN)[::2], "table: got float32 [8, 6] with row stride 12"),
        ("table", None, zeros(HIDDEN, VOCAB).T, "table: got float32 [8, 6] with strides"),
        ("table", None, misaligned(zeros(VOCAB, HIDDEN)), "table: got misaligned"),
        ("table", None, zeros(VOCAB, HIDDEN, dtype=np.int8), "table_scales: got none"),
        ("scales", None, zeros(VOCAB), "table_scales: got float32 [8], expected none"),
        ("scales", None, zeros(VOCAB, dtype=np.float64), "table_scales: got float64"),
        ("tokens", "row", -1, "segments[0].row: got -1"),
        ("tokens", "row", 4, "segments[0].row: got 4 for 3 rows"),
        ("tokens", "row", 2**63 - 1, "segments[0].row"),
        ("tokens", "ids", np.arange(4), "segments[1].row: got 3, expected at least 4"),
        ("tokens", "row", "0", "segments[0].row: got str"),
        ("tokens", "ids", [1, 2, 3], "segments[0].ids: got list"),
        ("tokens", "ids", zeros(3), "segments[0].ids: got float32"),
        ("tokens", "ids", zeros(1, 3, dtype=np.int64), "segments[0].ids: got int64 [1, 3]"),
        ("tokens", "ids", zeros(6, dtype=np.int64)[::2], "segments[0].ids: got int64 [3] with a stride"),
        ("tokens", "ids", misaligned(zeros(3, dtype=np.int64)), "segments[0].ids: got misaligned"),
        ("tokens", "ids", np.array([1, VOCAB, 3]), "segments[0].ids[1]: got 8, expected 0 <= id < 8"),
        ("tokens", "ids", np.array([1, 2, -1], np.int32), "segments[0].ids[2]: got -1"),
        ("tokens", "ids", np.array([1, 2]), "segments: got no segment for rows 2 to 3"),
        ("features", "features", zeros(2, WIDTH, dtype=np.int8), "segments[1].features: got int8"),
        ("features", "features", zeros(WIDTH), "segments[1].features: got float32 [10]"),
        ("features", "features", zeros(2, 0), "segments[1].features: got float32 [2, 0]"),
        ("features", "features", zeros(2, WIDTH * 2)[:, ::2], "segments[1].features: got float32 [2, 10] with strides"),
        ("features", "features", zeros(2, WIDTH)[::-1], "segments[1].features"),
        ("features", "features", misaligned(zeros(2, WIDTH)), "segments[1].features: got misaligned"),
        ("features", "features", zeros(1, WIDTH), "segments: got no segment for rows 4 to 5"),
        ("features", "weight", zeros(HIDDEN, WIDTH, dtype=np.int8), "segments[1].weight: got int8"),
        ("features", "weight", zeros(HIDDEN, WIDTH + 1), "segments[1].weight: got float32 [6, 11]"),
        ("features", "weight", zeros(WIDTH, HIDDEN).T, "segments[1].weight: got float32 [6, 10] with strides"),
        ("features", "weight", misaligned(zeros(HIDDEN, WIDTH)), "segments[1].weight: got misaligned"),
        ("features", "bias", zeros(HIDDEN, dtype=np.float16), "segments[1].bias: got float16"),
        ("features", "bias", zeros(HIDDEN - 1), "segments[1].bias: got float32 [5]"),
        ("features", "bias", None, "segments[1].bias: got NoneType"),
        ("features", "eps", 0.0, "segments[1].layer_norm_eps: got 0"),
        ("features", "eps", float("nan"), "segments[1].layer_norm_eps: got nan"),
        ("features", "eps", "1e-5", "segments[1].layer_norm_eps: got str"),
        ("options", "threads", 0, "threads: got 0"),
        ("options", "threads", 1025, "threads: got 1025"),
        ("options", "path", "avx9", 'path: got "avx9"'),
    ],
)
def test_the_argument_is_named(group: str, key: str | None, value: Any, named: str) -> None:
    call = Call()
    if key is None:
        setattr(call, group, value)
    else:
        getattr(call, group)[key] = value
    with pytest.raises(KernelArgumentError) as caught:
        call.run()
    assert caught.value.message.startswith(named)
    assert caught.value.code == "kernel.argument"
    assert caught.value.seen
    assert call.out.min() == call.out.max() == 7


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ([[0.0]], "out: got list"),
        (zeros(HIDDEN), "out: got float32 [6]"),
        (zeros(5, HIDDEN, dtype=np.float64), "out: got float64"),
        (zeros(5, HIDDEN, dtype=np.int8), "out: got int8"),
        (zeros(5, HIDDEN * 2)[:, ::2], "out: got float32 [5, 6], not contiguous"),
        (read_only(zeros(5, HIDDEN)), "out: got float32 [5, 6], read-only"),
        (misaligned(zeros(5, HIDDEN)), "out: got misaligned"),
        (zeros(5, 0), "out: got float32 [5, 0]"),
        (zeros(6, HIDDEN), "segments: got no segment for rows 5 to 6"),
    ],
)
def test_a_bad_buffer_is_refused(out: Any, named: str) -> None:
    call = Call()
    call.out = out
    with pytest.raises(KernelArgumentError) as caught:
        call.run()
    assert caught.value.message.startswith(named)


@pytest.mark.parametrize("name", ["table", "features", "weight", "bias"])
def test_out_may_not_overlap_an_input(name: str) -> None:
    memory = zeros(200)
    call = Call()
    call.out = memory[100:130].reshape(5, HIDDEN)
    start = 129  # its last element is the first of the input
    shapes = {"table": (VOCAB, HIDDEN), "features": (2, WIDTH), "weight": (HIDDEN, WIDTH), "bias": (HIDDEN,)}
    shape = shapes[name]
    view = memory[start : start + int(np.prod(shape))].reshape(shape)
    if name == "table":
        call.table = view
    else:
        call.features[name] = view
    with pytest.raises(KernelArgumentError, match="overlaps out") as caught:
        call.run()
    assert name in caught.value.message


@pytest.mark.parametrize("name", ["scales_missing", "scales_short"])
def test_an_int8_table_needs_a_scale_per_row(name: str) -> None:
    call = Call()
    call.table = zeros(VOCAB, HIDDEN, dtype=np.int8)
    call.scales = None if name == "scales_missing" else zeros(VOCAB - 1)
    with pytest.raises(KernelArgumentError, match=r"^table_scales"):
        call.run()


@pytest.mark.parametrize(
    "segment", [("tokens", 0), ("images", 0, zeros(1)), (), [1], None, ("features", 0, zeros(1, 1)), (1, 2, 3)]
)
def test_a_malformed_segment_is_refused(segment: Any) -> None:
    with pytest.raises(KernelArgumentError, match=r"^segments\[0\]: got "):
        _native.splice(zeros(1, 1), zeros(1, 1), None, [segment])


def test_lookup_of_an_id_outside_the_vocabulary() -> None:
    with pytest.raises(KernelArgumentError, match="got 8, expected 0 <= id < 8"):
        EmbeddingTable(zeros(VOCAB, HIDDEN)).lookup_into(VOCAB, zeros(1, HIDDEN))


def test_a_table_of_the_wrong_rank_is_refused_before_a_buffer_is_made() -> None:
    with pytest.raises(KernelArgumentError, match="table"):
        splice([TokenPart(np.array([0]))], EmbeddingTable(zeros(3)), threads=1)
