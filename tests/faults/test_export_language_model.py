"""BioMedGPT-LM-7B alone, as it was trained or as GPTQ has quantized it: a text bundle, or a named error.

What is quantized reaches the bundle bit for bit. Checkpoints are packed here by hand, eight values to a word as digits
of a number to base 16; those of ``data/gptq`` were written by GPTQModel.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from biomedgpt_edge import Engine, Molecule
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.errors import MissingModalityError
from biomedgpt_edge.manifest import PORTABLE
from biomedgpt_edge.onnx_header import read_header
from biomedgpt_export import exporter
from biomedgpt_export.checkpoint import JoinedCheckpoint, open_checkpoint, open_gptq
from biomedgpt_export.cli import main
from biomedgpt_export.errors import CheckpointError, ExportError, KeyMismatchError, ModelConfigError
from biomedgpt_export.exporter import export_bundle, plan_bundle
from biomedgpt_export.families import biomedgpt_10b
from biomedgpt_export.families.base import LLM
from biomedgpt_export.families.base import Layout as AnyLayout
from biomedgpt_export.families.biomedgpt_lm_7b import FAMILY, Layout
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.layouts import PORTABLE_DECODER
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize.int8_groups import nearest_int8_groups
from biomedgpt_export.stored_model import StoredModel
from biomedgpt_export.synthesize import train_tokenizer
from support import bytes_of_linears

DATA = Path(__file__).parents[1] / "data" / "gptq"
WRITTEN_BY_GPTQMODEL = sorted(path.name for path in DATA.iterdir() if path.is_dir())
TEXT = Path("text_ckpts/biomedgpt-lm-7b")
GROUP_SIZE = 32
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(tiny_checkpoint: Path) -> State:
    """The language model of the tiny release, by transformers' own names."""
    whole: State = torch.load(tiny_checkpoint / biomedgpt_10b.WEIGHTS, weights_only=True)
    buffers = ("rotary_emb.inv_freq",)
    return {
        key.removeprefix(LLM): value
        for key, value in whole.items()
        if key.startswith(LLM) and not key.endswith(buffers)
    }


