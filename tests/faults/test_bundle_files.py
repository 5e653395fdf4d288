"""A damaged, incomplete or hostile bundle is refused with a typed error that names the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biomedgpt_edge import bundle as bundle_module
from biomedgpt_edge import device_cache
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.engine import Engine
from biomedgpt_edge.errors import (
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    ManifestError,
    PlatformError,
    UnsafePathError,
)
from biomedgpt_edge.manifest import MAX_MANIFEST_BYTES
from support import bounded_memory

FILES = [
    "POLICY.txt",
    "decoder-cuda.onnx",
    "decoder-portable.onnx",
    "decoder-standard.onnx",
    "decoder.data",
    "decoder.onnx",
    "embeddings.safetensors",
    "molecule_encoder-standard.onnx",
    "molecule_encoder.data",
    "molecule_encoder.onnx",
    "projections.safetensors",
    "protein_encoder-cuda.onnx",
    "protein_encoder-standard.onnx",
    "protein_encoder.data",
    "protein_encoder.onnx",
    "tokenizer.model",
]


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def add_file(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].append({"path": name, "size": 1, "sha256": "0" * 64}))


# --- a whole bundle ---------------------------------------------------------------------------------------------------


def test_these_are_the_files_of_a_bundle(tiny_bundle: Path) -> None:
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted([*FILES, "manifest.json"])


def test_a_whole_bundle_opens_and_verifies(tiny_bundle: Path) -> None:
    seen = []
    Bundle.open(tiny_bundle).verify(lambda entry, good: seen.append((entry.path, good)))
    assert seen == [(name, True) for name in FILES]


def test_opening_holds_no_weights_in_memory(tiny_bundle: Path) -> None:
    with bounded_memory(2 << 20):
        Bundle.open(str(tiny_bundle))


def test_files_that_the_manifest_does_not_list_are_left_alone(bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    Bundle.open(bundle_copy).verify()


def test_a_bundle_may_be_reached_through_a_link_to_its_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle)
    Bundle.open(tmp_path / "link").verify()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 1e-9, 0.3, 0.999999])
def test_a_truncated_file_is_named_with_the_byte_where_it_ends(bundle_copy: Path, name: str, kept: float) -> None:
    content = (bundle_copy / name).read_bytes()
    size = min(int(len(content) * kept) + (0 < kept < 0.1), len(content) - 1)
    (bundle_copy / name).write_bytes(content[:size])
    with (
        bounded_memory(24 << 20),
        pytest.raises(BundleCorruptError, match=f"{name} has {size:,} bytes.*ends at byte") as caught,
    ):
        Engine.load(bundle_copy, threads=1, verify="sizes")
    assert (caught.value.seen, caught.value.limit) == (size, len(content))


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_byte_too_many_is_named(bundle_copy: Path, name: str) -> None:
    with (bundle_copy / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleCorruptError, match=f"{name} .*longer"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleNotFoundError, match=f"{name} is missing"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("field", ["graph", "embeddings", "projections", "tokenizer"])
def test_a_file_in_use_that_is_not_listed_is_refused(bundle_copy: Path, field: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        (fields["decoder"] if field == "graph" else fields["tensors"])[field] = "elsewhere.bin"

    edit(bundle_copy, change)
    with pytest.raises(ManifestError, match=r"uses 'elsewhere\.bin' but does not list it"):
        Bundle.open(bundle_copy)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.31, 0.999999])
def test_one_flipped_bit_is_found_and_its_file_named(bundle_copy: Path, name: str, place: float) -> None:
    opened = Bundle.open(bundle_copy)
    flip(bundle_copy / name, int((bundle_copy / name).stat().st_size * 8 * place))
    seen = []
    with pytest.raises(BundleCorruptError, match=name) as caught:
        opened.verify(lambda entry, good: seen.append((entry.path, good)))
    assert caught.value.seen == [name]
    assert seen == [(other, other != name) for other in FILES]
    for verify in ("once", "full"):
        with pytest.raises(BundleCorruptError, match=name):
            Engine.load(bundle_copy, threads=1, verify=verify)  # type: ignore[arg-type]


def test_verify_names_every_file_that_differs(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    for name in ("POLICY.txt", "decoder.data"):
        flip(bundle_copy / name, 77)
    with pytest.raises(BundleCorruptError, match=r"POLICY\.txt, decoder\.data"):
        opened.verify()


def test_hashes_are_not_checked_where_only_sizes_are_asked_for(bundle_copy: Path) -> None:
    flip(bundle_copy / "POLICY.txt", 0)
    Engine.load(bundle_copy, threads=1, verify="sizes").close()


# --- the stamp in the device cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files hashed so far."""
    names: list[str] = []
    real = bundle_module.sha256_of
    monkeypatch.setattr(bundle_module, "sha256_of", lambda path: (names.append(path.name), real(path))[1])
    return names


