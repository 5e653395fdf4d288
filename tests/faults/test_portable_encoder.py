"""A portable protein encoder is derived from one in records bit for bit, and chosen with the decoder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto
from test_portable_decoder import edit, flip, install, place, remove, rename, replace_by_link, tensors_of, truncate

from biomedgpt_edge import Engine, Protein, int4_ops
from biomedgpt_edge import portable as module
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main as edge
from biomedgpt_edge.decoder.graph import Wanted, choose, protein_encoder_graph
from biomedgpt_edge.device_cache import clear_cache
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.errors import BioMedGPTError, BundleCorruptError, ManifestError, UnsafePathError
from biomedgpt_edge.manifest import PAGE, PORTABLE
from biomedgpt_edge.onnx_header import read_header
from biomedgpt_edge.portable import derived_files, of_protein_encoder
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.layouts import PORTABLE_ENCODER
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.relayout import relayout

DATA = "protein_encoder-portable.data"
SEQUENCE = "MAKEDTLEFPGVVKELLPNATFRVELDNGHELIAVMAGKMRKNRIRVLAGDKVQVEMTPYDLSKGRINYRFK"
FOLDERS = ["decoder", "protein_encoder"]


def silent(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def export(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("int8") / "bundle"
        chosen = ExportOptions(
            Layout.locate(tiny_checkpoint), out, quantizer="rtn", protein_encoder="int8", proof="none", **options
        )
        export_bundle(chosen, silent)
        return out

    return export


@pytest.fixture(scope="module")
def records(exported: Callable[..., Path]) -> Path:
    """A bundle in records whose protein encoder is int8; to be read only."""
    return exported()


@pytest.fixture(scope="module")
def portable(exported: Callable[..., Path]) -> Path:
    """The same for ONNX Runtime's operators."""
    return exported(decoder_layout="portable")


@pytest.fixture
def copy(records: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(records, tmp_path / "copy"))


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_ops, "LIBRARY", Path("none.so"))


def derive(path: Path, verify: Any = "once") -> Path:
    """The graph that is used where the portable decoder of the bundle at ``path`` is asked for."""
    bundle = Bundle.open(path)
    spec = bundle.manifest.protein_encoder
    assert spec is not None
    graph = protein_encoder_graph(bundle, spec, choose(bundle, "portable"), verify)
    assert graph.layout == PORTABLE
    return graph.path


def features(path: Path, wanted: Wanted = "auto") -> np.ndarray:
    bundle = Bundle.open(path)
    return Encoders(bundle, threads=1, choice=choose(bundle, wanted)).encode(Protein.from_sequence(SEQUENCE))


def derived_in(cache: Path) -> list[str]:
    """Whose data was derived so far."""
    return sorted(name for name in FOLDERS for _ in cache.glob(f"portable/*-{name}-{module.FORMAT}"))


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_the_derived_tensors_are_those_of_a_portable_export(records: Path, portable: Path) -> None:
    assert tensors_of(derive(records)) == tensors_of(portable / "protein_encoder.onnx")


def test_so_are_those_of_a_portable_bundle_that_became_one_in_records(portable: Path, tmp_path: Path) -> None:
    relayout(portable, tmp_path / "records", "records", silent)
    assert tensors_of(derive(tmp_path / "records")) == tensors_of(portable / "protein_encoder.onnx")
    relayout(tmp_path / "records", tmp_path / "back", "portable", silent)
    assert not list((tmp_path / "back").glob("*-portable.*"))


def test_tensors_lie_on_pages_and_come_to_what_the_manifest_says(records: Path) -> None:
    graph = derive(records)
    tensors = read_header(graph).tensors
    assert len(tensors) > 12
    assert all(tensor.offset % PAGE == 0 for tensor in tensors)
    encoder = Bundle.open(records).manifest.protein_encoder
    assert graph.with_suffix(".data").stat().st_size == encoder.portable.data_size  # type: ignore[union-attr]


def test_features_are_the_bits_of_the_portable_bundle(records: Path, portable: Path) -> None:
    np.testing.assert_array_equal(features(records, "portable"), features(portable))


def test_features_of_both_encoders_agree_within_the_rounding_of_activations(records: Path) -> None:
    ours, theirs = features(records), features(records, "portable")
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() > 0.999


# --- when it is used --------------------------------------------------------------------------------------------------


