"""``biomedgpt-edge bench``: what is written of a run, which rounds count, what is refused. No test looks at a time."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from biomedgpt_edge.bench import counters, limits, stages, suite
from biomedgpt_edge.bench.energy import RailMeter, RaplMeter, find_meter
from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.plot import as_svg
from biomedgpt_edge.bench.report import as_csv, as_markdown, as_table
from biomedgpt_edge.bench.stages import NotMeasured
from biomedgpt_edge.bench.statistics import Round, disturbances, nearest_rank, summarize
from biomedgpt_edge.bench.suite import Plan, Suite
from biomedgpt_edge.bench.work import (
    Bound,
    Work,
    bound,
    bound_in_turn,
    decode_work,
    graph_bytes,
    molecule_work,
    prefill_work,
    splice_work,
)
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main
from biomedgpt_edge.decoder.kv_cache import KvLayout
from biomedgpt_edge.devices import DEVICES, ENCODERS
from biomedgpt_edge.engine import DEMO_BUNDLE, Engine
from biomedgpt_edge.errors import OptionError, PlatformError

SCHEMA = json.loads((Path(__file__).parents[2] / "benchmarks" / "bench.schema.json").read_text())
PROBED = Limits(2**31, {"one stream": 3e10, "four streams": 4e10}, {"int8 portable": 1e12, "fp32 portable": 1e11})
QUIET = Round(1, "serve", 1.0, 0.0, {"one stream": 1e10}, {})


def misfits(schema: dict[str, Any], value: Any, where: str = "result") -> Iterator[str]:
    """Where ``value`` does not keep to ``schema``, for the keywords that ours uses; any other is a misfit."""
    known = {"type", "enum", "const", "required", "properties", "additionalProperties", "items", "$ref", "$defs"}
    yield from (f"keyword {word}" for word in schema.keys() - known - {"$schema", "$id", "title", "description"})
    if "$ref" in schema:
        yield from misfits(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value, where)
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    types |= {"number": (int, float), "null": type(None)}
    names = schema.get("type", list(types))
    if not any(isinstance(value, types[name]) for name in ([names] if isinstance(names, str) else names)):
        yield f"{where} is {type(value).__name__}"
    if value not in schema.get("enum", [value]) or schema.get("const", value) != value:
        yield f"{where} is {value!r}"
    if isinstance(value, dict):
        yield from (f"{where} lacks {name}" for name in set(schema.get("required", ())) - value.keys())
        for name, inner in value.items():
            rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from [f"{where} has {name}"] if rule is False else misfits(rule or {}, inner, f"{where}.{name}")
    if isinstance(value, list):
        for inner in value:
            yield from misfits(schema.get("items", {}), inner, f"{where}[]")


def measured(bundle: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> dict[str, Any]:
    """A run on a machine that nobody else uses, its probe made up."""
    monkeypatch.setattr(counters.Processors, "foreign_share", lambda self, before: 0.0)
    monkeypatch.setattr(suite, "_PAUSE", 0)
    return Suite(Plan(bundle, 1, **plan), lambda line: None, probing=lambda threads, size: PROBED).run()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A whole run, two rounds of every stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "ANSWER_TOKENS", 4)
        return measured(DEMO_BUNDLE, patch, rounds=2)


def stage_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in result["stages"] if stage["name"] == name)


# ------------------------------------------------------------------------------------------------ samples and rounds


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(1, 50, 1), (2, 50, 1), (9, 90, None), (10, 90, 9), (19, 95, None), (20, 95, 19), (99, 99, None), (100, 99, 99)],
)
def test_a_percentile_is_the_nearest_rank_and_none_of_too_few(count: int, percent: int, expected: int | None) -> None:
    assert nearest_rank([float(value) for value in range(1, count + 1)], percent) == expected


def test_a_summary_takes_samples_in_any_order() -> None:
    summary = summarize([3.0, 1.0, 2.0])
    assert summary is not None
    assert (summary.count, summary.minimum, summary.mean, summary.maximum) == (3, 1.0, 2.0, 3.0)
    assert summary.percentiles == {50: 2.0, 90: None, 95: None, 99: None}
    assert summarize([]) is None


@pytest.mark.parametrize(
    ("round_", "reason"),
    [
        (QUIET, None),
        (replace(QUIET, foreign_cpu=0.06), None),
        (replace(QUIET, foreign_cpu=None), None),
        (replace(QUIET, foreign_cpu=0.061), "other processes"),
        (replace(QUIET, bandwidth={"one stream": 0.85e10}), None),
        (replace(QUIET, bandwidth={"one stream": 0.84e10}), "bandwidth was 84%"),
        (replace(QUIET, index=0), "warm-up"),
    ],
)
def test_rounds_are_dropped_by_the_rule_alone(round_: Round, reason: str | None) -> None:
    reasons = disturbances([QUIET, round_])[1]
    assert reasons == () if reason is None else reason in reasons[0]


# ---------------------------------------------------------------------------------------------------- a whole result


def test_the_schema_knows_every_device() -> None:
    method = SCHEMA["properties"]["method"]["properties"]
    assert (method["device"]["enum"], method["encoders"]["enum"]) == (list(DEVICES), list(ENCODERS))


def test_a_result_keeps_to_its_schema(result: dict[str, Any]) -> None:
    assert list(misfits(SCHEMA, result)) == []
    assert list(misfits(SCHEMA, {**result, "schema_version": 3, "more": 1})) != []


def test_every_stage_is_there_and_every_sample_kept(result: dict[str, Any]) -> None:
    names = [stage["name"] for stage in result["stages"] if stage["measured"]]
    for name in ("load, warm", "encode protein 400", "splice molecule", "prefill pp128", "prefill pp512"):
        assert name in names
    for depth in (0, 512, 1024):
        (tpot, itl) = stage_of(result, f"decode tg128 @ depth {depth}")["metrics"]
        assert [len(sample["values"]) for sample in itl["samples"]] == [128, 128, 128]  # the warm-up's too
        assert itl["summary"]["count"] == 2 * 128
        assert itl["summary"]["p99"] is not None
        assert (tpot["summary"]["count"], tpot["summary"]["p90"]) == (2, None)
    for what in ("molecule", "protein 400", "protein 1000"):
        metrics = {metric["name"] for metric in stage_of(result, f"request {what}")["metrics"]}
        assert {"ttft", "end to end", "answer", *stages.REQUEST_PARTS} <= metrics


def test_a_load_that_reads_nothing_from_storage_is_not_called_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "bytes_read_from_storage", lambda: 0)
    cold, warm = measured(DEMO_BUNDLE, monkeypatch, rounds=1, groups=("load",))["stages"]
    assert "nothing was read from storage" in cold["reason"]
    assert warm["measured"]


def test_memory_stands_with_every_stage(result: dict[str, Any]) -> None:
    for stage in result["stages"]:
        if stage["measured"]:
            assert stage["memory"]["peak_rss"] > stage["memory"]["anonymous"] > 2**20


def test_shares_are_of_the_limit_that_binds(result: dict[str, Any]) -> None:
    stage = stage_of(result, "decode tg128 @ depth 512")
    tpot = stage["metrics"][0]
    assert tpot["bound"]["limit"] == "bandwidth"
    (work,) = stage["work"]
    assert tpot["bound"]["seconds"] == work["bytes"] / 4e10
    assert tpot["bound"]["share_reached"] == tpot["bound"]["seconds"] / tpot["summary"]["p50"]
    assert stage_of(result, "prefill pp512")["metrics"][0]["bound"]["limit"] == "int8 arithmetic"


def test_a_disturbed_round_counts_in_no_figure_but_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([4e10, 4e10, 3e10, 4e10])
    monkeypatch.setattr(counters.Processors, "foreign_share", lambda self, before: 0.0)
    plan = Plan(DEMO_BUNDLE, 1, rounds=3, groups=("prefill",))
    run = Suite(plan, lambda line: None, probing=lambda *_: replace(PROBED, bandwidth={"one stream": next(probes)}))
    result = run.run()
    metric = stage_of(result, "prefill pp128")["metrics"][0]
    assert [sample["round"] for sample in metric["samples"]] == [0, 1, 2, 3]
    assert metric["summary"]["count"] == 2
    assert result["counted"] == {"serve": {"rounds": [1, 3], "undisturbed": True}}
    assert "1 disturbed round dropped (round 2: bandwidth was 75%" in as_table(result)


def test_where_no_round_is_undisturbed_all_count_and_everything_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.Processors, "foreign_share", lambda self, before: 0.5)
    result = Suite(Plan(DEMO_BUNDLE, 1, 1, ("splice",)), lambda line: None, probing=lambda *_: PROBED).run()
    assert result["counted"] == {"serve": {"rounds": [1], "undisturbed": False}}
    assert stage_of(result, "splice molecule")["metrics"][0]["summary"]["count"] == 1
    for text in (as_table(result), as_markdown(result), as_svg(result)):
        assert "EVERY ROUND WAS DISTURBED" in text


def test_what_cannot_be_measured_is_named_with_its_reason(result: dict[str, Any]) -> None:
    with Engine.load(DEMO_BUNDLE, threads=1) as engine, pytest.raises(NotMeasured, match="do not fit the model's con"):
        stages.DecodeStage(engine, engine.bundle.manifest.decoder.context - 127).run(0, lambda: None)
    unfit = {"group": "decode", "name": "decode", "measured": False, "reason": "it does not fit"}
    shown = {**result, "stages": [*result["stages"], unfit]}
    assert list(misfits(SCHEMA, shown)) == []
    for text in (as_table(shown), as_markdown(shown), as_csv(shown)):
        assert "it does not fit" in text


def test_no_two_runs_of_a_stage_share_an_input() -> None:
    """Or an engine that keeps features would answer the second from memory."""
    groups = ("encode", "splice", "request")
    molecules = [stages.molecule_maker(group)(turn) for group in groups for turn in range(4)]
    proteins = [stages.protein_maker(group, 400)(turn) for group in groups for turn in range(4)]
    for items in (molecules, proteins):
        assert len({item.digest for item in items}) == len(items)
        assert len({item.n_soft_tokens for item in items}) == 1


# ------------------------------------------------------------------------------------------------------ work and limits


def test_a_decoded_token_reads_all_weights_and_its_past() -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    spec = bundle.manifest.decoder
    weights = graph_bytes(bundle, spec.graph)
    stored = sum(entry.size for entry in bundle.manifest.files if entry.path == "decoder.data")
    assert 0.9 * stored < weights <= stored
    per_position = 2 * spec.layers * spec.kv_heads * spec.head_size * 4
    kv = KvLayout.rows(bundle.manifest.decoder)
    deep, shallow = decode_work(bundle, kv, 1000, 1), decode_work(bundle, kv, 0, 1)
    assert shallow.bytes == weights + per_position
    assert deep.bytes - shallow.bytes == 1000 * per_position
    one, two = prefill_work(bundle, 100), prefill_work(bundle, 200)
    assert one.bytes == two.bytes == weights
    assert one.operations < two.operations


def test_int8_limits_hold_for_quantized_graphs_alone(tiny_bundle_fp32: Path) -> None:
    assert prefill_work(Bundle.open(DEMO_BUNDLE), 8).kind == "int8"
    assert prefill_work(Bundle.open(tiny_bundle_fp32), 8).kind == "fp32"


def test_works_that_follow_each_other_are_added() -> None:
    rates = {"int8 fast": 2.0, "fp32 fast": 100.0}
    works = (Work(30, 40, "int8"), Work(10, 60, "int8"))
    assert bound_in_turn(works, 1.0, rates) == Bound(60.0, "bandwidth")
    assert bound_in_turn(works[::-1], 2.0, rates) == Bound(50.0, "int8 arithmetic")
    assert bound_in_turn((), 1.0, rates) is None


def test_the_first_token_of_a_request_has_the_encoder_and_what_no_cache_held_before_it(result: dict[str, Any]) -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    assert bundle.manifest.molecule_encoder is not None
    stage = stage_of(result, "request molecule")
    encoder, decoder = stage["work"]
    atoms = stages.molecule_maker("request")(0).n_soft_tokens
    assert encoder == asdict(molecule_work(bundle, bundle.manifest.molecule_encoder, atoms))
    with Engine.load(threads=1) as engine:
        prompt = len(engine.prepare(stages.MOLECULE_QUESTION, stages.molecule_maker("request")(0)))
    assert 0 < decoder["operations"] < prefill_work(bundle, prompt).operations
    (ttft,) = (metric for metric in stage["metrics"] if metric["name"] == "ttft")
    assert ttft["bound"]["share_reached"] > 0


def test_a_splice_reads_weights_and_features_and_writes_soft_tokens() -> None:
    projection = Bundle.open(DEMO_BUNDLE).molecule_projection
    assert projection is not None
    hidden, width = projection.weight.shape
    more = splice_work(projection, 11).bytes - splice_work(projection, 10).bytes
    assert more == 4 * (hidden + width)
    assert splice_work(projection, 0).bytes == projection.weight.nbytes + projection.bias.nbytes


def test_the_slower_of_memory_and_arithmetic_binds() -> None:
    rates = {"int8 slow": 1.0, "int8 fast": 2.0, "fp32 fast": 100.0}
    assert bound(Work(30, 40, "int8"), 1.0, rates).limit == "bandwidth"
    binding = bound(Work(10, 40, "int8"), 1.0, rates)
    assert (binding.limit, binding.seconds) == ("int8 arithmetic", 20.0)


def test_a_probe_measures_every_pattern_and_kind() -> None:
    found = limits.probe(1, 2**26)
    assert found.buffer == 2**26
    assert all(rate > 0 for rate in [*found.bandwidth.values(), *found.arithmetic.values()])
    assert {name.split()[0] for name in found.arithmetic} == {"int8", "fp32"}


def test_a_probe_that_fails_is_a_typed_error() -> None:
    with pytest.raises(PlatformError, match="the probe of memory and arithmetic failed"):
        limits.probe(1, 0)


# --------------------------------------------------------------------------------------------- what the machine counts


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_foreign_time_is_that_of_others_on_the_processors_we_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "usable_processors", lambda: (0, 2))
    write(
        tmp_path / "stat",
        "cpu 9 9 9 9\ncpu0 100 0 0 50 7 0 0 0 0 0\ncpu1 999 0 0 0 0 0 0 0\ncpu2 10 10 10 5 5 10 10 50 9 9",
    )
    busy = counters.Processors.now(tmp_path).busy
    assert busy == pytest.approx((100 + 100) / counters.os.sysconf("SC_CLK_TCK"))
    before, after = counters.Processors(0.0, 10.0, 1.0), counters.Processors(10.0, 22.0, 8.0)
    assert after.foreign_share(before) == pytest.approx((12 - 7) / 20)
    assert replace(after, own=99.0).foreign_share(before) == 0.0
    assert replace(after, busy=None).foreign_share(before) is None


def test_memory_says_whose_peak_it_is(tmp_path: Path) -> None:
    write(tmp_path / "self" / "status", "VmHWM:\t 2048 kB\nRssAnon:\t 1024 kB")
    memory = counters.Memory(tmp_path)
    memory.restart()
    memory.look()
    assert (memory.peak_rss, memory.anonymous, memory.peak_is_of_stage) == (2**21, 2**20, True)
    locked = counters.Memory(tmp_path / "nowhere")
    locked.restart()
    locked.look()
    assert (locked.peak_rss, locked.anonymous, locked.peak_is_of_stage) == (None, None, False)


def test_rapl_adds_packages_and_survives_a_counter_that_runs_over(tmp_path: Path) -> None:
    domains = [tmp_path / "class" / "powercap" / name for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")]
    for domain in domains:
        write(domain / "max_energy_range_uj", 1_000_000)
        write(domain / "energy_uj", 900_000)
    meter = find_meter(tmp_path)
    assert isinstance(meter, RaplMeter)
    write(domains[0] / "energy_uj", 100_000)
    write(domains[1] / "energy_uj", 950_000)
    write(domains[2] / "energy_uj", 999_999)
    assert meter.joules() == pytest.approx(0.25)


def test_counters_of_root_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "class" / "powercap" / "intel-rapl:0" / "energy_uj", 1)

    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "root alone" in str(find_meter(tmp_path))


def test_a_jetson_is_read_at_its_input_rail(tmp_path: Path) -> None:
    chip = tmp_path / "bus" / "i2c" / "drivers" / "ina3221" / "1-0040" / "hwmon" / "hwmon1"
    for number, (label, volts, amperes) in enumerate([("VDD_CPU", 900, 900), ("VDD_IN", 5000, 2000)], 1):
        write(chip / f"in{number}_label", label)
        write(chip / f"in{number}_input", volts)
        write(chip / f"curr{number}_input", amperes)
    meter = find_meter(tmp_path)
    assert isinstance(meter, RailMeter)
    meter.close()
    meter._read_at -= 3.0
    assert meter.joules() == pytest.approx(30.0, rel=0.5)


def test_a_machine_without_meters_says_so(tmp_path: Path, result: dict[str, Any]) -> None:
    assert find_meter(tmp_path) == "not reported: this machine has neither RAPL (powercap) nor an INA3221"


# ----------------------------------------------------------------------------------------------------- what is written


def test_csv_has_one_row_for_each_metric(result: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    metrics = [(stage["name"], metric["name"]) for stage in result["stages"] for metric in stage.get("metrics", ())]
    assert [(row["stage"], row["metric"]) for row in rows if row["metric"]] == metrics
    row = next(row for row in rows if row["metric"] == "tpot")
    assert row["p99"] == ""  # of two samples
    assert float(row["p50"]) > 0


def test_tables_say_how_many_samples_and_how_percentiles_are_made(result: dict[str, Any]) -> None:
    for text in (as_table(result), as_markdown(result)):
        assert "nearest rank" in text
        assert "256" in text
    header = next(line for line in as_markdown(result).splitlines() if line.startswith("| stage"))
    assert all(name in header for name in ("n", "min", "p50", "p90", "p95", "p99", "max", "of the limit"))


def test_the_picture_is_svg_whatever_a_bundle_is_called(result: dict[str, Any]) -> None:
    hostile = {**result, "model": {**result["model"], "name": 'a<b>&"\x00\x1b'}}
    texts = [element.text or "" for element in ET.fromstring(as_svg(hostile)).iter() if element.tag.endswith("text")]
    assert any('a<b>&"' in text for text in texts)
    for word in ("Time per token, ms", "p99", "prefill", "decode tg128 @ depth 512", "protein 1000"):
        assert word in texts
    nothing = ET.fromstring(as_svg({**result, "stages": []}))
    assert [element.text for element in nothing.iter()].count("not measured") == 2


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``bench`` on one stage, with a small probe."""
    monkeypatch.setattr(suite, "probe_bytes", lambda: 2**26)

    def run(*arguments: str) -> tuple[int, str, str]:
        given = ["bench", "--bundle", str(DEMO_BUNDLE), "--threads", "1", "--rounds", "1", "--stages", "splice"]
        code = main([*given, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_one_run_gives_a_file_a_table_and_a_picture(command: Any, tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "result.svg"
    code, table, progress = command("--format", "json", "--out", str(out), "--plot", str(plot))
    assert code == 0
    assert list(misfits(SCHEMA, json.loads(out.read_text()))) == []
    assert "splice protein 400" in table
    assert "64 MiB only" in table
    assert ET.fromstring(plot.read_text()).tag.endswith("svg")
    assert "round 1 of 1" in progress


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--stages", "prefill,decod"], "stages names decod"),
        (["--stages", ""], "stages names"),
        (["--plot", "picture.png"], "Give a name in .svg"),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_mistakes_are_typed_errors(command: Any, arguments: list[str], words: str) -> None:
    code, out, err = command("--format", "json", *arguments)
    assert code == OptionError.exit_code
    assert json.loads(out)["error"]["code"] == "input.option"
    assert words in err


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(command: Any, tmp_path: Path) -> None:
    code, out, err = command("--out", str(tmp_path / "no such folder" / "result.json"))
    assert (code, out) == (OptionError.exit_code, "")
    assert "result.json cannot be written: No such file or directory" in err
    assert "warm-up" not in err
