"""Every precision that parts of a bundle can be given: it opens, answers, and loses what that precision loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from biomedgpt_edge import Engine, Protein
from biomedgpt_edge.bench.work import protein_work
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.onnx_header import INT8_INPUTS, read_header
from biomedgpt_export.cli import main
from biomedgpt_export.errors import ExportError
from biomedgpt_export.exporter import export_bundle, plan_bundle
from biomedgpt_export.families.biomedgpt_10b import WEIGHTS, Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize.int8_groups import nearest_int8_groups
from biomedgpt_export.quantize.rtn import RoundToNearest
from biomedgpt_export.relayout import relayout
from support import bytes_of_linears

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


def test_a_protein_encoder_in_int8_lies_in_records_where_the_decoder_does(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def features(bundle: Bundle) -> Any:
        return Encoders(bundle, threads=1).encode(Protein.from_sequence(SEQUENCE))

    ours = export(tiny_checkpoint, tmp_path / "bundle", protein_encoder="int8", decoder_layout="records")
    used = read_header(ours.path / "protein_encoder.onnx").operators
    assert INT8_INPUTS.keys() <= used
    assert ("com.microsoft", "DynamicQuantizeMatMul") not in used
    chosen = ExportOptions(
        Layout.locate(tiny_checkpoint), tmp_path / "x", protein_encoder="int8", decoder_layout="records"
    )
    assert plan_bundle(chosen).parts["protein_encoder"] == bytes_of_linears(ours.path / "protein_encoder.onnx")
    spec = ours.manifest.protein_encoder
    assert spec is not None
    assert protein_work(ours, spec, 10).kind == "int8"
    assert ours.manifest.parity["fidelity"]["protein"]["embeddings"] <= 1e-4
    assert ours.manifest.parity["proof"]["cosine"]["least"] > 0.999
    relayout(ours.path, tmp_path / "portable", "portable", lambda line: None)
    relayout(tmp_path / "portable", tmp_path / "back", "records", lambda line: None)
    portable, back = (Bundle.open(tmp_path / name) for name in ("portable", "back"))
    assert not INT8_INPUTS.keys() & read_header(portable.path / "protein_encoder.onnx").operators
    np.testing.assert_array_equal(features(back), features(ours))
    np.testing.assert_allclose(features(portable), features(ours), atol=0.05 * np.abs(features(ours)).max())


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


def test_the_head_has_a_precision_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "bundle", lm_head="int8")
    head = torch.load(tiny_checkpoint / WEIGHTS, weights_only=True)["llm.lm_head.weight"]
    stored = StoredWeights(bundle.path / "decoder.onnx")
    assert torch.equal(stored.linear("lm_head"), nearest_int8_groups(head).dequantize())
    assert not stored.int8("layers.0.o_proj")
    recipe = bundle.manifest.quantization["decoder.onnx"]
    assert (recipe["precision"], recipe["quantizer"]) == ("int4", "rtn")
    assert (recipe["lm_head"]["precision"], recipe["lm_head"]["group_size"]) == ("int8", 128)
    assert edge(["inspect", str(bundle.path)]) == 0
    assert "    lm_head\n      group_size: 128\n      precision: int8\n" in capsys.readouterr().out
    parity = bundle.manifest.parity
    assert parity["fidelity"]["text"]["logits"] <= 1e-4
    # Half a step at most is a root mean square of about 0.29, and a step is a sixteenth of one of int4.
    assert 0.2 < parity["rounding"]["lm_head"] < 0.35
    assert parity["rounding"]["decoder"] > 0.2
    nearest = RoundToNearest().quantize("lm_head", head).dequantize()
    worse, better = ((one - head.float()).square().mean() for one in (nearest, stored.linear("lm_head")))
    assert better < worse / 200
    assert Engine.load(bundle.path).ask("What is it?", max_new_tokens=3).finish == "length"


def test_a_head_in_int8_is_counted_before_it_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    layout = Layout.locate(tiny_checkpoint)
    common: dict[str, Any] = {"decoder_layout": "portable"}
    four, eight = (
        plan_bundle(ExportOptions(layout, tmp_path / "x", lm_head=head, **common)) for head in ("int4", "int8")
    )
    assert eight.parts["lm_head"] == 1001 * (128 + 2)
    assert four.parts["decoder"] - eight.parts["decoder"] == 1001 * (64 + 2)
    assert "lm_head" not in four.parts
    bundle = export(tiny_checkpoint, tmp_path / "bundle", lm_head="int8", proof="none", **common)
    assert eight.parts["decoder"] + eight.parts["lm_head"] == bytes_of_linears(bundle.path / "decoder.onnx")
    # GPTQ, too, leaves it out; the standard graph holds it, in either precision.
    assert four.work - eight.work == 1001 * (64 + 2) + 1001 * (64 + 2) - eight.parts["lm_head"]


@pytest.mark.parametrize("head", ["int4", "int8"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_precision_for_the_head_of_a_decoder_that_is_not_int4_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, head: str
) -> None:
    with pytest.raises(ExportError, match=f"an LM head in {head} was asked for, and precision {precision}") as caught:
        export(tiny_checkpoint, tmp_path / "bundle", precision=precision, lm_head=head)
    assert caught.value.seen == head
    assert not list(tmp_path.iterdir())


def test_a_quantizer_without_anything_to_quantize_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "bundle", "fp16", "gptq")
    with pytest.raises(ExportError, match="the quantizer gptq was asked for, and no part is to be stored in int4"):
        export_bundle(options, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_them_all(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--out", str(out)]
    options = ["--protein-encoder", "int8", "--embeddings", "int8", "--lm-head", "int8"]
    assert main([*command, *options, "--quantizer", "gptq", "--proof", "none"]) == 0
    recipes = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["quantization"]
    assert recipes["decoder.onnx"]["quantizer"] == "gptq"
    assert recipes["decoder.onnx"]["lm_head"]["precision"] == "int8"
    assert recipes["protein_encoder.onnx"]["precision"] == "int8"
    said = capsys.readouterr().err
    assert "protein_encoder layer" not in said, "GPTQ has nothing to do there"
    assert "decoder head" not in said, "nor there"
