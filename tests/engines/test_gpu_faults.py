"""What goes wrong while engines are built and run on a GPU leaves what was there, frees what it took, and says so."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from biomedgpt_edge import Engine
from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.suite import Plan as BenchPlan
from biomedgpt_edge.bench.suite import Suite
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import OptionError, PlatformError, PromptTooLongError
from biomedgpt_edge.ort_session import running
from biomedgpt_edge.tensorrt import build
from biomedgpt_edge.tensorrt.build import Plan, engines_for, find_target, plan_engines
from engine_answers import IBUPROFEN, LARGE_PROTEIN, SIZE
from fake_gpu import FakeCuda, FakeTensorRt, Status


@pytest.fixture
def trt(gpu: FakeCuda, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    return FakeTensorRt(gpu, tmp_path / "graphs", "tensorrt").install(monkeypatch)


def silent(line: str) -> None:
    pass


def plan(context: int | None = None) -> Plan:
    return plan_engines(Bundle.open(DEMO_BUNDLE), find_target(), context)


def load() -> Engine:
    return Engine.load(device="tensorrt", threads=1)


def rows(engine: Engine, count: int) -> np.ndarray:
    width = engine.bundle.manifest.decoder.hidden_size
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float32) * 0.05


# --- building ---------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading
from biomedgpt_edge.cli.main import main
from biomedgpt_edge.tensorrt import build
real = build.build_engine
def soon(*arguments):
    threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
    return real(*arguments)
build.build_engine = soon
sys.exit(main(["engines", "build", "--device", "sm89"]))
"""


@pytest.mark.parametrize("seconds", ["0.1", "0.8"])
def test_ctrl_c_ends_a_build_and_leaves_nothing(cache: Path, seconds: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, seconds], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 130, done.stderr
    assert not [path for path in (cache / "engines").iterdir() if path.is_dir()]


def test_a_disk_that_is_full_while_an_engine_is_written_gives_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    real = build._writer
    monkeypatch.setattr(build, "_writer", lambda api, file: real(api, Full()))  # type: ignore[arg-type]
    wanted = plan_engines(Bundle.open(DEMO_BUNDLE), find_target("sm89"))
    with pytest.raises(PlatformError, match="No space left on device"):
        engines_for(wanted, "once", silent)
    assert not wanted.key.folder.exists()


def test_a_terminal_that_has_gone_ends_a_build_by_its_own_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(line: str) -> None:
        if " s, " in line:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(build, "_SECONDS_BETWEEN_LINES", 0.0)
    with pytest.raises(PlatformError, match="Broken pipe"):
        engines_for(plan_engines(Bundle.open(DEMO_BUNDLE), find_target("sm89")), "once", tell)


