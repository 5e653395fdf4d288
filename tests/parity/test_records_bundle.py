"""A bundle whose decoder lies in records answers as the portable one that it was made from does."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from biomedgpt_edge import Engine, Molecule, Protein, _native, int4_ops
from biomedgpt_edge.bench.limits import Limits
from biomedgpt_edge.bench.stages import LoadOptions, drop_from_page_cache
from biomedgpt_edge.bench.suite import Plan, Suite
from biomedgpt_edge.bench.work import prefill_work
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.decoder.graph import WANTED, Wanted
from biomedgpt_edge.decoder.kv_cache import KvElement
from biomedgpt_edge.engine import DEMO_BUNDLE, PreparedPrompt
from biomedgpt_edge.errors import BundleCorruptError, OptionError, PlatformError
from biomedgpt_edge.manifest import MANIFEST_NAME, PORTABLE, RECORDS
from biomedgpt_edge.onnx_header import INT4_DOMAIN, read_header
from biomedgpt_export import bundle_writer
from biomedgpt_export.bundle_writer import file_entry
from biomedgpt_export.cli import main as export
from biomedgpt_export.errors import ExportError, ModelConfigError, OutputExistsError
from biomedgpt_export.layouts import PORTABLE_DECODER
from biomedgpt_export.relayout import relayout

QUESTIONS: dict[str, tuple[str, Molecule | Protein | None]] = {
    "aspirin": ("Please describe this molecule.", Molecule.from_smiles("CC(=O)Oc1ccccc1C(=O)O")),
    "caffeine": ("Which functional groups does it have?", Molecule.from_smiles("Cn1c(=O)c2c(ncn2C)n(C)c1=O")),
    "ethanol": ("What is its molecular formula?", Molecule.from_smiles("CCO")),
    "protein": ("What are the subcellular locations of this protein?", Protein.from_sequence("MKTAYIAKQRQISFVKSHFSRQ")),
    "text": ("What is a protein?", None),
}
# Where answers may differ, since two tokens are so close there that rounding decides. This bundle has none of these.
NEAR_TIES: set[str] = set()


def silent(line: str) -> None:
    pass


def prepared(engine: Engine, name: str) -> PreparedPrompt:
    question, item = QUESTIONS[name]
    return engine.prepare(question, *([] if item is None else [item]))


@pytest.fixture(scope="module")
def records(portable_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("relayout") / "records"
    relayout(portable_demo, out, "records", silent)
    return out


@pytest.fixture(scope="module")
def portable(records: Path) -> Path:
    """Turned back again."""
    out = records.with_name("portable")
    relayout(records, out, "portable", silent)
    return out


@pytest.fixture(scope="module")
def engines(records: Path, portable_demo: Path) -> Iterator[dict[str, Engine]]:
    with (
        Engine.load(portable_demo, threads=1) as shipped,
        Engine.load(records, threads=1) as one,
        Engine.load(records, threads=2) as two,
        Engine.load(records, threads=1, decoder="portable") as derived,
    ):
        yield {"portable": shipped, "records": one, "records, 2 threads": two, "derived": derived}


def test_the_benchmark_holds_them_against_int8_arithmetic_too(records: Path, portable_demo: Path) -> None:
    one, other = (prefill_work(Bundle.open(path), 8) for path in (records, portable_demo))
    assert (one.kind, one.operations) == (other.kind, other.operations)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("other", ["portable", "derived"])
def test_greedy_tokens_are_those_of_a_portable_decoder(engines: dict[str, Engine], name: str, other: str) -> None:
    question, item = QUESTIONS[name]
    inputs = [] if item is None else [item]
    theirs, ours = (engines[key].ask(question, *inputs, max_new_tokens=48) for key in (other, "records"))
    assert ours.token_ids == theirs.token_ids or name in NEAR_TIES


def test_a_derived_decoder_computes_the_bits_of_the_portable_bundle(engines: dict[str, Engine]) -> None:
    for name in QUESTIONS:
        one, other = (engines[key].first_logits(prepared(engines[key], name)) for key in ("portable", "derived"))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", QUESTIONS)
def test_any_number_of_threads_gives_the_same_bits(engines: dict[str, Engine], name: str) -> None:
    one, two = (engines[key].first_logits(prepared(engines[key], name)) for key in ("records", "records, 2 threads"))
    np.testing.assert_array_equal(one, two)


def test_it_is_the_operators_that_compute(records: Path) -> None:
    used = read_header(records / "decoder.onnx").operators
    assert {(INT4_DOMAIN, "Int4Linear"), (INT4_DOMAIN, "Int4GateUp")} <= used
    assert ("com.microsoft", "MatMulNBits") not in used


@pytest.mark.parametrize("element", ["fp32", "int8"])
def test_answers_with_another_kv_cache(records: Path, engines: dict[str, Engine], element: KvElement) -> None:
    with Engine.load(records, threads=1, kv_cache=element) as engine:
        assert engine.decoder.kv.element == element
        for name, (question, item) in QUESTIONS.items():
            inputs = [] if item is None else [item]
            expected = engines["records"].first_logits(prepared(engines["records"], name))
            found = engine.first_logits(prepared(engine, name))
            assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
            assert engine.ask(question, *inputs, max_new_tokens=8).token_ids


def test_a_kv_cache_that_the_decoder_cannot_have_is_refused(portable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edge(["ask", "--bundle", str(portable), "--kv-cache", "int8", "Hello"]) == OptionError.exit_code
    assert "kv_cache is 'int8', and the decoder is portable" in capsys.readouterr().err


# --- speculation and prefixes, where rows depend on nothing beside them -----------------------------------------------


def test_all_of_the_templates_beginning_is_taken_over(records: Path) -> None:
    with Engine.load(records, threads=1) as engine:
        question, item = QUESTIONS["aspirin"]
        first, again = (engine.ask(question, item, max_new_tokens=12) for _ in range(2))
        ids = engine.prepare(question, item).token_ids
        assert again.timings.cached_tokens == first.timings.cached_tokens == int(np.flatnonzero(ids < 0)[0])
        assert again.token_ids == first.token_ids


def test_speculation_is_on_and_changes_no_token(records: Path) -> None:
    drafted = 0
    with Engine.load(records, threads=1) as engine:
        for question, item in QUESTIONS.values():
            inputs = [] if item is None else [item]
            options = {"max_new_tokens": 60, "repetition_penalty": 1.0}
            plain = engine.ask(question, *inputs, **options, speculate=False)
            default = engine.ask(question, *inputs, **options)
            assert default.token_ids == plain.token_ids
            drafted += default.timings.drafted
    assert drafted


# --- from one layout to the other -------------------------------------------------------------------------------------


def test_what_is_turned_back_computes_the_same_bits_as_before(engines: dict[str, Engine], portable: Path) -> None:
    with Engine.load(portable, threads=1) as back:
        for name in QUESTIONS:
            prompt = prepared(back, name)
            np.testing.assert_array_equal(back.first_logits(prompt), engines["portable"].first_logits(prompt))


def test_the_packaged_demo_is_in_records() -> None:
    decoder = Bundle.open(DEMO_BUNDLE).manifest.decoder
    assert decoder.layout == RECORDS
    assert decoder.portable is not None


def test_all_else_stays_and_the_parity_report_names_what_it_was_measured_on(
    records: Path, portable: Path, portable_demo: Path
) -> None:
    shipped, ours, back = (Bundle.open(path) for path in (portable_demo, records, portable))
    assert [bundle.manifest.decoder.layout for bundle in (shipped, ours, back)] == [PORTABLE, RECORDS, PORTABLE]
    ours.verify()
    # The one for CUDA refers to the data of the portable one, wherever that lies.
    changed = {"decoder.onnx", "decoder.data", PORTABLE_DECODER, "decoder-cuda.onnx"}
    files = [{e for e in bundle.manifest.files if e.path not in changed} for bundle in (shipped, ours, back)]
    assert files[0] == files[1] == files[2]
    assert [bundle.manifest.decoder.portable is not None for bundle in (shipped, ours, back)] == [False, True, False]
    assert {path.name for path in portable.iterdir()} == {path.name for path in portable_demo.iterdir()}
    # The packaged demo was portable when it was measured, and what it became of it says so.
    assert shipped.manifest.parity["measured_on"]["layout"] == PORTABLE
    assert ours.manifest.parity == back.manifest.parity == shipped.manifest.parity


def test_a_bundle_that_was_measured_as_it_is_is_named_by_what_becomes_of_it(tiny_bundle: Path, tmp_path: Path) -> None:
    relayout(tiny_bundle, tmp_path / "portable", "portable", silent)
    before, after = (Bundle.open(path) for path in (tiny_bundle, tmp_path / "portable"))
    measured_on = {"bundle": before.digest, "layout": RECORDS}
    assert after.manifest.parity == before.manifest.parity | {"measured_on": measured_on}


def test_the_same_bundle_always_gives_the_same_bytes(records: Path, portable_demo: Path, tmp_path: Path) -> None:
    assert export(["relayout", str(portable_demo), "--decoder-layout", "records", "--out", str(tmp_path / "b")]) == 0
    for path in records.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_layout_that_is_there_already_is_refused(records: Path, portable_demo: Path, tmp_path: Path) -> None:
    for source, layout in ((portable_demo, "portable"), (records, "records")):
        with pytest.raises(ExportError, match=f"is in {layout} already"):
            relayout(source, tmp_path / "out", layout, silent)  # type: ignore[arg-type]


def test_a_bundle_without_int4_products_cannot_lie_in_records(tiny_bundle_fp16: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"no int4 product.*--decoder-layout portable"):
        relayout(tiny_bundle_fp16, tmp_path / "out", "records", silent)
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_not_whole_is_not_laid_out_anew(bundle_copy: Path, tmp_path: Path) -> None:
    with (bundle_copy / "decoder.data").open("r+b") as file:
        file.write(b"tampered")
    with pytest.raises(BundleCorruptError, match=r"decoder\.data differ"):
        relayout(bundle_copy, tmp_path / "out", "portable", silent)
    assert not (tmp_path / "out").exists()


def test_files_in_folders_stay_there(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, manifest = Path(shutil.copytree(records, tmp_path / "source")), Bundle.open(records).manifest
    (source / "notes" / "lab").mkdir(parents=True)
    (source / "notes" / "lab" / "readme.txt").write_text("of the lab", encoding="utf-8")
    added = file_entry(source / "notes" / "lab" / "readme.txt", "notes/lab/readme.txt")
    with_folder = replace(manifest, files=(*manifest.files, added))
    (source / MANIFEST_NAME).write_text(with_folder.to_json(), encoding="utf-8")
    synced = set[str]()
    sync = bundle_writer._sync
    monkeypatch.setattr(bundle_writer, "_sync", lambda path: (synced.add(path.name), sync(path)))
    laid_out = relayout(source, tmp_path / "out", "portable", silent)
    assert added in laid_out.files
    Bundle.open(tmp_path / "out").verify()
    assert {"readme.txt", "lab", "notes"} <= synced  # a power cut loses none of it


def test_a_bundle_is_not_written_over(portable: Path, records: Path) -> None:
    with pytest.raises(OutputExistsError):
        relayout(records, portable, "portable", silent)


# --- what people see --------------------------------------------------------------------------------------------------


def test_inspect_and_doctor_name_the_instruction_set(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _native.int4_paths()[0]
    assert edge(["inspect", str(records)]) == 0
    printed = capsys.readouterr().out
    assert "layout      records-1, and decoder-portable.onnx, whose 3.40 MB are derived where it is used" in printed
    assert f"used here   records-1, computed with {path}" in printed
    edge(["doctor", "--json", "--bundle", str(records)])
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["operators"]["ok"]
    assert found["operators"]["found"].startswith(f"int4 {path}, int8 ")
    assert found["decoder"]["found"] == f"records-1, computed with {path}"
    assert f"int4: {', '.join(_native.int4_paths())}" in found["kernels"]["found"]
    assert f"int8: {', '.join(_native.int8_paths())}" in found["kernels"]["found"]


def test_compare_reads_both_layouts(
    records: Path, portable_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Please describe this molecule.", "smiles": "CCO", "answer": "Ethanol."}\n')
    assert export(["compare", str(portable_demo), str(records), "--questions", str(questions), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"]["mean"] < 0.01
    assert figures["same_tokens"]["mean"] > 0


# --- where the operators cannot be used -------------------------------------------------------------------------------


@pytest.fixture
def without_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_ops, "LIBRARY", tmp_path / "none.so")


@pytest.fixture
def records_alone(records: Path, tmp_path: Path) -> Path:
    """As bundles were before a portable graph lay in them."""
    path = Path(shutil.copytree(records, tmp_path / "alone"))
    fields = json.loads((path / "manifest.json").read_text())
    added = [*path.glob("*-cuda.onnx"), *path.glob("*-standard.onnx"), path / PORTABLE_DECODER]
    for graph in added:
        graph.unlink()
    for part in ("decoder", "molecule_encoder", "protein_encoder"):
        for field in ("portable", "cuda", "standard", *([] if part == "decoder" else ["layout"])):
            fields[part].pop(field, None)
    fields["schema_version"] = 2
    fields["files"] = [entry for entry in fields["files"] if path / entry["path"] not in added]
    (path / "manifest.json").write_text(json.dumps(fields))
    return path


def test_records_alone_are_in_records_already(records_alone: Path, tmp_path: Path) -> None:
    """There is no portable graph whose data one for CUDA could share."""
    with pytest.raises(ExportError, match="is in records already"):
        relayout(records_alone, tmp_path / "again", "records", silent)
    made = relayout(records_alone, tmp_path / "portable", "portable", silent)
    assert made.decoder.cuda is not None


def test_a_bundle_without_a_portable_graph_works_as_before(records_alone: Path) -> None:
    with Engine.load(records_alone, threads=1) as engine:
        assert engine.ask("What is a protein?", max_new_tokens=2).token_ids


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("decoder", ["auto", "records"])
def test_records_alone_are_refused_with_the_way_out_and_portable_bundles_do_not_care(
    records_alone: Path, decoder: Wanted
) -> None:
    with pytest.raises(
        PlatformError, match=r"operators for records cannot be used.*biomedgpt-export relayout"
    ) as caught:
        Engine.load(records_alone, threads=1, decoder=decoder)
    assert caught.value.seen == ort.__version__
    Engine.load(threads=1).close()


@pytest.mark.usefixtures("without_library")
def test_the_portable_decoder_is_used_instead_and_a_warning_says_why(
    records: Path, engines: dict[str, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.load(records, threads=1) as engine:
        prompt = prepared(engine, "aspirin")
        np.testing.assert_array_equal(engine.first_logits(prompt), engines["portable"].first_logits(prompt))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = r"the operators for records cannot be used .*none\.so.* The portable decoder is used instead\."
    assert re.fullmatch(expected, warning)


@pytest.mark.usefixtures("without_library")
def test_commands_say_so_on_stderr(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert edge(["ask", "--bundle", str(records), "--max-new-tokens", "1", "--json", "?"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["finish"] == "length"
        assert printed.err.count("warning: the operators for records cannot be used") == 1


@pytest.mark.usefixtures("without_library")
def test_records_that_were_asked_for_are_not_replaced(records: Path) -> None:
    with pytest.raises(
        PlatformError, match=r"operators for records cannot be used.*Leave the choice of the decoder to auto"
    ):
        Engine.load(records, threads=1, decoder="records")


@pytest.mark.usefixtures("without_library")
def test_an_export_that_could_not_be_compared_is_refused_before_it_begins(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = ["--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "b")]
    assert export(["bundle", *checkpoint, "--quantizer", "rtn"]) == ExportError.exit_code
    assert not list(tmp_path.glob("*b*"))
    assert export(["bundle", *checkpoint, "--quantizer", "rtn", "--proof", "none"]) == 0


@pytest.mark.usefixtures("without_library")
def test_doctor_and_inspect_say_so(
    records: Path, records_alone: Path, portable_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def findings(*arguments: str) -> Any:
        code = edge(["doctor", "--json", *arguments])
        return code, {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}

    code, found = findings("--bundle", str(records_alone))
    assert code == PlatformError.exit_code
    assert not found["operators"]["ok"]
    assert "relayout" in found["operators"]["remedy"]
    code, found = findings("--bundle", str(records))
    assert code == 0
    assert found["operators"]["found"].startswith("the operators for records cannot be used")
    assert found["decoder"]["found"].startswith(
        "portable, derived in the device cache: the operators for records cannot"
    )
    code, found = findings("--bundle", str(portable_demo))
    assert "operators" not in found
    assert found["decoder"]["found"] == "portable, computed with ONNX Runtime's operators"
    for path, used in (
        (records_alone, "nothing: the operators for records"),
        (records, "portable, derived in the device"),
    ):
        assert edge(["inspect", str(path)]) == 0
        assert f"used here   {used}" in capsys.readouterr().out


# --- where one is asked for -------------------------------------------------------------------------------------------


def test_a_decoder_that_a_bundle_does_not_have_is_refused_by_name(records_alone: Path, portable_demo: Path) -> None:
    with pytest.raises(OptionError, match=r"records was asked for.* is portable.*biomedgpt-export relayout"):
        Engine.load(portable_demo, decoder="records")
    with pytest.raises(OptionError, match=r"portable decoder was asked for.*nothing to derive.*relayout"):
        Engine.load(records_alone, decoder="portable")
    with pytest.raises(OptionError, match=r"decoder is 'fast'.*Give auto, records, portable"):
        Engine.load(decoder="fast")  # type: ignore[arg-type]


def test_a_portable_bundle_needs_nothing_derived(portable_demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Engine.load(portable_demo, threads=1, decoder="portable").close()
    assert not caplog.records


def test_the_commands_take_it(
    records: Path,
    portable_demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    question = ["ask", "--bundle", str(records), "--max-new-tokens", "8", "--quiet", "What is a protein?"]
    said = []
    for decoder in ("portable", "portable", "records", "auto"):
        assert edge([*question, "--decoder", decoder]) == 0
        said.append(capsys.readouterr())
    assert len({answer.out for answer in said}) == 1
    derived = f"deriving the portable decoder, 4 MiB in {tmp_path}/cache/portable, once\n"
    assert [answer.err.count(derived) for answer in said] == [1, 0, 0, 0]
    assert edge(["ask", "--bundle", str(portable_demo), "--decoder", "records", "?"]) == OptionError.exit_code
    assert edge(["cache", "info"]) == 0
    assert re.search(r"portable +\d files +3\.4 MB  portable decoders", capsys.readouterr().out)
    assert edge(["cache", "clear"]) == 0
    assert {path.suffix for path in (tmp_path / "cache" / "portable").iterdir()} == {".lock"}


def test_what_one_decoder_computed_of_a_template_the_other_does_not_take(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path))
    counts = []
    for decoder in WANTED:
        with Engine.load(records, threads=1, decoder=decoder) as engine:
            engine.ask(*(one for one in QUESTIONS["aspirin"] if one is not None), max_new_tokens=1)  # type: ignore[arg-type]
            counts.append((decoder, engine.prefix_counts.found))
    assert counts == [("auto", 0), ("records", 1), ("portable", 0)]


def test_a_cold_load_is_cold_for_what_was_derived_too(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda handle, *_: dropped.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    )
    Engine.load(records, threads=1, decoder="portable").close()
    drop_from_page_cache(records, LoadOptions(decoder="auto", kv_cache=None, device="cpu"))
    assert "decoder.data" in dropped
    assert "decoder-portable.data" not in dropped
    drop_from_page_cache(records, LoadOptions(decoder="portable", kv_cache=None, device="cpu"))
    assert "decoder-portable.data" in dropped


@pytest.mark.parametrize(("decoder", "layout"), [("auto", RECORDS), ("portable", PORTABLE)])
def test_the_benchmark_says_which_one_it_measured(records: Path, decoder: Wanted, layout: str) -> None:
    limits = Limits(2**31, {"one stream": 3e10}, {"int8 portable": 1e12, "fp32 portable": 1e11})
    suite = Suite(Plan(records, 1, 1, ("load",), decoder), silent, probing=lambda threads, size: limits)
    assert suite.run()["model"]["decoder"] == layout


def test_a_session_has_the_operators_only_where_the_manifest_says_records(
    records: Path, portable_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from biomedgpt_edge.decoder import onnx as decoder

    registered: list[ort.SessionOptions] = []
    register: Callable[[ort.SessionOptions], None] = decoder.register_int4_ops
    monkeypatch.setattr(decoder, "register_int4_ops", lambda options: (registered.append(options), register(options)))
    for path, count in ((portable_demo, 0), (records, 1)):
        with Engine.load(path, threads=1, verify="sizes") as engine:
            engine.prepare("?", Molecule.from_smiles("CCO"))
        assert len(registered) == count
