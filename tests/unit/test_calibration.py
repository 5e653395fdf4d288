"""Calibration files: what they may hold, and how their mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biomedgpt_edge import Molecule, Protein
from biomedgpt_export import calibration
from biomedgpt_export.calibration import CALIBRATION, PROOF, read_examples
from biomedgpt_export.errors import CalibrationError


def written(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"question": "What is it?", "smiles": "CCO", "answer": "Ethanol."},
        "",
        {"question": "Where is it?", "sequence": "MKV"},
        {"question": "Why?"},
    )
    molecule, protein, nothing = read_examples(path)
    assert (molecule.question, molecule.answer, molecule.inputs) == (
        "What is it?",
        "Ethanol.",
        (Molecule.from_smiles("CCO"),),
    )
    assert (protein.inputs, protein.answer) == ((Protein.from_sequence("MKV"),), "")
    assert nothing.inputs == ()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: not a JSON object"),
        ({"answer": "Yes."}, "line 2: 'question' is missing"),
        ({"question": "  "}, "line 2: 'question' is not text, or empty"),
        ({"question": 7}, "line 2: 'question' is not text, or empty"),
        ({"question": "?", "SMILES": "CCO"}, "line 2: unknown field 'SMILES'; there are question"),
        ({"question": "?", "smiles": "CCO", "sequence": "MKV"}, "line 2: both 'smiles' and 'sequence' are given"),
        ({"question": "?", "smiles": "C1CC"}, "line 2: .*[Rr]ing"),
        ({"question": "?", "sequence": "MK1"}, "line 2: "),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: object, complaint: str) -> None:
    path = written(tmp_path, {"question": "Fine?"}, line)
    with pytest.raises(CalibrationError, match=complaint) as caught:
        read_examples(path)
    assert caught.value.seen == 1


def test_many_bad_lines_are_counted_and_some_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="25 of the lines") as caught:
        read_examples(written(tmp_path, *["{}"] * 25))
    assert caught.value.message.count("line ") == 10
    assert "and 15 more" in caught.value.message


def test_an_empty_file_a_missing_one_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no questions"):
        read_examples(written(tmp_path, "", ""))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_examples(tmp_path / "missing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_examples(tmp_path / "bytes.jsonl")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_BYTES", 10)
    with pytest.raises(CalibrationError, match="too large"):
        read_examples(written(tmp_path, {"question": "Is this too long?"}))


def test_the_shipped_files_have_everything_in_them_and_nothing_in_common() -> None:
    seen = set()
    for path, least in ((CALIBRATION, 128), (PROOF, 36)):
        examples = read_examples(path)
        assert len(examples) >= least
        kinds = [type(item) for example in examples for item in example.inputs]
        assert kinds.count(Molecule) >= len(examples) // 2
        assert kinds.count(Protein) >= len(examples) // 6
        assert len(kinds) < len(examples)
        keys = {line for line in path.read_text().splitlines() if line}
        assert len(keys) == len(examples)
        assert not keys & seen
        seen |= keys
