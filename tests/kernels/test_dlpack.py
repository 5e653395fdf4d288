"""Arrays of other libraries: the buffer protocol and DLPack give the same bits as numpy, and nothing is copied."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from biomedgpt_edge import _native
from biomedgpt_edge.errors import KernelArgumentError, PlatformError

ROWS, HIDDEN, WIDTH, VOCAB = 5, 6, 10, 8


def arguments() -> dict[str, Any]:
    """Of a prompt of three tokens and two features, as numpy arrays."""
    rng = np.random.default_rng(0)
    return {
        "out": np.zeros((ROWS, HIDDEN), np.float32),
        "table": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16),
        "ids": np.array([3, 0, 7]),
        "features": rng.standard_normal((2, WIDTH)).astype(np.float32),
        "weight": rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32),
        "bias": rng.standard_normal(HIDDEN).astype(np.float32),
    }


def call(given: dict[str, Any]) -> None:
    segments = [("tokens", 0, given["ids"]), ("features", 3, given["features"], given["weight"], given["bias"], None)]
    _native.splice(given["out"], given["table"], None, segments)


@pytest.fixture
def expected() -> np.ndarray[Any, Any]:
    given = arguments()
    call(given)
    out: np.ndarray[Any, Any] = given["out"]
    return out


@pytest.mark.parametrize("convert", [torch.from_numpy, memoryview], ids=["torch", "memoryview"])
def test_other_arrays_are_used_in_place(expected: np.ndarray[Any, Any], convert: Any) -> None:
    given = arguments()
    call({name: convert(value) for name, value in given.items()})
    np.testing.assert_array_equal(given["out"], expected)


def test_an_array_of_the_standard_library_will_do(expected: np.ndarray[Any, Any]) -> None:
    given = arguments()
    call({**given, "ids": array("q", given["ids"].tolist()), "bias": array("f", given["bias"].tolist())})
    np.testing.assert_array_equal(given["out"], expected)


def test_strided_tensors_are_read_where_they_lie(expected: np.ndarray[Any, Any]) -> None:
    given = arguments()
    wide = torch.zeros(2, WIDTH + 4)
    wide[:, 2 : WIDTH + 2] = torch.from_numpy(given["features"])
    call({**given, "features": wide[:, 2 : WIDTH + 2]})
    np.testing.assert_array_equal(given["out"], expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table", torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16), "table: got bfloat16 [8, 6], expected float32"),
        ("table", torch.zeros(VOCAB, HIDDEN, dtype=torch.float64), "table: got float64 [8, 6]"),
        ("table", torch.zeros(HIDDEN, VOCAB).T, "table: got float32 [8, 6] with strides"),
        ("features", torch.zeros(2, WIDTH, requires_grad=True), "segments[1].features: got"),
        ("weight", torch.zeros(HIDDEN, WIDTH, dtype=torch.bool), "segments[1].weight: got bool [6, 10]"),
        ("weight", torch.zeros(HIDDEN, WIDTH, device="meta"), "segments[1].weight: got"),
        ("ids", torch.zeros(3, dtype=torch.int16), "segments[0].ids: got int16 [3]"),
        ("out", memoryview(bytes(4 * ROWS * HIDDEN)).cast("f", (ROWS, HIDDEN)), "out: got float32 [5, 6], read-only"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, value: Any, message: str) -> None:
    given = arguments()
    with pytest.raises(KernelArgumentError) as caught:
        call({**given, name: value})
    assert caught.value.message.startswith(message)
    assert not given["out"].any()


class Exporter:
    """An object that has nothing but DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_after_a_call(fails: bool) -> None:
    given = arguments()
    exporter = Exporter(torch.from_numpy(given["weight"].copy()))
    if fails:
        given["ids"] = np.array([3, 0, VOCAB])
    before = sys.getrefcount(given["features"])
    try:
        call({**given, "weight": exporter})
    except KernelArgumentError:
        assert fails
    after = sys.getrefcount(given["features"])
    assert after == before
    gone = weakref.ref(exporter.tensor)
    del exporter
    gc.collect()
    assert gone() is None


class Liar:
    """Says that it exports something else than it does."""

    def __init__(self, capsule: Any, device: Any = (1, 0)) -> None:
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> Any:
        return self.device


def test_a_capsule_is_taken_once_and_only_if_it_is_one() -> None:
    given = arguments()
    liar = Liar(torch.from_numpy(given["weight"]).__dlpack__())
    call({**given, "weight": liar})
    for wrong in (liar, Liar(None), Liar("text"), Liar(given["weight"])):
        with pytest.raises(KernelArgumentError, match=r"segments\[1\]\.weight"):
            call({**given, "weight": wrong})


def test_tensors_of_other_devices_are_refused() -> None:
    given = arguments()
    for device in ((2, 0), (10, 1), (2, 3)):
        liar = Liar(torch.from_numpy(given["weight"]).__dlpack__(), device)
        with pytest.raises(KernelArgumentError, match=r"expected .*CPU memory"):
            call({**given, "weight": liar})


def test_the_kernel_runs_without_the_interpreter_lock() -> None:
    features = np.ones((400, 2000), np.float32)
    weight, bias = np.ones((2000, 2000), np.float32), np.zeros(2000, np.float32)
    out, table = np.empty((400, 2000), np.float32), np.zeros((1, 2000), np.float32)
    started, ran = threading.Event(), []

    def run() -> None:
        started.wait()
        ran.append(True)

    other = threading.Thread(target=run)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # longer than the call, so that only a release of the lock lets the other run
    try:
        started.set()
        _native.splice(out, table, None, [("features", 0, features, weight, bias, None)], 1, "portable")
        ran_meanwhile = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert ran_meanwhile


@pytest.mark.skipif(_native.cuda_device_count() > 0, reason="there is a CUDA device")
def test_without_cuda_its_op_says_so() -> None:
    given = arguments()
    with pytest.raises((PlatformError, KernelArgumentError)):
        _native.splice_cuda(given["out"], given["table"], None, [])
