"""A bundle appears whole or not at all: nothing is written over, an export that fails or is killed leaves no bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import BundleNotFoundError
from biomedgpt_edge.manifest import parse_manifest
from biomedgpt_export import bundle_writer, exporter
from biomedgpt_export.bundle_writer import BundleWriter
from biomedgpt_export.errors import ExportError, OutputExistsError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families import biomedgpt_10b
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions


def export(checkpoint: Path, out: Path, precision: str = "fp32") -> None:
    quantizer = "rtn" if precision == "int4" else None
    options = ExportOptions(Layout.locate(checkpoint), out, precision, quantizer, proof="none")  # type: ignore[arg-type]
    export_bundle(options, lambda line: None)


def bundles(folder: Path) -> list[Path]:
    """Everything in a folder that opens as a bundle; what does must also verify."""
    found = []
    for path in folder.iterdir():
        try:
            Bundle.open(path).verify()
        except BundleNotFoundError:
            continue
        found.append(path)
    return found


# --- the output -------------------------------------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent.parent)


TAKEN = [a_file, a_folder, a_full_folder, a_dangling_link, a_link_to_a_folder]


@pytest.mark.parametrize("arrange", TAKEN)
def test_an_output_that_exists_is_refused_and_left_alone(
    tiny_checkpoint: Path, tmp_path: Path, arrange: Callable[[Path], None]
) -> None:
    out = tmp_path / "bundle"
    arrange(out)
    before = out.lstat()
    with pytest.raises(OutputExistsError, match=f"{out} exists already"):
        export(tiny_checkpoint, out)
    assert out.lstat() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("arrange", TAKEN)
def test_an_output_that_appears_during_the_export_is_not_replaced(
    tiny_bundle: Path, tmp_path: Path, arrange: Callable[[Path], None]
) -> None:
    out = tmp_path / "bundle"
    manifest = parse_manifest((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    with BundleWriter(out) as writer:
        arrange(out)
        before = out.lstat()
        with pytest.raises(OutputExistsError):
            writer.commit(manifest)
    assert out.lstat() == before
    assert list(tmp_path.iterdir()) == [out]


def test_folders_on_the_way_are_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "a" / "b" / "bundle")
    Bundle.open(tmp_path / "a" / "b" / "bundle").verify()


def test_an_output_that_cannot_be_made_is_a_typed_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="a file cannot be read or written"):
        export(tiny_checkpoint, tmp_path / "file" / "bundle")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_everyone_may_read_what_the_umask_allows(tiny_bundle: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tiny_bundle.iterdir()} == {0o666 & ~umask}


# --- failure at each step ---------------------------------------------------------------------------------------------


def failing(name: str, after: int = 0, of: Any = exporter) -> Callable[[pytest.MonkeyPatch, BaseException], None]:
    """Makes the function ``name`` of the exporter, or another module, raise at its call number ``after``."""

    def arrange(patch: pytest.MonkeyPatch, error: BaseException) -> None:
        owner: Any = of
        *parents, last = name.split(".")
        for part in parents:
            owner = getattr(owner, part)
        real, calls = getattr(owner, last), []

        def fail(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise error
            return real(*arguments, **options)

        patch.setattr(owner, last, fail)

    return arrange


def failing_commit(name: str, after: int = 0) -> Callable[[pytest.MonkeyPatch, BaseException], None]:
    def arrange(patch: pytest.MonkeyPatch, error: BaseException) -> None:
        owner: Any = bundle_writer.os if "." in name else bundle_writer
        last = name.rsplit(".", 1)[-1]
        real, calls = getattr(owner, last), []

        def fail(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise error
            return real(*arguments)

        patch.setattr(owner, last, fail)

    return arrange


STEPS = {
    "opening the checkpoint": failing("open_checkpoint", of=biomedgpt_10b),
    "reading configurations": failing("EsmConfig.read", of=biomedgpt_10b),
    "comparing keys": failing("require_fit", of=biomedgpt_10b),
    "reading the first tensor": failing("_Export.weights"),
    "reading a tensor of the decoder": failing("_Export.weights", after=100),
    "writing embeddings": failing("_save_tensors"),
    "writing projections": failing("_save_tensors", after=1),
    "molecule encoder": failing("build_gin"),
    "protein encoder": failing("build_esm"),
    "decoder": failing("build_decoder"),
    "writing a weight": failing("GraphBuilder._write_external", after=30),
    "saving a graph": failing("GraphBuilder.save", after=1),
    "manifest": failing("_Export.manifest"),
    "hashing": failing("file_entry"),
    "hashing staged files": failing_commit("file_entry", after=4),
    "measuring": failing("parity.measure"),
    "manifest with figures": failing("_Export.manifest", after=1),
    "committing": failing("BundleWriter.commit"),
    "bringing a file to disk": failing_commit("_sync", after=3),
    "naming the manifest": failing_commit("os.rename"),
    "bringing the folder to disk": failing_commit("_sync", after=12),
    "moving the bundle to its place": failing_commit("os.rename", after=1),
}


FULL_DISK = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("step", "error", "expected"),
    [
        *((step, RuntimeError("at this step"), RuntimeError) for step in STEPS),
        *((step, KeyboardInterrupt(), KeyboardInterrupt) for step in ("reading the first tensor", "measuring")),
        *((step, FULL_DISK, ExportError) for step in ("writing a weight", "saving a graph", "committing")),
    ],
)
def test_a_failure_at_any_step_leaves_nothing_and_the_next_export_works(
    tiny_checkpoint: Path, tmp_path: Path, step: str, error: BaseException, expected: type[BaseException]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](patch, error)
        with pytest.raises(expected):
            export(tiny_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    if step in ("writing a weight", "moving the bundle to its place"):
        export(tiny_checkpoint, tmp_path / "bundle")
        assert bundles(tmp_path) == [tmp_path / "bundle"]


def test_a_failure_of_whoever_watches_the_progress_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def report(line: str) -> None:
        if line.startswith("comparing"):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(ExportError, match="Broken pipe"):
        export_bundle(ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "bundle", "int4", "rtn"), report)
    assert list(tmp_path.iterdir()) == []


# --- killed -----------------------------------------------------------------------------------------------------------

# Forks a child per kill from one process that has imported everything, so that a kill falls into the export itself.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.families.biomedgpt_10b import Layout

checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])

def export(name):
    export_bundle(ExportOptions(Layout.locate(checkpoint), folder / name, "fp32"), lambda line: None)

# Killed right before and right after each rename of the commit.
real = os.rename
for number in range(4):
    if os.fork() == 0:
        calls = []
        def rename(*arguments):
            for moment in (0, 1):
                calls.append(1)
                if len(calls) == number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == 0:
                    real(*arguments)
        os.rename = rename
        export(f"renames/bundle{number}")
    _, status = os.wait()
    assert os.WTERMSIG(status) == signal.SIGKILL, status

export("first")
started = time.perf_counter()
export("second")
lasts = time.perf_counter() - started
moments = random.Random(0)
for number in range(10):
    child = os.fork()
    if child == 0:
        export(f"moments/bundle{number}")
        os._exit(0)
    time.sleep(lasts * moments.uniform(0, 1.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def killed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What killed exports left: in ``moments`` at ten random moments, in ``renames`` at the end of a commit."""
    folder = tmp_path_factory.mktemp("killed")
    for name in ("moments", "renames"):
        (folder / name).mkdir()
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return folder


