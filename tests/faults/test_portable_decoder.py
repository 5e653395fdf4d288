"""A portable decoder is derived from records bit for bit, once, and never used if it is not whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto, TensorProto

from biomedgpt_edge import Engine
from biomedgpt_edge import portable as module
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.graph import choose, decoder_graph
from biomedgpt_edge.device_cache import clear_cache, locked
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import BundleCorruptError, ManifestError, PlatformError, UnsafePathError
from biomedgpt_edge.manifest import PAGE, PORTABLE
from biomedgpt_edge.onnx_header import read_header
from biomedgpt_edge.portable import derived_files, of_decoder
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.layouts import PORTABLE_DECODER
from biomedgpt_export.options import ExportOptions
from support import bounded_memory

DATA = "decoder-portable.data"
CUDA_DECODER = "decoder-cuda.onnx"


def silent(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def derive(path: Path, verify: Any = "once") -> Path:
    """The graph that is used where the portable decoder of the bundle at ``path`` is asked for."""
    bundle = Bundle.open(path)
    graph = decoder_graph(bundle, choose(bundle, "portable"), verify)
    assert graph.layout == PORTABLE
    return graph.path


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were filled so far."""
    filled: list[Path] = []
    real = module._derive
    monkeypatch.setattr(module, "_derive", lambda *arguments: (filled.append(arguments[1]), real(*arguments)))
    return filled


def tensors_of(graph: Path) -> dict[str, bytes]:
    stored, model = StoredWeights(graph), onnx.load(str(graph), load_external_data=False)
    return {tensor.name: stored.array(tensor.name).tobytes() for tensor in model.graph.initializer}


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_the_derived_tensors_are_those_of_the_portable_bundle(portable_demo: Path) -> None:
    assert tensors_of(derive(DEMO_BUNDLE)) == tensors_of(portable_demo / "decoder.onnx")


@pytest.mark.parametrize("lm_head", ["int4", "int8"])
def test_an_export_in_records_derives_the_tensors_of_a_portable_export(
    tiny_checkpoint: Path, tmp_path: Path, lm_head: Any
) -> None:
    def exported(name: str, **options: Any) -> Path:
        layout, out = Layout.locate(tiny_checkpoint), tmp_path / name
        export_bundle(ExportOptions(layout, out, quantizer="rtn", lm_head=lm_head, proof="none", **options), silent)
        return out

    portable = exported("portable", decoder_layout="portable")
    assert tensors_of(derive(exported("records"))) == tensors_of(portable / "decoder.onnx")


def test_tensors_lie_on_pages_and_nothing_else_in_the_file(tiny_bundle: Path) -> None:
    graph = derive(tiny_bundle)
    tensors = sorted(read_header(graph).tensors, key=lambda tensor: tensor.offset)
    data = np.fromfile(graph.with_suffix(".data"), np.uint8)
    end = 0
    for tensor in tensors:
        assert tensor.length is not None
        assert tensor.offset == -(-end // PAGE) * PAGE
        assert not data[end : tensor.offset].any()
        end = tensor.offset + tensor.length
    assert end == len(data) == Bundle.open(tiny_bundle).manifest.decoder.portable.data_size  # type: ignore[union-attr]


def test_one_matrix_is_in_memory_at_a_time() -> None:
    bundle = Bundle.open(DEMO_BUNDLE)
    graph, portable = bundle.file("decoder.onnx"), bundle.file(PORTABLE_DECODER)
    with bounded_memory(600_000):
        total = sum(map(len, module.derived_data(graph, portable)))
    assert total > 3_000_000


# --- once -------------------------------------------------------------------------------------------------------------


def test_it_is_derived_once_and_said_once(
    tiny_bundle: Path, derivations: list[Path], caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    with caplog.at_level(logging.INFO):
        first, again = derive(tiny_bundle), derive(tiny_bundle)
    assert first == again
    assert len(derivations) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"deriving the portable decoder, 1 MiB in {cache}/portable, once"
    ]


def test_it_lies_in_a_private_folder_named_after_the_bundle(tiny_bundle: Path, cache: Path) -> None:
    graph = derive(tiny_bundle)
    assert graph.parent == cache / "portable" / f"{Bundle.open(tiny_bundle).digest}-decoder-{module.FORMAT}"
    assert {path.stat().st_mode & 0o777 for path in (graph.parent, graph.parent.parent)} == {0o700}
    assert {path.name for path in graph.parent.iterdir()} == {PORTABLE_DECODER, CUDA_DECODER, DATA, "stamp.json"}


def test_a_cache_behind_a_link_is_no_hindrance(tiny_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "link"))
    with Engine.load(tiny_bundle, threads=1, decoder="portable") as engine:
        assert engine.ask("?", max_new_tokens=1).token_ids
    assert derived_folder(tiny_bundle).exists()


