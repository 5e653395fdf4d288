"""The benchmark against peers: who is timed, who is named, what a ratio is. No test looks at a time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.statistics import Round
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.manifest import PORTABLE, RECORDS
from support import benchmark_script, bytes_of_linears

QUIET = Round(1, "serve", 1.0, 0.0, {"one stream": 1e10}, {})


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    with benchmark_script("peers") as module:
        yield module


@pytest.fixture(scope="module")
def models(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the demo bundle."""
    return of_bundle(peers, tmp_path_factory.mktemp("models"), DEMO_BUNDLE)


def of_bundle(peers: Any, folder: Path, bundle: Path) -> Any:
    return peers.peer_models.models_of_bundle(folder, bundle, lambda line: None)


@pytest.fixture(scope="module")
def logits_of_ours(peers: Any, models: Any) -> list[float]:
    return logits_of(peers, models, "ours")


def logits_of(peers: Any, models: Any, name: str) -> list[float]:
    """Of an engine that has forgotten a sequence before; in its own process, as some leave registers set."""
    peer = peers.Peer(name, models, 1)
    try:
        logits: list[float] = peer.ask(do="load")["logits"]
        return logits
    finally:
        peer.close()


def test_both_layouts_are_there_whichever_was_given(peers: Any, models: Any, tmp_path: Path) -> None:
    for given in (models.records, models.portable):
        found = of_bundle(peers, tmp_path, given)
        layouts = [Bundle.open(path).manifest.decoder.layout for path in (found.records, found.portable)]
        assert layouts == [RECORDS, PORTABLE]
        assert given in (found.records, found.portable)


