"""Checks what is in a wheel for Linux on aarch64, without installing or loading anything of it.

Its tag; that every shared object is for aarch64, needs nothing that JetPack 6 lacks, and contains no path of the
machine that built it; that no file of the two packages is missing; that the demo bundle has the hashes of its manifest;
the licence. Prints a table, names all that is wrong, and fails if anything is.

Usage: python csrc/check_wheel.py WHEEL [--source CHECKOUT]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("runtime/biomedgpt_edge", "export/biomedgpt_export")
DEMO = "biomedgpt_edge/demo_bundle"

# JetPack 6 is Ubuntu 22.04: glibc 2.35, and libstdc++ and libgcc of GCC 12. JetPack 5 has glibc 2.31, but its Python,
# 3.8, is too old anyway.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
# What every Ubuntu has. A Python is no library that is linked: its program brings the names.
LIBRARIES = {"ld-linux-aarch64.so.1", "libc.so.6", "libgcc_s.so.1", "libm.so.6", "libstdc++.so.6"}

MACHINES = {3: "x86", 40: "32-bit Arm", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
AARCH64 = 183
# A source or object file by an absolute path, as __FILE__ leaves it behind.
BUILD_PATH = re.compile(rb"(?<![\w.+/-])/[\w.+-]+/[\w./+-]*\.(?:c|cc|cpp|cu|h|hpp|o)\b")

Version = tuple[int, ...]


class ElfError(ValueError):
    """Not a shared object for aarch64, or one that ends too soon or contradicts itself."""


@dataclass(frozen=True)
class SharedObject:
    needed: list[str]
    run_path: str
    versions: list[str]  # of symbols, such as GLIBC_2.34


def read_shared_object(content: bytes) -> SharedObject:
    """What the loader of an aarch64 Linux would ask for."""
    try:
        return _read(content)
    except ElfError:
        raise
    except (struct.error, ValueError, OverflowError, IndexError) as error:  # whichever a wrong offset leads to
        raise ElfError(f"is damaged ({error})") from error


def _read(content: bytes) -> SharedObject:
    if content[:4] != b"\x7fELF":
        raise ElfError("is no ELF file")
    kind, machine = struct.unpack_from("<HH", content, 16)
    if machine != AARCH64:
        raise ElfError(f"is for {MACHINES.get(machine, f'machine {machine}')}, not for AArch64")
    if content[4:6] != b"\x02\x01":
        raise ElfError("is not 64-bit and little-endian")
    if kind != 3:
        raise ElfError("is no shared object")
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    # Each: type, flags, offset, address, physical address, size in the file, size in memory, alignment.
    segments = [struct.unpack_from("<IIQQQQQQ", content, table + size * index) for index in range(count)]

    def offset(address: int) -> int:
        for kind, _, start, first, _, length, _, _ in segments:
            if kind == 1 and first <= address < first + length:  # PT_LOAD
                return int(start + address - first)
        raise ElfError(f"is damaged (nothing is loaded at address {address:#x})")

    dynamic: dict[int, list[int]] = {}
    for kind, _, start, _, _, length, _, _ in segments:
        if kind == 2:  # PT_DYNAMIC
            for place in range(start, start + length, 16):
                tag, value = struct.unpack_from("<qQ", content, place)
                if tag == 0:
                    break
                dynamic.setdefault(tag, []).append(value)
    if 5 not in dynamic:  # DT_STRTAB
        raise ElfError("has nothing to link dynamically")
    strings = offset(dynamic[5][0])

    def text(index: int) -> str:
        return content[strings + index : content.index(b"\0", strings + index)].decode()

    versions = []
    if 0x6FFFFFFE in dynamic:  # DT_VERNEED: chains of distances, of which the last is zero
        place, more = offset(dynamic[0x6FFFFFFE][0]), 1
        while more:
            _, _, _, names, more = struct.unpack_from("<HHIII", content, place)
            name_place, more_names = place + names, 1
            while more_names:
                _, _, _, name, more_names = struct.unpack_from("<IHHII", content, name_place)
                versions.append(text(name))
                name_place += more_names
            place += more
    paths = [text(index) for tag in (15, 29) for index in dynamic.get(tag, [])]  # DT_RPATH, DT_RUNPATH
    return SharedObject([text(index) for index in dynamic.get(1, [])], ":".join(paths), versions)  # DT_NEEDED


def newest_versions(names: list[str]) -> tuple[dict[str, Version], list[str]]:
    """The newest of each family, and the names that are no version of a family in ``NEWEST``, such as GLIBC_PRIVATE."""
    newest: dict[str, Version] = {}
    unknown = []
    for name in names:
        family, _, number = name.partition("_")
        if family in NEWEST and re.fullmatch(r"\d+(\.\d+)*", number):
            version = tuple(int(part) for part in number.split("."))
            newest[family] = max(version, newest.get(family, version))
        else:
            unknown.append(name)
    return newest, unknown


def dotted(version: Version | None) -> str:
    return ".".join(map(str, version)) if version else "-"


def shared_object_faults(content: bytes, found: SharedObject, source: Path) -> Iterator[str]:
    newest, unknown = newest_versions(found.versions)
    for family, version in newest.items():
        if version > NEWEST[family]:
            yield f"needs {family} {dotted(version)}; JetPack 6 has {dotted(NEWEST[family])}"
    if unknown:
        yield f"needs symbol versions that JetPack 6 is not known to have: {', '.join(unknown)}"
    if others := sorted(set(found.needed) - LIBRARIES):
        yield f"needs libraries that a board may lack: {', '.join(others)}"
    if found.run_path:
        yield f"looks for libraries in {found.run_path}"
    if os.fsencode(source) in content:
        yield f"contains the checkout's path, {source}"
    elif path := BUILD_PATH.search(content):
        yield f"contains a path of the machine that built it, {path[0].decode()}"


def tag_faults(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Of the file's name, and of what the wheel says of itself."""
    parts = name.removesuffix(".whl").split("-")
    if not name.endswith(".whl") or len(parts) not in (5, 6):
        yield f"{name} is not called as a wheel is"
        return
    python, abi, platform = parts[-3:]
    if not re.fullmatch(r"cp3\d+", python) or abi not in (python, f"{python}t"):
        yield f"{name} is for {python}-{abi}, not for one version of CPython"
    for one in platform.split("."):
        # manylinux_2_35 is Ubuntu 22.04, which is what NEWEST says; an older one would promise more than is checked.
        manylinux = re.fullmatch(r"manylinux_2_(\d+)_aarch64", one)
        if one != "linux_aarch64" and not (manylinux and int(manylinux[1]) >= NEWEST["GLIBC"][1]):
            yield f"{name} is for {one}, not for linux_aarch64, or manylinux_2_35_aarch64 or newer"
    own = f"{parts[0]}-{parts[1]}.dist-info/WHEEL"
    if own not in files:
        yield f"{own} is missing"
        return
    tags = set(re.findall(r"^Tag: (\S+)$", files[own].decode(errors="replace"), re.MULTILINE))
    if tags != {f"{python}-{abi}-{one}" for one in platform.split(".")}:
        yield f"{own} says {', '.join(sorted(tags)) or 'no tag'}, unlike the file's name"


def source_files(source: Path) -> Iterator[str]:
    """The files of both packages, as the wheel is to name them; not what was compiled beside them."""
    for package in map(source.joinpath, PACKAGES):
        for file in sorted(package.rglob("*")):
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                yield file.relative_to(package.parent).as_posix()


def demo_faults(files: Mapping[str, bytes]) -> Iterator[str]:
    try:
        entries = [(f"{DEMO}/{entry['path']}", entry) for entry in json.loads(files[f"{DEMO}/manifest.json"])["files"]]
        hashes = {path: entry["sha256"] for path, entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        yield f"{DEMO}/manifest.json is missing or cannot be read ({error!r})"
        return
    for path, expected in hashes.items():
        if path not in files:
            yield f"{path} is missing"
        elif hashlib.sha256(files[path]).hexdigest() != expected:
            yield f"{path} has not the SHA-256 that the manifest states"
    if not hashes:
        yield f"{DEMO}/manifest.json lists no file"


def check(wheel: Path, source: Path) -> tuple[list[str], list[str]]:
    """Lines of the table, and what is wrong."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    faults = list(tag_faults(wheel.name, files))

    abi = re.search(r"-cp(3\d+t?)-[^-]+\.whl$", wheel.name)
    suffix = f"cpython-{abi[1] if abi else '3XX'}-aarch64-linux-gnu.so"
    wanted = {f"biomedgpt_edge/_native.{suffix}", "biomedgpt_edge/_ort_ops.so"}
    objects = sorted(name for name in files if name.endswith(".so") or files[name].startswith(b"\x7fELF"))
    faults += [f"{name} is missing" for name in sorted(wanted - set(objects))]
    faults += [f"{name} does not belong there" for name in objects if name not in wanted]

    rows = [("shared object", *NEWEST, "needs")]
    glibc: Version = ()
    for name in objects:
        try:
            found = read_shared_object(files[name])
        except ElfError as error:
            faults.append(f"{name} {error}")
            continue
        newest, _ = newest_versions(found.versions)
        glibc = max(glibc, newest.get("GLIBC", ()))
        rows.append((Path(name).name, *(dotted(newest.get(family)) for family in NEWEST), " ".join(found.needed)))
        faults += [f"{name} {fault}" for fault in shared_object_faults(files[name], found, source)]
    rows.append(("JetPack 6 has at most", *map(dotted, NEWEST.values()), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    of_packages = list(source_files(source))
    if not of_packages:
        faults.append(f"{source} has none of {', '.join(PACKAGES)}, to compare with")
    faults += [f"{name} is missing" for name in of_packages if name not in files]
    faults += [f"{name} is compiled Python" for name in files if name.endswith((".pyc", ".pyo"))]
    faults += demo_faults(files)
    if not any(re.fullmatch(r"[^/]+\.dist-info/licenses/LICENSE", name) and files[name] for name in files):
        faults.append("the licence is missing")
    present, demo = sum(name in files for name in of_packages), sum(name.startswith(f"{DEMO}/") for name in files)
    lines += [
        f"needs glibc {dotted(glibc)} or newer",
        f"{wheel.stat().st_size:,} bytes, {len(files)} files: {present} of the {len(of_packages)} of both packages, "
        f"{demo} of them the demo bundle",
    ]
    return lines, list(dict.fromkeys(faults))  # a file of the demo is one of its package too


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks a wheel for Linux on aarch64.")
    parser.add_argument("wheel", type=Path)
    checkout = Path(__file__).resolve().parents[1]
    parser.add_argument("--source", type=Path, default=checkout, help="the checkout it was built from (default: this)")
    options = parser.parse_args(arguments)
    try:
        lines, faults = check(options.wheel, options.source.resolve())
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # whatever zipfile lets through
        lines, faults = [], [f"it cannot be read ({error})"]
    print(options.wheel.name, *lines, sep="\n")
    for fault in faults:
        print(f"wrong: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
