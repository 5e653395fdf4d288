"""What an export writes is known before it begins, and too little space is found before hours are spent."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from biomedgpt_export import plan as plan_module
from biomedgpt_export.cli import main
from biomedgpt_export.errors import ExportError
from biomedgpt_export.exporter import export_bundle, plan_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import QUANTIZERS, ExportOptions
from biomedgpt_export.plan import Plan
from support import bytes_of_linears

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("precision", ["int4", "fp16", "fp32"])
def test_sizes_are_those_of_the_bundle(
    tiny_checkpoint: Path, tiny_bundles: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    quantizer = "rtn" if precision == "int4" else None
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "x", precision, quantizer)  # type: ignore[arg-type]
    planned, written = plan_bundle(options), tiny_bundles(precision)
    for part in ("decoder", "protein_encoder"):
        assert planned.parts[part] == bytes_of_linears(written / f"{part}.onnx"), part
    assert planned.parts["embeddings"] == pytest.approx((written / "embeddings.safetensors").stat().st_size, rel=0.01)
    assert sum(path.stat().st_size for path in written.iterdir()) <= planned.bundle


def test_a_decoder_in_records_has_its_own_size_and_lies_there_twice_for_a_while(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    layout, out = Layout.locate(tiny_checkpoint), tmp_path / "x"
    options = ExportOptions(layout, out, quantizer="rtn", lm_head="int8", proof="none", decoder_layout="records")
    planned = plan_bundle(options)
    export_bundle(options, lambda line: None)
    parts = planned.parts["decoder"] + planned.parts["lm_head"]
    assert parts == bytes_of_linears(out / "decoder.onnx")
    # Once as the portable graph that records are made of, and decoder and encoder once in a standard one.
    assert planned.work == 2 * parts + planned.parts["protein_encoder"]


def test_work_of_gptq_is_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    layout = Layout.locate(tiny_checkpoint)
    with_work, without = (
        plan_bundle(ExportOptions(layout, tmp_path / "x", "int4", quantizer, decoder_layout="portable"))
        for quantizer in QUANTIZERS
    )
    matrices = with_work.parts["decoder"] + with_work.parts["protein_encoder"]
    assert without.work == matrices, "standard graphs, for a while"
    assert with_work.work == 2 * matrices


def test_too_little_space_is_found_before_anything_is_done(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: Usage(0, 0, 10_000_000))
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "deep" / "bundle")
    with pytest.raises(ExportError, match=r"will write about 0\.\d+ GB below .*, where 0\.01 GB are free"):
        export_bundle(options, lambda line: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_space_is_that_of_the_disk_on_which_the_bundle_will_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(0, 0, 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    Plan({"decoder": 1}, 0).require_space(tmp_path / "not" / "there" / "yet")
    assert asked == [tmp_path]


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--dry-run"]
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 0
    written = capsys.readouterr().out
    assert written.startswith("will write 0.0")
    assert "protein_encoder" in written
    assert "of work beside it" in written
    assert not list(tmp_path.iterdir())


def test_a_dry_run_makes_the_checks_that_an_export_begins_with(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copy / "text_ckpts/biomedgpt-lm-7b/config.json").write_text("{}", encoding="utf-8")
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(copy), "--dry-run"]
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 6
    assert "config.json" in capsys.readouterr().err