def test_a_shape_becomes_a_bundle_in_both_layouts_and_leaves_no_checkpoint(peers: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    models = peers.peer_models.models_of_shape(tmp_path, "tiny", 1, lines.append)
    assert Bundle.open(models.records).manifest.decoder.layout == RECORDS
    assert Bundle.open(models.portable).manifest.decoder.layout == PORTABLE
    assert models.spec.layers == 1
    assert {path.name for path in models.folder.iterdir()} == {"records", "portable"}
    written = len(lines)
    assert peers.peer_models.models_of_shape(tmp_path, "tiny", 1, lines.append) == models
    assert len(lines) == written  # nothing was made twice
    with pytest.raises(ValueError, match=r"down_proj has .* rows of 344 values, no whole number of groups of 32"):
        peers.peer_models.Weights(models.portable).matrix("down", 0)


def test_ratios_are_of_the_same_round_and_of_rounds_that_count(peers: Any) -> None:
    ours, peer = {0: 1.0, 1: 1.0, 2: 10.0, 3: 1.0}, {0: 99.0, 1: 2.0, 2: 15.0, 4: 7.0}
    assert peers.ratio(peer, ours, [1, 2, 3, 4]) == peers.Ratio(1.75, 1.5, 2.0, 2)
    assert peers.ratio(peer, {}, [1, 2]) is None


def turn(peers: Any, index: int, burst: str = "prefill 128", group: int = 0, **changes: Any) -> Any:
    return peers.Turn(group, burst, replace(QUIET, index=index, **changes))


def test_disturbed_rounds_do_not_count_unless_all_are_which_is_marked(peers: Any, models: Any) -> None:
    history = [turn(peers, 0), turn(peers, 1, foreign_cpu=0.5), turn(peers, 2)]
    history += [turn(peers, 0, "prefill 512"), turn(peers, 1, "prefill 512", foreign_cpu=0.5)]
    match = peers.Match(["ours"], models, 1, 1, history)
    rounds = peers.as_result([match], history, {}, {})["groups"][0]["rounds"]
    counted = {burst: (one["counted"], one["undisturbed"]) for burst, one in rounds.items() if one["all"]}
    assert counted == {"prefill 128": ([2], True), "prefill 512": ([1], False)}
    assert [peers._mark(rounds[burst]) for burst in counted] == ["", " †"]


def test_a_group_is_held_against_the_best_bandwidth_of_all(peers: Any) -> None:
    history = [turn(peers, 1), turn(peers, 1, group=1, bandwidth={"one stream": 8e9})]
    assert [peers.undisturbed(history, group, "prefill 128") for group in (0, 1)] == [[1], []]


def test_disturbed_rounds_are_repeated_and_others_are_not(
    peers: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[Any] = []
    match = peers.Match(["ours"], models, 1, 1, history)
    disturbed = {("prefill 128", 1), *(("prefill 512", index) for index in range(9))}

    def run_round(burst: str, index: int) -> None:
        share = 0.5 if (burst, index) in disturbed else 0.0
        history.append(turn(peers, index, burst, foreign_cpu=share))

    monkeypatch.setattr(match, "load", lambda: None)
    monkeypatch.setattr(match, "run_round", run_round)
    match.run(2, 4)
    run = {burst: [one.round.index for one in history if one.burst == burst] for burst in peers.BURSTS}
    assert run.pop("prefill 128") == [0, 1, 2, 3]
    assert run.pop("prefill 512") == [0, 1, 2, 3, 4]
    assert set(map(tuple, run.values())) == {(0, 1, 2)}


def test_engines_that_do_not_fit_together_run_in_groups_with_ours_in_each(peers: Any) -> None:
    sizes = {"ours": 4, "a": 5, "b": 5, "c": 6, "huge": 17, "d": 1}
    groups, too_large = peers.grouped(list(sizes), sizes, 20)
    assert groups == [["ours", "a", "b", "c"], ["ours", "d"]]
    assert too_large == ["huge"]
    assert peers.grouped(["a", "b"], sizes, 5) == ([["a"], ["b"]], [])
    assert peers.grouped(["ours"], sizes, 20) == ([["ours"]], [])


# engine -> the module that it needs
PEERS = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "llama.cpp-q4_0": "llama_cpp",
    "llama.cpp-q4_k": "llama_cpp",
    "openvino": "openvino",
    "openvino-f32": "openvino",
    "torch-bf16": "transformers",
}


@pytest.mark.parametrize("peer", PEERS)
def test_contestants_compute_with_the_same_weights(
    peers: Any, models: Any, logits_of_ours: list[float], peer: str
) -> None:
    """So that none is fast because it computes something else."""
    if find_spec(PEERS[peer]) is None:
        pytest.skip(f"{PEERS[peer]} is not installed")
    assert peers.difference(logits_of(peers, models, peer), logits_of_ours) < 0.05


def test_who_computes_something_else_is_not_timed(peers: Any, models: Any) -> None:
    match = peers.Match(["ours", "onnxruntime", "torch-bf16"], models, 1, 1, [])
    first, second, third = match.standings
    match._check(first, [3.0, -4.0])
    match._check(second, [3.3, -4.2])
    for wrong in ([3.0, -2.5], [3.0, float("nan")], [3.0]):
        with pytest.raises(peers.EngineFailed, match=r"computes something else: .* off those of ours"):
            match._check(third, wrong)


def test_guesses_have_the_logits_of_steps_and_can_be_taken_back(peers: Any, models: Any) -> None:
    engine = sys.modules["peer_engines"].Ours(models, 1)
    engine.clear(8)
    engine.append([5, 6, 7])
    guessed = np.array(engine.guess([8, 9]))
    engine.take_back(2)
    for logits, token in zip(guessed, [8, 9], strict=True):
        np.testing.assert_allclose(engine.append([token]), logits, rtol=1e-4, atol=1e-4)


def test_linear_layers_alone_read_every_record_of_the_decoder_and_nothing_else(peers: Any, models: Any) -> None:
    bundle = Bundle.open(models.records)
    engines, weights = sys.modules["peer_engines"], peers.peer_models.Weights(models.portable)
    layers = engines.LinearLayers(models, 1)
    assert layers.bytes == bytes_of_linears(bundle.file(bundle.manifest.decoder.graph))
    # The outputs of a width share an array; the head is alone in its own.
    layers.run()
    source, logits = (next(a for a in layers._arrays if a.shape[1] == width) for width in (256, 1025))
    expected = source[0] @ weights.head().dequantized().T
    assert peers.difference(logits[0], expected) < 0.02


def test_bursts_of_ours_are_for_ours_alone(peers: Any, models: Any) -> None:
    worker = sys.modules["peer_engines"].Worker("onnxruntime", models, 1)
    worker.answer({"do": "load"})
    with pytest.raises(TypeError, match="asked PlainOnnxRuntime for a burst of ours"):
        worker.answer({"do": "rows", "depth": 4, "rows": 2, "tokens": 1, "seed": 0})


def test_an_engine_that_is_not_installed_is_named(peers: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = sys.modules["peer_engines"]

    def missing(*_: object) -> Any:
        raise ModuleNotFoundError(name="some_engine")

    monkeypatch.setitem(engines.ENGINES, "ours", missing)
    worker = engines.Worker("ours", models, 1)
    assert engines._answer(worker, {"do": "load"}) == {"error": "some_engine is not installed"}


def test_an_engine_that_breaks_is_named_with_its_last_words(peers: Any, models: Any) -> None:
    missing = Path("no such bundle")
    peer = peers.Peer("ours", replace(models, records=missing, portable=missing), 1)
    with pytest.raises(peers.EngineFailed, match="does not exist"):
        peer.ask(do="load")
    peer.close()


@pytest.mark.parametrize(("kind", "error"), [("Q4_0", 0.0), ("Q4_K", 0.015), ("Q6_K", 0.01)])
def test_blocks_of_llama_cpp_hold_the_weights(peers: Any, kind: str, error: float) -> None:
    """``error`` is of the largest weight."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.003, 0.006, (5, 4)) * rng.choice([-1, 1], (5, 4))
    levels = rng.integers(0, 16, (5, 512), np.uint8)
    matrix = peers.peer_models.Matrix(levels, scales.astype(np.float16))
    blocks = getattr(sys.modules["peer_gguf"], kind.lower())(matrix)
    held = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    expected = matrix.dequantized()
    assert np.abs(held - expected).max() <= error * np.abs(expected).max()


def test_a_gguf_has_the_shape_of_the_bundle_and_its_weights(peers: Any, models: Any) -> None:
    gguf = pytest.importorskip("gguf")
    path = sys.modules["peer_gguf"].gguf_file(models, "Q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    spec = models.spec
    assert len(tensors) == 3 + 9 * spec.layers
    down = tensors["blk.0.ffn_down.weight"]
    assert [int(size) for size in down.shape] == [spec.intermediate_size, spec.hidden_size]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0
    expected = peers.peer_models.Weights(models.portable).matrix("down", 0).dequantized()
    np.testing.assert_array_equal(gguf.quants.dequantize(down.data, down.tensor_type), expected)


def test_what_an_interrupted_run_wrote_is_not_taken_for_whole(peers: Any, tmp_path: Path) -> None:
    staged, folder = peers.peer_models.staged, tmp_path / "models" / "format"

    def interrupted() -> None:
        with staged(folder) as staging:
            (staging / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folder.exists()
    with staged(folder) as staging:
        (staging / "whole").touch()
    assert [path.name for path in folder.parent.rglob("*")] == ["format", "whole"]


def test_rows_that_are_no_whole_blocks_are_refused(peers: Any) -> None:
    pytest.importorskip("gguf")
    tensor = sys.modules["peer_gguf"]._Tensor("name", "Q4_K", (2, 384), lambda: None)
    with pytest.raises(ValueError, match="rows of 384 values are no whole number of Q4_K blocks of 256"):
        tensor.layout()


def test_a_match_writes_every_time_and_names_who_is_missing(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = Limits(2**26, {"one stream": 1e10}, {})
    monkeypatch.setattr(peers, "probe", lambda threads, size: limits)
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setattr(peers, "grouped", lambda names, sizes, room: ([["ours"], names[:2]], names[2:]))
    out = tmp_path / "peers.json"
    shape = ["--bundle", str(DEMO_BUNDLE), "--work", str(tmp_path), "--engines", "ours,onnxruntime,torch-bf16"]
    once = ["--threads", "1", "--rounds", "1", "--most-rounds", "1"]  # however busy the machine is
    peers.main([*shape, *once, "--tokens", "3", "--json", str(out)])
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    (ours,), (_, peer) = (group["engines"] for group in written["groups"])
    assert set(ours["times"]) == {*peers.BURSTS, *peers.BURSTS_OF_OURS}  # of the second group, not again
    assert set(peer["times"]) == set(peers.BURSTS)
    assert [len(tokens) for tokens in peer["tokens"].values()] == [1, 3]
    assert all(value["rounds"] == 1 for value in peer["ratios"].values())
    assert len(written["ours_alone"]) == 4
    assert "| onnxruntime | " in printed
    assert "- linear layers, share of the bandwidth: " in printed
    assert "| ours, onnxruntime | 1 of 1, 10.0 to 10.0" in printed
    assert re.search(r"Not measured:\n- torch-bf16: takes 0.\d GiB, too much beside ours", printed)


def test_what_an_engine_did_before_it_broke_is_kept(peers: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "probe", lambda threads, size: Limits(2**26, {"one stream": 1e10}, {}))
    monkeypatch.setitem(peers.BURSTS, "impossible", {"do": "nothing"})
    history: list[Any] = []
    match = peers.Match(["ours"], models, 1, 1, history)
    match.run(1, 1)
    (standing,) = match.standings
    assert standing.reason == "KeyError: 'nothing'"
    assert set(standing.times) == {*peers.BURSTS, *peers.BURSTS_OF_OURS} - {"impossible"}
    assert peers.as_result([match], history, {}, {})["failed"] == {"ours": standing.reason}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engines", "ours,theirs"], "no engine theirs"),
        (["--bundle", "b", "--layers", "2"], "--layers cuts a --shape"),
        (["--rounds", "0"], "1 or more"),
        (["--rounds", "3", "--most-rounds", "2"], "--most-rounds 2 is less than --rounds 3"),
    ],
)
def test_wrong_usage_is_refused(
    peers: Any, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