def test_an_export_killed_at_any_moment_leaves_a_whole_bundle_or_none(tiny_checkpoint: Path, killed: Path) -> None:
    folder = killed / "moments"
    opened = bundles(folder)
    interrupted = [number for number in range(10) if folder / f"bundle{number}" not in opened]
    assert interrupted
    assert not any((folder / f"bundle{number}").exists() for number in interrupted)
    export(tiny_checkpoint, folder / f"bundle{interrupted[0]}")
    assert folder / f"bundle{interrupted[0]}" in bundles(folder)


def test_an_export_killed_around_its_last_renames_leaves_a_whole_bundle_or_none(
    tiny_checkpoint: Path, killed: Path
) -> None:
    folder = killed / "renames"
    assert [(folder / f"bundle{number}").exists() for number in range(4)] == [False, False, False, True]
    assert folder / "bundle3" in bundles(folder)
    export(tiny_checkpoint, folder / "bundle0")
    assert folder / "bundle0" in bundles(folder)


# --- the same again ---------------------------------------------------------------------------------------------------


def differing(one: Path, other: Path) -> list[str]:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_the_same_export_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_bundles: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    options = ExportOptions(Layout.locate(tiny_checkpoint), tmp_path / "again", precision)  # type: ignore[arg-type]
    export_bundle(options, lambda line: None)
    assert differing(tiny_bundles(precision), tmp_path / "again") == []


def test_another_process_at_another_time_in_another_place_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for path in copied.rglob("*"):
        os.utime(path, (1e9, 1e9))
    arguments = ["--family", "biomedgpt-10b", "--checkpoint", str(copied), "--out", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-m", "biomedgpt_export.cli", "bundle", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    assert differing(tiny_bundle, tmp_path / "again") == []
