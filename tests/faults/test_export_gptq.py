"""A GPTQ export that is killed, runs out of disk or finds its work damaged goes on, and ends with the same bytes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_edge.bundle import Bundle
from biomedgpt_export import calibrated
from biomedgpt_export.calibration import CALIBRATION
from biomedgpt_export.cli import main
from biomedgpt_export.errors import CalibrationError, CheckpointError, ExportError, JournalError, ProofError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families import biomedgpt_10b
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize import journal as journal_module


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions with answers, of every kind."""
    lines = CALIBRATION.read_text(encoding="utf-8").splitlines()
    proteins = sorted((line for line in lines if "sequence" in line), key=len)[:3]
    others = sorted((line for line in lines if "sequence" not in line), key=len)[:8]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join([*proteins, *others]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(tiny_checkpoint: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    out = tmp_path_factory.mktemp("whole") / "bundle"
    return ExportOptions(Layout.locate(tiny_checkpoint), out, calibration=questions, proof="none")


@pytest.fixture(scope="module")
def whole(options: ExportOptions) -> Path:
    """The bundle of an export that nothing disturbed."""
    export_bundle(options, lambda line: None)
    assert [path.name for path in options.out.parent.iterdir()] == ["bundle"], "no work is left behind"
    return options.out


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def export(options: ExportOptions, out: Path, **changes: Any) -> list[str]:
    lines: list[str] = []
    export_bundle(dataclasses.replace(options, out=out, **changes), lines.append)
    return lines


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.gptq"


def interrupted(options: ExportOptions, out: Path, units: int) -> None:
    """An export that fails when it is about to keep unit number ``units``."""
    real, calls = journal_module.Journal.write, []

    def write(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > units:
            raise KeyboardInterrupt
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module.Journal, "write", write)
        with pytest.raises(KeyboardInterrupt):
            export(options, out)


def test_the_manifest_says_how_values_were_chosen(whole: Path) -> None:
    manifest = Bundle.open(whole).manifest
    assert manifest.quantization["decoder.onnx"]["quantizer"] == "gptq"
    assert manifest.quantization["protein_encoder.onnx"]["quantizer"] == "gptq"


@pytest.mark.parametrize("units", [0, 1, 3, 4])
def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(
    options: ExportOptions, whole: Path, tmp_path: Path, units: int
) -> None:
    out = tmp_path / "bundle"
    interrupted(options, out, units)
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.gptq"]
    assert len(list(work(out).glob("*.safetensors"))) == units
    lines = export(options, out)
    assert sum("done before" in line for line in lines) == min(units, 4)
    assert contents(out) == contents(whole)
    assert not work(out).exists()


def test_a_head_in_int8_is_left_out_of_the_work_and_another_choice_is_other_work(
    options: ExportOptions, whole: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(options, lm_head="int8")
    undisturbed, out = tmp_path / "undisturbed" / "bundle", tmp_path / "bundle"
    undisturbed.parent.mkdir()
    export(options, undisturbed)
    interrupted(options, out, 3)
    with pytest.raises(JournalError, match="begun with another lm_head"):
        export(options, out, lm_head="int4")
    lines = export(options, out)
    assert sum("done before" in line for line in lines) == 3
    assert "decoder head" not in lines
    assert contents(out) == contents(undisturbed)
    # What GPTQ chose for the layers does not depend on the head.
    four, eight = (StoredWeights(bundle / "decoder.onnx") for bundle in (whole, out))
    assert four.int4("layers.1.down_proj").same_as(eight.int4("layers.1.down_proj"))
    assert not four.int8("lm_head")
    assert eight.int8("lm_head")


# Forks a child per kill from one process that has imported everything, so that a kill falls into the export itself.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.families.biomedgpt_10b import Layout

checkpoint, questions, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def export(name):
    layout = Layout.locate(checkpoint)
    export_bundle(ExportOptions(layout, folder / name, calibration=questions, proof="none"), lambda line: None)

export("warm")
started = time.perf_counter()
export("timed")
lasts = time.perf_counter() - started
moments = random.Random(0)
for number in range(kills):
    child = os.fork()
    if child == 0:
        export("bundle")
        os._exit(0)
    time.sleep(lasts * moments.uniform(0, 0.8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if (folder / "bundle").exists():
        break
"""


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_an_export_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tiny_checkpoint: Path, questions: Path, options: ExportOptions, whole: Path, tmp_path: Path, kills: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(questions), str(tmp_path), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "bundle"
    if not out.exists():
        export(options, out)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40))])
def test_damaged_work_is_done_again_or_refused(options: ExportOptions, whole: Path, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "bundle"
    interrupted(options, out, 4)
    rng = random.Random(seed)
    path = rng.choice(sorted(work(out).iterdir()))
    content = bytearray(path.read_bytes())
    if seed % 2:
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 0x10
    path.write_bytes(content)
    if path.name == "plan.json":
        with pytest.raises(JournalError, match=r"begun with another|cannot be read"):
            export(options, out)
    else:
        export(options, out)
        assert contents(out) == contents(whole)


class SmallDisk:
    """Has room for so many bytes of new files; beyond that, the system's own error comes from its device for it."""

    def __init__(self, patch: pytest.MonkeyPatch, room: float) -> None:
        self.written = 0
        disk, real = self, Path.open

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                left = int(min(room - disk.written, len(content)))
                if not left:
                    with FULL.open("wb", buffering=0) as full:
                        full.write(content)
                disk.written += left
                return super().write(content[:left])

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode not in ("wb", "xb", "w") or path == FULL:
                return real(path, mode, *arguments, **options)
            file = io.BufferedWriter(File(path, mode.replace("b", "")))
            return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

        patch.setattr(Path, "open", opened)


FULL = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


def check_a_full_disk(options: ExportOptions, whole: Path, folder: Path, room: int) -> None:
    """The export fails and says what it must; the same command ends with the same bytes."""
    out = folder / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        disk = SmallDisk(patch, room)
        with pytest.raises(ExportError, match=r"the disk is full: .*No space left on device") as caught:
            export(options, out)
    assert disk.written == room
    assert caught.value.remedy.startswith("Nothing was written.")
    assert str(work(out)) in caught.value.remedy
    assert [path.name for path in folder.iterdir()] == [".bundle.gptq"]
    export(options, out)
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    assert contents(out) == contents(whole)


@pytest.fixture(scope="module")
def all_bytes(options: ExportOptions, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How much is written on the way, journal, copies and bundle together."""
    with pytest.MonkeyPatch.context() as patch:
        disk = SmallDisk(patch, math.inf)
        export(options, tmp_path_factory.mktemp("counted") / "bundle")
    assert disk.written > sum(map(len, contents(whole).values()))
    return disk.written


@full_disk
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_disk_that_fills_up_is_a_typed_error_and_the_work_is_kept(
    options: ExportOptions, whole: Path, all_bytes: int, tmp_path: Path, share: float
) -> None:
    check_a_full_disk(options, whole, tmp_path, int(share * (all_bytes - 1)))


@full_disk
@pytest.mark.slow
@settings(max_examples=50)
@given(data=st.data())
def test_a_disk_may_fill_up_at_any_byte(
    options: ExportOptions, whole: Path, all_bytes: int, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    room = data.draw(st.integers(0, all_bytes - 1))
    check_a_full_disk(options, whole, tmp_path_factory.mktemp("full"), room)


def test_work_of_another_calibration_is_not_continued(options: ExportOptions, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    interrupted(options, out, 1)
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text(encoding="utf-8") + '\n{"question": "Why?"}')
    with pytest.raises(JournalError, match="begun with another calibration") as caught:
        export(options, out, calibration=other)
    assert "remove it" in caught.value.remedy
    with pytest.raises(JournalError, match="begun with another threads"):
        export(options, out, threads=2)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"question": "Why?"}'], "none of the calibration questions has a protein"),
        (
            ['{"question": "Where?", "sequence": "MKV"}', json.dumps({"question": "Why?", "answer": "since " * 3000})],
            r"the question 'Why\?' of .* takes",
        ),
        (["{"], "line 1"),
    ],
)
def test_questions_that_cannot_calibrate_are_refused_before_any_work(
    options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], complaint: str
) -> None:
    monkeypatch.setattr(calibrated, "Layerwise", lambda *arguments: pytest.fail("work was begun"))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CalibrationError, match=complaint):
        export(options, tmp_path / "bundle", calibration=path)
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_with_nan_names_the_tensor(
    options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = biomedgpt_10b.open_checkpoint

    def damaged(path: Path) -> Any:
        checkpoint = real(path)
        tensor = checkpoint.tensor

        def read(key: str) -> Any:
            found = tensor(key)
            return found * float("nan") if key == "llm.model.layers.1.mlp.up_proj.weight" else found

        checkpoint.tensor = read  # type: ignore[method-assign]
        return checkpoint

    monkeypatch.setattr(biomedgpt_10b, "open_checkpoint", damaged)
    with pytest.raises(CheckpointError, match=r"llm\.model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        export(options, tmp_path / "bundle")


# --- proof ------------------------------------------------------------------------------------------------------------


def test_a_bundle_that_loses_too_much_is_not_written_and_the_work_is_kept(
    options: ExportOptions, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(ProofError, match="mean KL divergence") as caught:
        export(options, out, proof="quick", max_kl=1e-9)
    assert caught.value.limit == 1e-9
    assert not out.exists()
    lines = export(options, out, proof="quick", max_kl=1.0)
    assert sum("done before" in line for line in lines) == 4
    figures = Bundle.open(out).manifest.parity["proof"]
    assert figures["questions"] == 8
    assert 0 < figures["kl"]["mean"] <= figures["kl"]["p99"] < 1


@pytest.mark.parametrize("changes", [{"proof": "none"}, {"precision": "fp32"}])
def test_a_limit_without_a_comparison_is_refused(
    options: ExportOptions, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ExportError, match="nothing is to be compared"):
        export(options, tmp_path / "bundle", max_kl=0.1, **changes)


def test_the_commands(
    tiny_checkpoint: Path, questions: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--proof", "none"]
    out = tmp_path / "bundle"
    assert main([*command, "--calibration", str(questions), "--out", str(out)]) == 0
    names = {path.name for path in whole.iterdir()}
    assert {name for name in names if (out / name).read_bytes() == (whole / name).read_bytes()} == names
    rounded = tmp_path / "rounded"
    assert main([*command, "--quantizer", "rtn", "--out", str(rounded)]) == 0
    capsys.readouterr()
    assert main(["compare", str(whole), str(rounded), "--questions", str(questions), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"]["mean"] > 0
    assert main(["compare", str(whole), str(out), "--questions", str(questions)]) == 0
    shown = capsys.readouterr().out
    assert "KL divergence, nats per token       mean 0.0, 99th percentile 0.0" in shown
    assert main(["compare", str(whole), str(tmp_path / "missing")]) == 4
    shutil.rmtree(out)
