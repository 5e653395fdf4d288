"""The manifest is read strictly: whatever it does not allow is an error that names the field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.errors import BundleError, BundleVersionError, ManifestError
from biomedgpt_edge.manifest import (
    MAX_MANIFEST_BYTES,
    PORTABLE,
    RECORDS,
    SCHEMA_VERSION,
    DecoderSpec,
    DerivedGraph,
    FileEntry,
    Manifest,
    MoleculeEncoderSpec,
    Policy,
    ProteinEncoderSpec,
    TensorFiles,
    parse_manifest,
)
from biomedgpt_edge.prompt import PromptTemplate
from support import bounded_memory

MANIFEST = Manifest(
    family="family",
    name="näme 分子",
    precision="int4",
    decoder=DecoderSpec("decoder.onnx", 2, 128, 344, 4, 2, 32, 1001, 2048, 10000.0, 1e-6, False),
    tensors=TensorFiles("embeddings.safetensors", "projections.safetensors", "tokenizer.model"),
    prompt=PromptTemplate("system ", "###", "Human", "Assistant", ("<m>", "</m>"), ("<p>", "</p>")),
    policy=Policy("licence", "https://example.org", "notice"),
    files=(FileEntry("decoder.onnx", 7, "0" * 64),),
    sources=(FileEntry("a/weights.pth", 9, "1" * 64),),
    quantization={"decoder.onnx": {"precision": "int4", "zero_padded": ["layers.0.down_proj"]}},
    parity={"fidelity": {"text": {"logits": 7.4e-7}}},
    about={},
    molecule_encoder=MoleculeEncoderSpec("molecule_encoder.onnx", 5, 300),
    protein_encoder=ProteinEncoderSpec("protein_encoder.onnx", 2, 64, 4, 256, 1e-5),
)


def raw() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(MANIFEST.to_json())
    return fields


def changed(path: str, value: object) -> str:
    """The manifest as text with the field at the dotted ``path`` replaced."""
    fields = raw()
    *parents, last = path.split(".")
    target: Any = fields
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[int(last) if last.isdigit() else last] = value
    return json.dumps(fields)


# --- what is written is read ------------------------------------------------------------------------------------------


def test_a_manifest_survives_writing_and_reading() -> None:
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST


def test_the_same_manifest_is_always_the_same_text() -> None:
    assert parse_manifest(MANIFEST.to_json()).to_json() == MANIFEST.to_json()


@pytest.mark.parametrize("encoder", ["molecule_encoder", "protein_encoder"])
def test_an_encoder_may_be_absent(encoder: str) -> None:
    assert getattr(parse_manifest(changed(encoder, None)), encoder) is None


def test_a_whole_number_is_read_where_a_float_is_wanted() -> None:
    base = parse_manifest(changed("decoder.rope_base", 500000)).decoder.rope_base
    assert base == 500000.0
    assert isinstance(base, float)


def test_a_manifest_that_cannot_be_written_as_json_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(MANIFEST, about={"loss": float("nan")}).to_json()


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_manifest_from_the_future_asks_for_an_update() -> None:
    with pytest.raises(BundleVersionError, match="Update biomedgpt-edge") as caught:
        parse_manifest(changed("schema_version", SCHEMA_VERSION + 1))
    assert (caught.value.seen, caught.value.limit) == (6, 5)


def test_the_version_is_looked_at_before_fields_that_another_version_may_have() -> None:
    fields = raw()
    fields["schema_version"] = SCHEMA_VERSION + 1
    fields["later"] = True
    del fields["policy"]
    with pytest.raises(BundleVersionError):
        parse_manifest(json.dumps(fields))


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, [1]])
def test_a_version_that_is_no_positive_number_is_refused(version: object) -> None:
    with pytest.raises(ManifestError, match="schema_version"):
        parse_manifest(changed("schema_version", version))


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '"x"', '{"schema": "another/format", "schema_version": 1}'])
def test_other_json_is_not_a_manifest(text: str) -> None:
    with pytest.raises(ManifestError, match="not a biomedgpt-edge manifest"):
        parse_manifest(text)


# --- layout of the decoder --------------------------------------------------------------------------------------------

IN_RECORDS = dataclasses.replace(MANIFEST, decoder=dataclasses.replace(MANIFEST.decoder, layout=RECORDS))


def test_a_portable_bundle_is_written_as_older_runtimes_read_it() -> None:
    assert raw()["schema_version"] == 1
    assert "layout" not in raw()["decoder"]
    assert parse_manifest(MANIFEST.to_json()).decoder.layout == PORTABLE


def test_a_bundle_in_records_has_a_version_that_older_runtimes_refuse() -> None:
    fields = json.loads(IN_RECORDS.to_json())
    assert (fields["schema_version"], fields["decoder"]["layout"]) == (2, "records-1")
    assert parse_manifest(IN_RECORDS.to_json()) == IN_RECORDS


@pytest.mark.parametrize("layout", ["records-2", "records", "", "RECORDS-1", "x" * 10_000])
def test_a_layout_that_is_not_known_is_refused_by_name(layout: str) -> None:
    with pytest.raises(BundleVersionError, match=rf"layout '{layout[:60]}'.* or export .*--decoder-layout") as caught:
        parse_manifest(IN_RECORDS.to_json().replace('"records-1"', f'"{layout}"'))
    assert (caught.value.seen, caught.value.limit) == (layout[:60], "portable, records-1")


@pytest.mark.parametrize("layout", ["1", "null", "[]", "true"])
def test_a_layout_that_is_no_text_is_refused(layout: str) -> None:
    with pytest.raises(ManifestError, match=r"'manifest\.decoder\.layout'.* should be of type str"):
        parse_manifest(IN_RECORDS.to_json().replace('"records-1"', layout))


def test_what_a_version_added_is_unknown_before_and_needed_from_then_on() -> None:
    with pytest.raises(ManifestError, match="unknown layout: schema version 1"):
        parse_manifest(changed("decoder.layout", RECORDS))
    with pytest.raises(ManifestError, match="lacks layout"):
        parse_manifest(changed("schema_version", 2))
    fields = json.loads(WITH_PORTABLE.to_json())
    for version, wrong in ((1, "unknown layout, portable"), (2, "unknown portable")):
        with pytest.raises(ManifestError, match=f"{wrong}: schema version {version}"):
            parse_manifest(json.dumps({**fields, "schema_version": version}))
    del fields["decoder"]["portable"]
    with pytest.raises(ManifestError, match="lacks portable"):
        parse_manifest(json.dumps(fields))


# --- a portable graph beside records ----------------------------------------------------------------------------------

WITH_PORTABLE = dataclasses.replace(
    IN_RECORDS,
    decoder=dataclasses.replace(IN_RECORDS.decoder, portable=DerivedGraph("sub/other.onnx", 4096, "2" * 64)),
)


def test_a_bundle_with_a_portable_graph_has_a_version_of_its_own() -> None:
    fields = json.loads(WITH_PORTABLE.to_json())
    assert fields["schema_version"] == 3
    assert fields["decoder"]["portable"] == {"graph": "sub/other.onnx", "data_size": 4096, "data_sha256": "2" * 64}
    assert parse_manifest(WITH_PORTABLE.to_json()) == WITH_PORTABLE


def test_its_data_is_named_after_it() -> None:
    assert DerivedGraph("sub/other.onnx", 4096, "2" * 64).data == "other.data"


@pytest.mark.parametrize("graph", ["", "other", "other.data", "other.onnx.data", "other.ONNX", ".onnx"])
def test_a_portable_graph_by_another_name_is_refused(graph: str) -> None:
    with pytest.raises(ManifestError, match=r"portable\.graph'.*which does not end in \.onnx"):
        parse_manifest(WITH_PORTABLE.to_json().replace("sub/other.onnx", graph))


def test_a_portable_decoder_has_none_beside_it() -> None:
    with pytest.raises(ManifestError, match=r"'sub/other\.onnx', and the decoder is portable itself"):
        parse_manifest(WITH_PORTABLE.to_json().replace('"records-1"', '"portable"'))


@pytest.mark.parametrize("value", ['"other.onnx"', "[]", "{}", '{"graph": "other.onnx"}'])
def test_a_portable_graph_that_is_not_described_is_refused(value: str) -> None:
    fields = json.loads(WITH_PORTABLE.to_json())
    fields["decoder"]["portable"] = json.loads(value)
    with pytest.raises(ManifestError, match=r"'manifest\.decoder\.portable'"):
        parse_manifest(json.dumps(fields))


@pytest.mark.parametrize("size", [-1, 2**48 + 1, 10**300])
def test_the_size_of_its_data_has_limits(size: int) -> None:
    with pytest.raises(ManifestError, match=r"portable\.data_size.*must lie between"):
        parse_manifest(WITH_PORTABLE.to_json().replace("4096", str(size)))


# --- a protein encoder in records -------------------------------------------------------------------------------------

ENCODER_IN_RECORDS = dataclasses.replace(
    WITH_PORTABLE,
    protein_encoder=dataclasses.replace(
        MANIFEST.protein_encoder,  # type: ignore[arg-type]
        layout=RECORDS,
        portable=DerivedGraph("other_encoder.onnx", 8192, "3" * 64),
    ),
)


def of_encoder(**fields: Any) -> str:
    """The text of a manifest with an encoder in records, some of whose fields are others."""
    manifest = json.loads(ENCODER_IN_RECORDS.to_json())
    manifest["protein_encoder"] |= fields
    return json.dumps(manifest)


def test_a_protein_encoder_in_records_has_a_version_that_older_runtimes_refuse() -> None:
    fields = json.loads(ENCODER_IN_RECORDS.to_json())
    assert fields["schema_version"] == 4
    assert fields["protein_encoder"]["layout"] == "records-1"
    assert fields["protein_encoder"]["portable"]["graph"] == "other_encoder.onnx"
    assert parse_manifest(ENCODER_IN_RECORDS.to_json()) == ENCODER_IN_RECORDS


def test_a_protein_encoder_that_is_portable_is_written_as_older_runtimes_read_it() -> None:
    for manifest in (MANIFEST, IN_RECORDS, WITH_PORTABLE):
        assert not {"layout", "portable"} & json.loads(manifest.to_json())["protein_encoder"].keys()


def test_a_bundle_without_one_is_written_with_the_version_of_its_decoder() -> None:
    without = dataclasses.replace(WITH_PORTABLE, protein_encoder=None)
    assert json.loads(without.to_json())["schema_version"] == 3
    assert parse_manifest(without.to_json()) == without


def test_no_older_version_knows_of_them() -> None:
    fields = json.loads(ENCODER_IN_RECORDS.to_json())
    with pytest.raises(
        ManifestError, match=r"'manifest\.protein_encoder'.* unknown layout, portable: schema version 3"
    ):
        parse_manifest(json.dumps({**fields, "schema_version": 3}))


def test_its_layout_is_refused_by_name_where_it_is_not_known() -> None:
    with pytest.raises(BundleVersionError, match=r"protein encoder lies in the layout 'records-2'"):
        parse_manifest(of_encoder(layout="records-2"))


def test_one_in_records_needs_a_portable_graph_and_a_decoder_in_records_beside_it() -> None:
    with pytest.raises(ManifestError, match="lies in records-1 without a portable graph"):
        parse_manifest(of_encoder(portable=None))
    fields = json.loads(ENCODER_IN_RECORDS.to_json())
    fields["decoder"] |= {"layout": PORTABLE, "portable": None}
    with pytest.raises(ManifestError, match="lies in records-1 without a decoder that does"):
        parse_manifest(json.dumps(fields))


def test_a_portable_one_has_none_beside_it() -> None:
    with pytest.raises(ManifestError, match=r"protein_encoder\.portable'.* and the protein encoder is portable itself"):
        parse_manifest(of_encoder(layout=PORTABLE))


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "field"),
    [("", "name"), ("decoder", "rope_base"), ("decoder", "attention_bias"), ("tensors", "tokenizer"), ("", "about")],
)
def test_a_missing_field_is_named_with_its_place(where: str, field: str) -> None:
    fields = raw()
    del (fields[where] if where else fields)[field]
    with pytest.raises(ManifestError, match=rf"manifest{'.' + where if where else ''}'.*lacks {field}"):
        parse_manifest(json.dumps(fields))


@pytest.mark.parametrize("where", ["", "decoder.", "policy.", "files.0.", "prompt."])
def test_an_unknown_field_is_named(where: str) -> None:
    with pytest.raises(ManifestError, match="unknown surprise"):
        parse_manifest(changed(f"{where}surprise", 1))


def test_missing_and_unknown_fields_are_reported_together() -> None:
    fields = raw()
    fields["decoder"]["head_dim"] = fields["decoder"].pop("head_size")
    with pytest.raises(ManifestError, match="lacks head_size and has unknown head_dim"):
        parse_manifest(json.dumps(fields))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 3),
        ("name", None),
        ("decoder", None),
        ("decoder", []),
        ("decoder.layers", "2"),
        ("decoder.layers", 2.0),
        ("decoder.layers", True),
        ("decoder.norm_eps", "1e-6"),
        ("decoder.norm_eps", True),
        ("decoder.rope_base", 10**400),
        ("decoder.attention_bias", 0),
        ("files", {}),
        ("files.0", "decoder.onnx"),
        ("files.0.size", 7.0),
        ("files.0.sha256", 0),
        ("molecule_encoder", []),
        ("prompt.molecule", "<m>"),
        ("prompt.molecule", ["<m>"]),
        ("prompt.molecule", ["<m>", "</m>", ""]),
        ("prompt.molecule.1", 1),
        ("about", []),
        ("parity", None),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_path(path: str, value: object) -> None:
    place = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))
    with pytest.raises(ManifestError) as caught:
        parse_manifest(changed(path, value))
    assert f"'manifest{place}'" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("decoder.layers", 0),
        ("decoder.layers", -1),
        ("decoder.layers", 10**300),
        ("decoder.vocabulary", 2**24 + 1),
        ("decoder.hidden_size", 2**63),
        ("decoder.context", 2**20 + 1),
        ("decoder.norm_eps", -1e-9),
        ("decoder.norm_eps", 1.5),
        ("decoder.rope_base", 0.5),
        ("decoder.rope_base", 10**15),
        ("files.0.size", -1),
        ("files.0.size", 2**48 + 1),
        ("molecule_encoder.width", 0),
        ("protein_encoder.heads", 5000),
    ],
)
def test_a_number_out_of_range_is_named_with_its_limits(path: str, value: object) -> None:
    with pytest.raises(ManifestError, match="must lie between") as caught:
        parse_manifest(changed(path, value))
    assert path.split(".")[-1] in str(caught.value)
    assert caught.value.limit is not None
    assert len(str(caught.value)) < 300


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "{", "not json", '{"schema": }', "\ufeff{}", "{}{}", "{'a': 1}"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json is not JSON"):
        parse_manifest(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["rope_base", "head_size"])
def test_numbers_that_json_does_not_have_are_refused(number: str, field: str) -> None:
    text = MANIFEST.to_json().replace(f'"{field}": {raw()["decoder"][field]}', f'"{field}": {number}')
    with pytest.raises(ManifestError, match=number):
        parse_manifest(text)


@pytest.mark.parametrize("where", ["about", "parity", "quantization"])
def test_a_float_beyond_the_largest_is_refused_even_where_anything_goes(where: str) -> None:
    text = changed(where, {"x": "HUGE"}).replace('"HUGE"', "1e999")
    with pytest.raises(ManifestError, match="not JSON"):
        parse_manifest(text)


def test_an_integer_of_many_digits_is_refused() -> None:
    text = changed("about", {"x": "HUGE"}).replace('"HUGE"', "9" * 100_000)
    with pytest.raises(ManifestError, match="not JSON"):
        parse_manifest(text)


@pytest.mark.parametrize("path", ["name", "prompt.system", "files.0.path", "about"])
def test_half_a_surrogate_pair_is_refused(path: str) -> None:
    value: object = {"x": "\ud800"} if path == "about" else "a\ud800"
    with pytest.raises(ManifestError, match="not JSON"):
        parse_manifest(changed(path, value))


def test_a_field_that_appears_twice_is_refused() -> None:
    text = MANIFEST.to_json().replace('"layers": 2,', '"layers": 2, "layers": 3,', 1)
    with pytest.raises(ManifestError, match="twice"):
        parse_manifest(text)


@pytest.mark.parametrize("depth", [100, 450, 900, 3000, 100_000])
@pytest.mark.parametrize("template", ['{"schema": %s}', '{"about": %s}'])
def test_deep_nesting_is_an_error_and_no_crash(depth: int, template: str) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(template % ("[" * depth + "]" * depth))


@pytest.mark.parametrize("depth", [100, 450, 490, 900, 960, 985])
@pytest.mark.parametrize("path", ["name", "decoder", "files", "about"])
def test_deep_nesting_in_place_of_a_value_is_an_error_and_no_crash(depth: int, path: str) -> None:
    text = changed(path, "DEEP").replace('"DEEP"', "[" * depth + "]" * depth)
    with pytest.raises(ManifestError):
        parse_manifest(text)


def test_the_largest_manifest_takes_memory_in_proportion() -> None:
    text = changed("files", "FILL").replace('"FILL"', "[" + "[]," * (MAX_MANIFEST_BYTES // 3 - 2000) + "[]]")
    with bounded_memory(48 * MAX_MANIFEST_BYTES), pytest.raises(ManifestError, match=r"files\[0\]"):
        parse_manifest(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    *raw(),
    *(f"{k}.{n}" for k, v in raw().items() if isinstance(v, dict) and k != "parity" for n in v),
    *(f"files.0.{n}" for n in raw()["files"][0]),
    *("files.0", "prompt.molecule.0"),
]


def refused_or_read(parse: Callable[[], Manifest]) -> None:
    try:
        parse().to_json()
    except BundleError as error:
        message = str(error)
    else:
        return
    assert message


@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_in_any_field_is_read_or_refused_with_a_typed_error(path: str, value: object) -> None:
    refused_or_read(lambda: parse_manifest(changed(path, value)))


@given(start=st.integers(0, 2000), length=st.integers(0, 40), new=st.text(max_size=6))
def test_damaged_text_is_read_or_refused_with_a_typed_error(start: int, length: int, new: str) -> None:
    text = MANIFEST.to_json()
    refused_or_read(lambda: parse_manifest(text[:start] + new + text[start + length :]))
