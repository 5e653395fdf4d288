"""The checker of wheels for aarch64, on tiny wheels made here: a right one passes, and each fault is named."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc" / "check_wheel.py"
NAME = "biomedgpt_edge-1.0-cp311-cp311-linux_aarch64.whl"
NATIVE = "biomedgpt_edge/_native.cpython-311-aarch64-linux-gnu.so"
OPS = "biomedgpt_edge/_ort_ops.so"
WHEEL = "biomedgpt_edge-1.0.dist-info/WHEEL"
LICENCE = "biomedgpt_edge-1.0.dist-info/licenses/LICENSE"
DEMO = "biomedgpt_edge/demo_bundle"
TAG = b"Wheel-Version: 1.0\nTag: cp311-cp311-linux_aarch64\n"
X86 = 62


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_object(
    versions: Sequence[str] = ("GLIBC_2.17", "GLIBCXX_3.4.9"),
    needed: Sequence[str] = ("libstdc++.so.6", "libc.so.6"),
    *,
    machine: int = 183,
    run_path: str = "",
    bits: int = 2,
    kind: int = 3,
) -> bytes:
    """An ELF file with nothing but what the loader reads first; the last byte ends the last string."""
    address = 0x10000  # as in real ones, addresses are no offsets
    strings = b"\0"

    def string(text: str) -> int:
        nonlocal strings
        strings += text.encode() + b"\0"
        return len(strings) - 1 - len(text)

    # Those of two libraries where there are enough, so that both chains have more than one link.
    entries, half = b"", len(versions) // 2
    groups = [names for names in (versions[:half], versions[half:]) if names]
    for names in groups:
        more = 0 if names is groups[-1] else 16 + 16 * len(names)
        entries += struct.pack("<HHIII", 1, len(names), string("libc.so.6"), 16, more)
        for index, name in enumerate(names):
            entries += struct.pack("<IHHII", 0, 0, 2, string(name), 16 if index + 1 < len(names) else 0)
    tags = [(1, string(name)) for name in needed]
    if run_path:
        tags.append((29, string(run_path)))
    at = 64 + 2 * 56
    dynamic = at + len(entries)
    size = 16 * (len(tags) + 3)
    tags += [(0x6FFFFFFE, address + at), (5, address + dynamic + size), (0, 0)]
    body = entries + b"".join(struct.pack("<qQ", *tag) for tag in tags) + strings
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, at + len(body), at + len(body), 0x10000)
    table = struct.pack("<IIQQQQQQ", 2, 6, dynamic, address + dynamic, address + dynamic, size, size, 8)
    start = struct.pack("<4sBBBBQ", b"\x7fELF", bits, 1, 1, 0, 0)
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    return start + header + load + table + body


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout with two files of the packages, and with what was compiled for the machine that builds."""
    root = tmp_path / "checkout"
    for name, content in {
        "runtime/biomedgpt_edge/__init__.py": b"",
        "runtime/biomedgpt_edge/_ort_ops.so": shared_object(machine=X86),
        "runtime/biomedgpt_edge/__pycache__/__init__.cpython-311.pyc": b"",
        "export/biomedgpt_export/questions/proof.jsonl": b"",
    }.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def right_wheel() -> dict[str, bytes]:
    listed = [{"path": "decoder.data", "sha256": hashlib.sha256(b"weights").hexdigest(), "size": 7}]
    return {
        "biomedgpt_edge/__init__.py": b"",
        "biomedgpt_export/questions/proof.jsonl": b"",
        NATIVE: shared_object(("GLIBC_2.9", "GLIBC_2.34", "GLIBCXX_3.4.30", "CXXABI_1.3.13", "GCC_3.0")),
        OPS: shared_object(),
        f"{DEMO}/manifest.json": json.dumps({"files": listed}).encode(),
        f"{DEMO}/decoder.data": b"weights",
        WHEEL: TAG,
        LICENCE: b"Apache License",
    }


def write(folder: Path, changes: Mapping[str, bytes | None] | None = None, name: str = NAME) -> Path:
    """A right wheel, but for ``changes``; None leaves a file out."""
    wheel = folder / name
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in (right_wheel() | dict(changes or {})).items():
            if content is not None:
                archive.writestr(path, content)
    return wheel