def test_building_again_keeps_the_old_engines_until_the_new_ones_are_there(
    trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan()
    before = engines_for(wanted, "once", silent)

    def failing(*arguments: Any) -> None:
        raise PlatformError("no")

    monkeypatch.setattr(build, "build_engine", failing)
    with pytest.raises(PlatformError, match="no"):
        engines_for(wanted, "once", silent, again=True)
    assert engines_for(wanted, "full", silent) == before


def test_a_file_in_the_place_of_engines_gives_way(trt: FakeTensorRt) -> None:
    wanted = plan()
    wanted.key.folder.parent.mkdir(parents=True)
    wanted.key.folder.write_text("")
    assert engines_for(wanted, "once", silent).files


def test_one_bundle_is_built_for_one_thing_at_a_time(trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    """What engines are made of is derived once, and removed when one of them is built."""
    running_now, most = [0], [0]
    real = trt.build

    def counted(*arguments: Any) -> Any:
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        try:
            return real(*arguments)
        finally:
            running_now[0] -= 1

    monkeypatch.setattr(build, "build_engine", counted)
    plans = [plan(), plan(300)]
    threads = [threading.Thread(target=engines_for, args=(one, "once", silent)) for one in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert {one.key.folder.exists() for one in plans} >= {True}


def test_a_bundle_without_the_standard_graph_of_an_encoder_is_refused_by_its_name(
    trt: FakeTensorRt, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(DEMO_BUNDLE, tmp_path / "copy"))
    text = (copy / "manifest.json").read_text()
    start = text.index('"molecule_encoder": {')
    begin = text.index('"standard": {', start)
    end = text.index("}", begin) + 1
    (copy / "manifest.json").write_text(text[:begin] + '"standard": null' + text[end:])
    with pytest.raises(OptionError, match="no standard graph, for TensorRT, of its molecule encoder"):
        Engine.load(copy, device="tensorrt", threads=1)


# --- running ----------------------------------------------------------------------------------------------------------


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_closing_an_engine_frees_the_gpu_at_once(trt: FakeTensorRt) -> None:
    with without_collector():
        engine = load()
        engine.ask(SIZE, IBUPROFEN, max_new_tokens=4)
        assert trt.cuda.used > 0
        engine.close()
        del engine
        assert trt.cuda.used == 0


def test_numbers_that_are_none_do_not_outlast_their_answer(trt: FakeTensorRt) -> None:
    with load() as engine:
        given = rows(engine, 30)
        with engine.decoder.open(60) as state:
            expected = state.prefill(given[:20]).copy()
        with engine.decoder.open(60) as state:
            given[25] = 1e30
            state.prefill(given)
        with engine.decoder.open(60) as state:
            np.testing.assert_array_equal(state.prefill(given[:20]), expected)


def test_any_number_of_positions_in_one_call(trt: FakeTensorRt) -> None:
    with load() as engine:
        given = rows(engine, 600)
        with engine.decoder.open(600) as whole, engine.decoder.open(600) as parts:
            logits = whole.prefill(given)
            for begin in (0, 256, 512):
                expected = parts.prefill(given[begin : begin + 256])
            np.testing.assert_array_equal(logits, expected)
            assert whole.length == 600
        with engine.decoder.open(400) as state:
            with pytest.raises(ValueError, match="600 positions do not fit"):
                state.prefill(given)
            assert state.length == 0


def test_threads_open_sequences_at_once(trt: FakeTensorRt) -> None:
    with load() as engine:
        given, found = rows(engine, 20), list[np.ndarray]()

        def answer() -> None:
            with engine.decoder.open(60) as state:
                logits = state.prefill(given)
                for token in (3, 4, 5, 6):
                    logits = state.step(token)
                found.append(logits.copy())

        threads = [threading.Thread(target=answer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for logits in found[1:]:
            np.testing.assert_array_equal(logits, found[0])


def test_a_cache_that_cannot_be_cleared_goes_with_its_cuda_graphs(trt: FakeTensorRt) -> None:
    with load() as engine:
        decoder = engine.decoder
        with decoder.open(60) as state:
            state.prefill(rows(engine, 20))
            for _ in range(3):
                state.step(3)
            start = state.key_values()
        assert len(trt.cuda.graphs) == 1
        trt.cuda.refused["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
        with pytest.raises(PlatformError, match="cudaErrorIllegalAddress"):
            decoder.open(60, start)
        del trt.cuda.refused["cudaStreamSynchronize"]
        gc.collect()
        assert not trt.cuda.graphs


def test_engines_for_fewer_positions_are_named_and_no_memory_limit(trt: FakeTensorRt) -> None:
    engines_for(plan(160), "once", silent)
    with load() as engine, pytest.raises(PromptTooLongError, match=r"the engines were built for 160"):
        engine.ask(SIZE, LARGE_PROTEIN)


def test_chats_keep_their_caches_where_engines_have_fewer_positions(trt: FakeTensorRt) -> None:
    engines_for(plan(300), "once", silent)
    with load() as engine:
        chat = engine.chat()
        chat.ask(SIZE, IBUPROFEN, max_new_tokens=8)
        engine.ask("What is a protein?", max_new_tokens=8)
        assert chat.ask("Why?", max_new_tokens=8).timings.cached_tokens > 16


def test_a_gpu_that_fails_in_onnxruntime_makes_no_bundle_corrupt() -> None:
    with (
        pytest.raises(PlatformError, match=r"the GPU failed to run decoder\.onnx: CUDA failure 700"),
        running("decoder.onnx"),
    ):
        raise ort_state.Fail("CUDA failure 700: an illegal memory access was encountered ; GPU=0")


def test_a_writer_counts_nothing_behind_a_failure(tmp_path: Path) -> None:
    api = find_target("sm89").library.api

    class Once:
        def __init__(self) -> None:
            self.calls = 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            raise OSError(28, "full")

    file: Any = Once()
    writer = build._writer(api, file)
    target: BinaryIO = writer
    assert (target.write(b"one"), target.write(b"two")) == (0, 0)
    assert file.calls == 1
    assert writer.error.errno == 28


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_a_gpu_with_no_limit_of_the_processor(trt: FakeTensorRt) -> None:
    limits = Limits(2**31, {"one stream": 3e10}, {"int8 portable": 1e12, "fp32 portable": 1e11})
    wanted = BenchPlan(None, 1, 1, ("load", "splice", "prefill"), device="tensorrt")
    result = Suite(wanted, silent, probing=lambda threads, size: limits).run()
    assert (result["method"]["device"], result["model"]["decoder"], result["model"]["kv_cache"]) == (
        "tensorrt",
        "tensorrt",
        "fp16",
    )
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert "not dropped from the page cache" in stages["load, cold"]["reason"]
    measured = [stage for stage in result["stages"] if stage["measured"]]
    assert {stage["group"] for stage in measured} == {"load", "splice", "prefill"}
    assert not [metric for stage in measured for metric in stage["metrics"] if "bound" in metric]
