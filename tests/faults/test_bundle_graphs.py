"""A graph of a bundle can make ONNX Runtime read listed files of the bundle and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from biomedgpt_edge import Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.encoders import Encoders
from biomedgpt_edge.engine import Engine
from biomedgpt_edge.errors import BundleCorruptError, BundleError, UnsafePathError
from biomedgpt_edge.onnx_header import (
    CUDA_OPERATORS,
    DECODER_RECORDS_OPERATORS,
    INT4_MATRICES,
    INT8_INPUTS,
    MAX_GRAPH_BYTES,
    MAX_REFERENCES,
    OPERATORS,
    PROTEIN_RECORDS_OPERATORS,
    STANDARD_OPERATORS,
    ExternalTensor,
    read_header,
)
from biomedgpt_edge.onnx_products import contradictions
from biomedgpt_edge.ort_session import open_session
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.relayout import relayout
from support import bounded_memory

PORTABLE = "decoder-portable.onnx"
OPENED = ["decoder.onnx", "molecule_encoder.onnx", "protein_encoder.onnx"]
GRAPHS = [*OPENED, PORTABLE]


def external(name: str = "w", **entries: str) -> TensorProto:
    """A tensor of 16 floats whose bytes lie elsewhere; by default at the start of ``decoder.data``."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "decoder.data", "offset": "0", "length": "64", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*initializers: TensorProto, nodes: tuple[NodeProto, ...] = ()) -> ModelProto:
    """A graph that adds ``w`` to its input."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16])],
        list(initializers),
    )
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])


def install(bundle: Path, content: bytes | ModelProto, name: str = "molecule_encoder.onnx") -> None:
    """Replaces a graph of the bundle and corrects its size in the manifest, as an attacker would."""
    data = content if isinstance(content, bytes) else content.SerializeToString()
    (bundle / name).write_bytes(data)
    fields = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    next(entry for entry in fields["files"] if entry["path"] == name)["size"] = len(data)
    (bundle / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")


def add_file(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(content)
    fields = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    fields["files"].append({"path": name, "size": len(content), "sha256": "0" * 64})
    (bundle / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: bytes, *, tag: bytes | None = None) -> bytes:
    return (varint(number << 3 | 2) if tag is None else tag) + varint(len(content)) + content


def read(tmp_path: Path, content: bytes | ModelProto) -> list[ExternalTensor]:
    path = tmp_path / "graph.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return list(read_header(path).tensors)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_all_references_of_an_exported_graph_are_found(tiny_bundle: Path, name: str) -> None:
    loaded = onnx.load(str(tiny_bundle / name), load_external_data=False)
    expected = []
    for tensor in loaded.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = int(entries["offset"]), int(entries["length"])
            expected.append(ExternalTensor(tensor.name, entries["location"], *place))
    assert len(expected) > 3
    assert list(read_header(tiny_bundle / name).tensors) == expected


def constant(**attributes: Any) -> NodeProto:
    return helper.make_node("Constant", [], ["hidden"], **attributes)


def in_tensor_attribute(secret: TensorProto) -> ModelProto:
    return model(external(), nodes=(constant(value=secret),))


def in_tensors_attribute(secret: TensorProto) -> ModelProto:
    node = constant()
    node.attribute.append(AttributeProto(name="values", type=AttributeProto.TENSORS, tensors=[external("a"), secret]))
    return model(external(), nodes=(node,))


def in_sparse_attribute(secret: TensorProto) -> ModelProto:
    return model(external(), nodes=(constant(sparse_value=onnx.SparseTensorProto(values=secret, dims=[16])),))


def in_sparse_attributes(secret: TensorProto) -> ModelProto:
    node, sparse = constant(), onnx.SparseTensorProto(indices=secret, dims=[16])
    node.attribute.append(AttributeProto(name="v", type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse]))
    return model(external(), nodes=(node,))


def in_sparse_initializer(secret: TensorProto) -> ModelProto:
    result = model(external())
    result.graph.sparse_initializer.append(onnx.SparseTensorProto(values=secret, indices=external("i"), dims=[16]))
    return result


def in_sparse_indices(secret: TensorProto) -> ModelProto:
    result = model(external())
    result.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external("v"), indices=secret, dims=[16]))
    return result


def in_subgraph(secret: TensorProto) -> ModelProto:
    branch = helper.make_graph([], "branch", [], [], [secret])
    return model(external(), nodes=(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch),))


def in_nested_subgraph(secret: TensorProto) -> ModelProto:
    inner = helper.make_graph([constant(value=secret)], "inner", [], [])
    middle = helper.make_graph([helper.make_node("Loop", [], ["z"], body=inner)], "middle", [], [])
    node = constant()
    node.attribute.append(AttributeProto(name="graphs", type=AttributeProto.GRAPHS, graphs=[GraphProto(), middle]))
    return model(external(), nodes=(node,))


def in_function(secret: TensorProto) -> ModelProto:
    result = model(external())
    result.functions.add(name="f", domain="d").node.append(constant(value=secret))
    return result


def in_default_of_function_attribute(secret: TensorProto) -> ModelProto:
    result = model(external())
    function = result.functions.add(name="f", domain="d")
    function.attribute_proto.append(AttributeProto(name="a", type=AttributeProto.TENSOR, t=secret))
    return result


def in_training_info(secret: TensorProto) -> ModelProto:
    result = model(external())
    result.training_info.add().initialization.initializer.append(secret)
    return result


def in_training_algorithm(secret: TensorProto) -> ModelProto:
    result = model(external())
    result.training_info.add().algorithm.initializer.append(secret)
    return result


HIDING_PLACES = [
    in_tensor_attribute,
    in_tensors_attribute,
    in_sparse_attribute,
    in_sparse_attributes,
    in_sparse_initializer,
    in_sparse_indices,
    in_subgraph,
    in_nested_subgraph,
    in_function,
    in_default_of_function_attribute,
    in_training_info,
    in_training_algorithm,
]


@pytest.mark.parametrize("hide", HIDING_PLACES)
def test_a_reference_is_found_wherever_a_tensor_can_be(
    bundle_copy: Path, hide: Callable[[TensorProto], ModelProto]
) -> None:
    install(bundle_copy, hide(external("secret", location="../secret.bin")))
    with pytest.raises(UnsafePathError, match=r"molecule_encoder\.onnx refers to '\.\./secret\.bin'"):
        Bundle.open(bundle_copy)


def message_types(descriptor: Any, found: dict[str, Any]) -> dict[str, Any]:
    if descriptor.full_name not in found:
        found[descriptor.full_name] = descriptor
        for child in descriptor.fields:
            if child.message_type is not None:
                message_types(child.message_type, found)
    return found


def test_every_message_of_the_installed_onnx_that_can_hold_a_tensor_is_walked() -> None:
    from biomedgpt_edge.onnx_header import _CHILDREN

    types = message_types(ModelProto.DESCRIPTOR, {})
    holders = {"TensorProto"}
    while True:
        more = {
            t.name
            for t in types.values()
            if any(f.message_type is not None and f.message_type.name in holders for f in t.fields)
        }
        if more <= holders:
            break
        holders |= more
    expected = {
        t.name.removesuffix("Proto"): {
            f.number: f.message_type.name.removesuffix("Proto")
            for f in t.fields
            if f.message_type is not None and f.message_type.name in holders
        }
        for t in types.values()
        if t.name in holders - {"TensorProto"}
    }
    assert {name: children for name, children in _CHILDREN.items() if name != "Tensor"} == expected


# --- where a reference may lead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "/etc/passwd",
        "//etc/passwd",
        "sub/../decoder.data",
        "sub/decoder.data",
        "unlisted.bin",
        "decoder.data\0",
        "decoder.data\0.txt",
        "DECODER.DATA",
        "",
        ".",
        "C:\\secret.bin",
        "..\\secret.bin",
        "\\\\server\\share",
        "file:///etc/passwd",
        "*/_ORT_MEM_ADDR_/*",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_reference_to_anything_but_a_listed_file_is_refused(bundle_copy: Path, name: str, location: str) -> None:
    (bundle_copy / "unlisted.bin").write_bytes(bytes(64))
    (bundle_copy.parent / "secret.bin").write_bytes(bytes(64))
    install(bundle_copy, model(external(location=location)), name)
    with pytest.raises(UnsafePathError, match=f"{name} refers to"):
        Bundle.open(bundle_copy)


def test_an_address_in_memory_is_no_place_even_where_a_file_has_that_name(bundle_copy: Path) -> None:
    secret = np.full(16, 42, np.float32)
    tag = "*/_ORT_MEM_ADDR_/*"
    add_file(bundle_copy, tag, b"")
    (bundle_copy / tag).write_bytes(b"")
    os.truncate(bundle_copy / tag, 4096)
    fields = json.loads((bundle_copy / "manifest.json").read_text())
    fields["files"][-1]["size"] = 4096
    (bundle_copy / "manifest.json").write_text(json.dumps(fields))
    for offset in (0, secret.ctypes.data):
        install(bundle_copy, model(external(location=tag, offset=str(offset))))
        with pytest.raises(BundleError):
            Encoders(Bundle.open(bundle_copy), threads=1).encode(Molecule.from_smiles("CCO"))


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "567233"},
        {"offset": "567296", "length": "1"},
        {"length": "567297"},
        {"offset": str(2**63)},
        {"offset": "9" * 19},
        {"offset": "9" * 5000},
        {"length": "9" * 5000},
        {"offset": "-1"},
        {"offset": "-4", "length": "4"},
        {"length": "-1"},
        {"offset": "1e3"},
        {"offset": "0x10"},
        {"offset": "1_000"},
        {"offset": " 1"},
        {"offset": "٣"},
        {"offset": ""},
        {"length": ""},
        {"offset": "NaN"},
    ],
)
def test_an_offset_or_length_that_leaves_the_file_or_is_no_number_is_refused(
    bundle_copy: Path, entries: dict[str, str]
) -> None:
    assert (bundle_copy / "decoder.data").stat().st_size == 567_296
    install(bundle_copy, model(external(**entries)))
    with pytest.raises(BundleCorruptError, match=r"molecule_encoder\.onnx"):
        Bundle.open(bundle_copy)


def test_the_last_byte_of_a_file_may_be_referred_to(bundle_copy: Path) -> None:
    install(bundle_copy, model(external(offset=str(567_296 - 64))))
    Bundle.open(bundle_copy)


def test_a_missing_offset_is_zero_and_a_missing_length_reaches_to_the_end(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="a.data")
    assert read(tmp_path, model(tensor)) == [ExternalTensor("w", "a.data", 0, None)]


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_two_values_for_one_entry_are_refused(bundle_copy: Path, key: str) -> None:
    tensor = external(location="../secret.bin")
    tensor.external_data.add(key=key, value="decoder.data" if key == "location" else "0")
    install(bundle_copy, model(tensor))
    with pytest.raises(BundleError, match=r"molecule_encoder\.onnx"):
        Bundle.open(bundle_copy)


def test_entries_count_also_where_the_location_flag_is_missing(bundle_copy: Path) -> None:
    tensor = external(location="../secret.bin")
    tensor.ClearField("data_location")
    install(bundle_copy, model(tensor))
    with pytest.raises(UnsafePathError):
        Bundle.open(bundle_copy)


# --- encodings that two parsers read differently ----------------------------------------------------------------------


def with_initializer_tag(tag: bytes, location: str) -> bytes:
    """A graph whose initializer's field tag is written as ``tag``."""
    skeleton = model()
    graph = skeleton.graph.SerializeToString() + field(5, external(location=location).SerializeToString(), tag=tag)
    skeleton.ClearField("graph")
    return skeleton.SerializeToString() + field(7, graph)


