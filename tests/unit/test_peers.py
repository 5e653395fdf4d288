"""The benchmark against peers: who is timed, who is named, what a ratio is. No test looks at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.statistics import Round
from biomedgpt_edge.engine import DEMO_BUNDLE
from support import benchmark_script

QUIET = Round(1, "serve", 1.0, 0.0, {"one stream": 1e10}, {})


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    with benchmark_script("peers") as module:
        yield module


@pytest.fixture(scope="module")
def models(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return peers.Models(DEMO_BUNDLE, tmp_path_factory.mktemp("models"))


def test_ratios_are_of_the_same_round_and_of_rounds_that_count(peers: Any) -> None:
    ours, peer = {0: 1.0, 1: 1.0, 2: 10.0, 3: 1.0}, {0: 99.0, 1: 2.0, 2: 15.0, 4: 7.0}
    assert peers.ratio(peer, ours, [1, 2, 3, 4]) == peers.Ratio(1.75, 1.5, 2.0, 2)
    assert peers.ratio(peer, {}, [1, 2]) is None


def test_disturbed_rounds_do_not_count_unless_all_are(peers: Any, models: Any) -> None:
    match = peers.Match(["ours"], models, 1, 1)
    match.rounds = [replace(QUIET, index=0), replace(QUIET, foreign_cpu=0.5), replace(QUIET, index=2)]
    assert match.counted() == ([2], True)
    match.rounds = [replace(QUIET, index=0), replace(QUIET, foreign_cpu=0.5)]
    assert match.counted() == ([1], False)


@pytest.mark.parametrize("peer", ["onnxruntime", "onnxruntime-genai"])
def test_contestants_on_one_graph_agree(peers: Any, models: Any, peer: str) -> None:
    """So that none is fast because it computes something else."""
    if peer == "onnxruntime-genai":
        pytest.importorskip("onnxruntime_genai")
    engines = sys.modules["peer_engines"]
    logits = []
    for name in ("ours", peer):
        engine = engines.ENGINES[name](models, 1)
        for _ in range(2):  # a sequence that was forgotten leaves nothing behind
            engine.clear(8)
            engine.append([5, 6, 7])
            engine.append([8])
            last = np.array(engine.append([9, 10]))
        logits.append(last)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_who_computes_something_else_is_not_timed(peers: Any, models: Any) -> None:
    match = peers.Match(list(sys.modules["peer_engines"].SAME_WEIGHTS), models, 1, 1)
    first, second, third, _ = match.standings
    match._check(first, [1.0, -4.0])
    match._check(second, [1.1, -4.1])
    for wrong in ([1.3, -4.0], [1.0, float("nan")], [1.0]):
        with pytest.raises(peers.EngineFailed, match="computes something else"):
            match._check(third, wrong)
    match._check(peers.Standing("torch-bf16"), [9.0])  # with weights of its own


def test_an_engine_that_is_not_installed_is_named(peers: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = sys.modules["peer_engines"]

    def missing(*_: object) -> Any:
        raise ModuleNotFoundError(name="some_engine")

    monkeypatch.setitem(engines.ENGINES, "ours", missing)
    worker = engines.Worker("ours", models, 1)
    assert engines._answer(worker, {"do": "load"}) == {"error": "some_engine is not installed"}


def test_an_engine_that_breaks_is_named_with_its_last_words(peers: Any, models: Any) -> None:
    peer = peers.Peer("ours", replace(models, bundle=Path("no such bundle")), 1)
    with pytest.raises(peers.EngineFailed, match="does not exist"):
        peer.ask(do="load")
    peer.close()


def test_a_gguf_of_random_blocks_has_the_shape_of_the_bundle(peers: Any, models: Any) -> None:
    gguf = pytest.importorskip("gguf")
    path = sys.modules["peer_models"].gguf_file(models, "Q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    spec = models.spec
    assert len(tensors) == 3 + 9 * spec.layers
    down = tensors["blk.0.ffn_down.weight"]
    assert [int(size) for size in down.shape] == [spec.intermediate_size, spec.hidden_size]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0


def test_a_match_writes_every_time_and_names_who_is_missing(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = Limits(2**26, {"one stream": 1e10}, {})
    monkeypatch.setattr(peers, "probe", lambda threads, size: limits)
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setitem(peers.BURSTS, "impossible", {"do": "nothing"})
    out = tmp_path / "peers.json"
    shape = ["--bundle", str(DEMO_BUNDLE), "--work", str(tmp_path), "--engines", "ours"]
    peers.main([*shape, "--threads", "1", "--rounds", "1", "--tokens", "3", "--json", str(out)])
    (engine,) = json.loads(out.read_text())["engines"]
    assert engine["reason"] == "KeyError: 'nothing'"  # and what it did before is kept
    assert [len(tokens) for tokens in engine["tokens"].values()] == [3]
    assert set(engine["times"]) == set(peers.BURSTS) - {"impossible"}
    printed = capsys.readouterr().out
    assert "Not measured:" in printed
    assert f"- ours: {engine['reason']}" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engines", "ours,theirs"], "no engine theirs"),
        (["--bundle", "b", "--layers", "2"], "--layers cuts a --shape"),
        (["--rounds", "0"], "1 or more"),
    ],
)
def test_wrong_usage_is_refused(
    peers: Any, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
