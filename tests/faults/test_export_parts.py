"""A bundle without an encoder: exported from what is left, complete in itself, and honest about what it cannot read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import MissingModalityError
from biomedgpt_edge.tensor_file import map_tensors
from biomedgpt_export.cli import main
from biomedgpt_export.errors import CalibrationError, CheckpointError, ExportError, JournalError, KeyMismatchError
from biomedgpt_export.exporter import export_bundle, plan_bundle
from biomedgpt_export.families.base import Modality
from biomedgpt_export.families.biomedgpt_10b import WEIGHTS, Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize import journal as journal_module

ETHANOL, PEPTIDE = Molecule.from_smiles("CCO"), Protein.from_sequence("MKV")
PREFIXES: dict[Modality, tuple[str, str]] = {
    "molecule": ("mol_structure_encoder.", "proj_mol."),
    "protein": ("prot_structure_encoder.", "proj_prot."),
}
QUESTIONS = (
    {"question": "What is this?", "smiles": "CCO", "answer": "ethanol"},
    {"question": "Where is it?", "sequence": "MKVA", "answer": "in the cell"},
    {"question": "What is a protein?", "answer": "a chain of amino acids"},
)


def export(layout: Layout, out: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    quantizer = "rtn" if options.get("precision", "int4") == "int4" else None
    export_bundle(ExportOptions(layout, out, **{"proof": "none", "quantizer": quantizer, **options}), lines.append)
    return lines


def stripped(checkpoint: Path, folder: Path, modality: Modality) -> Path:
    """A copy of a release that never had one of the encoders."""
    release = Path(shutil.copytree(checkpoint, folder / "release"))
    state = torch.load(release / WEIGHTS, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith(PREFIXES[modality])}, release / WEIGHTS)
    if modality == "protein":
        shutil.rmtree(release / "protein_ckpts")
    return release


def questions(folder: Path, *lines: dict[str, str]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("modality", ["molecule", "protein"])
def test_an_encoder_that_is_not_wanted_need_not_be_there_and_is_not_read_where_it_is(
    tiny_checkpoint: Path, tmp_path: Path, modality: Modality
) -> None:
    with_it = Layout.locate(tiny_checkpoint, without=[modality])
    without_it = Layout.locate(stripped(tiny_checkpoint, tmp_path, modality), without=[modality])
    export(with_it, tmp_path / "one")
    export(without_it, tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    assert not any(name.startswith(modality) for name in names)
    # The weights are another file, and the manifest says so; nothing else differs.
    for name in names - {"manifest.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = Bundle.open(tmp_path / "one").manifest
    other = "protein" if modality == "molecule" else "molecule"
    assert (getattr(manifest, f"{modality}_encoder"), getattr(manifest, f"{other}_encoder") is None) == (None, False)
    assert sorted(manifest.parity["fidelity"]) == sorted([other, "text"])
    assert sorted(manifest.quantization) == sorted([f"{other}_encoder.onnx", "decoder.onnx"])
    assert any(entry.path.startswith("protein/") for entry in manifest.sources) == (modality == "molecule")
    assert sorted(map_tensors(tmp_path / "one" / "projections.safetensors")) == [f"{other}.bias", f"{other}.weight"]


@pytest.mark.parametrize("modality", ["molecule", "protein"])
def test_a_question_about_what_the_bundle_has_no_encoder_for_is_a_typed_error(
    tiny_checkpoint: Path, tmp_path: Path, modality: Modality
) -> None:
    export(Layout.locate(tiny_checkpoint, without=[modality]), tmp_path / "bundle", precision="fp32")
    unknown, known = (ETHANOL, PEPTIDE) if modality == "molecule" else (PEPTIDE, ETHANOL)
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        with pytest.raises(MissingModalityError, match=f"without an encoder for {modality}s") as caught:
            engine.ask("What is it?", unknown)
        assert caught.value.seen == f"{modality}s"
        assert engine.ask("What is it?", known, max_new_tokens=2).finish in ("eos", "length")


def test_without_both_encoders_text_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(Layout.locate(tiny_checkpoint, without=["protein", "molecule"]), tmp_path / "bundle", precision="fp32")
    assert map_tensors(tmp_path / "bundle" / "projections.safetensors") == {}
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        assert engine.ask("What is a protein?", max_new_tokens=2).finish in ("eos", "length")
        for item in (ETHANOL, PEPTIDE):
            with pytest.raises(MissingModalityError):
                engine.ask("What is it?", item)


@pytest.mark.parametrize("modality", ["molecule", "protein"])
def test_what_the_other_parts_need_is_still_required(tiny_checkpoint: Path, tmp_path: Path, modality: Modality) -> None:
    other: Modality = "protein" if modality == "molecule" else "molecule"
    release = stripped(tiny_checkpoint, tmp_path, modality)
    shutil.copytree(tiny_checkpoint / "protein_ckpts", release / "protein_ckpts", dirs_exist_ok=True)
    with pytest.raises(KeyMismatchError) as caught:
        export(Layout.locate(release, without=[other]), tmp_path / "bundle")
    assert all(problem.removeprefix("missing: ").startswith(PREFIXES[modality]) for problem in caught.value.problems)


def test_calibration_and_comparison_use_the_questions_that_are_left_and_say_so(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = questions(tmp_path, *QUESTIONS)
    layout = Layout.locate(tiny_checkpoint, without=["protein"])
    lines = export(layout, tmp_path / "bundle", quantizer="gptq", calibration=path, proof="quick")
    assert "calibration: 1 of 3 questions need an encoder that is not there" in lines
    assert "comparison: 8 of 36 questions need an encoder that is not there" in lines
    assert any(line.startswith("calibrating the decoder on 2 prompts") for line in lines)
    proof = Bundle.open(tmp_path / "bundle").manifest.parity["proof"]
    assert (proof["questions"], proof["source"]) == (8, "the checkpoint")


def test_work_for_other_inputs_is_not_continued(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"quantizer": "gptq", "calibration": questions(tmp_path, *QUESTIONS)}
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Journal, "write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(Layout.locate(tiny_checkpoint, without=["molecule"]), tmp_path / "bundle", **options)
    with pytest.raises(JournalError, match="begun with another inputs"):
        export(Layout.locate(tiny_checkpoint), tmp_path / "bundle", **options)


def test_questions_none_of_which_the_model_can_be_asked_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = questions(tmp_path, QUESTIONS[1])
    with pytest.raises(CalibrationError, match="each of the 1 calibration questions") as caught:
        export(
            Layout.locate(tiny_checkpoint, without=["protein"]),
            tmp_path / "bundle",
            quantizer="gptq",
            calibration=path,
        )
    assert caught.value.seen == 1
    assert not (tmp_path / "bundle").exists()


def test_a_protein_encoder_that_is_given_and_left_out_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is to be without one"):
        Layout.locate(tiny_checkpoint, protein=tiny_checkpoint / "protein_ckpts/esm2-3b", without=["protein"])


def test_a_precision_for_an_encoder_that_is_left_out_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a protein encoder in int8 was asked for"):
        export(Layout.locate(tiny_checkpoint, without=["protein"]), tmp_path / "bundle", protein_encoder="int8")


def test_what_would_be_written_is_without_the_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole, less = (
        plan_bundle(ExportOptions(Layout.locate(tiny_checkpoint, without=without), tmp_path / "bundle"))
        for without in ([], ["protein"])
    )
    assert whole.parts.keys() - less.parts.keys() == {"protein_encoder"}
    # What GPTQ chose of it, and its standard graph with its data, which is checked and removed.
    assert whole.work - less.work == 2 * whole.parts["protein_encoder"]
    assert less.parts["projections"] == whole.parts["projections"] * 300 // (300 + 64)


def test_questions_without_meaning_for_the_precision_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert main([
        "bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "bundle"),
        "--precision", "fp16", "--calibration", str(questions(tmp_path, *QUESTIONS)),
    ]) == 6  # fmt: skip
    assert not (tmp_path / "bundle").exists()


def test_the_commands(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--quantizer", "rtn"]
    command += ["--proof", "none", "--without", "protein"]
    assert main([*command, "--out", str(tmp_path / "molecules")]) == 0
    assert main([*command, "--without", "molecule", "--out", str(tmp_path / "text")]) == 0
    capsys.readouterr()
    asked = questions(tmp_path, *QUESTIONS)
    bundles = [str(tmp_path / "molecules"), str(tmp_path / "text")]
    assert main(["compare", *bundles, "--questions", str(asked), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["questions"] == 1
    assert "comparison: 2 of 3 questions" in shown.err