def test_it_is_derived_when_the_first_protein_is_read_and_once(
    records: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with caplog.at_level(logging.INFO), Engine.load(records, threads=1, decoder="portable") as engine:
            engine.prepare("?")
            if not caplog.records[1:]:
                assert derived_in(cache) == ["decoder"]
            engine.prepare("?", Protein.from_sequence(SEQUENCE))
    assert derived_in(cache) == FOLDERS
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in said] == [
        "deriving the portable decoder",
        "deriving the portable protein encoder",
    ]


def test_an_encoder_that_opens_anew_hashes_what_was_derived_once(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    real = module.holds
    monkeypatch.setattr(
        module, "holds", lambda folder, entries, verify: (looks.append(verify), real(folder, entries, verify))[1]
    )
    bundle = Bundle.open(records)
    encoders = Encoders(bundle, threads=1, choice=choose(bundle, "portable"), verify="full")
    for _ in range(3):
        encoders.encode(Protein.from_sequence(SEQUENCE))
        encoders.release()
    assert looks == ["full", "full", "once", "once"], "without the lock and with it, when it was derived"


def test_an_encoder_that_opens_anew_after_the_cache_was_cleared_is_derived_again(records: Path) -> None:
    bundle = Bundle.open(records)
    encoders = Encoders(bundle, threads=1, choice=choose(bundle, "portable"))
    features = encoders.encode(Protein.from_sequence(SEQUENCE))
    encoders.release()
    clear_cache()
    np.testing.assert_array_equal(encoders.encode(Protein.from_sequence(SEQUENCE)), features)


def test_records_derive_nothing(records: Path, cache: Path) -> None:
    with Engine.load(records, threads=1) as engine:
        engine.prepare("?", Protein.from_sequence(SEQUENCE))
    assert derived_in(cache) == []


@pytest.mark.usefixtures("without_library")
def test_where_the_operators_cannot_be_used_both_portable_graphs_are_and_a_warning_says_why(
    records: Path, portable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protein = Protein.from_sequence(SEQUENCE)
    with Engine.load(records, threads=1) as engine, Engine.load(portable, threads=1) as other:
        np.testing.assert_array_equal(engine.prepare("?", protein).embeddings, other.prepare("?", protein).embeddings)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = (
        r"the operators for records cannot be used .*none\.so.* The portable decoder and protein encoder are used"
    )
    assert re.fullmatch(rf"{expected} instead\.", warning)


def test_soft_tokens_of_one_are_not_taken_for_those_of_the_other(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Protein] = []
    real = Encoders.encode
    monkeypatch.setattr(Encoders, "encode", lambda self, item: (read.append(item), real(self, item))[1])
    for decoder in ("auto", "portable", "auto", "portable"):
        with Engine.load(records, threads=1, decoder=decoder, keep_soft_tokens=True) as engine:  # type: ignore[arg-type]
            engine.prepare("?", Protein.from_sequence(SEQUENCE))
    assert len(read) == 2


def test_commands_say_what_is_used(records: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def found() -> str:
        edge(["doctor", "--json", "--bundle", str(records)])
        findings = json.loads(capsys.readouterr().out)["findings"]
        return str(next(one["found"] for one in findings if one["what"] == "protein encoder"))

    assert found().startswith("records-1, computed with ")
    edge(["inspect", str(records)])
    printed = capsys.readouterr().out
    assert re.search(rf"heads, records-1, and {PORTABLE_ENCODER}, whose [0-9.,]+ M?B are derived where it is", printed)
    monkeypatch.setattr(int4_ops, "LIBRARY", Path("none.so"))
    assert re.match(r"portable, derived in the device cache: the operators for records cannot be used", found())


def test_the_cache_counts_it_and_is_cleared_of_it(
    records: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    derive(records)
    edge(["cache", "info"])
    assert re.search(r"portable decoders and protein encoders of bundles in records", capsys.readouterr().out)
    edge(["cache", "clear"])
    assert not list(cache.glob("portable/*/"))


# --- what was damaged, and hostile bundles ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, flip, replace_by_link, remove])
def test_what_was_damaged_since_is_derived_again(records: Path, damage: Callable[[Path], None]) -> None:
    graph = derive(records)
    expected = tensors_of(graph)
    damage(graph.with_suffix(".data"))
    assert derive(records) == graph
    assert tensors_of(graph) == expected


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name != "portable" and path.suffix != ".lock"]


@pytest.mark.parametrize("location", ["protein_encoder.data", "decoder-portable.data", "../secret", "stamp.json", ""])
def test_it_may_refer_to_nothing_but_what_is_derived_for_it(copy: Path, location: str) -> None:
    install(copy, place(location=location), PORTABLE_ENCODER)
    with pytest.raises(UnsafePathError, match=rf"{PORTABLE_ENCODER} refers to '{location}'"):
        Bundle.open(copy)


@pytest.mark.parametrize("entries", [{"offset": str(2**30)}, {"length": str(2**30)}])
def test_it_may_place_nothing_beyond_the_end_of_that(copy: Path, entries: dict[str, str]) -> None:
    install(copy, place(**entries), PORTABLE_ENCODER)
    with pytest.raises(BundleCorruptError, match=rf"{PORTABLE_ENCODER} places tensor"):
        Bundle.open(copy)


def test_what_is_to_be_derived_may_not_lie_in_the_bundle(copy: Path) -> None:
    (copy / DATA).write_bytes(b"x")
    edit(copy, lambda fields: fields["files"].append({"path": DATA, "size": 1, "sha256": "0" * 64}))
    with pytest.raises(ManifestError, match=r"lists protein_encoder-portable\.data, which is to be derived"):
        Bundle.open(copy)


def test_a_graph_that_is_not_listed_is_refused(copy: Path) -> None:
    edit(copy, lambda fields: fields["protein_encoder"]["portable"].update(graph="elsewhere.onnx"))
    with pytest.raises(ManifestError, match=r"uses 'elsewhere\.onnx' but does not list it"):
        Bundle.open(copy)


def use_our_operator(graph: GraphProto) -> None:
    graph.node.append(onnx.helper.make_node("Int8Linear", ["x", "r"], ["y"], domain="biomedgpt", N=1, K=1))


def test_it_may_use_none_of_our_operators(copy: Path) -> None:
    install(copy, use_our_operator, PORTABLE_ENCODER)
    with pytest.raises(BundleCorruptError, match=rf"{PORTABLE_ENCODER} uses operators that no bundle needs"):
        Bundle.open(copy)


VALUES = "layers.0.intermediate.weight_int8"


@pytest.mark.parametrize(
    "change",
    [
        place(offset="1"),
        rename(VALUES, "stranger.weight_int8"),
        rename(VALUES, "layers.0.output.weight_int8"),
        rename(VALUES, "layers.0.intermediate.bias"),
        rename(VALUES, "layers.0.intermediate.weight_int4"),
    ],
)
def test_tensors_that_cannot_be_derived_as_declared_are_refused(
    copy: Path, cache: Path, change: Callable[[GraphProto], None]
) -> None:
    install(copy, change, PORTABLE_ENCODER)
    with pytest.raises(
        BundleCorruptError, match=rf"{PORTABLE_ENCODER} places .* bytes of|was derived with|contradicts itself"
    ):
        derive(copy)
    assert left_in(cache) == []


@pytest.mark.parametrize("changed", [{"data_size": 2**48}, {"data_sha256": "0" * 64}])
def test_what_comes_out_otherwise_than_declared_is_not_used(copy: Path, cache: Path, changed: dict[str, Any]) -> None:
    edit(copy, lambda fields: fields["protein_encoder"]["portable"].update(changed))
    with pytest.raises(BioMedGPTError, match=r"manifest says|portable protein encoder takes 268,435,456 MiB"):
        derive(copy)
    assert left_in(cache) == []


def test_records_that_were_altered_are_found_by_what_comes_out(copy: Path) -> None:
    flip(copy / "protein_encoder.data")
    with (
        Engine.load(copy, threads=1, verify="sizes", decoder="portable") as engine,
        pytest.raises(BundleCorruptError, match=rf"{DATA} was derived with .*biomedgpt-edge verify"),
    ):
        engine.prepare("?", Protein.from_sequence(SEQUENCE))


def test_its_folder_is_its_own(records: Path) -> None:
    derivation = of_protein_encoder(Bundle.open(records))
    assert derivation is not None
    graph, data = derived_files(derivation)
    assert (graph.name, data.name) == (PORTABLE_ENCODER, DATA)
    assert graph.parent.name == f"{Bundle.open(records).digest}-protein_encoder-{module.FORMAT}"
