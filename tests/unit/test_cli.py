"""The command line: what goes to stdout, what to stderr, and which exit code."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biomedgpt_edge.cli.main import main
from biomedgpt_edge.encoders import Encoders

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
SHORT = ["--max-new-tokens", "6"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def bundle(tiny_bundle_fp32: Path) -> str:
    return str(tiny_bundle_fp32)


def test_ask_prints_the_answer_alone_on_stdout(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    code, out, err = run(capsys, "ask", "--bundle", bundle, "--molecule", ASPIRIN, *SHORT, "Hello")
    code_json, out_json, _ = run(capsys, "ask", "--bundle", bundle, "--molecule", ASPIRIN, *SHORT, "--json", "Hello")
    assert (code, code_json) == (0, 0)
    answer = json.loads(out_json)
    assert out == answer["text"] + "\n"
    assert answer["finish"] == "length"
    assert len(answer["token_ids"]) == 6
    assert answer["timings"]["ttft"] > 0
    assert "no medical advice" in err


def test_inputs_keep_the_order_of_the_command_line(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    mixed = ["--protein", "MKTAYIAK", "--molecule", "CCO", "--json", *SHORT, "Hello"]
    swapped = ["--molecule", "CCO", "--protein", "MKTAYIAK", "--json", *SHORT, "Hello"]
    answers = [json.loads(run(capsys, "ask", "--bundle", bundle, *order)[1]) for order in (mixed, swapped)]
    assert answers[0]["token_ids"] != answers[1]["token_ids"]


def test_files_are_read_by_their_endings(capsys: pytest.CaptureFixture[str], bundle: str, tmp_path: Path) -> None:
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">p\nMKTAYIAK\n")
    from_file = run(capsys, "ask", "--bundle", bundle, "--protein", str(fasta), "--json", *SHORT, "Hello")[1]
    direct = run(capsys, "ask", "--bundle", bundle, "--protein", "MKTAYIAK", "--json", *SHORT, "Hello")[1]
    assert json.loads(from_file)["token_ids"] == json.loads(direct)["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "code", "error", "words"),
    [
        (["--molecule", "C1CC"], 3, "input.molecule", "unclosed ring"),
        (["--molecule", ""], 3, "input.molecule", "empty"),
        (["--molecule", "nothing.sdf"], 3, "input.file", "there is no file"),
        (["--protein", "MKJ"], 3, "input.protein", "'J' at 3"),
        (["--protein", "nothing.fasta"], 3, "input.file", "there is no file"),
        (["--protein", "/some/where"], 3, "input.file", "no FASTA file by its name"),
        (["--protein", "M" * 1023], 3, "input.protein", "truncate"),
        (["--temperature", "-1"], 3, "input.option", "temperature"),
        (["--max-new-tokens", "5000"], 3, "input.prompt_too_long", "at most"),
        (["--memory-limit", "lots"], 3, "input.option", "memory_limit is 'lots'"),
        (["--memory-limit", "1MiB"], 3, "input.memory_limit", "Give at least"),
        (["--bundle", "nowhere"], 4, "bundle.not_found", "does not exist"),
    ],
)
def test_mistakes_have_exit_codes_and_typed_errors(
    capsys: pytest.CaptureFixture[str], bundle: str, arguments: list[str], code: int, error: str, words: str
) -> None:
    given = arguments if "--bundle" in arguments else ["--bundle", bundle, *arguments]
    found, out, err = run(capsys, "ask", *given, "--json", "Hello")
    assert found == code
    assert json.loads(out)["error"]["code"] == error
    assert words in err


def test_the_cache_is_shown_and_cleared_and_nothing_else_is(
    capsys: pytest.CaptureFixture[str], bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path))
    (tmp_path / "mine.txt").write_text("not the cache's")
    run(capsys, "ask", "--bundle", bundle, "--molecule", ASPIRIN, "--keep-soft-tokens", "--low-memory", *SHORT, "Hello")
    held = json.loads(run(capsys, "cache", "info", "--json")[1])["holds"]
    files = {one["name"]: one["files"] for one in held}
    assert files == {"verified": 1, "prefixes": 1, "soft_tokens": 1, "portable": 0, "standard": 0, "engines": 0}
    code, out, _ = run(capsys, "cache", "clear")
    assert code == 0
    assert "cleared" in out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]
    assert all(one["bytes"] == 0 for one in json.loads(run(capsys, "cache", "info", "--json")[1])["holds"])


def test_a_cut_protein_is_named_on_stderr(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    code, _, err = run(capsys, "ask", "--bundle", bundle, "--protein", "M" * 1100, "--truncate", *SHORT, "Hello")
    assert code == 0
    assert "note: the protein was cut: the first 1,022 of its 1,100 residues were used" in err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ask"])
    assert caught.value.code == 2


def test_chat_answers_line_by_line_and_survives_mistakes(
    capsys: pytest.CaptureFixture[str], bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Hello", "/molecule C1CC", "/molecule CCO", "What is this?", "", "/what", "/reset", "Bye", "/quit", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run(capsys, "chat", "--bundle", bundle, *SHORT)
    assert code == 0
    assert len(out.strip().split("\n")) >= 3
    assert "unclosed ring" in err
    assert "unknown command /what" in err
    assert "Use policy: https://" in err
    assert "no medical advice" in err


def test_control_characters_of_a_bundle_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tiny_bundle_fp32: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_bundle_fp32.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["name"] = "\x1b]0;title\x07\u202emodel"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    _, out, _ = run(capsys, "inspect", str(copy))
    _, _, err = run(capsys, "ask", "--bundle", str(copy), "--molecule", "CCO", *SHORT, "Hello")
    for text in (out, err):
        assert "\\x1b]0;title\\x07\\u202emodel" in text
        assert "\x1b" not in text


def test_inspect_shows_terms_and_facts(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    code, out, _ = run(capsys, "inspect", bundle)
    assert code == 0
    for words in ("no medical advice", "Use policy: https://", "GIN, 5 layers", "decoder.onnx", "parity"):
        assert words in out
    manifest = json.loads(run(capsys, "inspect", bundle, "--json")[1])
    assert manifest["schema_version"] == 1


def test_verify_names_the_file_that_differs(
    capsys: pytest.CaptureFixture[str], tiny_bundle_fp32: Path, tmp_path: Path
) -> None:
    assert run(capsys, "verify", str(tiny_bundle_fp32))[0] == 0
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_bundle_fp32.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "decoder.data").read_bytes())
    data[1000] ^= 1
    (copy / "decoder.data").write_bytes(data)
    code, out, err = run(capsys, "verify", str(copy))
    assert code == 4
    assert "DIFFERS  decoder.data" in out
    assert "decoder.data differ from the manifest" in err


def test_doctor_reports_the_machine_and_the_bundle(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    code, out, _ = run(capsys, "doctor", "--bundle", bundle, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"]
    assert {"processor", "onnxruntime", "GPU", "CUDA provider", "TensorRT", "bundle"} <= {
        finding["what"] for finding in report["findings"]
    }
    lines = run(capsys, "doctor", "--bundle", bundle)[1].splitlines()
    assert all(line[25] == " " for line in lines), "columns that touch each other"
    assert run(capsys, "doctor", "--bundle", "nowhere")[0] == 5


def test_doctor_names_a_missing_package_and_still_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rdkit" else real(name, *rest))
    code, out, _ = run(capsys, "doctor")
    assert code == 5
    assert "NOT OK  rdkit" in out
    assert "-> pip install rdkit" in out
    assert "processor" in out


@pytest.mark.parametrize("command", ["ask", "doctor"])
def test_without_onnxruntime_there_is_a_message_and_no_traceback(tmp_path: Path, command: str) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('none', name='onnxruntime')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    question = ["Hello"] if command == "ask" else []
    done = subprocess.run(
        [sys.executable, "-m", "biomedgpt_edge.cli.main", command, *question],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "onnxruntime" in done.stdout + done.stderr


def test_an_answer_that_the_terminal_cannot_encode_is_shown_in_part(tiny_bundle_fp32: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "biomedgpt_edge.cli.main", "inspect", str(tiny_bundle_fp32)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_interrupting_while_an_encoder_runs_keeps_the_conversation(
    capsys: pytest.CaptureFixture[str], bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoders, "encode", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("/molecule CCO\nWhat is this?\n/reset\nHello\n"))
    code, out, err = run(capsys, "chat", "--bundle", bundle, *SHORT)
    assert code == 0
    assert "stopped; this answer is not remembered" in err
    assert len(out.strip()) > 0


@pytest.mark.parametrize("path", ["p.fasta.gz", "proteins.doc"])
def test_a_file_name_is_not_read_as_residues(capsys: pytest.CaptureFixture[str], bundle: str, path: str) -> None:
    code, _, err = run(capsys, "ask", "--bundle", bundle, "--protein", path, "Hello")
    assert code == 3
    assert "no FASTA file by its name" in err


def test_no_telemetry_is_written_or_sent(bundle: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-m", "biomedgpt_edge.cli.main", "ask", "--bundle", bundle, *SHORT, "Hello"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_importing_onnxruntime_first_is_warned_about() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    code = "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime'); import biomedgpt_edge"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "telemetry could not be switched off" in done.stderr


def test_an_answer_that_was_cut_says_so(capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    _, _, err = run(capsys, "ask", "--bundle", bundle, *SHORT, "Hello")
    assert "note: the answer was cut at 6 tokens (--max-new-tokens)" in err


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">/dev/full", "<&-"])
def test_closed_and_full_streams_give_no_traceback(bundle: str, redirection: str) -> None:
    command = f'"{sys.executable}" -m biomedgpt_edge.cli.main chat --bundle "{bundle}" {redirection}'
    done = subprocess.run(["bash", "-c", f"echo Hello | {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr
