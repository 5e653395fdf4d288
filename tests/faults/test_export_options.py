"""Where GPTQ runs and what a bundle is compared on: recorded with the figures, and refused where they mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import RECORDS
from biomedgpt_export import exporter
from biomedgpt_export.calibration import PROOF
from biomedgpt_export.cli import main
from biomedgpt_export.device import CPU
from biomedgpt_export.errors import (
    CalibrationError,
    DeviceError,
    ExportError,
    JournalError,
    MemoryNeedError,
    QuantizationError,
)
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize import journal as journal_module
from biomedgpt_export.relayout import relayout
from biomedgpt_export.synthesize import SCALES, synthesize

QUESTIONS = (
    {"question": "What is this?", "smiles": "CCO", "answer": "ethanol"},
    {"question": "Where is it?", "sequence": "MKVA", "answer": "in the cell"},
    {"question": "What is a protein?"},
)


def export(checkpoint: Path, out: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    export_bundle(ExportOptions(Layout.locate(checkpoint), out, **options), lines.append)
    return lines


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def proof_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = Bundle.open(bundle).manifest.parity["proof"]
    return found


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_records_are_for_int4_alone(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    with pytest.raises(ExportError, match=f"decoder in records was asked for, and precision {precision}") as caught:
        export(tiny_checkpoint, tmp_path / "bundle", precision=precision, decoder_layout="records")
    assert caught.value.seen == "records"
    assert not list(tmp_path.iterdir())


def test_an_export_is_in_records_and_is_the_portable_one_laid_out_anew(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path
) -> None:
    common = {"quantizer": "rtn", "lm_head": "int8", "questions": questions}
    export(tiny_checkpoint, tmp_path / "portable", decoder_layout="portable", **common)
    export(tiny_checkpoint, tmp_path / "records", **common)
    relayout(tmp_path / "portable", tmp_path / "relayout", "records", lambda line: None)
    direct, other = (Bundle.open(tmp_path / name).manifest for name in ("records", "relayout"))
    assert direct.files == other.files
    assert direct.decoder == other.decoder
    assert direct.decoder.layout == RECORDS
    # The same matrices; how far int8 activations go wrong is measured with the operators that the bundle has.
    for kind in ("fidelity", "rounding", "tolerance"):
        assert direct.parity[kind] == other.parity[kind]
    assert direct.parity["proof"]["kl"]["mean"] == pytest.approx(other.parity["proof"]["kl"]["mean"], rel=0.5)


# --- questions --------------------------------------------------------------------------------------------------------


def test_own_questions_take_the_place_of_the_shipped_ones_and_are_named_by_their_hash(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path
) -> None:
    export(tiny_checkpoint, tmp_path / "bundle", precision="fp16", proof="full", questions=questions)
    proof = proof_of(tmp_path / "bundle")
    assert proof["questions"] == 3
    assert proof["questions_sha256"] == sha256(questions.read_bytes()).hexdigest()


def test_the_shipped_questions_are_named_too(tiny_bundle: Path) -> None:
    assert proof_of(tiny_bundle)["questions_sha256"] == sha256(PROOF.read_bytes()).hexdigest()


def test_quick_takes_the_first_ones(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.proof, "QUICK", 2)
    export(tiny_checkpoint, tmp_path / "bundle", precision="fp16", questions=questions)
    assert proof_of(tmp_path / "bundle")["questions"] == 2


@pytest.mark.parametrize("options", [{"proof": "none", "quantizer": "rtn"}, {"precision": "fp32"}])
def test_questions_are_refused_where_nothing_is_compared(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ExportError, match="nothing is to be compared") as caught:
        export(tiny_checkpoint, tmp_path / "bundle", questions=questions, **options)
    assert caught.value.seen == str(questions)


@pytest.mark.parametrize("option", ["questions", "calibration"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "line 1"), ("", "holds no questions"), (json.dumps({"question": "why " * 3000}), "takes .* positions")],
)
def test_questions_that_cannot_be_used_are_found_before_anything_is_quantized(
    tiny_checkpoint: Path, tmp_path: Path, option: str, content: str, complaint: str
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=complaint):
        export(tiny_checkpoint, tmp_path / "bundle", **{option: path})
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_has_both_options(tiny_checkpoint: Path, tmp_path: Path, questions: Path) -> None:
    command = [
        "bundle",
        "--family",
        "biomedgpt-10b",
        "--checkpoint",
        str(tiny_checkpoint),
        "--out",
        str(tmp_path / "b"),
    ]
    assert main([*command, "--precision", "fp32", "--questions", str(questions)]) == 6
    assert main([*command, "--device", "tpu"]) == 6


# --- device -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_the_checkpoint_is_opened(tmp_path: Path) -> None:
    class Unopened:
        def open(self) -> None:
            raise AssertionError("was opened")

    with pytest.raises(DeviceError, match="cuda"):
        export_bundle(ExportOptions(Unopened(), tmp_path / "bundle", device="cuda"), lambda line: None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"quantizer": "rtn"}, {"precision": "fp16"}])
def test_a_device_is_refused_where_nothing_would_run_on_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for module in ("options", "choices"):
        monkeypatch.setattr(f"biomedgpt_export.{module}.find_device", lambda name: CPU)
    with pytest.raises(ExportError, match="GPTQ, which would run there, has nothing to quantize"):
        export(tiny_checkpoint, tmp_path / "bundle", device="cuda", **options)


def test_the_device_stands_in_the_recipe_and_work_of_another_is_not_continued(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"calibration": questions, "proof": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "describe", lambda device: "cuda: Some GPU")
        patch.setattr(journal_module.Journal, "write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(tiny_checkpoint, tmp_path / "bundle", **options)
    with pytest.raises(JournalError, match="begun with another device") as caught:
        export(tiny_checkpoint, tmp_path / "bundle", **options)
    assert (caught.value.seen, caught.value.limit) == ({"device": "cuda: Some GPU"}, {"device": "cpu"})
    export(tiny_checkpoint, tmp_path / "other", **options)
    recipes = Bundle.open(tmp_path / "other").manifest.quantization
    assert {name: recipe.get("device") for name, recipe in recipes.items()} == {
        "decoder.onnx": "cpu",
        "protein_encoder.onnx": "cpu",
        "molecule_encoder.onnx": None,
    }


def test_a_device_without_enough_memory_is_a_typed_error_that_names_what_is_done(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(journal_module.Journal, "write", full)
    with pytest.raises(MemoryNeedError, match="the device cpu has too little memory") as caught:
        export(tiny_checkpoint, tmp_path / "bundle", calibration=questions, proof="none")
    assert str(tmp_path / ".bundle.gptq") in caught.value.remedy


@pytest.mark.parametrize(("quantizer", "layout"), [("gptq", "portable"), ("rtn", "portable"), ("rtn", "records")])
def test_one_group_size_for_all_matrices(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str, layout: str
) -> None:
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], ffn=384))
    synthesize(tmp_path / "release", scale="tiny", seed=0, report=lambda line: None)
    options: dict[str, Any] = {"quantizer": quantizer, "decoder_layout": layout, "proof": "none"}
    options |= {"calibration": questions} if quantizer == "gptq" else {}
    export(tmp_path / "release", tmp_path / "bundle", group_size=32, **options)
    recipes = Bundle.open(tmp_path / "bundle").manifest.quantization
    for graph in ("decoder.onnx", "protein_encoder.onnx"):
        assert recipes[graph]["weights_by_group_size"].keys() == {"32"}


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_done(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    monkeypatch.setattr(exporter, "quantize_model", lambda *arguments, **more: pytest.fail("work was begun"))
    monkeypatch.setattr(exporter._Export, "write_tensors", lambda self: pytest.fail("something was written"))
    with pytest.raises(QuantizationError, match=r"groups of 128 were asked for, and '.*' has \d+ columns"):
        export(tiny_checkpoint, tmp_path / "bundle", group_size=128, quantizer=quantizer)
    assert not list(tmp_path.glob("*bundle*"))


def test_a_group_size_is_refused_where_nothing_is_quantized_to_int4(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="groups of 32 were asked for, and no part"):
        export(tiny_checkpoint, tmp_path / "bundle", group_size=32, precision="fp16")


def test_a_reader_that_has_gone_is_no_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    family = ["--family", "biomedgpt-10b"]
    arguments = ["bundle", *family, "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--dry-run"]
    command = [sys.executable, "-m", "biomedgpt_export.cli", *arguments]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