def load(path: Path) -> None:
    Engine.load(path, threads=1).close()


def test_hashes_are_checked_once(cache: Path, hashed: list[str], tiny_bundle: Path) -> None:
    load(tiny_bundle)
    assert hashed == FILES
    load(tiny_bundle)
    assert hashed == FILES


def test_a_full_check_ignores_the_stamp(cache: Path, hashed: list[str], tiny_bundle: Path) -> None:
    load(tiny_bundle)
    Engine.load(tiny_bundle, threads=1, verify="full").close()
    assert hashed == FILES * 2


def test_a_failed_check_leaves_no_stamp(cache: Path, hashed: list[str], bundle_copy: Path) -> None:
    flip(bundle_copy / "decoder.data", 5)
    for _ in range(2):
        with pytest.raises(BundleCorruptError):
            load(bundle_copy)
    assert hashed == FILES * 2
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize("how", ["touched", "replaced", "rewritten"])
def test_a_file_that_changed_since_is_hashed_again(cache: Path, hashed: list[str], bundle_copy: Path, how: str) -> None:
    load(bundle_copy)
    path = bundle_copy / "decoder.data"
    state = path.stat()
    if how == "touched":
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif how == "replaced":
        shutil.copy2(path, bundle_copy / "new")
        os.replace(bundle_copy / "new", path)
    else:
        flip(path, 12_345)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    hashed.clear()
    if how == "rewritten":
        with pytest.raises(BundleCorruptError, match=r"decoder\.data"):
            load(bundle_copy)
    else:
        load(bundle_copy)
    assert hashed == FILES


def test_another_manifest_is_another_bundle(cache: Path, hashed: list[str], bundle_copy: Path) -> None:
    load(bundle_copy)
    edit(bundle_copy, lambda fields: fields.update(name="renamed"))
    load(bundle_copy)
    assert hashed == FILES * 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"null"])
def test_a_stamp_that_cannot_be_read_counts_as_none(
    cache: Path, hashed: list[str], tiny_bundle: Path, content: bytes
) -> None:
    load(tiny_bundle)
    (stamp,) = cache.rglob("*.json")
    stamp.write_bytes(content)
    load(tiny_bundle)
    assert hashed == FILES * 2
    load(tiny_bundle)
    assert hashed == FILES * 2


def test_stamps_are_for_their_user_alone(cache: Path, tiny_bundle: Path) -> None:
    load(tiny_bundle)
    assert (cache / "verified").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in cache.rglob("*.json")] == [0o600]


@pytest.mark.parametrize("obstacle", ["file", "dangling link", "folder in place of the stamp"])
def test_a_cache_that_cannot_be_written_means_hashing_each_time(
    cache: Path, hashed: list[str], tiny_bundle: Path, obstacle: str
) -> None:
    if obstacle == "file":
        cache.write_text("")
    elif obstacle == "dangling link":
        cache.symlink_to(cache.parent / "nowhere" / "at all")
    else:
        place = hashlib.sha256(os.fsencode(tiny_bundle)).hexdigest()[:16]
        (cache / "verified" / f"{Bundle.open(tiny_bundle).digest}-{place}.json").mkdir(parents=True)
    load(tiny_bundle)
    load(tiny_bundle)
    assert hashed == FILES * 2
    assert not list(cache.rglob("tmp*"))


def test_a_full_disk_leaves_no_half_written_stamp(
    cache: Path, hashed: list[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device_cache.os, "replace", fail)
    load(tiny_bundle)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user id without an account."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BIOMEDGPT_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(device_cache.Path, "home", no_home)


def test_a_user_without_a_home_folder_can_load_a_bundle(homeless: None, hashed: list[str], tiny_bundle: Path) -> None:
    load(tiny_bundle)
    assert hashed == FILES
    with pytest.raises(PlatformError, match="BIOMEDGPT_EDGE_CACHE"):
        device_cache.cache_folder()


# --- the manifest's file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "", "no\0thing", "x" * 300, "file/inside"])
def test_a_path_without_a_bundle_is_not_found(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleNotFoundError):
        Bundle.open(name)


def test_a_file_is_not_a_bundle(tiny_bundle: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="is a file, not a folder"):
        Bundle.open(tiny_bundle / "manifest.json")


def test_a_folder_without_a_manifest_is_not_a_bundle(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").rename(bundle_copy / "manifest.json.staged")
    with pytest.raises(BundleNotFoundError, match=r"holds no manifest\.json.*interrupted"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_manifest_that_is_no_regular_file_is_refused(bundle_copy: Path, kind: str) -> None:
    path = bundle_copy / "manifest.json"
    path.rename(bundle_copy / "real.json")
    {"link": lambda: path.symlink_to("real.json"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(UnsafePathError, match=r"manifest\.json"):
        Bundle.open(bundle_copy)


def test_a_manifest_beyond_the_size_limit_is_not_read(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / "manifest.json", 1 << 33)
    with bounded_memory(1 << 20), pytest.raises(ManifestError, match="8,589,934,592 bytes") as caught:
        Bundle.open(bundle_copy)
    assert caught.value.limit == MAX_MANIFEST_BYTES


@pytest.mark.parametrize("content", [b"\xff\xfe{\0}\0", b'{"name": "\xe9"}', b"\x00" * 100, b""])
def test_a_manifest_that_is_not_utf8_json_is_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"manifest\.json is not"):
        Bundle.open(bundle_copy)


def test_a_manifest_that_cannot_be_read_is_a_typed_error(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BundleError, match=r"manifest\.json in .* cannot be read: Permission denied"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("kept", [0, 1, 700, 4000])
def test_a_truncated_manifest_is_refused(bundle_copy: Path, kept: int) -> None:
    os.truncate(bundle_copy / "manifest.json", kept)
    with pytest.raises(ManifestError, match="not JSON"):
        Bundle.open(bundle_copy)


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "sub/../../outside.bin",
        "sub/../decoder.onnx",
        "..",
        "/etc/passwd",
        "//etc/passwd",
        "///etc/passwd",
        "C:/windows/win.ini",
        "C:outside.bin",
        "c:\\windows\\win.ini",
        "\\\\server\\share\\file",
        "sub\\decoder.onnx",
        "..\\outside.bin",
        "decoder.onnx\0",
        "decoder.onnx\0.txt",
        "",
        ".",
        "./decoder.onnx",
        "./",
        "sub/./decoder.onnx",
        "sub//decoder.onnx",
        "decoder.onnx/",
        "decoder.onnx/.",
        "~\n",
        "\x1b[2Jcleared",
        "a\u202eb",
    ],
)
def test_a_path_that_is_not_plainly_inside_the_bundle_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / "sub").mkdir()
    (bundle_copy.parent / "outside.bin").write_text("x")
    add_file(bundle_copy, name)
    with pytest.raises(UnsafePathError, match="the manifest lists the path") as caught:
        Bundle.open(bundle_copy)
    assert str(caught.value).isprintable()


def test_a_path_longer_than_any_file_system_allows_is_refused(bundle_copy: Path) -> None:
    add_file(bundle_copy, "x" * 100_000)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_copy)
    assert len(str(caught.value)) < 1000


def test_a_file_may_lie_in_a_folder_of_the_bundle(bundle_copy: Path) -> None:
    (bundle_copy / "sub").mkdir()
    (bundle_copy / "sub" / "x").write_text("x")
    add_file(bundle_copy, "sub/x")
    assert Bundle.open(bundle_copy).file("sub/x").read_text() == "x"


def replace_by_link(bundle: Path) -> None:
    (bundle / "decoder.data").rename(bundle.parent / "outside.data")
    (bundle / "decoder.data").symlink_to(bundle.parent / "outside.data")


def replace_by_inner_link(bundle: Path) -> None:
    (bundle / "decoder.data").rename(bundle / "inside.data")
    (bundle / "decoder.data").symlink_to("inside.data")


def replace_by_dangling_link(bundle: Path) -> None:
    (bundle / "decoder.data").unlink()
    (bundle / "decoder.data").symlink_to("nowhere")


def replace_by_loop(bundle: Path) -> None:
    (bundle / "decoder.data").unlink()
    (bundle / "decoder.data").symlink_to("decoder.data")


def replace_by_folder(bundle: Path) -> None:
    (bundle / "decoder.data").unlink()
    (bundle / "decoder.data").mkdir()


def replace_by_fifo(bundle: Path) -> None:
    (bundle / "decoder.data").unlink()
    os.mkfifo(bundle / "decoder.data")


def put_below_linked_folder(bundle: Path) -> None:
    (bundle.parent / "outside").mkdir()
    (bundle.parent / "outside" / "x").write_text("x")
    (bundle / "sub").symlink_to(bundle.parent / "outside")
    add_file(bundle, "sub/x")


@pytest.mark.parametrize(
    "arrange",
    [
        replace_by_link,
        replace_by_inner_link,
        replace_by_dangling_link,
        replace_by_loop,
        replace_by_folder,
        replace_by_fifo,
        put_below_linked_folder,
    ],
)
def test_what_is_no_regular_file_or_is_reached_through_a_link_is_refused(
    bundle_copy: Path, arrange: Callable[[Path], None]
) -> None:
    arrange(bundle_copy)
    with pytest.raises(UnsafePathError, match=r"decoder\.data|sub/x"):
        Bundle.open(bundle_copy)


def test_a_file_that_is_used_as_a_folder_is_missing(bundle_copy: Path) -> None:
    add_file(bundle_copy, "decoder.onnx/x")
    with pytest.raises(BundleNotFoundError, match=r"decoder\.onnx/x is missing"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["decoder.onnx", "Decoder.ONNX"])
def test_a_path_listed_twice_is_refused_also_in_other_case(bundle_copy: Path, name: str) -> None:
    if name != "decoder.onnx":
        shutil.copy(bundle_copy / "decoder.onnx", bundle_copy / name)
    entry = next(
        e for e in json.loads((bundle_copy / "manifest.json").read_text())["files"] if e["path"] == "decoder.onnx"
    )
    edit(bundle_copy, lambda fields: fields["files"].append({**entry, "path": name}))
    with pytest.raises(ManifestError, match="lists a file twice"):
        Bundle.open(bundle_copy)


def test_a_declared_size_is_never_allocated(bundle_copy: Path) -> None:
    def enlarge(fields: dict[str, Any]) -> None:
        next(e for e in fields["files"] if e["path"] == "embeddings.safetensors")["size"] = 2**48

    edit(bundle_copy, enlarge)
    with bounded_memory(4 << 20), pytest.raises(BundleCorruptError, match=r"embeddings\.safetensors"):
        Bundle.open(bundle_copy)


# --- tensors and tokenizer against the manifest -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("decoder", "hidden_size"), 64, "weight"),
        (("decoder", "vocabulary"), 1000, "weight"),
        (("molecule_encoder", "width"), 64, r"molecule\.weight"),
        (("protein_encoder", "width"), 300, r"protein\.weight"),
        (("tensors", "embeddings"), "projections.safetensors", "weight"),
        (("tensors", "projections"), "embeddings.safetensors", r"molecule\.weight"),
        (("tensors", "embeddings"), "decoder.data", r"decoder\.data"),
        (("tensors", "projections"), "tokenizer.model", r"tokenizer\.model"),
        (("tensors", "tokenizer"), "decoder.data", r"decoder\.data"),
    ],
)
def test_tensors_that_contradict_the_manifest_are_found_when_the_bundle_is_opened(
    bundle_copy: Path, path: tuple[str, str], value: object, named: str
) -> None:
    edit(bundle_copy, lambda fields: fields[path[0]].update({path[1]: value}))
    with bounded_memory(24 << 20), pytest.raises(BundleCorruptError, match=named):
        Bundle.open(bundle_copy)


