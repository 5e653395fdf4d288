"""A bundle whose decoder lies in records answers as the portable one that it was made from does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from biomedgpt_edge import Engine, Molecule, Protein, _native, int4_ops
from biomedgpt_edge.bench.work import prefill_work
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.engine import DEMO_BUNDLE, PreparedPrompt
from biomedgpt_edge.errors import BundleCorruptError, PlatformError
from biomedgpt_edge.manifest import PORTABLE, RECORDS
from biomedgpt_edge.onnx_header import INT4_DOMAIN, read_header
from biomedgpt_export.cli import main as export
from biomedgpt_export.errors import ExportError, ModelConfigError, OutputExistsError
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
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("relayout") / "records"
    relayout(DEMO_BUNDLE, out, "records", silent)
    return out


@pytest.fixture(scope="module")
def portable(records: Path) -> Path:
    """Turned back again."""
    out = records.with_name("portable")
    relayout(records, out, "portable", silent)
    return out


@pytest.fixture(scope="module")
def engines(records: Path) -> Iterator[dict[str, Engine]]:
    with (
        Engine.load(threads=1) as shipped,
        Engine.load(records, threads=1) as one,
        Engine.load(records, threads=2) as two,
    ):
        yield {"portable": shipped, "records": one, "records, 2 threads": two}


def test_the_benchmark_holds_them_against_int8_arithmetic_too(records: Path) -> None:
    one, other = (prefill_work(Bundle.open(path), 8) for path in (records, DEMO_BUNDLE))
    assert (one.kind, one.operations) == (other.kind, other.operations)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_are_those_of_the_portable_bundle(engines: dict[str, Engine], name: str) -> None:
    question, item = QUESTIONS[name]
    inputs = [] if item is None else [item]
    theirs, ours = (engines[key].ask(question, *inputs, max_new_tokens=48) for key in ("portable", "records"))
    assert ours.text == theirs.text or name in NEAR_TIES


@pytest.mark.parametrize("name", QUESTIONS)
def test_any_number_of_threads_gives_the_same_bits(engines: dict[str, Engine], name: str) -> None:
    one, two = (engines[key].first_logits(prepared(engines[key], name)) for key in ("records", "records, 2 threads"))
    np.testing.assert_array_equal(one, two)


def test_it_is_the_operators_that_compute(records: Path) -> None:
    used = read_header(records / "decoder.onnx").operators
    assert {(INT4_DOMAIN, "Int4Linear"), (INT4_DOMAIN, "Int4GateUp")} <= used
    assert ("com.microsoft", "MatMulNBits") not in used


# --- from one layout to the other -------------------------------------------------------------------------------------


def test_what_is_turned_back_computes_the_same_bits_as_before(engines: dict[str, Engine], portable: Path) -> None:
    with Engine.load(portable, threads=1) as back:
        for name in QUESTIONS:
            prompt = prepared(back, name)
            np.testing.assert_array_equal(back.first_logits(prompt), engines["portable"].first_logits(prompt))


def test_all_else_stays_and_the_parity_report_names_what_it_was_measured_on(records: Path, portable: Path) -> None:
    shipped, ours, back = (Bundle.open(path) for path in (DEMO_BUNDLE, records, portable))
    assert [bundle.manifest.decoder.layout for bundle in (shipped, ours, back)] == [PORTABLE, RECORDS, PORTABLE]
    ours.verify()
    changed = {"decoder.onnx", "decoder.data"}
    files = [{e for e in bundle.manifest.files if e.path not in changed} for bundle in (shipped, ours, back)]
    assert files[0] == files[1] == files[2]
    measured_on = {"bundle": shipped.digest, "layout": PORTABLE}
    assert ours.manifest.parity == back.manifest.parity == shipped.manifest.parity | {"measured_on": measured_on}


def test_the_same_bundle_always_gives_the_same_bytes(records: Path, tmp_path: Path) -> None:
    assert export(["relayout", str(DEMO_BUNDLE), "--decoder-layout", "records", "--out", str(tmp_path / "b")]) == 0
    for path in records.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_layout_that_is_there_already_is_refused(records: Path, tmp_path: Path) -> None:
    for source, layout in ((DEMO_BUNDLE, "portable"), (records, "records")):
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
        relayout(bundle_copy, tmp_path / "out", "records", silent)
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_not_written_over(portable: Path, records: Path) -> None:
    with pytest.raises(OutputExistsError):
        relayout(records, portable, "portable", silent)


# --- what people see --------------------------------------------------------------------------------------------------


def test_inspect_and_doctor_name_the_instruction_set(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _native.int4_paths()[0]
    assert edge(["inspect", str(records)]) == 0
    assert f"layout      records-1, on this machine computed with {path}" in capsys.readouterr().out
    edge(["doctor", "--json", "--bundle", str(records)])
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["int4 operators"]["ok"]
    assert found["int4 operators"]["found"].startswith(path)
    assert f"int4: {', '.join(_native.int4_paths())}" in found["kernels"]["found"]
    assert f"int8: {', '.join(_native.int8_paths())}" in found["kernels"]["found"]


def test_compare_reads_both_layouts(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Please describe this molecule.", "smiles": "CCO", "answer": "Ethanol."}\n')
    assert export(["compare", str(DEMO_BUNDLE), str(records), "--questions", str(questions), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"]["mean"] < 0.01
    assert figures["same_tokens"]["mean"] > 0


# --- where the operators cannot be used -------------------------------------------------------------------------------


@pytest.fixture
def without_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_ops, "LIBRARY", tmp_path / "none.so")


@pytest.mark.usefixtures("without_library")
def test_records_are_refused_with_the_way_out_and_portable_bundles_do_not_care(records: Path) -> None:
    with pytest.raises(PlatformError, match=r"int4 operators cannot be used.*biomedgpt-export relayout") as caught:
        Engine.load(records, threads=1)
    assert caught.value.seen == ort.__version__
    Engine.load(threads=1).close()


@pytest.mark.usefixtures("without_library")
def test_doctor_says_so(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def findings(*arguments: str) -> Any:
        code = edge(["doctor", "--json", *arguments])
        return code, {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}

    code, found = findings("--bundle", str(records))
    assert code == PlatformError.exit_code
    assert not found["int4 operators"]["ok"]
    assert "relayout" in found["int4 operators"]["remedy"]
    assert "int4 operators" not in findings()[1]


def test_a_session_has_the_operators_only_where_the_manifest_says_records(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from biomedgpt_edge.decoder import onnx as decoder

    registered: list[ort.SessionOptions] = []
    register: Callable[[ort.SessionOptions], None] = decoder.register_int4_ops
    monkeypatch.setattr(decoder, "register_int4_ops", lambda options: (registered.append(options), register(options)))
    for path, count in ((DEMO_BUNDLE, 0), (records, 1)):
        with Engine.load(path, threads=1, verify="sizes") as engine:
            engine.prepare("?", Molecule.from_smiles("CCO"))
        assert len(registered) == count
