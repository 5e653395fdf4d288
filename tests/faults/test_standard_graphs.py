"""Graphs for GPUs: what they need is derived as the manifest says, hostile ones are refused, older bundles get them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, TensorProto, helper, numpy_helper
from test_portable_decoder import edit, first_outside, flip, install, place, remove, rename, truncate

from biomedgpt_edge import Engine
from biomedgpt_edge import portable as module
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import BundleCorruptError, BundleError, ManifestError, PlatformError, UnsafePathError
from biomedgpt_edge.manifest import PAGE, PORTABLE, RECORDS
from biomedgpt_edge.onnx_header import STANDARD_OPERATORS, read_header
from biomedgpt_edge.portable import (
    Derivation,
    derived_graph,
    forget,
    of_decoder,
    of_protein_encoder,
    of_standard,
)
from biomedgpt_export import relayout as relayout_module
from biomedgpt_export.errors import ExportError, ModelConfigError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.layouts import GpuGraphs
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.relayout import relayout
from support import bounded_memory

STANDARD = ["decoder-standard.onnx", "molecule_encoder-standard.onnx", "protein_encoder-standard.onnx"]
CUDA = ["decoder-cuda.onnx", "protein_encoder-cuda.onnx"]
PARTS = ["decoder", "molecule encoder", "protein encoder"]
# By what they are called here, options of exports.
EXPORTS: Mapping[str, dict[str, Any]] = {
    "int4 in records": {},
    "int4 portable": {"decoder_layout": "portable"},
    "int4, head in int8": {"lm_head": "int8"},
    "int4, head in int8, portable": {"lm_head": "int8", "decoder_layout": "portable"},
    "int4, proteins in int8": {"protein_encoder": "int8"},
    "int4, proteins in int8, portable": {"protein_encoder": "int8", "decoder_layout": "portable"},
    "int4, proteins in fp16": {"protein_encoder": "fp16"},
    "fp16": {"precision": "fp16"},
    "fp16, proteins in int8": {"precision": "fp16", "protein_encoder": "int8"},
}
# Those that differ in what becomes of them in another version or layout.
DIFFERENT = ["int4 in records", "int4 portable", "int4, head in int8", "int4, proteins in int8", "fp16"]
IN_RECORDS = [name for name, options in EXPORTS.items() if not {"decoder_layout", "precision"} & options.keys()]


def silent(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of ``EXPORTS``, each exported once; to be read only."""
    folder = tmp_path_factory.mktemp("exports")

    def exported(name: str) -> Path:
        out = folder / name
        if not out.exists():
            options = dict(EXPORTS[name])
            if options.get("precision", "int4") == "int4":
                options["quantizer"] = "rtn"
            export_bundle(ExportOptions(Layout.locate(tiny_checkpoint), out, proof="none", **options), silent)
        return out

    return exported


