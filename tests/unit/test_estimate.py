"""What an export takes: its steps as they run, an upper bound of its memory, and a refusal where a machine has less."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from biomedgpt_edge.available_memory import available_memory
from biomedgpt_export import exporter
from biomedgpt_export.calibration import CALIBRATION, PROOF, Questions, read_examples
from biomedgpt_export.cli import main
from biomedgpt_export.device import CPU
from biomedgpt_export.errors import MemoryNeedError
from biomedgpt_export.estimate import Estimate, Speed, Step, Subject, Work
from biomedgpt_export.exporter import estimate_bundle, export_bundle
from biomedgpt_export.families.base import Configs
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.config import EsmConfig, GinConfig, LlamaConfig
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.streamed_model import DECODER_PART, PROTEIN_PART

QUESTIONS = (
    {"question": "What is this?", "smiles": "CCO", "answer": "ethanol"},
    {"question": "Where is it?", "sequence": "MKVA", "answer": "in the cell"},
    {"question": "And this?", "sequence": "MKVA"},
)
SLOW = Speed(1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


# --- steps ------------------------------------------------------------------------------------------------------------

# The first words of a step, and those of the line that the export reports where it begins.
BEGINS = {
    "smooth the protein encoder": "smoothing the protein encoder",
    "hash the checkpoint": "hashing biomedgpt_10b.pth",
    "calibrate and quantize the protein encoder": "protein_encoder layer 1",
    "calibrate and quantize the decoder": "calibrating the decoder",
    "write embeddings": "writing embeddings",
    "write graphs": "molecule encoder",
    "hash the bundle": "hashing POLICY.txt",
    "check parity": "rounding of the stored weights",
    "compare with the source": "comparing with the source",
}


@pytest.mark.parametrize(
    ("quantizer", "protein_encoder", "count"),
    [("gptq", None, 8), ("rtn", None, 5), ("rtn", "int8", 6), ("gptq", "int8", 9)],
)
def test_the_steps_are_those_that_run_in_their_order(
    tiny_checkpoint: Path, tmp_path: Path, questions: Path, quantizer: Any, protein_encoder: Any, count: int
) -> None:
    calibration = None if (quantizer, protein_encoder) == ("rtn", None) else questions
    options = ExportOptions(
        Layout.locate(tiny_checkpoint), tmp_path / "bundle", quantizer=quantizer, calibration=calibration,
        questions=questions, protein_encoder=protein_encoder,
    )  # fmt: skip
    steps = [step.text for step in estimate_bundle(options).steps]
    lines: list[str] = []
    export_bundle(options, lines.append)
    # The protein encoder that is not quantized is run for what the decoder reads of it, without a word.
    marks = [
        next(line for first, line in BEGINS.items() if one.startswith(first)) for one in steps if one[:4] != "run "
    ]
    began = [next(index for index, line in enumerate(lines) if line.startswith(mark)) for mark in marks]
    assert began == sorted(began)
    assert len(steps) == count


def test_the_steps_say_how_much_there_is_to_do(tiny_checkpoint: Path, tmp_path: Path, questions: Path) -> None:
    options = ExportOptions(
        Layout.locate(tiny_checkpoint), tmp_path / "x", calibration=questions, proof="full", questions=questions
    )
    steps = " | ".join(step.text for step in estimate_bundle(options).steps)
    # Two of the questions are about one protein, which the encoder reads once: four residues between two marks.
    assert "the protein encoder: 2 layers on 1 proteins, 6 positions" in steps
    assert re.search(r"the decoder: 2 layers and the head on 3 prompts, \d\d\d positions", steps)
    assert "check parity with the source modules: molecule, protein, text" in steps
    assert steps.endswith("compare with the source on 3 questions")


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"proof": "none"}, "compare"),
        ({"quantizer": "rtn"}, "calibrate"),
        ({"precision": "fp32"}, "compare"),
        ({"protein_encoder": "int8"}, "quantize the protein encoder"),
    ],
)
def test_what_the_options_leave_out_is_no_step(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], absent: str
) -> None:
    layout = Layout.locate(tiny_checkpoint)
    assert any(absent in step.text for step in estimate_bundle(ExportOptions(layout, tmp_path / "x")).steps)
    steps = estimate_bundle(ExportOptions(layout, tmp_path / "x", **options)).steps
    assert not any(absent in step.text for step in steps)


# --- memory -----------------------------------------------------------------------------------------------------------


def ten_b(**changes: Any) -> Subject:
    """The real sizes, with the questions that exports come with."""
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32, head_size=128, vocabulary=32000,
        context=2048, rope_base=10000.0, norm_eps=1e-6, attention_bias=False, tied_head=False,
    )  # fmt: skip
    esm = EsmConfig(
        hidden_size=2560, intermediate_size=10240, layers=36, heads=40, vocabulary=33, context=1026,
        rope_base=10000.0, norm_eps=1e-5, token_dropout=True,
    )  # fmt: skip
    shipped = [Questions("", read_examples(path), [200] * 128, [60] * 128) for path in (CALIBRATION, PROOF)]
    subject = Subject(
        configs=Configs(llama, 32007, esm, GinConfig(5, 300)),
        precisions={DECODER_PART: "int4", PROTEIN_PART: "int4"},
        table="fp16",
        gptq=(DECODER_PART, PROTEIN_PART),
        head=True,
        smooths=False,
        device=CPU,
        calibration=shipped[0],
        comparison=dataclasses.replace(shipped[1], lengths=[200] * 8, answers=[60] * 8),
        checkpoint=19 * 10**9,
        bundle=5 * 10**9,
    )
    return dataclasses.replace(subject, **changes)


def memory_of(subject: Subject, step: str) -> float:
    return next(one.memory for one in subject.estimate().steps if one.text.startswith(step))


def test_fewer_questions_take_less_memory_to_calibrate() -> None:
    whole = ten_b()
    assert whole.calibration is not None
    fewer = dataclasses.replace(whole.calibration, lengths=[200] * 28, answers=[60] * 28)
    saved = memory_of(whole, "calibrate and quantize the decoder") - memory_of(
        ten_b(calibration=fewer), "calibrate and quantize the decoder"
    )
    # Of each position, float32: the residual stream, normed, projected (thrice the width) and, twice, attended to.
    assert saved == pytest.approx(4 * 100 * 200 * (1 + 1 + 3 + 2) * 4096)


def test_on_a_gpu_the_solver_takes_no_memory_of_the_host() -> None:
    for step in ("calibrate and quantize the decoder", "calibrate and quantize the protein"):
        assert memory_of(ten_b(device=torch.device("cuda", 0)), step) < memory_of(ten_b(), step)


def test_wider_sessions_take_more() -> None:
    by_precision = [
        memory_of(ten_b(precisions={DECODER_PART: one, PROTEIN_PART: one}), "check parity")
        for one in ("int4", "fp32", "fp16")
    ]
    assert by_precision == sorted(by_precision)


def test_too_little_memory_is_found_before_anything_is_done(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "bundle")
    needed = estimate_bundle(options).memory
    monkeypatch.setattr(exporter, "available_memory", lambda: needed - 1)
    with pytest.raises(MemoryNeedError, match=r"will take about 0\.\d+ GB of memory to \w+") as caught:
        export_bundle(options, lambda line: None)
    assert (caught.value.seen, caught.value.limit) == (needed - 1, needed)
    assert "larger machine" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_the_remedy_names_what_each_step_beyond_the_memory_would_save() -> None:
    calibrating, comparing = Step("a", 3, Work(), remedy="Less of a."), Step("b", 5, Work(), remedy="Less of b.")
    needed = Estimate([calibrating, Step("c", 7, Work()), comparing], CPU)
    for available, remedies in ((6, ""), (4, "Less of b. "), (2, "Less of a. Less of b. ")):
        with pytest.raises(MemoryNeedError, match="of memory to c") as caught:
            needed.require_memory(available)
        assert caught.value.remedy == f"{remedies}Close other programs, or use a larger machine."


def test_calibration_and_comparison_say_how_they_take_less() -> None:
    remedies = " ".join(step.remedy for step in ten_b().estimate().steps)
    for option in ("--calibration", "--quantizer rtn", "--questions", "--proof none"):
        assert option in remedies


def test_enough_memory_and_an_unknown_amount_are_no_reason_to_refuse() -> None:
    needed = ten_b().estimate()
    needed.require_memory(needed.memory)
    needed.require_memory(None)


MEMINFO = "MemTotal:       8000 kB\nMemFree:         10 kB\nMemAvailable:    4000 kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def group(path: str, limit: str, used: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.stat": f"anon {used}\nfile 99999\nkernel 1\n"}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"proc/meminfo": "nothing known\n"}, None),
        ({"proc/meminfo": MEMINFO}, 4000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/a\n0::/a\n", **group("a", "5000", 2000)}, 3000),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", **group("a", "5000", 6000)}, 0),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", **group("a", "max", 2000)}, 4000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **group("a", "5000", 2000)}, 3000),
        ({"proc/self/cgroup": "0::/a/b\n", **group("a", "5000", 2000), **group("a/b", "4000", 1500)}, 2500),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **group("", "5000", 2000)}, 3000),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/a\n", **group("a", "5000", 2000)}, 4000 * 1024),
    ],
)
def test_available_is_the_least_of_what_the_machine_and_its_groups_leave(
    tmp_path: Path, files: dict[str, str], available: int | None
) -> None:
    assert available_memory(machine(tmp_path, files)) == available


# A process of its own, which has imported everything and then measures what the export adds, without mapped files.
MEASURED = """
import sys, threading, time
from pathlib import Path
from biomedgpt_export import synthesize
from biomedgpt_export.exporter import estimate_bundle, export_bundle
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.families.biomedgpt_10b import Layout