@pytest.fixture
def saved(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder with the given tensors."""

    def save(tensors: State, quantize_config: dict[str, Any] | None = None, **fields: object) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(tiny_checkpoint / TEXT / "tokenizer.model", folder)
        config = json.loads((tiny_checkpoint / TEXT / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
        if quantize_config is not None:
            (folder / "quantize_config.json").write_text(json.dumps(quantize_config))
        return folder

    return save


def export(layout: AnyLayout, out: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    export_bundle(ExportOptions(layout, out, **{"proof": "none", **options}), lines.append)
    return lines


# --- as it was trained ------------------------------------------------------------------------------------------------


def test_the_language_model_alone_answers_text_and_nothing_else(
    saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    export(Layout.locate(saved(state)), tmp_path / "bundle", precision="fp32")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.family, manifest.name) == ("biomedgpt-lm-7b", "BioMedGPT-LM-7B")
    assert (manifest.molecule_encoder, manifest.protein_encoder) == (None, None)
    assert "gave no prompt format" in manifest.about["prompt"]
    assert sorted(manifest.parity["fidelity"]) == ["text"]
    names = ["text/config.json", "text/model.safetensors", "text/tokenizer.model"]
    assert sorted(entry.path for entry in manifest.sources) == names
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        assert engine.prepare("What is a protein?").text == "### Human: What is a protein? ### Assistant: "
        assert engine.ask("What is a protein?", max_new_tokens=2).finish in ("eos", "length")
        with pytest.raises(MissingModalityError):
            engine.ask("What is it?", Molecule.from_smiles("CCO"))


def test_torch_files_of_transformers_export_as_safetensors_do(
    saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    folder = saved(state)
    export(Layout.locate(folder), tmp_path / "one", precision="fp32")
    (folder / "model.safetensors").unlink()
    index, keys = {}, list(state)
    for number in range(2):
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: state[key] for key in keys[number::2]}, folder / name)
        index.update(dict.fromkeys(keys[number::2], name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    export(Layout.locate(folder), tmp_path / "two", precision="fp32")
    for name in ("decoder.data", "embeddings.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    sources = [entry.path for entry in Bundle.open(tmp_path / "two").manifest.sources]
    assert {"text/pytorch_model.bin.index.json", "text/pytorch_model-00002-of-00002.bin"} < set(sources)


def test_gptq_and_the_comparison_use_text_alone(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    calibration = tmp_path / "questions.jsonl"
    calibration.write_text('{"question": "Why?", "answer": "So."}\n{"question": "What?", "smiles": "CCO"}\n')
    lines = export(Layout.locate(saved(state)), tmp_path / "bundle", calibration=calibration, proof="quick")
    assert "calibration: 1 of 2 questions need an encoder that is not there" in lines
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.quantization["decoder.onnx"]["quantizer"] == "gptq"
    assert manifest.parity["proof"]["questions"] == 8
    assert manifest.parity["proof"]["cosine"] == {}


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(1000, 1001), (1000, 1000), (1001, 1001)], ids=["widened", "as it is", "both widened"]
)
def test_the_vocabulary_has_a_row_for_pad_or_not(
    saved: Callable[..., Path], state: State, tmp_path: Path, vocabulary: int, rows: int
) -> None:
    tables = {key: state[key][:rows] for key in ("model.embed_tokens.weight", "lm_head.weight")}
    export(Layout.locate(saved({**state, **tables}, vocab_size=vocabulary)), tmp_path / "bundle", precision="fp32")
    assert Bundle.open(tmp_path / "bundle").manifest.decoder.vocabulary == rows


@pytest.mark.parametrize(("vocabulary", "rows"), [(1002, 1002), (999, 999)])
def test_a_vocabulary_of_another_tokenizer_is_refused(
    saved: Callable[..., Path], state: State, tmp_path: Path, vocabulary: int, rows: int
) -> None:
    wide = torch.zeros(1002, 128, dtype=torch.float16)
    tables = {key: wide[:rows].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(ModelConfigError, match="1,000 pieces"):
        export(Layout.locate(saved({**state, **tables}, vocab_size=vocabulary)), tmp_path / "bundle")


def test_misfits_are_listed_by_the_names_that_the_file_has(
    saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    tables = {"lm_head.weight": state["lm_head.weight"][:1000], "score.weight": torch.zeros(2)}
    rest = {key: value for key, value in state.items() if key != "model.norm.weight"}
    with pytest.raises(KeyMismatchError) as caught:
        export(Layout.locate(saved({**rest, **tables})), tmp_path / "bundle")
    assert sorted(caught.value.problems) == [
        "misshapen: lm_head.weight is [1000, 128], the configuration implies [1001, 128]",
        "missing: model.norm.weight [128]",
        "unexpected: score.weight [2]",
    ]


def test_a_value_that_is_not_finite_is_named_as_the_file_names_it(
    saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    damaged = {"model.norm.weight": torch.full((128,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' holds NaN"):
        export(Layout.locate(saved({**state, **damaged})), tmp_path / "bundle", precision="fp32")


def test_files_that_are_missing_are_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*tokenizer\.model"):
        Layout.locate(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Layout.locate(None)


@pytest.mark.parametrize("option", ["--fusion", "--text", "--protein", "--without"])
def test_options_for_parts_that_it_lacks_are_refused(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "protein" if option == "--without" else str(tmp_path)
    command = ["bundle", "--family", "biomedgpt-lm-7b", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main([*command, option, value]) == 6
    assert f"without encoders, and {option} was given" in capsys.readouterr().err


# --- as GPTQModel has quantized it ------------------------------------------------------------------------------------


def small_tokenizer(pieces: int) -> bytes:
    """Single characters, without bytes for the others: what fits into the vocabulary of the fixtures."""
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(train_tokenizer(700))
    singles = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) == 1]
    kept = [*model.pieces[:3], *singles][:pieces]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.byte_fallback, model.trainer_spec.vocab_size = False, pieces
    return bytes(model.SerializeToString())


def require_imported(folder: Path, bundle: Path) -> None:
    """Every matrix that the checkpoint has quantized stands in the bundle's decoder, bit for bit."""

    def not_there(key: str) -> torch.Tensor:
        raise AssertionError(f"{key} is not in the bundle")

    stored = StoredModel(Bundle.open(bundle)).replacing(not_there)
    with open_gptq(folder) as checkpoint:
        assert checkpoint.quantized_keys()
        for key in checkpoint.quantized_keys():
            assert torch.equal(stored(LLM + key), checkpoint.tensor(key)), key


def export_of_gptqmodel(name: str, tmp_path: Path, *more: str) -> Path:
    """Exports it to ``bundle``; returns the checkpoint's folder."""
    folder = Path(shutil.copytree(DATA / name, tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(small_tokenizer(32))
    command = ["bundle", "--family", "biomedgpt-lm-7b", "--checkpoint", str(folder), "--proof", "none", *more]
    assert main([*command, "--out", str(tmp_path / "bundle")]) == 0
    return folder


@pytest.mark.parametrize("name", WRITTEN_BY_GPTQMODEL)
def test_it_is_there_bit_for_bit_in_records_too_or_beside_them_where_it_has_zero_points(
    name: str, tmp_path: Path
) -> None:
    folder = export_of_gptqmodel(name, tmp_path, "--decoder-layout", "records")
    require_imported(folder, tmp_path / "bundle")
    operators = {operator for _, operator in read_header(tmp_path / "bundle" / "decoder.onnx").operators}
    assert "Int4Linear" in operators
    assert ("MatMulNBits" in operators) == ("asymmetric" in name)
    for decoder in ("records", "portable"):
        with Engine.load(tmp_path / "bundle", threads=1, decoder=decoder) as engine:  # type: ignore[arg-type]
            assert engine.ask("Why?", max_new_tokens=2).token_ids


def test_what_no_operator_computes_is_portable_unless_records_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_of_gptqmodel("v1_asymmetric", tmp_path, "--lm-head", "int8")
    assert Bundle.open(tmp_path / "bundle").manifest.decoder.layout == PORTABLE
    assert not (tmp_path / "bundle" / PORTABLE_DECODER).exists()
    assert "decoder not in records: built_decoder.onnx has no int4 product" in capsys.readouterr().err
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        assert engine.ask("Why?", max_new_tokens=2).token_ids
    checkpoint = ["--family", "biomedgpt-lm-7b", "--checkpoint", str(tmp_path / "model"), "--lm-head", "int8"]
    command = ["bundle", *checkpoint, "--proof", "none", "--decoder-layout", "records"]
    assert main([*command, "--out", str(tmp_path / "records")]) == ModelConfigError.exit_code
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", WRITTEN_BY_GPTQMODEL)
def test_what_gptqmodel_has_quantized_is_in_the_bundle_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = export_of_gptqmodel(name, tmp_path)
    require_imported(folder, tmp_path / "bundle")
    # Zero points and orders among them.
    planned = plan_bundle(ExportOptions(Layout.locate(folder), tmp_path / "again", proof="none"))
    assert planned.parts["decoder"] == bytes_of_linears(tmp_path / "bundle" / "decoder.onnx")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    recipe = manifest.quantization["decoder.onnx"]
    assert (recipe["quantizer"], recipe["symmetric"]) == ("imported gptq, rtn", "asymmetric" not in name)
    names = ["config.json", "model.safetensors", "quantize_config.json", "tokenizer.model"]
    assert sorted(entry.path for entry in manifest.sources) == [f"text/{name}" for name in names]


# --- packed by hand ---------------------------------------------------------------------------------------------------


def words(values: np.ndarray) -> torch.Tensor:
    """``[A, 8 B]`` digits 0 to 15 -> int32 ``[A, B]``: eight digits of a number to base 16, the first the lowest."""
    digits = values.astype(np.uint64).reshape(len(values), -1, 8)
    return torch.from_numpy((digits * 16 ** np.arange(8, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32))


def packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix rounded to the nearest levels around 8, in groups of neighbouring columns, format ``gptq``."""
    rows, columns = weight.shape
    group_of = np.arange(columns) // GROUP_SIZE
    groups = int(group_of[-1]) + 1
    largest = np.stack([weight.float().abs().numpy()[:, group_of == group].max(1) for group in range(groups)], 1)
    scales = (largest / 7).astype(np.float16)
    values = np.clip(np.rint(weight.float().numpy() / scales.astype(np.float32)[:, group_of]) + 8, 0, 15)
    return {
        "qweight": words(values).T.contiguous(),
        "qzeros": words(np.full((groups, rows), 7)),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }


def gptq_state(state: State, *, also: tuple[str, ...] = ()) -> State:
    """The language model with the linear layers of its decoder quantized, and the matrices in ``also``."""
    tensors: State = {}
    for key, value in state.items():
        if "_proj." in key or key in also:
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{name}": part for name, part in packed(value).items()}
        else:
            tensors[key] = value
    return tensors


GPTQ = {"bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True, "quant_method": "gptq"}


def narrow(state: State) -> State:
    """Without the row for [PAD]: eight outputs share a word, and 1,001 are no multiple of it."""
    return {key: value[:1000] if value.shape[0] == 1001 else value for key, value in state.items()}


@pytest.mark.parametrize("declared", ["quantize_config.json", "config.json"])
def test_a_quantized_checkpoint_is_recognized_by_either_of_its_files(
    saved: Callable[..., Path], state: State, tmp_path: Path, declared: str
) -> None:
    tensors = gptq_state(state)
    folder = saved(tensors, GPTQ) if declared == "quantize_config.json" else saved(tensors, quantization_config=GPTQ)
    lines = export(Layout.locate(folder), tmp_path / "bundle", proof="quick")
    require_imported(folder, tmp_path / "bundle")
    assert "comparing with the source, which is the dequantized checkpoint" in lines
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.parity["proof"]["source"] == "the checkpoint, dequantized"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".gptq")] == []


def test_a_quantized_head_is_imported_too(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    folder = saved(gptq_state(narrow(state), also=("lm_head.weight",)), GPTQ)
    export(Layout.locate(folder), tmp_path / "bundle", decoder_layout="portable")
    require_imported(folder, tmp_path / "bundle")
    # Groups of 32 columns take more than ours do, which is known before; beside them lie the two rotary tables.
    decoder = Bundle.open(tmp_path / "bundle").manifest.decoder
    matrices = (tmp_path / "bundle" / "decoder.data").stat().st_size - decoder.context * decoder.head_size * 4
    options = ExportOptions(Layout.locate(folder), tmp_path / "again", proof="none", decoder_layout="portable")
    planned = plan_bundle(options)
    assert planned.parts["decoder"] == matrices
    # What is imported is what is there: nothing was rounded but the embeddings, to fp16.
    assert Bundle.open(tmp_path / "bundle").manifest.parity["rounding"]["decoder"] == 0


def test_a_plain_head_is_rounded_to_nearest(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    export(Layout.locate(saved(gptq_state(state), GPTQ)), tmp_path / "bundle")
    assert 0 < Bundle.open(tmp_path / "bundle").manifest.parity["rounding"]["decoder"] < 0.5


def test_a_plain_head_may_be_in_int8(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    folder = saved(gptq_state(state), GPTQ)
    export(Layout.locate(folder), tmp_path / "bundle", lm_head="int8")
    require_imported(folder, tmp_path / "bundle")
    stored = StoredWeights(tmp_path / "bundle" / "decoder.onnx").linear("lm_head")
    assert torch.equal(stored, nearest_int8_groups(state["lm_head.weight"]).dequantize())
    rounding = Bundle.open(tmp_path / "bundle").manifest.parity["rounding"]
    assert rounding["decoder"] == 0
    assert 0 < rounding["lm_head"] < 0.5


def test_a_head_that_is_quantized_already_cannot_be_in_int8(
    saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    folder = saved(gptq_state(narrow(state), also=("lm_head.weight",)), GPTQ)
    with pytest.raises(ExportError, match="LM head in int8 was asked for, and the checkpoint has quantized") as caught:
        export(Layout.locate(folder), tmp_path / "bundle", lm_head="int8")
    assert caught.value.seen == "int8"
    assert not (tmp_path / "bundle").exists()
    plan_bundle(ExportOptions(Layout.locate(folder), tmp_path / "bundle", lm_head="int4"))


def test_biases_that_a_tool_made_up_change_nothing(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    made_up = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.zeros(128, dtype=torch.float16)
        for layer in range(2)
        for part in "qkvo"
    }
    export(Layout.locate(saved({**gptq_state(state), **made_up}, GPTQ)), tmp_path / "bundle")
    assert not Bundle.open(tmp_path / "bundle").manifest.decoder.attention_bias


def test_a_bias_with_values_is_no_made_up_one(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.bias"
    folder = saved({**gptq_state(state), key: torch.ones(128, dtype=torch.float16)}, GPTQ)
    with pytest.raises(KeyMismatchError, match=f"unexpected: {key}"):
        export(Layout.locate(folder), tmp_path / "bundle")


@pytest.mark.parametrize("family", ["biomedgpt-lm-7b", "biomedgpt-10b"])
def test_a_matrix_that_no_linear_layer_computes_with_is_refused_before_anything_is_done(
    tiny_checkpoint: Path,
    saved: Callable[..., Path],
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    folder = saved(gptq_state(narrow(state), also=("model.embed_tokens.weight",)), GPTQ)
    if family == "biomedgpt-10b":
        layout: AnyLayout = biomedgpt_10b.Layout.locate(tiny_checkpoint, text=folder)
    else:
        layout = Layout.locate(folder)
    monkeypatch.setattr(exporter._Export, "write_tensors", lambda self: pytest.fail("something was written"))
    monkeypatch.setattr(exporter, "quantize_model", lambda *arguments, **more: pytest.fail("work was begun"))
    for begin in (export_bundle, lambda options, report: plan_bundle(options)):
        with pytest.raises(CheckpointError, match=r"has quantized model\.embed_tokens\.weight") as caught:
            begin(ExportOptions(layout, tmp_path / "bundle"), print)
        assert caught.value.seen == ["model.embed_tokens.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "fp16"}, "precision fp16 was asked for"),
        ({"precision": "fp32"}, "precision fp32 was asked for"),
        ({"quantizer": "gptq"}, "the quantizer gptq was asked for"),
        ({"quantizer": "rtn"}, "the quantizer rtn was asked for"),
        ({"calibration": Path("questions.jsonl")}, "GPTQ has nothing to quantize"),
    ],
)
def test_options_for_what_the_checkpoint_has_decided_are_refused(
    saved: Callable[..., Path], state: State, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ExportError, match=complaint):
        export(Layout.locate(saved(gptq_state(state), GPTQ)), tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_groups_that_a_bundle_cannot_hold_are_refused_before_the_rest_is_quantized(
    tiny_checkpoint: Path, saved: Callable[..., Path], state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.GROUP_SIZE", 8)
    monkeypatch.setattr(exporter, "quantize_model", lambda *arguments, **more: pytest.fail("work was begun"))
    folder = saved(gptq_state(state), {**GPTQ, "group_size": 8})
    layout = biomedgpt_10b.Layout.locate(tiny_checkpoint, text=folder)
    with pytest.raises(CheckpointError, match="groups of 8 columns"):
        export(layout, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="groups of 8 columns"):
        plan_bundle(ExportOptions(layout, tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_way_of_quantizing_is_refused(saved: Callable[..., Path], state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="method is 'awq'"):
        export(Layout.locate(saved(state, quantization_config={"quant_method": "awq"})), tmp_path / "bundle")


# --- inside BioMedGPT-10B ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_quantized_folder_in_the_place_of_the_texts_supplies_the_decoder(
    tiny_checkpoint: Path, saved: Callable[..., Path], state: State, tmp_path: Path, quantizer: str
) -> None:
    calibration = tmp_path / "questions.jsonl"
    calibration.write_text('{"question": "Where?", "sequence": "MKVAAL"}\n')
    folder = saved(gptq_state(state), GPTQ)
    layout = biomedgpt_10b.Layout.locate(tiny_checkpoint, text=folder)
    more = {"calibration": calibration} if quantizer == "gptq" else {}
    export(layout, tmp_path / "bundle", quantizer=quantizer, **more)
    require_imported(folder, tmp_path / "bundle")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.family == "biomedgpt-10b"
    assert manifest.quantization["decoder.onnx"]["quantizer"] == "imported gptq, rtn"
    assert manifest.quantization["protein_encoder.onnx"]["quantizer"] == quantizer
    assert {"fusion", "text/model.safetensors"} < {entry.path for entry in manifest.sources}


def test_the_quantizer_has_nothing_to_do_without_a_protein_encoder(
    tiny_checkpoint: Path, saved: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    layout = biomedgpt_10b.Layout.locate(tiny_checkpoint, text=saved(gptq_state(state), GPTQ), without=["protein"])
    with pytest.raises(ExportError, match="the quantizer rtn was asked for"):
        export(layout, tmp_path / "bundle", quantizer="rtn")


def test_a_part_that_stands_for_another_hides_all_of_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "llm.a": torch.zeros(1), "llm.b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    one, two = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    with JoinedCheckpoint({LLM: two, "": one}) as joined:
        assert sorted(joined.keys()) == ["a", "llm.a"]
        assert (joined.shape("llm.a"), joined.shape("a"), joined.dtype("llm.a")) == ((2,), (1,), "float32")
        assert torch.equal(joined.tensor("llm.a"), torch.ones(2))
        assert (joined.original_name("llm.a"), joined.original_name("a")) == ("a", "a")
        assert joined.files == [two.files[0], one.files[0]]
        with pytest.raises(KeyMismatchError, match="no tensor named 'b'"):
            joined.tensor("llm.b")
    with JoinedCheckpoint({LLM: two}) as alone, pytest.raises(KeyMismatchError, match="no tensor named 'a'"):
        alone.tensor("a")


def test_the_familys_terms_and_title_are_its_own() -> None:
    assert FAMILY.policy != biomedgpt_10b.FAMILY.policy
    assert FAMILY.template.system == ""
    assert FAMILY.template.separator == biomedgpt_10b.PROMPT_TEMPLATE.separator
