"""One layer of every part at the widths of the real model: what small dimensions cannot show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_export import synthesize as synthesis
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions

REAL_WIDTHS = dataclasses.replace(
    synthesis.SCALES["tiny"],
    hidden=4096, layers=1, heads=32, ffn=11008, esm_hidden=2560, esm_layers=1, esm_heads=40, esm_ffn=10240,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_layer_of_the_real_widths_exports_within_the_tolerance_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setitem(synthesis.SCALES, "wide", REAL_WIDTHS)
    synthesis.synthesize(tmp_path / "checkpoint", scale="wide", seed=1, report=lambda line: None)
    options = ExportOptions(Layout.locate(tmp_path / "checkpoint"), tmp_path / "bundle", precision)  # type: ignore[arg-type]
    export_bundle(options, lambda line: None)
    with Engine.load(tmp_path / "bundle") as engine:
        inputs = (Molecule.from_smiles("CCO"), Protein.from_sequence("MKTAYIAKQRQISFVKSHFSRQ"))
        assert len(engine.ask("Hello", *inputs, max_new_tokens=4).token_ids) == 4
