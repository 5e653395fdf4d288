"""The plumbing of the precision benchmark: what it asks, which bundles it makes, what it says. No figure is judged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biomedgpt_export.calibration import read_examples
from biomedgpt_export.demo.proteins import ProteinRecord
from support import benchmark_script

QUESTIONS = [
    {"question": "What is this?", "sequence": "MAKEDTLEFPGVVKELLPNATFRV", "answer": "A factor."},
    {"question": "What is this?", "smiles": "CCO", "answer": "Ethanol."},
]


@pytest.fixture(scope="module")
def precision() -> Iterator[Any]:
    with benchmark_script("precision") as module:
        yield module


@pytest.fixture(scope="module")
def demo_questions() -> Iterator[Any]:
    with benchmark_script("demo_questions") as module:
        yield module


@pytest.fixture
def command(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    files = ["--questions", str(questions), "--calibration", str(questions), "--work", str(tmp_path)]
    return ["--checkpoint", str(tiny_checkpoint), *files]


def test_every_choice_is_exported_and_compared_with_float32(
    precision: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "precision.json"
    precision.main([*command, "--choices", "fp16,protein-int8,decoder-gptq", "--json", str(file)])
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    rows = {row["choice"]: row for row in written["rows"]}
    assert list(rows) == ["fp16", "protein-int8", "decoder-gptq"]
    for row in rows.values():
        assert f"| {row['name']} | {row['bytes'] / 1e6:.1f} |" in printed
        assert row["questions"] == len(QUESTIONS)
        assert row["bytes"] < written["exact_bytes"]
    assert rows["decoder-gptq"]["bytes"] < rows["fp16"]["bytes"]
    assert rows["protein-int8"]["bytes"] < rows["fp16"]["bytes"]
    # One change at a time: an int4 decoder leaves soft tokens alone, an int8 encoder does not.
    assert rows["decoder-gptq"]["cosine"] == rows["fp16"]["cosine"]
    assert rows["protein-int8"]["cosine"]["least"] < rows["fp16"]["cosine"]["least"]
    assert {"cpu", "threads used", "versions"} <= written["machine"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precision.json", "questions.jsonl"], "nothing is left"


def test_no_two_rows_are_the_same_bundle(precision: Any) -> None:
    options = [json.dumps(choice.options, sort_keys=True) for choice in precision.CHOICES]
    assert len(set(options)) == len(options) == len({choice.key for choice in precision.CHOICES})


def test_a_choice_that_does_not_exist_is_refused(
    precision: Any, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        precision.main([*command, "--choices", "fp16,fp8"])
    assert "no choice fp8; there are fp16, decoder-rtn" in capsys.readouterr().err


def test_a_checkpoint_that_is_none_ends_with_its_error(precision: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*biomedgpt_10b\.pth"):
        precision.main(["--checkpoint", str(tmp_path)])


def test_questions_of_the_demo_are_drawn_with_their_answers(demo_questions: Any, tmp_path: Path) -> None:
    located = [
        ProteinRecord("MKVLA" * 5, location="Nucleus", membrane="S"),
        ProteinRecord("M" * 30, location="Nucleus", membrane="U"),
        ProteinRecord("M" * 601, location="Nucleus", membrane="S"),
    ]
    structured = [ProteinRecord("AEEKLA", structure="HHHHHC")]
    lines, again = (
        demo_questions.drawn(["CCO", "c1ccccc1"] * 3, located, structured, 6, random.Random(1)) for _ in range(2)
    )
    assert lines == again
    assert [line["sequence"] for line in lines if "sequence" in line] == ["MKVLA" * 5, "AEEKLA"]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    examples = read_examples(file)
    assert len(examples) == 6 + 2
    assert all(example.answer for example in examples)