folder = Path(sys.argv[1])
synthesize.SCALES["middle"] = synthesize.Scale(
    hidden=1024, layers=3, heads=16, ffn=2816, positions=2048, pieces=4000,
    esm_hidden=512, esm_layers=3, esm_heads=8, esm_ffn=2048,
)
synthesize.synthesize(folder / "release", scale="middle", seed=0, report=lambda line: None)
options = ExportOptions(
    Layout.locate(folder / "release"), folder / "bundle", calibration=Path(sys.argv[2]), questions=Path(sys.argv[2])
)
estimated = estimate_bundle(options).memory

def kept():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

before = peak = kept()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, kept())
        time.sleep(0.005)

watching = threading.Thread(target=watch)
watching.start()
export_bundle(options, lambda line: None)
done = True
watching.join()
print(estimated, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_estimate_bounds_what_an_export_takes(tmp_path: Path, questions: Path) -> None:
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(questions)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    estimated, measured = map(int, result.stdout.split())
    assert measured <= estimated <= 2 * measured


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_is_the_sum_of_each_kind_of_work_at_its_speed() -> None:
    speed = Speed(products=2.0, factorized=4.0, rounded=8.0, hashed=16.0)
    assert speed.seconds(Work(products=2, factorized=8, rounded=24, hashed=64)) == 1 + 2 + 3 + 4


def test_speed_is_measured_on_this_machine() -> None:
    speed = Speed.measured(CPU)
    assert min(speed.products, speed.factorized, speed.rounded, speed.hashed) > 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.01, "about 0 to 1 s"),
        (40, "about 40 to 80 s"),
        (90, "about 1.5 to 3.0 min"),
        (5400, "about 1.5 to 3.0 h"),
    ],
)
def test_a_range_is_given_in_the_unit_that_people_use(
    seconds: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speed, "measured", lambda device: SLOW)
    *steps, memory, time = Estimate([Step("do it", 2e9, Work(products=seconds))], CPU).lines(3 * 10**9)
    assert steps == ["steps:", f"  1. do it: 2.00 GB of memory, {said}"]
    assert memory == "memory: about 2.00 GB at most, 3.00 GB are available"
    assert time == f"time: {said}, without reading and writing files"


