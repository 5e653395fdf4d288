"""Every precision that parts of a bundle can be given: it opens, answers, and loses what that precision loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biomedgpt_edge import Engine, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_export.cli import main
from biomedgpt_export.errors import ExportError
from biomedgpt_export.exporter import ExportOptions, export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout

SEQUENCE = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"


def export(checkpoint: Path, out: Path, **options: Any) -> Bundle:
    if "int4" in (options.get("precision", "int4"), options.get("protein_encoder")):
        options["quantizer"] = "rtn"
    export_bundle(ExportOptions(Layout.locate(checkpoint), out, **options), lambda line: None)
    return Bundle.open(out)


@pytest.mark.parametrize(
    ("precision", "protein"), [("int4", "int8"), ("int4", "fp16"), ("fp16", "int4"), ("fp32", "int8")]
)
def test_the_protein_encoder_has_a_precision_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, protein: str
) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "bundle", precision=precision, protein_encoder=protein)
    recipes = bundle.manifest.quantization
    assert recipes["protein_encoder.onnx"]["precision"] == protein
    assert recipes["decoder.onnx"]["precision"] == precision
    # Every export ends with its own measure of the graphs against the source, quantized activations aside.
    assert bundle.manifest.parity["fidelity"]["protein"]["embeddings"] <= 1e-4
    cosine = bundle.manifest.parity["proof"]["cosine"]["least"]
    assert cosine > {"int4": 0.98, "int8": 0.999, "fp16": 0.99999}[protein]
    answer = Engine.load(bundle.path).ask("What is this?", Protein.from_sequence(SEQUENCE), max_new_tokens=3)
    assert answer.finish == "length"


def test_embeddings_in_int8_are_half_as_large_and_within_half_a_step(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    halves = Bundle.open(tiny_bundle).embeddings
    table = export(tiny_checkpoint, tmp_path / "bundle", embeddings="int8", proof="none").embeddings
    assert (halves.rows.dtype, table.rows.dtype) == (np.float16, np.int8)
    assert table.scales is not None
    error = np.abs(table.rows * table.scales[:, None] - halves.rows.astype(np.float32))
    assert (error <= table.scales[:, None] * 0.51).all()


def test_embeddings_in_int8_beside_float32_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="embeddings in int8 were asked for, and precision fp32"):
        export(tiny_checkpoint, tmp_path / "bundle", precision="fp32", embeddings="int8")
    assert not list(tmp_path.iterdir())


def test_a_quantizer_without_anything_to_quantize_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "bundle", "fp16", "gptq")
    with pytest.raises(ExportError, match="the quantizer gptq was asked for, and no part is to be stored in int4"):
        export_bundle(options, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_both(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--out", str(out)]
    options = ["--protein-encoder", "int8", "--embeddings", "int8", "--quantizer", "gptq", "--proof", "none"]
    assert main([*command, *options]) == 0
    recipes = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["quantization"]
    assert recipes["decoder.onnx"]["quantizer"] == "gptq"
    assert recipes["protein_encoder.onnx"]["precision"] == "int8"
    assert "protein_encoder layer" not in capsys.readouterr().err, "GPTQ has nothing to do there"