def test_onnx_runtime_ignores_the_upper_bits_of_a_tag(tmp_path: Path) -> None:
    # Why the next test is needed: this is another field to a parser that keeps all bits.
    (tmp_path / "decoder.data").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(with_initializer_tag(b"\xaa\x80\x80\x80\x10", "decoder.data"))
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(16, np.float32)})[0], np.arange(16))


@pytest.mark.parametrize("tag", ["aa80808010", "aa808080f001", "aa80808080808080f001", "aa8080808080808010"])
def test_a_tag_with_bits_beyond_the_32nd_is_refused(bundle_copy: Path, tag: str) -> None:
    install(bundle_copy, with_initializer_tag(bytes.fromhex(tag), "unlisted.bin"))
    with pytest.raises(BundleError, match=r"molecule_encoder\.onnx"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("tag", ["2a", "aa00", "aa8000", "aa808000", "aa80808000"])
def test_a_tag_in_more_bytes_than_it_needs_hides_nothing(bundle_copy: Path, tag: str) -> None:
    install(bundle_copy, with_initializer_tag(bytes.fromhex(tag), "unlisted.bin"))
    with pytest.raises(UnsafePathError):
        Bundle.open(bundle_copy)


def test_both_halves_of_a_message_in_two_pieces_are_read(bundle_copy: Path) -> None:
    # Protobuf merges a message that appears twice where one is expected: here the attribute's tensor.
    halves = [external(location="decoder.data").SerializeToString(), TensorProto(name="w").SerializeToString()]
    halves[1] += field(13, field(1, b"location") + field(2, b"../secret.bin"))
    attribute = AttributeProto(name="value", type=AttributeProto.TENSOR).SerializeToString()
    attribute += b"".join(field(5, half) for half in halves)
    node = constant().SerializeToString() + field(5, attribute)
    skeleton = model(external())
    graph = skeleton.graph.SerializeToString() + field(1, node)
    skeleton.ClearField("graph")
    install(bundle_copy, skeleton.SerializeToString() + field(7, graph))
    with pytest.raises(BundleError, match=r"molecule_encoder\.onnx"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x00\x00", "no valid number"),
        (b"\x02\x00", "no valid number"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x3c", "wire type 4"),
        (b"\x3e", "wire type 6"),
        (b"\x3f", "wire type 7"),
        (b"\x3a", "does not end"),
        (b"\x3a\x05abc", "passes the end"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "passes the end"),
        (b"\x3a" + b"\xff" * 11, "does not end"),
        (b"\x39\x00\x00", "passes the end"),
        (b"\xff" * 20, "does not end"),
        (field(7, field(5, field(8, b"\xff\xfe"))), "utf-8"),
        (field(7, field(5, field(13, field(1, b"location") + field(2, b"\xff")))), "utf-8"),
    ],
)
def test_malformed_protobuf_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(BundleCorruptError, match=f"graph.onnx is not an ONNX graph: .*{what}"):
        read(tmp_path, content)


def test_messages_nested_beyond_any_graph_are_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(100):
        content = field(1, field(5, field(6, content)))
    with pytest.raises(BundleCorruptError, match="nested more than"):
        read(tmp_path, field(7, content))


def test_a_graph_file_as_large_as_weights_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.touch()
    os.truncate(path, MAX_GRAPH_BYTES + 1)
    with bounded_memory(1 << 20), pytest.raises(BundleCorruptError, match="a graph without weights"):
        read_header(path)


def test_references_without_end_are_not_collected(tmp_path: Path) -> None:
    one = field(5, field(13, field(1, b"location") + field(2, b"x")))
    with bounded_memory(96 << 20), pytest.raises(BundleCorruptError, match="more than 100,000 places"):
        read(tmp_path, field(7, one * (MAX_REFERENCES + 5)))


@given(content=st.binary(max_size=400))
def test_random_bytes_are_read_or_refused_with_a_typed_error(tmp_path: Path, content: bytes) -> None:
    try:
        read(tmp_path, content)
    except BundleCorruptError as error:
        message = str(error)
    else:
        return
    assert "graph.onnx" in message


@given(name=st.sampled_from(GRAPHS), kept=st.floats(0, 1))
def test_a_truncated_graph_is_read_or_refused_with_a_typed_error(
    tiny_bundle: Path, tmp_path: Path, name: str, kept: float
) -> None:
    content = (tiny_bundle / name).read_bytes()
    try:
        read(tmp_path, content[: int(len(content) * kept)])
    except BundleCorruptError as error:
        message = str(error)
    else:
        return
    assert "graph.onnx" in message


def tensors_of(message: Any) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for child in value if isinstance(value, list) or hasattr(value, "add") else [value]:
                yield from tensors_of(child)


@given(hide=st.sampled_from(HIDING_PLACES), data=st.data())
def test_no_damage_hides_a_reference_that_protobuf_itself_sees(
    tmp_path: Path, hide: Callable[[TensorProto], ModelProto], data: st.DataObject
) -> None:
    content = bytearray(hide(external("secret", location="s.bin")).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    parsed = ModelProto()
    try:
        parsed.ParseFromString(bytes(content))
    except Exception:  # protobuf's own error type depends on its implementation
        assume(False)
    try:
        found = read(tmp_path, bytes(content))
    except BundleCorruptError:
        return
    locations = {tensor.location for tensor in found}
    for tensor in tensors_of(parsed):
        for entry in tensor.external_data:
            if entry.key == "location":
                assert entry.value in locations


# --- what ONNX Runtime makes of it ------------------------------------------------------------------------------------


def ort_format_in_protobuf() -> bytes:
    """A model in ONNX Runtime's own format that also reads as a protobuf message without any tensor.

    A flatbuffer starts with the place of its root, which may be chosen: here its four bytes and the format's mark
    are harmless protobuf fields, and padding leads to one long field over the rest.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    path = Path(os.environ["BIOMEDGPT_EDGE_CACHE"]) / "plain.ort"
    options.optimized_model_filepath = str(path)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16])],
    )
    relu = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
    ort.InferenceSession(relu.SerializeToString(), options, providers=["CPUExecutionProvider"])
    plain = path.read_bytes()
    (root,) = struct.unpack("<I", plain[:4])
    content = bytearray(struct.pack("<I", 0x8018) + plain[4:8] + bytes(0x8018 - root) + plain[8:])
    rest = len(content) - 91
    header = next(b"\x12" + varint(rest - 1 - n) for n in (1, 2, 3) if len(varint(rest - 1 - n)) == n)
    content[91 : 91 + len(header)] = header
    return bytes(content)


def test_a_model_in_the_format_of_onnx_runtime_does_not_pass_for_onnx(bundle_copy: Path) -> None:
    content = ort_format_in_protobuf()
    add_file(bundle_copy, "decoder.ort", content)
    assert ort.InferenceSession(str(bundle_copy / "decoder.ort")).get_inputs()[0].name == "x"
    fields = json.loads((bundle_copy / "manifest.json").read_text())
    fields["decoder"]["graph"] = "decoder.ort"
    (bundle_copy / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(BundleCorruptError, match=r"decoder\.ort"):
        Bundle.open(bundle_copy)


def test_a_session_reads_onnx_whatever_the_file_is_called(tmp_path: Path) -> None:
    (tmp_path / "graph.ort").write_bytes(ort_format_in_protobuf())
    signature = {"x": ("tensor(float)", [16])}
    with pytest.raises(BundleCorruptError, match=r"cannot load graph\.ort"):
        open_session(tmp_path / "graph.ort", threads=1, inputs=signature, outputs={"y": ("tensor(float)", [16])})


@pytest.mark.parametrize("name", OPENED)
def test_a_foreign_graph_is_refused_with_the_names_that_do_not_fit(bundle_copy: Path, name: str) -> None:
    install(bundle_copy, model(external()), name)
    with pytest.raises(BundleCorruptError, match=f"inputs .* of {name} are not what the manifest implies"):
        use_everything(bundle_copy)


def use_everything(path: Path) -> None:
    with Engine.load(path, threads=1, verify="sizes") as engine:
        engine.prepare("?", Molecule.from_smiles("CCO"), Protein.from_sequence("MKT"))


def rename_input(graph: GraphProto) -> None:
    graph.input[0].name = "x"
    for node in graph.node:
        node.input[:] = ["x" if name == "atom_type" else name for name in node.input]


def make_input_double(graph: GraphProto) -> None:
    graph.input[2].type.tensor_type.elem_type = TensorProto.DOUBLE


def fix_dimension(graph: GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 9


def add_input(graph: GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, []))


def add_output(graph: GraphProto) -> None:
    graph.node.append(helper.make_node("Identity", ["atom_type"], ["extra"]))
    graph.output.append(helper.make_tensor_value_info("extra", TensorProto.INT64, ["atoms"]))


def drop_shape(graph: GraphProto) -> None:
    graph.input[3].type.tensor_type.ClearField("shape")


def unknown_operator(graph: GraphProto) -> None:
    graph.node[0].op_type = "Gatherer"


def unknown_domain(graph: GraphProto) -> None:
    graph.node[0].domain = "com.example.native"


def cycle(graph: GraphProto) -> None:
    graph.node[2].input[0] = "atom_features"


def declare_wrong_size(graph: GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL)
    tensor.dims[0] += 1


@pytest.mark.parametrize(
    "change",
    [
        rename_input,
        make_input_double,
        fix_dimension,
        add_input,
        add_output,
        drop_shape,
        unknown_operator,
        unknown_domain,
        cycle,
        declare_wrong_size,
    ],
)
def test_a_changed_graph_is_refused_when_it_is_opened(bundle_copy: Path, change: Callable[[GraphProto], None]) -> None:
    changed = onnx.load(str(bundle_copy / "molecule_encoder.onnx"), load_external_data=False)
    change(changed.graph)
    install(bundle_copy, changed)
    with pytest.raises(BundleCorruptError, match=r"molecule_encoder\.onnx"):
        use_everything(bundle_copy)


def test_a_graph_whose_refusal_cannot_be_quoted_is_refused_all_the_same(
    bundle_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = (bundle_copy / "molecule_encoder.onnx").read_bytes()
    install(bundle_copy, content.replace(b"embedded", b"embedde\xff", 1))
    with pytest.raises(BundleCorruptError, match=r"cannot load molecule_encoder\.onnx"):
        use_everything(bundle_copy)
    assert "Falling back" not in capfd.readouterr().out


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_an_empty_or_cut_graph_is_refused(bundle_copy: Path, cut: int) -> None:
    content = (bundle_copy / "decoder.onnx").read_bytes()
    for rest in (b"", content[:-cut]):
        install(bundle_copy, rest, "decoder.onnx")
        with pytest.raises(BundleCorruptError, match=r"decoder\.onnx"):
            use_everything(bundle_copy)


@pytest.mark.parametrize(
    ("operator", "domain", "named"), [("Loop", "", "Loop"), ("If", "", "If"), ("Relu", "ai.onnx.ml", "ai.onnx.ml.Relu")]
)
def test_an_operator_that_no_bundle_uses_is_refused_by_name(
    bundle_copy: Path, operator: str, domain: str, named: str
) -> None:
    graph = onnx.load(bundle_copy / "molecule_encoder.onnx", load_external_data=False)
    graph.graph.node[-1].op_type, graph.graph.node[-1].domain = operator, domain
    install(bundle_copy, graph)
    with pytest.raises(BundleCorruptError, match=f"uses operators that no bundle needs: '{named}'"):
        Bundle.open(bundle_copy)


def head_of(graph: GraphProto) -> NodeProto:
    return next(node for node in graph.node if node.name == "lm_head.product")


def declare(name: str = "lm_head.product", **attributes: int) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        for attribute in next(node for node in graph.node if node.name == name).attribute:
            attribute.i = attributes.get(attribute.name, attribute.i)

    return change


def declare_twice(graph: GraphProto) -> None:
    head_of(graph).attribute.append(helper.make_attribute("N", 10**6))


def resize(name: str, shape: list[int]) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        tensor.dims[:] = shape

    return change


def share_a_name(graph: GraphProto) -> None:
    graph.initializer.append(
        TensorProto(name="lm_head.scales", data_type=TensorProto.FLOAT16, dims=[1], raw_data=b"12")
    )


def take_other_scales(graph: GraphProto) -> None:
    head_of(graph).input[2] = "layers.0.o_proj.scales_fp32"


def take_scales_of_another_cast(graph: GraphProto) -> None:
    graph.node.append(helper.make_node("Cast", ["layers.0.o_proj.scales"], ["lm_head.scales_fp32"], to=1))


def compute_the_weights(graph: GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Identity", ["lm_head.weight_int4"], ["weights"]))
    head_of(graph).input[1] = "weights"


def add_zero_points(graph: GraphProto) -> None:
    graph.initializer.append(TensorProto(name="few", data_type=TensorProto.UINT8, dims=[2], raw_data=b"12"))
    head_of(graph).input.append("few")


def add_a_bias(graph: GraphProto) -> None:
    head_of(graph).input.extend(["", "", "lm_head.scales_fp32"])


@pytest.mark.parametrize(
    "change",
    [
        *(declare(bits=bits) for bits in (0, 2, 3, 5, 8, 16, 2**40, -4)),
        *(declare(N=rows) for rows in (0, -1, 1000, 1002, 10**9)),
        *(declare(K=columns) for columns in (0, -1, 129, 10**12)),
        *(declare(block_size=size) for size in (0, 16, 32, 64, 256, -128)),
        declare_twice,
        resize("lm_head.weight_int4", [1001 * 64]),
        resize("lm_head.scales", [1]),
        share_a_name,
        take_other_scales,
        take_scales_of_another_cast,
        compute_the_weights,
        add_zero_points,
        add_a_bias,
    ],
)
def test_a_matrix_of_another_size_than_its_product_declares_is_refused_before_a_session_is_opened(
    bundle_copy: Path, change: Callable[[GraphProto], None]
) -> None:
    changed = onnx.load(str(bundle_copy / PORTABLE), load_external_data=False)
    change(changed.graph)
    install(bundle_copy, changed, PORTABLE)
    with pytest.raises(BundleCorruptError, match=rf"{PORTABLE} (contradicts itself|is not an ONNX graph)"):
        Bundle.open(bundle_copy)


def test_bundles_of_every_precision_declare_what_they_hold(
    tiny_checkpoint: Path, tiny_bundles: Callable[[str], Path], portable_demo: Path, tmp_path: Path
) -> None:
    layout, out = Layout.locate(tiny_checkpoint), tmp_path / "bundle"
    export_bundle(ExportOptions(layout, out, quantizer="rtn", lm_head="int8", proof="none"), lambda line: None)
    graphs = [portable_demo / "decoder.onnx", tiny_bundles("int4") / "protein_encoder.onnx", out / PORTABLE]
    for graph in graphs:
        header = read_header(graph)
        assert header.products
        assert not list(contradictions(header))
    assert {product.attributes["bits"] for product in header.products} == {4, 8}, "the last has a head in int8"


def test_every_operator_that_bundles_may_use_is_used_by_one(
    tiny_bundles: Callable[[str], Path], records_int8: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    layout = Layout.locate(tiny_checkpoint)
    export_bundle(ExportOptions(layout, tmp_path / "int8", "fp16", protein_encoder="int8", proof="none"), print)
    bundles = tiny_bundles("fp32"), tiny_bundles("int4"), tmp_path / "int8", records_int8

    def used(pattern: str, of: str = "") -> set[tuple[str, str]]:
        graphs = (graph for bundle in bundles for graph in bundle.glob(pattern))
        chosen = (graph for graph in graphs if graph.stem.partition("-")[2] in (of, *([] if of else ["portable"])))
        return {operator for graph in chosen for operator in read_header(graph).operators}

    assert used("*.onnx") == OPERATORS | DECODER_RECORDS_OPERATORS | PROTEIN_RECORDS_OPERATORS
    assert used("*.onnx", "standard") == STANDARD_OPERATORS
    assert used("*.onnx", "cuda") - OPERATORS == CUDA_OPERATORS - OPERATORS
    assert used("decoder*.onnx") - OPERATORS == DECODER_RECORDS_OPERATORS
    assert used("protein_encoder*.onnx") - OPERATORS == PROTEIN_RECORDS_OPERATORS


# --- a decoder in records ---------------------------------------------------------------------------------------------

HEAD, GATED = "lm_head.records", "layers.0.gate_proj+layers.0.up_proj.records"
Change = Callable[[GraphProto], None]


def change_decoder(bundle: Path, change: Change) -> None:
    graph = onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)
    change(graph.graph)
    install(bundle, graph, "decoder.onnx")


def operator_of(graph: GraphProto, records: str) -> NodeProto:
    return next(node for node in graph.node if records in node.input)


def without_attributes(graph: GraphProto) -> None:
    del operator_of(graph, HEAD).attribute[:]


def as_operator(records: str, operator: str) -> Change:
    def change(graph: GraphProto) -> None:
        operator_of(graph, records).op_type = operator

    return change


def computed(graph: GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Identity", [HEAD], ["computed"]))
    node = next(node for node in graph.node if node.op_type == "Int4Linear" and HEAD in node.input)
    node.input[1] = "computed"


def one_input_more(graph: GraphProto) -> None:
    operator_of(graph, HEAD).input.append(GATED)


def one_input_less(graph: GraphProto) -> None:
    del operator_of(graph, HEAD).input[1]


def records_of_another(graph: GraphProto) -> None:
    operator_of(graph, HEAD).input[1] = GATED


def two_of_one_name(graph: GraphProto) -> None:
    graph.initializer.append(TensorProto(name=HEAD, data_type=TensorProto.UINT8, dims=[1], raw_data=b"1"))


def test_a_bundle_in_records_declares_what_it_holds(tiny_bundle: Path) -> None:
    header = read_header(tiny_bundle / "decoder.onnx")
    assert {product.operator for product in header.products} == set(INT4_MATRICES)
    assert not list(contradictions(header))
    Bundle.open(tiny_bundle)


@pytest.mark.parametrize(
    "change",
    [
        *(declare(N=rows) for rows in (0, -1, 992, 1025, 10**9, 2**62)),
        *(declare(K=columns) for columns in (0, -1, 129, 10**9, 2**62)),
        *(declare("layers.0.gated", N=rows) for rows in (0, 320, 353, 704)),
        without_attributes,
        as_operator(HEAD, "Int4GateUp"),
        as_operator(GATED, "Int4Linear"),
        resize(HEAD, [32, 1, 2111]),
        resize(HEAD, [32, 2, 1056]),
        resize(HEAD, [32 * 2112]),
        resize(HEAD, [31, 1, 2112]),
        resize(HEAD, [0, 1, 2112]),
        computed,
        one_input_more,
        one_input_less,
        records_of_another,
        two_of_one_name,
    ],
)
def test_records_of_another_size_than_declared_are_refused_before_a_session_is_opened(
    bundle_copy: Path, change: Change
) -> None:
    change_decoder(bundle_copy, change)
    with pytest.raises(BundleCorruptError, match=r"decoder\.onnx contradicts itself"):
        Bundle.open(bundle_copy)


def places(records: str, **entries: int) -> Change:
    def change(graph: GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == records)
        for entry in tensor.external_data:
            entry.value = str(int(entry.value) + entries[entry.key]) if entry.key in entries else entry.value

    return change


def of_another_type(graph: GraphProto) -> None:
    next(tensor for tensor in graph.initializer if tensor.name == HEAD).data_type = TensorProto.INT8


def an_input_that_may_change(graph: GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info(HEAD, TensorProto.UINT8, [32, 1, 2112]))


@pytest.mark.parametrize(
    "change",
    [places(GATED, offset=-1), places(GATED, offset=-32), places(GATED, length=-1), of_another_type,
     an_input_that_may_change],
)  # fmt: skip
def test_records_that_cannot_be_used_where_they_lie_are_refused_when_the_session_is_made(
    bundle_copy: Path, change: Change
) -> None:
    change_decoder(bundle_copy, change)
    with pytest.raises(BundleCorruptError, match=r"decoder\.onnx"):
        Engine.load(bundle_copy, threads=1, verify="sizes")


def attention(graph: GraphProto) -> NodeProto:
    return next(node for node in graph.node if node.op_type == "CausalAttention")


def with_heads(**heads: int) -> Change:
    def change(graph: GraphProto) -> None:
        for attribute in attention(graph).attribute:
            attribute.i = heads.get(attribute.name, attribute.i)

    return change


def rotations(dims: list[int]) -> Change:
    """Tables of other shapes, as if the bundle had them."""

    def change(graph: GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name.startswith("rope_"):
                tensor.dims[:] = dims

    return change


@pytest.mark.parametrize("dims", [[2048, 32], [1024, 16], [2048, 15], [2048 * 16], []])
def test_rotations_for_other_heads_or_positions_than_the_manifest_declares_are_refused(
    bundle_copy: Path, dims: list[int]
) -> None:
    change_decoder(bundle_copy, rotations(dims))
    with pytest.raises(BundleCorruptError, match=r"rope_cos of decoder\.onnx is"):
        Bundle.open(bundle_copy)


def input_swapped(one: int, other: int) -> Change:
    def change(graph: GraphProto) -> None:
        inputs = attention(graph).input
        inputs[one], inputs[other] = inputs[other], inputs[one]

    return change


@pytest.mark.parametrize(
    "change",
    [*(with_heads(heads=n) for n in (0, -1, 3, 5, 2**40)), *(with_heads(kv_heads=n) for n in (0, 2, 8, -4)),
     input_swapped(1, 3), input_swapped(0, 4)],
)  # fmt: skip
def test_attention_that_contradicts_what_reaches_it_computes_nothing(bundle_copy: Path, change: Change) -> None:
    change_decoder(bundle_copy, change)
    with (
        pytest.raises(BundleCorruptError, match=r"decoder\.onnx"),
        Engine.load(bundle_copy, threads=1, verify="sizes") as engine,
    ):
        engine.ask("?", max_new_tokens=2)


def test_records_beyond_the_end_of_their_file_are_refused(bundle_copy: Path) -> None:
    change_decoder(bundle_copy, places(HEAD, offset=2**30))
    with pytest.raises(BundleCorruptError, match=r"places tensor 'lm_head\.records' at bytes"):
        Bundle.open(bundle_copy)


def test_a_portable_bundle_may_not_use_the_operators(tiny_bundle: Path, tmp_path: Path) -> None:
    relayout(tiny_bundle, tmp_path / "portable", "portable", lambda line: None)
    for name in ("decoder.data", "decoder.onnx"):
        install(tmp_path / "portable", (tiny_bundle / name).read_bytes(), name)
    with pytest.raises(BundleCorruptError, match=r"no bundle needs: 'biomedgpt\.CausalAttention, biomedgpt\.Int4"):
        Bundle.open(tmp_path / "portable")


@pytest.mark.parametrize("name", GRAPHS[1:])
def test_no_other_graph_may_use_them_in_any_bundle(bundle_copy: Path, name: str) -> None:
    node = helper.make_node("Int4Linear", ["x", "w"], ["z"], domain="biomedgpt", N=1, K=1)
    location = "decoder-portable.data" if name == PORTABLE else "decoder.data"
    install(bundle_copy, model(external(location=location), nodes=(node,)), name)
    with pytest.raises(BundleCorruptError, match=rf"{name} uses operators .* 'biomedgpt\.Int4Linear'"):
        Bundle.open(bundle_copy)


# --- a protein encoder in records -------------------------------------------------------------------------------------

INNER, OUTER = (f"layers.0.{name}.records_int8" for name in ("intermediate", "output"))


@pytest.fixture(scope="module")
def records_int8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in records whose protein encoder is int8; to be read only."""
    out = tmp_path_factory.mktemp("records_int8") / "bundle"
    chosen = {"quantizer": "rtn", "protein_encoder": "int8", "decoder_layout": "records", "proof": "none"}
    export_bundle(ExportOptions(Layout.locate(tiny_checkpoint), out, **chosen), print)  # type: ignore[arg-type]
    return out


@pytest.fixture
def records_int8_copy(records_int8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(records_int8, tmp_path / "records_int8"))


def change_encoder(bundle: Path, change: Change) -> None:
    graph = onnx.load(str(bundle / "protein_encoder.onnx"), load_external_data=False)
    change(graph.graph)
    install(bundle, graph, "protein_encoder.onnx")


def without_residual(graph: GraphProto) -> None:
    del operator_of(graph, OUTER).input[2]


def with_a_residual(graph: GraphProto) -> None:
    operator_of(graph, INNER).input.append("residue_ids")


def with_records_of_another(graph: GraphProto) -> None:
    operator_of(graph, INNER).input[1] = OUTER


def one_byte_less(graph: GraphProto) -> None:
    next(tensor for tensor in graph.initializer if tensor.name == INNER).dims[1] -= 1


def one_panel_less(graph: GraphProto) -> None:
    next(tensor for tensor in graph.initializer if tensor.name == INNER).dims[0] -= 1


def test_an_encoder_in_records_declares_what_it_holds(records_int8: Path) -> None:
    header = read_header(records_int8 / "protein_encoder.onnx")
    assert {product.operator for product in header.products} == INT8_INPUTS.keys()
    assert not list(contradictions(header))
    Bundle.open(records_int8)


@pytest.mark.parametrize(
    "change",
    [
        *(declare("layers.0.gelu", N=rows) for rows in (0, -1, 10**9, 2**62)),
        *(declare("layers.0.gelu", K=columns) for columns in (0, -1, 10**9, 2**62)),
        as_operator(INNER, "Int8LinearAdd"),
        as_operator(OUTER, "Int8Linear"),
        without_residual,
        with_a_residual,
        with_records_of_another,
        one_byte_less,
        one_panel_less,
    ],
)
def test_an_encoder_in_records_of_another_size_than_declared_is_refused(
    records_int8_copy: Path, change: Change
) -> None:
    change_encoder(records_int8_copy, change)
    with pytest.raises(BundleCorruptError, match=r"protein_encoder\.onnx contradicts itself"):
        Bundle.open(records_int8_copy)


@pytest.mark.parametrize("change", [places(INNER, offset=-1), places(INNER, offset=-32), places(INNER, length=-1)])
def test_an_encoder_whose_records_cannot_be_used_where_they_lie_is_refused_when_it_is_opened(
    records_int8_copy: Path, change: Change
) -> None:
    change_encoder(records_int8_copy, change)
    with (
        Engine.load(records_int8_copy, threads=1, verify="sizes") as engine,
        pytest.raises(BundleCorruptError, match=r"protein_encoder\.onnx"),
    ):
        engine.prepare("Hello", Protein.from_sequence("MAKE"))


def test_a_portable_bundle_may_not_have_an_encoder_in_records(records_int8: Path, tmp_path: Path) -> None:
    relayout(records_int8, tmp_path / "portable", "portable", print)
    for name in ("protein_encoder.data", "protein_encoder.onnx"):
        install(tmp_path / "portable", (records_int8 / name).read_bytes(), name)
    with pytest.raises(BundleCorruptError, match=r"no bundle needs: 'biomedgpt\.Int8Linear"):
        Bundle.open(tmp_path / "portable")


# --- what shows only when it runs -------------------------------------------------------------------------------------


def test_a_graph_that_fails_only_when_it_runs_is_a_typed_error(bundle_copy: Path) -> None:
    graph = onnx.load(bundle_copy / "molecule_encoder.onnx", load_external_data=False)
    table = next(tensor for tensor in graph.graph.initializer if tensor.name == "x_embedding1")
    table.dims[0] = 1  # Hydrogen only.
    length = next(entry for entry in table.external_data if entry.key == "length")
    length.value = str(int(length.value) // 120)
    install(bundle_copy, graph)
    with (
        Engine.load(bundle_copy, verify="sizes") as engine,
        pytest.raises(BundleCorruptError, match="cannot run the molecule encoder"),
    ):
        engine.prepare("Hello", Molecule.from_smiles("C"))