@pytest.fixture
def copied(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle in records that a test may damage."""
    return Path(shutil.copytree(bundles("int4 in records"), tmp_path / "bundle"))


def manifest(bundle: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return fields


def of_part(bundle: Path, part: str) -> Derivation:
    return next(one for one in of_standard(Bundle.open(bundle)) if one.part == part)


def derive(bundle: Path, part: str = "decoder") -> Path:
    return derived_graph(of_part(bundle, part), "once")


# --- what is derived --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_derived_has_the_size_and_hash_of_the_manifest(bundles: Callable[[str], Path], name: str) -> None:
    bundle = Bundle.open(bundles(name))
    derivations = of_standard(bundle)
    assert [one.part for one in derivations] == PARTS
    assert [one.derived.graph for one in derivations] == STANDARD
    for one in derivations:
        graph = derived_graph(one, "once")
        data = graph.with_suffix(".data").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one.derived.data_size, one.derived.data_sha256)
        assert graph.read_bytes() == bundle.file(one.derived.graph).read_bytes()
        assert {path.name for path in graph.parent.iterdir()} == {
            graph.name,
            graph.with_suffix(".data").name,
            "stamp.json",
        }


def matrices(graph: Path) -> dict[str, np.ndarray]:
    """What DequantizeLinear makes of the matrices of a graph, as ONNX says: float32 ``[K, N]`` by layer."""
    model = onnx.load(str(graph)).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    found = {}
    for node in model.node:
        if node.op_type == "DequantizeLinear":
            size = {attribute.name: attribute.i for attribute in node.attribute}.get("block_size", 0)
            values, scales = (weights[name].astype(np.float32) for name in node.input)
            found[node.input[0]] = values * (np.repeat(scales, size, axis=0) if size else scales)
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_matrices_are_those_of_the_bundle(bundles: Callable[[str], Path], name: str) -> None:
    bundle = Bundle.open(bundles(name))
    for one in of_standard(bundle):
        own, found = StoredWeights(bundle.file(one.own)), matrices(derived_graph(one, "once"))
        for key, matrix in found.items():
            layer = key.removesuffix("_kn").removesuffix(".weight_int4").removesuffix(".weight_int8")
            expected = own.linear(layer).T.numpy()
            columns, rows = expected.shape
            if key.endswith("_kn"):
                np.testing.assert_array_equal(matrix[:columns, :rows], expected)
            else:
                # One float32 scale per output, of which float16 keeps eleven bits.
                np.testing.assert_allclose(matrix, expected, rtol=2**-11)
            assert not matrix[columns:].any()
            assert not matrix[:, rows:].any()
        int8 = [key for key in found if "int8" in key]
        assert (
            int8
            == {
                "decoder": ["lm_head.weight_int8_kn"] * ("head in int8" in name),
                "molecule encoder": [],
                "protein encoder": int8 if "proteins in int8" in name else [],
            }[one.part]
        )
        expected_count = {
            "decoder": 0 if name.startswith("fp16") else 11,
            "molecule encoder": 0,
            "protein encoder": 0 if name in ("fp16", "int4, proteins in fp16") else 12,
        }
        assert len(found) == expected_count[one.part]


def test_graphs_lie_in_the_bundle_and_their_data_does_not(bundles: Callable[[str], Path]) -> None:
    for name in EXPORTS:
        files = {path.name for path in bundles(name).iterdir()}
        assert {*STANDARD, *CUDA} <= files
        assert not [file for file in files if file.endswith(("-standard.data", "-cuda.data"))]
        assert {entry["path"] for entry in manifest(bundles(name))["files"]} == files - {"manifest.json"}
        assert manifest(bundles(name))["schema_version"] == 5
        Bundle.open(bundles(name)).verify()


def test_layouts_of_the_same_matrices_derive_the_same_data(bundles: Callable[[str], Path]) -> None:
    for one, other in (
        ("int4 in records", "int4 portable"),
        ("int4, head in int8", "int4, head in int8, portable"),
        ("int4, proteins in int8", "int4, proteins in int8, portable"),
    ):
        assert hashes(bundles(one)) == hashes(bundles(other))
    assert hashes(bundles("int4 in records")) != hashes(bundles("int4, head in int8"))


def hashes(bundle: Path) -> list[tuple[int, str]]:
    """Of the data of standard graphs."""
    return [(one.derived.data_size, one.derived.data_sha256) for one in of_standard(Bundle.open(bundle))]


def test_an_exact_bundle_has_none(tiny_bundle_fp32: Path) -> None:
    bundle = Bundle.open(tiny_bundle_fp32)
    assert of_standard(bundle) == []
    assert bundle.manifest.decoder.cuda is None
    assert not [path for path in tiny_bundle_fp32.iterdir() if path.stem.endswith(("-standard", "-cuda"))]
    # So that runtimes of any age read it.
    fields = manifest(tiny_bundle_fp32)
    assert fields["schema_version"] == 1
    assert not {"cuda", "standard"} & {*fields["decoder"], *fields["molecule_encoder"], *fields["protein_encoder"]}


@pytest.mark.parametrize(("name", "in_cache"), [("int4, proteins in int8", True), ("int4 portable", False)])
def test_graphs_for_cuda_lie_beside_the_data_that_they_are_over(
    bundles: Callable[[str], Path], name: str, in_cache: bool
) -> None:
    bundle = Bundle.open(bundles(name))
    for derivation, graph in zip((of_decoder(bundle), of_protein_encoder(bundle)), CUDA, strict=True):
        assert (derivation is not None) == in_cache
        path = bundle.file(graph) if derivation is None else derived_graph(derivation, "once").with_name(graph)
        assert path.read_bytes() == bundle.file(graph).read_bytes()
        onnx.load(str(path))  # with what lies outside


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_what_was_damaged_since_is_derived_again(
    bundles: Callable[[str], Path], damage: Callable[[Path], None]
) -> None:
    data = derive(bundles("int4 in records")).with_suffix(".data")
    expected = data.read_bytes()
    damage(data)
    derive(bundles("int4 in records"))
    assert data.read_bytes() == expected


def test_parts_have_folders_of_their_own_and_are_forgotten_alone(bundles: Callable[[str], Path]) -> None:
    derivations = of_standard(Bundle.open(bundles("int4 in records")))
    folders = [derived_graph(one, "once").parent for one in derivations]
    assert len(set(folders)) == 3
    forget(derivations[1])
    assert [folder.exists() for folder in folders] == [True, False, True]


# --- hostile graphs ---------------------------------------------------------------------------------------------------


def add_node(*arguments: Any, **attributes: Any) -> Callable[[GraphProto], None]:
    return lambda graph: graph.node.append(helper.make_node(*arguments, **attributes))


def in_a_branch(graph: GraphProto) -> None:
    branch = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "branch", [], [])
    node = helper.make_node("Relu", ["mask"], ["strange"])
    node.attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH, g=branch))
    graph.node.append(node)


FOREIGN: dict[str, tuple[Callable[[GraphProto], None], str]] = {
    "a loop": (add_node("Loop", [], ["strange"]), "Loop"),
    "a branch": (add_node("If", ["x"], ["strange"]), "If"),
    "a constant": (add_node("Constant", [], ["strange"], value_int=1), "Constant"),
    "ONNX Runtime's": (add_node("MatMulNBits", ["x", "y"], ["z"], domain="com.microsoft"), "com.microsoft.MatMulNBits"),
    "our own": (add_node("Int4Linear", ["x", "y"], ["z"], domain="biomedgpt"), "biomedgpt.Int4Linear"),
    "a plugin's": (add_node("AnyPlugin_TRT", ["x"], ["z"]), "AnyPlugin_TRT"),
    "one of ONNX in another domain": (add_node("MatMul", ["x", "y"], ["z"], domain="elsewhere"), "elsewhere.MatMul"),
    "inside": (in_a_branch, "Sin"),
    "an old norm": (add_node("SimplifiedLayerNormalization", ["x"], ["z"]), "SimplifiedLayerNormalization"),
}


@pytest.mark.parametrize(
    ("graph", "kind"), [*((STANDARD[0], kind) for kind in FOREIGN), *((graph, "a loop") for graph in STANDARD[1:])]
)
def test_a_foreign_operator_is_refused_when_the_bundle_is_opened(copied: Path, graph: str, kind: str) -> None:
    change, name = FOREIGN[kind]
    install(copied, change, graph)
    with pytest.raises(BundleCorruptError, match=f"{graph} uses operators that no bundle needs: '{name}'"):
        Bundle.open(copied)


def test_no_operator_of_a_standard_graph_loops_branches_reads_or_is_anybody_elses() -> None:
    assert {domain for domain, _ in STANDARD_OPERATORS} == {""}
    assert not {"If", "Loop", "Scan", "SequenceMap", "Constant", "EPContext"} & {name for _, name in STANDARD_OPERATORS}


@pytest.mark.parametrize("graph", ["decoder-portable.onnx", "molecule_encoder.onnx", "protein_encoder.onnx"])
def test_what_standard_graphs_may_have_others_may_not(copied: Path, graph: str) -> None:
    install(copied, add_node("Attention", ["x"], ["z"]), graph)
    with pytest.raises(BundleCorruptError, match=f"{graph} uses operators that no bundle needs: 'Attention'"):
        Bundle.open(copied)


def resize(**changes: Any) -> Callable[[GraphProto], None]:
    """Changes what the first tensor outside says of itself."""

    def change(graph: GraphProto) -> None:
        tensor = first_outside(graph)
        if "dims" in changes:
            tensor.dims[:] = changes["dims"](list(tensor.dims))
        tensor.data_type = changes.get("kind", tensor.data_type)
        if "length" in changes:
            length = next(entry for entry in tensor.external_data if entry.key == "length")
            length.value = str(int(length.value) + changes["length"])

    return change


def without_length(graph: GraphProto) -> None:
    """All that follows in the file would belong to it."""
    tensor = first_outside(graph)
    kept = [entry for entry in tensor.external_data if entry.key != "length"]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)


def twice(graph: GraphProto) -> None:
    tensor = first_outside(graph)
    again = TensorProto.FromString(tensor.SerializeToString())
    again.dims[:] = [*tensor.dims, 1]
    graph.initializer.append(again)


CONTRADICTIONS: dict[str, Callable[[GraphProto], None]] = {
    "more rows": resize(dims=lambda dims: [dims[0] + 1, *dims[1:]]),
    "fewer rows": resize(dims=lambda dims: [dims[0] - 1, *dims[1:]]),
    "a huge dimension": resize(dims=lambda dims: [*dims, 2**40]),
    "a negative dimension": resize(dims=lambda dims: [-1, *dims[1:]]),
    "dimensions that wrap around": resize(dims=lambda dims: [2**32, 2**32, *dims]),
    "nothing": resize(dims=lambda dims: [0, *dims[1:]]),
    "no dimension": resize(dims=lambda dims: []),
    "wider elements": resize(kind=TensorProto.FLOAT),
    "narrower elements": resize(kind=TensorProto.INT4),
    "elements of no kind": resize(kind=0),
    "elements of a kind that no such graph has": resize(kind=TensorProto.DOUBLE),
    "texts": resize(kind=TensorProto.STRING),
    "fewer bytes": resize(length=-2),
    "no length": without_length,
    "two shapes": twice,
}


@pytest.mark.parametrize(
    ("graph", "kind"),
    [*((STANDARD[0], kind) for kind in CONTRADICTIONS), *((graph, "more rows") for graph in STANDARD[1:])],
)
def test_a_tensor_with_more_or_fewer_bytes_than_its_shape_implies_is_refused(
    copied: Path, graph: str, kind: str
) -> None:
    # The first one outside has 16 bits.
    def change(given: GraphProto) -> None:
        tensors = sorted(given.initializer, key=lambda tensor: tensor.data_type != TensorProto.FLOAT16)
        del given.initializer[:]
        given.initializer.extend(tensors)
        assert first_outside(given).data_type == TensorProto.FLOAT16
        CONTRADICTIONS[kind](given)

    install(copied, change, graph)
    with pytest.raises(BundleCorruptError, match=f"{graph} contradicts itself"):
        Bundle.open(copied)


def test_an_odd_nibble_takes_a_byte(copied: Path) -> None:
    # 4 bits that do not fill the last byte: that byte is there, and no more.
    def change(graph: GraphProto, length: str) -> None:
        tensor = first_outside(graph)
        tensor.dims[:], tensor.data_type = [5], TensorProto.INT4
        for entry in tensor.external_data:
            entry.value = {"length": length}.get(entry.key, entry.value)

    install(copied, lambda graph: change(graph, "3"), STANDARD[0])
    Bundle.open(copied)
    for length in ("2", "4"):
        install(copied, lambda graph, length=length: change(graph, length), STANDARD[0])  # type: ignore[misc]
        with pytest.raises(BundleCorruptError, match=r"is \(5,\) of 4 bits, and has [24] bytes"):
            Bundle.open(copied)


@pytest.mark.parametrize(
    "location",
    [
        *("decoder.data", "decoder.onnx", "decoder-portable.data", "embeddings.safetensors", "manifest.json"),
        *("../secret", "/etc/passwd", "stamp.json", "", ".", "*/_ORT_MEM_ADDR_/*"),
    ],
)
def test_it_may_refer_to_nothing_but_what_is_derived(copied: Path, location: str) -> None:
    for graph in STANDARD[::-1]:
        install(copied, place(location=location), graph)
        with pytest.raises(UnsafePathError, match=f"{graph} refers to"):
            Bundle.open(copied)


def test_one_part_may_not_refer_to_what_is_derived_for_another(copied: Path) -> None:
    install(copied, place(location="protein_encoder-standard.data"), STANDARD[0])
    with pytest.raises(UnsafePathError, match=r"decoder-standard\.onnx refers to 'protein_encoder-standard\.data'"):
        Bundle.open(copied)


@pytest.mark.parametrize("graph", STANDARD)
@pytest.mark.parametrize("beyond", [0, 2**62])
def test_it_may_place_nothing_beyond_the_end(copied: Path, graph: str, beyond: int) -> None:
    size = next(one.derived.data_size for one in of_standard(Bundle.open(copied)) if one.derived.graph == graph)
    install(copied, place(offset=str(size + beyond)), graph)
    with pytest.raises(BundleCorruptError, match=f"{graph} places tensor"):
        Bundle.open(copied)


def set_standard(part: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields[part]["standard"].update(values)


@pytest.mark.parametrize("part", ["decoder", "molecule_encoder", "protein_encoder"])
def test_it_may_be_four_times_the_bundle_and_what_pages_take_and_no_more(copied: Path, part: str) -> None:
    tensors = len(read_header(copied / f"{part}-standard.onnx").tensors)
    limit = 4 * sum(entry["size"] for entry in manifest(copied)["files"]) + PAGE * tensors
    edit(copied, set_standard(part, data_size=limit))
    assert getattr(Bundle.open(copied).manifest, part).standard.data_size == limit
    edit(copied, set_standard(part, data_size=limit + 1))
    with pytest.raises(ManifestError, match=rf"{part}-standard\.data has {limit + 1:,} bytes, and the bundle has"):
        Bundle.open(copied)
    for size in (2**48 + 1, -1):
        edit(copied, set_standard(part, data_size=size))
        with pytest.raises(ManifestError, match=rf"manifest\.{part}\.standard\.data_size"):
            Bundle.open(copied)


def test_what_is_to_be_derived_may_not_lie_in_the_bundle(copied: Path) -> None:
    (copied / "decoder-standard.data").write_bytes(b"x")
    entry = {"path": "decoder-standard.data", "size": 1, "sha256": "0" * 64}
    edit(copied, lambda fields: fields["files"].append(entry))
    with pytest.raises(ManifestError, match=r"lists decoder-standard\.data, which is to be derived"):
        Bundle.open(copied)


def reshape(name: str, dims: list[int], length: str | None = None) -> Callable[[GraphProto], None]:
    """Gives a tensor other dimensions, and another length where it lies outside."""

    def change(graph: GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name.startswith(name))
        tensor.dims[:] = dims
        for entry in tensor.external_data:
            if entry.key == "length" and length is not None:
                entry.value = length

    return change


@pytest.mark.parametrize(
    "change",
    [
        reshape("lm_head.weight_int4_kn", [0, 2**34], "0"),
        reshape("lm_head.weight_int4_kn", [2**34, 2**34]),
        reshape("layers.0.input_layernorm.weight", [2**40]),
        reshape("layers.0.input_layernorm.weight", [2**40, 0]),
    ],
    ids=["empty", "larger than its bytes", "larger than its bytes, inside", "empty, inside"],
)
def test_a_tensor_that_is_not_as_large_as_it_says_is_refused_wherever_it_lies(
    copied: Path, change: Callable[[GraphProto], None]
) -> None:
    install(copied, change, STANDARD[0])
    with (
        bounded_memory(50_000_000),
        pytest.raises(BundleCorruptError, match=r"decoder-standard\.onnx contradicts itself"),
    ):
        Bundle.open(copied)


def test_a_portable_graph_cannot_ask_for_more_by_the_name_of_a_standard_tensor(copied: Path) -> None:
    """Nothing says how large that is but the graph."""

    def change(graph: GraphProto) -> None:
        rename("layers.0.o_proj.weight_int4", "layers.0.o_proj.weight_int4_kn")(graph)
        reshape("layers.0.o_proj.weight_int4_kn", [128, 2**33])(graph)
        for node in graph.node:
            if "layers.0.o_proj.weight_int4_kn" in node.input:
                node.op_type, node.domain = "Identity", ""
                node.ClearField("attribute")
                del node.input[1:]

    install(copied, change, "decoder-portable.onnx")
    with (
        bounded_memory(50_000_000),
        pytest.raises(BundleCorruptError, match=r"decoder-portable\.onnx contradicts itself"),
    ):
        Bundle.open(copied)


@pytest.mark.parametrize(
    "split",
    [lambda count: [count], lambda count: [2, count // 4, 2], lambda count: [1, count], lambda count: [count, 1]],
    ids=["one dimension", "three", "one block", "one column"],
)
def test_scales_of_another_shape_are_refused_when_they_are_derived(
    copied: Path, split: Callable[[int], list[int]]
) -> None:
    shapes = read_header(copied / STANDARD[0]).shapes
    scales = next(name for name in shapes if name.startswith("lm_head.scales_kn"))
    install(copied, reshape(scales, split(math.prod(shapes[scales] or ()))), STANDARD[0])
    with pytest.raises(BundleCorruptError, match=r"cannot be made of what the bundle holds|was derived with"):
        derive(copied)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (set_standard("decoder", graph="elsewhere.onnx"), "uses 'elsewhere.onnx' but does not list it"),
        (set_standard("decoder", graph="../elsewhere.onnx"), r"uses '\.\./elsewhere.onnx' but does not list it"),
        (set_standard("decoder", graph="decoder.data"), r"'manifest\.decoder\.standard\.graph' .* does not end in"),
        (set_standard("decoder", graph="decoder-cuda.onnx"), "gives two parts the same graph"),
        (set_standard("decoder", graph="protein_encoder-standard.onnx"), "gives two parts the same graph"),
        (set_standard("decoder", graph="decoder.onnx"), "gives two parts the same graph"),
        (lambda fields: fields["decoder"].update(cuda="decoder.onnx"), "gives two parts the same graph"),
        (lambda fields: fields["decoder"].update(cuda="elsewhere.onnx"), "uses 'elsewhere.onnx' but does not list it"),
        (lambda fields: fields["decoder"].update(cuda="manifest.json"), r"'manifest\.decoder\.cuda' .* not end in"),
        (lambda fields: fields["decoder"].update(cuda=7), r"'manifest\.decoder\.cuda'"),
        (lambda fields: fields["decoder"].update(standard="decoder-standard.onnx"), r"'manifest\.decoder\.standard'"),
        (lambda fields: fields.update(schema_version=4), r"has unknown cuda, standard: schema version 4 knows none"),
    ],
)
def test_a_manifest_that_names_them_otherwise_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    edit(copied, change)
    with pytest.raises(ManifestError, match=what):
        Bundle.open(copied)


@pytest.mark.parametrize("graph", CUDA)
@pytest.mark.parametrize("operator", ["Attention", "Loop"])
def test_graphs_for_cuda_have_portable_operators_and_a_dequantization(copied: Path, graph: str, operator: str) -> None:
    install(copied, add_node("DequantizeLinear", ["x", "y"], ["z"]), graph)
    Bundle.open(copied)
    install(copied, add_node(operator, ["x"], ["z"]), graph)
    with pytest.raises(BundleCorruptError, match=f"{graph} uses operators that no bundle needs: '{operator}'"):
        Bundle.open(copied)


@pytest.mark.parametrize("location", ["decoder.data", "decoder-standard.data", "../secret", "/etc/passwd"])
def test_graphs_for_cuda_refer_to_the_data_of_portable_ones(copied: Path, location: str) -> None:
    install(copied, place(location=location), CUDA[0])
    with pytest.raises(UnsafePathError, match=f"{CUDA[0]} refers to '{location}'"):
        Bundle.open(copied)


def test_products_of_graphs_for_cuda_are_as_they_are_declared(copied: Path) -> None:
    def change(graph: GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "MatMulNBits")
        next(attribute for attribute in node.attribute if attribute.name == "K").i *= 2

    install(copied, change, CUDA[0])
    with pytest.raises(BundleCorruptError, match=rf"{CUDA[0]} contradicts itself"):
        Bundle.open(copied)


# --- what cannot be derived -------------------------------------------------------------------------------------------


def left_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name != "standard" and path.suffix != ".lock"]


RENAMED: dict[str, tuple[str, str]] = {
    "a layer that there is not": ("lm_head.weight_int4_kn", "stranger.weight_int4_kn"),
    "scales of a layer that there is not": ("lm_head.scales_kn.1001x1", "stranger.scales_kn.1001x1"),
    "scales of more rows": ("lm_head.scales_kn.1001x1", "lm_head.scales_kn.1008x1"),
    "scales of no groups": ("lm_head.scales_kn.1001x1", "lm_head.scales_kn.1001x0"),
    "scales without a size": ("lm_head.scales_kn.1001x1", "lm_head.scales_kn"),
    "a larger layer's matrix": ("layers.0.o_proj.weight_int4_kn", "lm_head.weight_int4"),
    "int8 of what is int4": ("lm_head.weight_int4_kn", "lm_head.weight_int8_kn"),
    "dequantized": ("lm_head.weight_int4_kn", "lm_head.weight_half"),
    "records": ("rope_cos", "lm_head.records"),
    "half of what is no float32": ("rope_cos", "lm_head.scales.half"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_tensors_that_cannot_be_derived_as_declared_are_refused(copied: Path, cache: Path, kind: str) -> None:
    install(copied, rename(*RENAMED[kind]), STANDARD[0])
    with pytest.raises(BundleCorruptError, match=r"decoder-standard\.onnx places|cannot be made of what the bundle"):
        derive(copied)
    assert left_in(cache) == []


def test_matrices_that_changed_places_are_found_by_what_comes_out(copied: Path, cache: Path) -> None:
    names = [f"layers.{layer}.o_proj.weight_int4_kn" for layer in (0, 1)]
    for old, new in ((names[0], "x"), (names[1], names[0]), ("x", names[1])):
        install(copied, rename(old, new), STANDARD[0])
    with pytest.raises(BundleCorruptError, match=r"decoder-standard\.data was derived with .* manifest says"):
        derive(copied)
    assert left_in(cache) == []


@pytest.mark.parametrize("changed", [{"data_size": 552_896 + 4096}, {"data_sha256": "0" * 64}])
def test_what_comes_out_otherwise_than_declared_is_not_used(copied: Path, cache: Path, changed: dict[str, Any]) -> None:
    edit(copied, set_standard("decoder", **changed))
    with pytest.raises(BundleCorruptError, match=r"decoder-standard\.data was derived with .* manifest says"):
        derive(copied)
    assert left_in(cache) == []


def test_records_that_were_altered_are_found_by_what_comes_out(copied: Path) -> None:
    flip(copied / "decoder.data")
    with pytest.raises(BundleCorruptError, match=r"decoder-standard\.data was derived with"):
        derive(copied)


def test_too_little_space_is_found_before_anything_is_written(
    copied: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(copied))(0, 0, 1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlatformError, match=r"the standard decoder takes 1 MiB in .*, where 1 MiB are free"):
        derive(copied)
    assert left_in(cache) == []


def test_hostile_graphs_are_no_hindrance_once_they_are_gone(bundles: Callable[[str], Path], copied: Path) -> None:
    install(copied, add_node("Loop", [], ["strange"]), STANDARD[0])
    for attempt in (lambda: Bundle.open(copied), lambda: Engine.load(copied, threads=1)):
        with pytest.raises(BundleError):
            attempt()
    shutil.copyfile(bundles("int4 in records") / STANDARD[0], copied / STANDARD[0])
    shutil.copyfile(bundles("int4 in records") / "manifest.json", copied / "manifest.json")
    assert derive(copied).is_file()


# --- bundles of older exports -----------------------------------------------------------------------------------------


def as_older_exports(bundle: Path, out: Path) -> Path:
    """A copy as versions before this one wrote it: no graphs for GPUs, and a schema without a word of them."""
    shutil.copytree(bundle, out)
    fields = manifest(out)
    for name in (*STANDARD, *CUDA):
        (out / name).unlink()
    fields["files"] = [entry for entry in fields["files"] if entry["path"] not in (*STANDARD, *CUDA)]
    for part in ("decoder", "molecule_encoder", "protein_encoder"):
        for field in ("cuda", "standard"):
            fields[part].pop(field, None)
    encoder, decoder = fields["protein_encoder"], fields["decoder"]
    fields["schema_version"] = 4 if encoder["layout"] == RECORDS else 3 if decoder["layout"] == RECORDS else 1
    if fields["schema_version"] < 4:
        del encoder["layout"], encoder["portable"]
    if fields["schema_version"] < 3:
        del decoder["layout"], decoder["portable"]
    (out / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")
    return out


@pytest.fixture
def older(bundles: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    return lambda name: as_older_exports(bundles(name), tmp_path / "older")  # type: ignore[return-value]


def layout_of(name: str) -> Any:
    return "records" if name in IN_RECORDS else "portable"


@pytest.mark.parametrize("name", DIFFERENT)
def test_bundles_of_older_exports_open_without_them(older: Callable[[str], Path], name: str) -> None:
    bundle = Bundle.open(older(name))
    bundle.verify()
    assert of_standard(bundle) == []
    assert bundle.manifest.decoder.cuda is None
    with Engine.load(bundle.path, threads=1) as engine:
        assert engine.ask("What is a protein?", max_new_tokens=2).token_ids


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_bundle_without_them_gets_them_and_all_else_stays(
    bundles: Callable[[str], Path], older: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source, lines = older(name), list[str]()
    relayout(source, tmp_path / "out", layout_of(name), lines.append)
    before, after = Bundle.open(source), Bundle.open(tmp_path / "out")
    after.verify()
    kept = {entry for entry in after.manifest.files if entry.path not in (*STANDARD, *CUDA)}
    assert kept == set(before.manifest.files)
    assert {entry.path for entry in set(after.manifest.files) - kept} == {*STANDARD, *CUDA}
    assert hashes(after.path) == hashes(bundles(name))
    for one in of_standard(after):
        derived_graph(one, "once")
    for graph in (*STANDARD, *CUDA):
        assert read_header(after.path / graph).operators == read_header(bundles(name) / graph).operators
    assert manifest(after.path)["schema_version"] == 5
    assert not [line for line in lines if "TensorRT" in line]
    # And not a second time.
    with pytest.raises(ExportError, match=f"is in {layout_of(name)} already"):
        relayout(after.path, tmp_path / "again", layout_of(name), silent)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["int4 in records", "int4, proteins in int8"])
def test_a_bundle_without_them_gets_them_in_another_layout_too(
    bundles: Callable[[str], Path], older: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source = older(name)
    relayout(source, tmp_path / "out", "portable", silent)
    assert Bundle.open(tmp_path / "out").manifest.decoder.layout == PORTABLE
    assert hashes(tmp_path / "out") == hashes(bundles(name))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_bundle_that_has_them_in_that_layout_is_refused(
    bundles: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ExportError, match=f"is in {layout_of(name)} already"):
        relayout(bundles(name), tmp_path / "out", layout_of(name), silent)
    assert not (tmp_path / "out").exists()


def test_an_exact_bundle_gets_none(tiny_bundle_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is in portable already"):
        relayout(tiny_bundle_fp32, tmp_path / "out", "portable", silent)
    with pytest.raises(ModelConfigError, match="no int4 product"):
        relayout(tiny_bundle_fp32, tmp_path / "out", "records", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int4 in records", "int4, head in int8", "int4, proteins in int8"])
def test_from_records_to_portable_and_back_their_data_stays(
    bundles: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    expected = hashes(bundles(name))
    source = bundles(name)
    for layout in ("portable", "records", "portable"):
        out = tmp_path / f"{layout} of {source.name}"
        relayout(source, out, layout, silent)  # type: ignore[arg-type]
        assert hashes(out) == expected
        files = {path.name for path in out.iterdir()}
        assert {*STANDARD, *CUDA} <= files
        assert not [file for file in files if file.startswith("built_") or file.endswith("-standard.data")]
        source = out
    for one in of_standard(Bundle.open(source)):
        derived_graph(one, "once")


def test_graphs_that_can_be_written_no_more_are_left_out(
    bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relayout_module, "write_gpu_graphs", lambda *arguments: GpuGraphs())
    monkeypatch.setattr(relayout_module, "write_standard_graph", lambda *arguments: None)
    relayout(bundles("int4, proteins in int8"), tmp_path / "out", "portable", silent)
    bundle = Bundle.open(tmp_path / "out")
    assert of_standard(bundle) == []
    assert not {*STANDARD, *CUDA} & {entry.path for entry in bundle.manifest.files}
    assert not {*STANDARD, *CUDA} & {path.name for path in bundle.path.iterdir()}


def test_all_else_stays(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    relayout(bundles("int4 in records"), tmp_path / "out", "portable", silent)
    before, after = (Bundle.open(path).manifest for path in (bundles("int4 in records"), tmp_path / "out"))
    assert len({entry.path for entry in after.files}) == len(after.files)
    decoder = {"decoder.onnx", "decoder.data", "decoder-portable.onnx", "decoder-standard.onnx", "decoder-cuda.onnx"}
    assert {entry for entry in after.files if entry.path not in decoder} == {
        entry for entry in before.files if entry.path not in decoder
    }