def test_a_right_wheel_passes(
    checker: ModuleType, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checker.main([str(write(tmp_path)), "--source", str(source)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [line.split() for line in printed.out.splitlines()]
    assert [Path(NATIVE).name, "2.34", "3.4.30", "1.3.13", "3.0", "libstdc++.so.6", "libc.so.6"] in rows
    assert [Path(OPS).name, "2.17", "3.4.9", "-", "-", "libstdc++.so.6", "libc.so.6"] in rows
    assert "needs glibc 2.34 or newer" in printed.out
    assert "2 of the 2 of both packages" in printed.out


def test_a_manylinux_tag_passes_if_it_promises_no_more_than_is_checked(
    checker: ModuleType, tmp_path: Path, source: Path
) -> None:
    tag = "Tag: cp311-cp311-manylinux_2_{}_aarch64\n"
    for glibc, faults in ((35, 0), (34, 1)):
        changes = {WHEEL: tag.format(glibc).encode()}
        wheel = write(tmp_path, changes, f"biomedgpt_edge-1.0-cp311-cp311-manylinux_2_{glibc}_aarch64.whl")
        assert len(checker.check(wheel, source)[1]) == faults


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({OPS: shared_object(machine=X86)}, f"{OPS} is for x86-64, not for AArch64"),
        ({OPS: shared_object(machine=999)}, f"{OPS} is for machine 999, not for AArch64"),
        ({OPS: shared_object(bits=1)}, f"{OPS} is not 64-bit and little-endian"),
        ({OPS: shared_object(kind=2)}, f"{OPS} is no shared object"),
        ({OPS: b"!<arch>"}, f"{OPS} is no ELF file"),
        ({OPS: None}, f"{OPS} is missing"),
        ({NATIVE: shared_object(["GLIBC_2.36"])}, f"{NATIVE} needs GLIBC 2.36; JetPack 6 has 2.35"),
        ({OPS: shared_object(["GLIBCXX_3.4.31"])}, f"{OPS} needs GLIBCXX 3.4.31; JetPack 6 has 3.4.30"),
        ({OPS: shared_object(["CXXABI_1.3.14"])}, f"{OPS} needs CXXABI 1.3.14; JetPack 6 has 1.3.13"),
        (
            {OPS: shared_object(["GLIBC_2.17", "GLIBC_ABI_DT_RELR"])},
            f"{OPS} needs symbol versions that JetPack 6 is not known to have: GLIBC_ABI_DT_RELR",
        ),
        (
            {NATIVE: shared_object(needed=["libc.so.6", "libpython3.11.so.1.0", "libcudart.so.12"])},
            f"{NATIVE} needs libraries that a board may lack: libcudart.so.12, libpython3.11.so.1.0",
        ),
        ({OPS: shared_object(run_path="/opt/lib")}, f"{OPS} looks for libraries in /opt/lib"),
        (
            {OPS: shared_object() + b"in /build/csrc/int4/int4.cpp\0"},
            f"{OPS} contains a path of the machine that built it, /build/csrc/int4/int4.cpp",
        ),
        ({"biomedgpt_export/questions/proof.jsonl": None}, "biomedgpt_export/questions/proof.jsonl is missing"),
        ({"biomedgpt_edge/__init__.py": None}, "biomedgpt_edge/__init__.py is missing"),
        ({"biomedgpt_edge/a.pyc": b""}, "biomedgpt_edge/a.pyc is compiled Python"),
        ({f"{DEMO}/decoder.data": b"Weights"}, f"{DEMO}/decoder.data has not the SHA-256 that the manifest states"),
        ({f"{DEMO}/decoder.data": None}, f"{DEMO}/decoder.data is missing"),
        ({f"{DEMO}/manifest.json": b'{"files": []}'}, f"{DEMO}/manifest.json lists no file"),
        ({LICENCE: None}, "the licence is missing"),
        ({WHEEL: None}, f"{WHEEL} is missing"),
        ({WHEEL: TAG.replace(b"aarch64", b"x86_64")}, f"{WHEEL} says cp311-cp311-linux_x86_64, unlike the file's name"),
    ],
)
def test_a_fault_is_named_and_no_other(
    changes: dict[str, bytes | None],
    fault: str,
    checker: ModuleType,
    tmp_path: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert checker.main([str(write(tmp_path, changes)), "--source", str(source)]) == 1
    assert capsys.readouterr().err == f"wrong: {fault}\n"


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        (
            "biomedgpt_edge-1.0-cp311-cp311-linux_x86_64.whl",
            {WHEEL: TAG.replace(b"aarch64", b"x86_64")},
            "is for linux_x86_64, not for linux_aarch64, or manylinux_2_35_aarch64 or newer",
        ),
        (
            "biomedgpt_edge-1.0-py3-none-linux_aarch64.whl",
            {WHEEL: TAG.replace(b"cp311-cp311", b"py3-none")},
            "is for py3-none, not for one version of CPython",
        ),
        ("biomedgpt_edge.whl", {}, "is not called as a wheel is"),
    ],
)
def test_a_wrong_name_is_named(
    name: str, changes: dict[str, bytes | None], fault: str, checker: ModuleType, tmp_path: Path, source: Path
) -> None:
    _, faults = checker.check(write(tmp_path, changes, name), source)
    assert f"{name} {fault}" in faults