def test_a_tokenizer_with_more_pieces_than_there_are_embeddings_is_refused(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biomedgpt_edge.tokenizer.Tokenizer.__len__", lambda tokenizer: 1002)
    with pytest.raises(BundleCorruptError, match=r"tokenizer\.model has 1,002 pieces.*1,001 rows"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("decoder", "layers"), 3),
        (("decoder", "layers"), 1),
        (("decoder", "kv_heads"), 2),
        (("decoder", "head_size"), 64),
        (("decoder", "graph"), "protein_encoder.onnx"),
    ],
)
def test_a_decoder_graph_that_contradicts_the_manifest_is_refused(
    bundle_copy: Path, path: tuple[str, str], value: object
) -> None:
    edit(bundle_copy, lambda fields: fields[path[0]].update({path[1]: value}))
    with pytest.raises(BundleCorruptError, match=r"are not what the manifest implies|and the manifest declares"):
        Engine.load(bundle_copy, threads=1, verify="sizes")


def test_a_bundle_of_another_precision_opens_alike(tiny_bundles: Callable[[str], Path]) -> None:
    opened = {precision: Bundle.open(tiny_bundles(precision)) for precision in ("fp32", "fp16")}
    assert [str(opened[p].embeddings.rows.dtype) for p in ("fp32", "fp16")] == ["float32", "float16"]
    decoders = [bundle.manifest.decoder for bundle in opened.values()]
    assert decoders[0].cuda is decoders[0].standard is None, "GPUs compute in 16 bits"
    assert decoders[0] == dataclasses.replace(decoders[1], cuda=None, standard=None)


def test_two_copies_of_a_bundle_keep_a_stamp_each(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(bundle_copy, tmp_path / "other"))
    for path in (bundle_copy, other):
        device_cache.verify_once(Bundle.open(path))
    monkeypatch.setattr(bundle_module, "sha256_of", lambda path: pytest.fail("hashed again"))
    for path in (bundle_copy, other):
        device_cache.verify_once(Bundle.open(path))


def test_the_folder_of_an_interrupted_export_is_no_bundle(bundle_copy: Path) -> None:
    staged = bundle_copy.rename(bundle_copy.with_name(f".bundle.partial-{0:08x}"))
    with pytest.raises(BundleNotFoundError, match="interrupted export"):
        Bundle.open(staged)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.data", "embeddings.safetensors"])
def test_a_file_that_may_not_be_read_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).chmod(0)
    with pytest.raises(BundleError, match=f"{name} in the bundle .* cannot be read"):
        Bundle.open(bundle_copy).verify()


def test_what_the_system_refuses_is_a_typed_error(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle_module, "sha256_of", refuse)
    with pytest.raises(BundleError, match=r"POLICY\.txt in the bundle .* cannot be read: Permission denied"):
        Bundle.open(bundle_copy).verify()