def test_work_on_the_device_takes_the_time_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        Speed, "measured", lambda device: dataclasses.replace(SLOW, products=10 if device == gpu else 1)
    )
    steps = [Step("there", 0, Work(products=500), quantizes=True), Step("here", 0, Work(products=50))]
    *_, total = Estimate(steps, gpu).lines(None)
    assert total.startswith("time: about 100 to 200 s") or total.startswith("time: about 1.7 to 3.3 min")


def test_gptq_is_counted_from_its_definition() -> None:
    step = next(step for step in ten_b().estimate().steps if step.text.startswith("calibrate and quantize the decoder"))
    layer = [(3 * 4096, 4096), (4096, 4096), (2 * 11008, 4096), (4096, 11008)]
    matrices, positions = [*32 * layer, (32007, 4096)], 128 * 200
    forward = sum(2 * positions * rows * columns for rows, columns in matrices)
    hessian = sum(2 * positions * columns**2 for _, columns in matrices)
    # What each block feels of those before it, and what it adds to the loss.
    solver = sum(2 * columns**2 * rows for rows, columns in matrices)
    assert step.work.products == pytest.approx(forward + hessian + solver)
    assert step.work.factorized == pytest.approx(sum(columns**3 / 3 for _, columns in matrices))


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_states_steps_memory_and_time_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--dry-run"]
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "  1. hash the checkpoint" in shown
    assert re.search(r"^memory: about 0\.\d\d GB at most, \d+\.\d\d GB are available$", shown, re.MULTILINE)
    assert re.search(r"^time: about .* without reading and writing files$", shown, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_where_memory_is_unknown_and_refuses_where_it_is_too_little_after_the_numbers(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(tiny_checkpoint), "--dry-run"]
    monkeypatch.setattr("biomedgpt_export.commands.available_memory", lambda: None)
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 0
    assert "how much is available is not known" in capsys.readouterr().out
    monkeypatch.setattr("biomedgpt_export.commands.available_memory", lambda: 10**6)
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 6
    shown = capsys.readouterr()
    assert "compare with the source on 8 questions" in shown.out
    assert "0.00 GB are available" in shown.err