@pytest.mark.parametrize(
    "extra", ["biomedgpt_edge/_native.cpython-311-x86_64-linux-gnu.so", "biomedgpt_edge/tool"], ids=["so", "executable"]
)
def test_an_object_of_the_machine_that_built_it_is_found_whatever_it_is_called(
    extra: str, checker: ModuleType, tmp_path: Path, source: Path
) -> None:
    _, faults = checker.check(write(tmp_path, {extra: shared_object(machine=X86)}), source)
    assert faults == [f"{extra} does not belong there", f"{extra} is for x86-64, not for AArch64"]


def test_the_extension_has_to_be_for_the_python_of_the_tag(checker: ModuleType, tmp_path: Path, source: Path) -> None:
    old = NATIVE.replace("311", "310")
    _, faults = checker.check(write(tmp_path, {NATIVE: None, old: shared_object()}), source)
    assert faults == [f"{NATIVE} is missing", f"{old} does not belong there"]


def test_the_checkouts_path_is_found(checker: ModuleType, tmp_path: Path, source: Path) -> None:
    content = shared_object() + bytes(source) + b"/csrc\0"
    _, faults = checker.check(write(tmp_path, {OPS: content}), source)
    assert faults == [f"{OPS} contains the checkout's path, {source}"]


def test_a_path_inside_a_text_is_no_fault(checker: ModuleType, tmp_path: Path, source: Path) -> None:
    content = shared_object() + b"see csrc/attention/attention.h, or docs at https://a.example/b.html\0"
    assert checker.check(write(tmp_path, {OPS: content}), source)[1] == []


@pytest.mark.parametrize("manifest", [None, b"{", b"[]", b'{"files": [{"path": "decoder.data"}]}', b"\xff"])
def test_a_manifest_that_cannot_be_read(
    manifest: bytes | None, checker: ModuleType, tmp_path: Path, source: Path
) -> None:
    _, faults = checker.check(write(tmp_path, {f"{DEMO}/manifest.json": manifest}), source)
    assert len(faults) == 1
    assert faults[0].startswith(f"{DEMO}/manifest.json is missing or cannot be read")


def test_an_object_that_ends_too_soon_is_a_fault_and_no_traceback(checker: ModuleType) -> None:
    whole = shared_object(["GLIBC_2.17", "GLIBC_2.34", "GCC_3.0"], run_path="/opt")
    assert checker.read_shared_object(whole).versions == ["GLIBC_2.17", "GLIBC_2.34", "GCC_3.0"]
    for length in range(len(whole)):
        with pytest.raises(checker.ElfError):
            checker.read_shared_object(whole[:length])


def test_an_object_with_any_byte_wrong_is_read_or_refused(checker: ModuleType) -> None:
    whole = shared_object(["GLIBC_2.17", "GLIBC_2.34", "GCC_3.0"], run_path="/opt")
    for place in range(len(whole)):
        for value in (0, 0x7F, 0xFF):
            try:
                checker.read_shared_object(whole[:place] + bytes([value]) + whole[place + 1 :])
            except checker.ElfError:
                continue


def test_a_file_that_is_no_wheel(
    checker: ModuleType, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write(tmp_path)
    broken.write_bytes(broken.read_bytes().replace(b"weights", b"Weights"))
    for wheel in (tmp_path / "absent.whl", source / "runtime/biomedgpt_edge/__init__.py", broken):
        assert checker.main([str(wheel), "--source", str(source)]) == 1
        assert capsys.readouterr().err.startswith("wrong: it cannot be read")


def test_a_source_without_packages_is_no_measure(checker: ModuleType, tmp_path: Path) -> None:
    _, faults = checker.check(write(tmp_path), tmp_path)
    assert faults == [f"{tmp_path} has none of runtime/biomedgpt_edge, export/biomedgpt_export, to compare with"]


def test_alone_it_compares_with_the_checkout_that_it_lies_in(tmp_path: Path) -> None:
    # -I and -S: of the standard library, whatever is installed.
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(write(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "wrong: biomedgpt_edge/engine.py is missing\n" in result.stderr
    assert "wrong: biomedgpt_export/cli.py is missing\n" in result.stderr
    assert "Traceback" not in result.stderr