def truncate(data: Path) -> None:
    os.truncate(data, data.stat().st_size - 1)


def flip(data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[123_456] ^= 1
    data.write_bytes(content)


def replace_by_link(data: Path) -> None:
    data.rename(data.parent.parent / "elsewhere")
    data.symlink_to(data.parent.parent / "elsewhere")


def remove(data: Path) -> None:
    data.unlink()


def alter_the_graph(data: Path) -> None:
    graph = data.with_suffix(".onnx")
    graph.write_bytes(graph.read_bytes().replace(b"lm_head", b"lm_hea_"))


def put_a_file_in_place_of_the_folder(data: Path) -> None:
    shutil.rmtree(data.parent)
    data.parent.write_text("")


@pytest.mark.parametrize(
    "damage", [truncate, flip, replace_by_link, remove, alter_the_graph, put_a_file_in_place_of_the_folder]
)
def test_what_was_damaged_since_is_derived_again(
    tiny_bundle: Path, derivations: list[Path], damage: Callable[[Path], None]
) -> None:
    graph = derive(tiny_bundle)
    expected = tensors_of(graph)
    damage(graph.with_suffix(".data"))
    derive(tiny_bundle)
    assert len(derivations) == 2
    assert tensors_of(graph) == expected


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files hashed in the cache so far, but for those that were just written."""
    from biomedgpt_edge import device_cache

    names: list[str] = []
    real = device_cache.sha256_of
    monkeypatch.setattr(device_cache, "sha256_of", lambda path: (names.append(path.name), real(path))[1])
    return names


def test_hashes_are_compared_again_where_a_file_was_touched_or_that_is_asked_for(
    tiny_bundle: Path, derivations: list[Path], hashed: list[str]
) -> None:
    graph = derive(tiny_bundle)
    for verify in ("once", "sizes"):
        derive(tiny_bundle, verify)
    assert hashed == []
    derive(tiny_bundle, "full")
    assert hashed == [PORTABLE_DECODER, CUDA_DECODER, DATA]
    os.utime(graph)
    for _ in range(2):
        derive(tiny_bundle)
    assert hashed == [PORTABLE_DECODER, CUDA_DECODER, DATA] * 2
    assert len(derivations) == 1


def test_processes_that_need_it_at_once_derive_it_once(tiny_bundle: Path, derivations: list[Path]) -> None:
    folder = derived_folder(tiny_bundle)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(derive(tiny_bundle))) for _ in range(2)]
    with locked(folder):
        for thread in threads:
            thread.start()
        assert not folder.exists()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(derivations) == 1


def test_clearing_the_cache_takes_no_lock_away(tiny_bundle: Path, derivations: list[Path]) -> None:
    derive(tiny_bundle)
    folder = derived_folder(tiny_bundle)
    thread = threading.Thread(target=derive, args=(tiny_bundle,))
    with locked(folder):
        clear_cache()
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not folder.exists()
    thread.join()
    assert len(derivations) == 2


def test_what_was_derived_for_the_bundle_before_stays_and_for_older_ones_goes(
    tiny_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    folders = []
    for name in ("first", "second", "third"):
        folders.append(derive(renamed(tiny_bundle, tmp_path, name)).parent)
        # Times of folders that follow one another this closely may be the same.
        os.utime(folders[-1], ns=(len(folders), len(folders)))
    assert sorted(path for path in (cache / "portable").iterdir() if path.is_dir()) == sorted(folders[1:])


def test_what_another_process_removes_meanwhile_is_no_hindrance(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = derive(renamed(tiny_bundle, tmp_path, "first")).parent
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        found = real(path)
        if path == before:
            shutil.rmtree(path, ignore_errors=True)
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert derive(renamed(tiny_bundle, tmp_path, "second")).is_file()
    assert not before.exists()


def renamed(bundle: Path, folder: Path, name: str) -> Path:
    """A copy that differs in its name, and so in its digest."""
    copy = Path(shutil.copytree(bundle, folder / name))
    edit(copy, lambda fields: fields.update(name=name))
    return copy


def derived_folder(path: Path) -> Path:
    derivation = of_decoder(Bundle.open(path))
    assert derivation is not None
    return derived_files(derivation)[0].parent


# --- not half ---------------------------------------------------------------------------------------------------------


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name != "portable" and path.suffix != ".lock"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def parts(records: Path, portable: Path) -> Iterator[np.ndarray]:
        yield np.zeros(10, np.uint8)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "derived_data", parts)
        with pytest.raises((PlatformError, KeyboardInterrupt), match=r"No space left|^$"):
            derive(tiny_bundle)
    assert left_in(cache) == []
    assert derive(tiny_bundle).exists()


def test_what_a_killed_process_left_is_removed(tiny_bundle: Path, cache: Path) -> None:
    folder = derived_folder(tiny_bundle)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    (partial / DATA).write_bytes(b"half")
    derive(tiny_bundle)
    assert not partial.exists()


def test_too_little_space_is_found_before_anything_is_written(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(cache.parent))(0, 0, 1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlatformError, match=r"takes 1 MiB in .*, where 1 MiB are free.*cache clear") as caught:
        derive(tiny_bundle)
    assert (caught.value.seen, caught.value.limit) == (1000, 551_488)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_a_typed_error(tiny_bundle: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(PlatformError, match=r"portable decoder cannot be kept in .*Set BIOMEDGPT_EDGE_CACHE"):
        derive(tiny_bundle)


# --- hostile bundles --------------------------------------------------------------------------------------------------


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change(fields)
    (bundle / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")


def install(bundle: Path, change: Callable[[GraphProto], None], name: str = PORTABLE_DECODER) -> None:
    """Changes a portable graph, and what the manifest says of it."""
    model = onnx.load(str(bundle / name), load_external_data=False)
    change(model.graph)
    content = model.SerializeToString()
    (bundle / name).write_bytes(content)

    def describe(fields: dict[str, Any]) -> None:
        entry = next(entry for entry in fields["files"] if entry["path"] == name)
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit(bundle, describe)


def first_outside(graph: GraphProto) -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def place(**entries: str) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        for entry in first_outside(graph).external_data:
            entry.value = entries.get(entry.key, entry.value)

    return change


@pytest.mark.parametrize(
    "location",
    ["decoder.data", "decoder.onnx", PORTABLE_DECODER, "manifest.json", "../secret", "/etc/passwd", "stamp.json", ""],
)
def test_it_may_refer_to_nothing_but_what_is_derived(bundle_copy: Path, location: str) -> None:
    install(bundle_copy, place(location=location))
    with pytest.raises(UnsafePathError, match=rf"{PORTABLE_DECODER} refers to '{location}'"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("entries", [{"offset": "551488"}, {"length": "551489"}, {"offset": str(2**62)}])
def test_it_may_place_nothing_beyond_the_end_of_that(bundle_copy: Path, entries: dict[str, str]) -> None:
    install(bundle_copy, place(**entries))
    with pytest.raises(BundleCorruptError, match=rf"{PORTABLE_DECODER} places tensor"):
        Bundle.open(bundle_copy)


def test_what_is_to_be_derived_may_not_lie_in_the_bundle(bundle_copy: Path) -> None:
    (bundle_copy / DATA).write_bytes(b"x")
    edit(bundle_copy, lambda fields: fields["files"].append({"path": DATA, "size": 1, "sha256": "0" * 64}))
    with pytest.raises(ManifestError, match=r"lists decoder-portable\.data, which is to be derived"):
        Bundle.open(bundle_copy)


def test_it_may_not_be_much_larger_than_the_bundle(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda fields: fields["decoder"]["portable"].update(data_size=2**48))
    with pytest.raises(
        ManifestError, match=r"decoder-portable\.data has 281,474,976,710,656 bytes, and the bundle has"
    ):
        Bundle.open(bundle_copy)


def test_a_graph_that_is_not_listed_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda fields: fields["decoder"]["portable"].update(graph="elsewhere.onnx"))
    with pytest.raises(ManifestError, match=r"uses 'elsewhere\.onnx' but does not list it"):
        Bundle.open(bundle_copy)


def rename(old: str, new: str) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        next(tensor for tensor in graph.initializer if tensor.name == old).name = new
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]

    return change


@pytest.mark.parametrize(
    "change",
    [
        place(offset="1"),
        place(offset="0", length="1024"),
        place(offset="4096"),
        rename("lm_head.weight_int4", "stranger.weight_int4"),
        rename("rope_cos", "stranger"),
        rename("rope_cos", "lm_head.records"),
    ],
)
def test_tensors_that_cannot_be_derived_as_declared_are_refused(
    bundle_copy: Path, cache: Path, change: Callable[[GraphProto], None]
) -> None:
    install(bundle_copy, change)
    with pytest.raises(BundleCorruptError, match=rf"{PORTABLE_DECODER} (places .* bytes of|contradicts itself)"):
        derive(bundle_copy)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "changed",
    [{"data_size": 551_488 + 4096}, {"data_sha256": "0" * 64}],
)
def test_what_comes_out_otherwise_than_declared_is_not_used(
    bundle_copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    edit(bundle_copy, lambda fields: fields["decoder"]["portable"].update(changed))
    with pytest.raises(BundleCorruptError, match="manifest says"):
        derive(bundle_copy)
    assert left_in(cache) == []


def test_records_that_were_altered_are_found_by_what_comes_out(bundle_copy: Path) -> None:
    flip(bundle_copy / "decoder.data")
    with pytest.raises(BundleCorruptError, match=r"decoder-portable\.data was derived with .*biomedgpt-edge verify"):
        Engine.load(bundle_copy, threads=1, verify="sizes", decoder="portable")


def test_a_graph_that_was_altered_is_not_taken_over(bundle_copy: Path) -> None:
    content = (bundle_copy / PORTABLE_DECODER).read_bytes()
    (bundle_copy / PORTABLE_DECODER).write_bytes(content.replace(b"biomedgpt-export", b"biomedgpt-xxport"))
    with pytest.raises(BundleCorruptError, match=r"decoder-portable\.onnx was derived with"):
        Engine.load(bundle_copy, threads=1, verify="sizes", decoder="portable")


def test_a_graph_of_another_model_is_refused_when_it_is_opened(bundle_copy: Path) -> None:
    install(bundle_copy, rename_input)
    with pytest.raises(BundleCorruptError, match=rf"inputs .* of {PORTABLE_DECODER} are not what the manifest implies"):
        Engine.load(bundle_copy, threads=1, verify="sizes", decoder="portable")


def rename_input(graph: GraphProto) -> None:
    old, graph.input[0].name = graph.input[0].name, "renamed"
    for node in graph.node:
        node.input[:] = ["renamed" if name == old else name for name in node.input]
