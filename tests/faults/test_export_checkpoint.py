"""What an export needs from a checkpoint, and how it names what is wrong with one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.engine import Engine
from biomedgpt_export import exporter
from biomedgpt_export.cli import main
from biomedgpt_export.errors import CheckpointError, ExportError, KeyMismatchError, ModelConfigError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families import biomedgpt_10b as family
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions, read_about
from biomedgpt_export.synthesize import train_tokenizer

FUSION = Path("fusion_ckpts/biomedgpt_10b.pth")
TEXT = Path("text_ckpts/biomedgpt-lm-7b/config.json")
PROTEIN = Path("protein_ckpts/esm2-3b/config.json")
ESM_BIAS = "prot_structure_encoder.encoder.layer.0.output.dense.bias"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Path) -> State:
    state: State = torch.load(tiny_checkpoint / FUSION, weights_only=True)
    return state


@pytest.fixture
def release(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "release"))


@pytest.fixture
def saved(release: Path, original: State) -> Callable[[State], Layout]:
    """Replaces the checkpoint's tensors: those given are added to, or None taken from, the original ones."""

    def save(changes: dict[str, torch.Tensor | None]) -> Layout:
        state = {key: value for key, value in {**original, **changes}.items() if value is not None}
        torch.save(state, release / FUSION)
        return Layout.locate(release)

    return save  # type: ignore[return-value]


def export(layout: Layout, out: Path, precision: str = "fp32", **options: Any) -> None:
    export_bundle(ExportOptions(layout, out, precision, **options), lambda line: None)  # type: ignore[arg-type]


def leaves_nothing(out: Path) -> bool:
    return [path.name for path in out.parent.iterdir() if "bundle" in path.name] == []


def edit(path: Path, **changes: object) -> None:
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


# --- keys -------------------------------------------------------------------------------------------------------------


def test_everything_missing_unexpected_and_misshapen_is_listed_at_once(
    saved: Callable[..., Layout], original: State, tmp_path: Path
) -> None:
    layout = saved(
        {
            "llm.model.norm.weight": None,
            "proj_mol.bias": None,
            "mol_structure_encoder.gnns.3.mlp.2.bias": None,
            "llm.lora.weight": torch.zeros(2, 3),
            "optimizer.step": torch.zeros(()),
            ESM_BIAS: torch.zeros(65),
            "llm.lm_head.weight": original["llm.lm_head.weight"][:-1],
            "proj_prot.weight": original["proj_prot.weight"].T.contiguous(),
        }
    )
    with pytest.raises(KeyMismatchError, match="in 8 places") as caught:
        export(layout, tmp_path / "bundle")
    assert sorted(caught.value.problems) == sorted(
        [
            "missing: llm.model.norm.weight [128]",
            "missing: proj_mol.bias [128]",
            "missing: mol_structure_encoder.gnns.3.mlp.2.bias [300]",
            "unexpected: llm.lora.weight [2, 3]",
            "unexpected: optimizer.step []",
            f"misshapen: {ESM_BIAS} is [65], the configuration implies [64]",
            "misshapen: llm.lm_head.weight is [1000, 128], the configuration implies [1001, 128]",
            "misshapen: proj_prot.weight is [64, 128], the configuration implies [128, 64]",
        ]
    )
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert leaves_nothing(tmp_path / "bundle")


def test_a_configuration_for_more_layers_lists_the_tensors_they_lack(release: Path, tmp_path: Path) -> None:
    edit(release / TEXT, num_hidden_layers=3)
    with pytest.raises(KeyMismatchError, match=r"missing: llm\.model\.layers\.2\.self_attn\.q_proj\.weight"):
        export(Layout.locate(release), tmp_path / "bundle")


BUFFERS: dict[str, torch.Tensor] = {
    "llm.model.rotary_emb.inv_freq": torch.zeros(16),
    "llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((16,), float("nan")),
    "prot_structure_encoder.rotary_embeddings.inv_freq": torch.zeros(8),
    "prot_structure_encoder.encoder.layer.1.attention.self.rotary_embeddings.inv_freq": torch.zeros(8),
    "prot_structure_encoder.embeddings.position_ids": torch.zeros(1, 1026, dtype=torch.int64),
    "prot_structure_encoder.embeddings.position_embeddings.weight": torch.zeros(1026, 64),
    "prot_structure_encoder.pooler.dense.weight": torch.zeros(64, 64),
    "prot_structure_encoder.pooler.dense.bias": torch.zeros(64),
    "prot_structure_encoder.contact_head.regression.weight": torch.zeros(1, 8),
    "prot_structure_encoder.contact_head.regression.bias": torch.zeros(1),
    "mol_structure_encoder.batch_norms.2.num_batches_tracked": torch.tensor(7),
}


def test_buffers_that_carry_no_weight_may_be_there_or_not(saved: Callable[..., Layout], tmp_path: Path) -> None:
    export(saved(BUFFERS), tmp_path / "with")
    export(saved(dict.fromkeys(BUFFERS)), tmp_path / "without")
    for name in ("decoder.data", "protein_encoder.data", "molecule_encoder.data", "projections.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key",
    [
        "llm.model.embed_tokens.weight",
        "llm.model.layers.1.mlp.down_proj.weight",
        "llm.model.norm.weight",
        "prot_structure_encoder.encoder.emb_layer_norm_after.bias",
        "prot_structure_encoder.encoder.layer.0.attention.self.key.bias",
        "mol_structure_encoder.batch_norms.4.running_var",
        "mol_structure_encoder.x_embedding1.weight",
        "proj_mol.weight",
    ],
)
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(
    saved: Callable[..., Layout], original: State, tmp_path: Path, key: str, value: float
) -> None:
    tensor = original[key].clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"'{key}' holds NaN or infinity"):
        export(saved({key: tensor}), tmp_path / "bundle")
    assert leaves_nothing(tmp_path / "bundle")


@pytest.mark.parametrize("key", ["llm.model.embed_tokens.weight", "proj_mol.weight", "proj_prot.weight"])
def test_a_value_beyond_fp16_is_refused_where_fp16_is_stored(
    saved: Callable[..., Layout], original: State, tmp_path: Path, key: str
) -> None:
    # The last row of the embeddings is that of [PAD], which no parity prompt reads.
    tensor = original[key].float().clone()
    tensor.view(-1)[-1] = 1e6
    with pytest.raises(CheckpointError, match=f"'{key}' holds values beyond fp16"):
        export(saved({key: tensor}), tmp_path / "bundle", "int4")
    if key == "llm.model.embed_tokens.weight":
        export(Layout.locate(tmp_path / "release"), tmp_path / "bundle", "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_may_be_in_another_float_type(
    saved: Callable[..., Layout], original: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    layout = saved({key: value.to(dtype) for key, value in original.items() if value.is_floating_point()})
    export(layout, tmp_path / "bundle", "int4")
    Bundle.open(tmp_path / "bundle").verify()


# --- file formats -----------------------------------------------------------------------------------------------------


def shard(folder: Path, state: State) -> Path:
    folder.mkdir()
    parts, index = [dict(list(state.items())[i::3]) for i in range(3)], {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00003.safetensors"
        safetensors.torch.save_file({key: value.contiguous() for key, value in part.items()}, folder / name)
        index.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_single_and_sharded_safetensors_export_as_the_torch_file_does(
    tiny_checkpoint: Path, original: State, tmp_path: Path
) -> None:
    whole = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.contiguous() for key, value in original.items()}, whole)
    sharded = shard(tmp_path / "shards", original)
    for name, fusion in (("torch", None), ("whole", whole), ("sharded", sharded)):
        export(Layout.locate(tiny_checkpoint, fusion=fusion), tmp_path / name, "int4")
    for path in (tmp_path / "torch").iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
            assert path.read_bytes() == (tmp_path / "sharded" / path.name).read_bytes()
    sources = [entry.path for entry in Bundle.open(tmp_path / "sharded").manifest.sources]
    assert len([path for path in sources if path.startswith("fusion/")]) == 4


def test_the_command_takes_each_part_by_a_path_of_its_own(
    tiny_checkpoint: Path, original: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.contiguous() for key, value in original.items()}, weights)
    parts = ["--fusion", str(weights), "--text", str(tiny_checkpoint / TEXT.parent)]
    parts += ["--protein", str(tiny_checkpoint / PROTEIN.parent), "--out", str(tmp_path / "bundle")]
    assert main(["bundle", "--family", "biomedgpt-10b", "--precision", "fp32", *parts]) == 0
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        assert engine.ask("What is a protein?", max_new_tokens=2).token_ids is not None
    assert "wrote" in capsys.readouterr().err


def test_everything_that_a_release_lacks_is_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"biomedgpt_10b\.pth.*tokenizer\.model.*vocab\.txt"):
        Layout.locate(tmp_path)


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "granite"}, "model_type"),
        ({"model_type": "mistral", "sliding_window": 4096}, "model_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 128.0}, "hidden_size"),
        ({"hidden_size": -128}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_attention_heads": 3, "head_dim": 32}, "3 heads"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"num_attention_heads": 16}, "head size 8"),
        ({"num_attention_heads": 256}, "head_dim"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
    ],
)
def test_a_language_model_that_the_graph_cannot_express_is_refused_by_the_fields_name(
    release: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    edit(release / TEXT, **changes)
    with pytest.raises(ModelConfigError) as caught:
        export(Layout.locate(release), tmp_path / "bundle")
    assert named in str(caught.value)
    assert str(release / TEXT) in str(caught.value)
    assert leaves_nothing(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"position_embedding_type": ...}, "position_embedding_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before"),
        ({"model_type": "bert"}, "model_type"),
        ({"is_folding_model": True}, "is_folding_model"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"token_dropout": None}, "token_dropout"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_attention_heads": 16}, "16 heads"),
        ({"vocab_size": 32}, "alphabet"),
        ({"max_position_embeddings": 512}, "512 positions"),
    ],
)
def test_a_protein_encoder_that_the_graph_cannot_express_is_refused_by_the_fields_name(
    release: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    edit(release / PROTEIN, **changes)
    with pytest.raises(ModelConfigError) as caught:
        export(Layout.locate(release), tmp_path / "bundle")
    assert named in str(caught.value)
    assert leaves_nothing(tmp_path / "bundle")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000])
@pytest.mark.parametrize("config", [TEXT, PROTEIN])
def test_a_configuration_that_is_no_json_object_is_refused(
    release: Path, tmp_path: Path, config: Path, content: bytes
) -> None:
    (release / config).write_bytes(content)
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        export(Layout.locate(release), tmp_path / "bundle")


def test_a_field_that_is_null_counts_as_left_out(release: Path, tmp_path: Path) -> None:
    edit(release / TEXT, rope_scaling=None, head_dim=None, attention_bias=None, mlp_bias=None, num_key_value_heads=None)
    edit(release / PROTEIN, emb_layer_norm_before=None)
    export(Layout.locate(release), tmp_path / "bundle")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_the_rope_base_is_found_where_either_transformers_version_writes_it(
    release: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    edit(release / TEXT, **changes)
    export(Layout.locate(release), tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.decoder.rope_base == 500.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 0.5}, "rope_base"),
        ({"rms_norm_eps": 2.0}, "norm_eps"),
        ({"max_position_embeddings": 2**21}, "context"),
    ],
)
def test_a_model_whose_manifest_no_runtime_would_read_is_refused_before_it_is_measured(
    release: Path, tmp_path: Path, changes: dict[str, object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.parity, "measure", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(exporter, "build_decoder", lambda graph, *arguments: None)
    edit(release / TEXT, **changes)
    with pytest.raises(ExportError, match=f"no bundle can hold this model: .*{named}"):
        export(Layout.locate(release), tmp_path / "bundle")
    assert leaves_nothing(tmp_path / "bundle")


# --- facts for the manifest -------------------------------------------------------------------------------------------


def test_facts_are_carried_in_the_manifest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    facts = {"trained on": ["a", 1, {"b": None}], "score": 0.5, "name": "分子"}
    (tmp_path / "about.json").write_text(json.dumps(facts))
    about, policy = read_about(tmp_path / "about.json")
    export(Layout.locate(tiny_checkpoint), tmp_path / "bundle", about=about, policy=policy)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.about == facts
    assert manifest.policy == family.POLICY


def test_a_model_of_ones_own_carries_its_own_terms(tiny_checkpoint: Path, tmp_path: Path) -> None:
    terms = {"licence": "MIT", "use_policy": "https://example.org", "notice": "Ours."}
    (tmp_path / "about.json").write_text(json.dumps({"policy": terms, "score": 1}))
    about, policy = read_about(tmp_path / "about.json")
    export(Layout.locate(tiny_checkpoint), tmp_path / "bundle", about=about, policy=policy)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert dataclasses.asdict(manifest.policy) == terms
    assert manifest.about == {"score": 1}
    assert (tmp_path / "bundle" / "POLICY.txt").read_text().startswith("Licence: MIT\n")


@pytest.mark.parametrize("terms", ["MIT", {}, {"licence": "MIT"}, {"licence": 1, "use_policy": "", "notice": ""}])
def test_incomplete_terms_are_refused(tmp_path: Path, terms: object) -> None:
    (tmp_path / "about.json").write_text(json.dumps({"policy": terms}))
    with pytest.raises(ExportError, match="needs the texts licence, use_policy, notice"):
        read_about(tmp_path / "about.json")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"3"])
def test_facts_that_are_no_json_object_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(ExportError, match=r"about\.json"):
        read_about(tmp_path / "about.json")


@pytest.mark.parametrize(
    "about", [{"x": float("nan")}, {"x": float("inf")}, {"x": "y" * (4 << 20)}, {"x": "\ud800"}], ids=range(4)
)
def test_facts_that_would_make_the_manifest_unreadable_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, about: dict[str, object]
) -> None:
    with pytest.raises(ExportError, match=r"manifest|no bundle can hold"):
        export(Layout.locate(tiny_checkpoint), tmp_path / "bundle", about=about)
    assert leaves_nothing(tmp_path / "bundle")


def test_every_refusal_is_one_line_and_an_exit_code_on_the_command_line(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(release / TEXT, hidden_act="gelu")
    arguments = ["bundle", "--family", "biomedgpt-10b", "--checkpoint", str(release), "--out", str(tmp_path / "bundle")]
    assert main(arguments) == 6
    assert capsys.readouterr().err.startswith("error: 'hidden_act'")


# --- shapes of model that the release does not have -------------------------------------------------------------------


def test_a_model_with_grouped_queries_exports(
    release: Path, saved: Callable[..., Layout], original: State, tmp_path: Path
) -> None:
    edit(release / TEXT, num_key_value_heads=2)
    keys = [key for key in original if ".k_proj" in key or ".v_proj" in key]
    export(saved({key: original[key][:64].clone() for key in keys}), tmp_path / "bundle", "int4")
    assert Bundle.open(tmp_path / "bundle").manifest.decoder.kv_heads == 2


@pytest.mark.parametrize(("precision", "head"), [("fp32", None), ("int4", None), ("int4", "int8")])
def test_a_model_with_a_tied_head_exports(
    release: Path, saved: Callable[..., Layout], tmp_path: Path, precision: str, head: str | None
) -> None:
    edit(release / TEXT, tie_word_embeddings=True)
    export(saved({"llm.lm_head.weight": None}), tmp_path / "bundle", precision, lm_head=head)
    rounding = Bundle.open(tmp_path / "bundle").manifest.parity.get("rounding", {})
    assert ("lm_head" in rounding) == (head == "int8")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_model_with_attention_biases_exports(
    release: Path, saved: Callable[..., Layout], tmp_path: Path, precision: str
) -> None:
    edit(release / TEXT, attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    biases = {
        f"llm.model.layers.{layer}.self_attn.{part}_proj.bias": torch.randn(128, generator=generator) * 0.1
        for layer in range(2)
        for part in "qkvo"
    }
    export(saved(biases), tmp_path / "bundle", precision)


def test_weights_too_small_for_a_scale_in_fp16_export_as_zeros(
    saved: Callable[..., Layout], original: State, tmp_path: Path
) -> None:
    head = original["llm.lm_head.weight"].float().clone()
    head[-1] = 1e-9
    head[7] = 0
    export(saved({"llm.lm_head.weight": head}), tmp_path / "bundle", "int4")


def test_a_missing_table_of_the_molecule_encoder_is_listed_beside_everything_else(
    saved: Callable[..., Layout], tmp_path: Path
) -> None:
    layout = saved({"mol_structure_encoder.x_embedding1.weight": None, "proj_mol.bias": None, "foo": torch.zeros(2)})
    with pytest.raises(KeyMismatchError) as caught:
        export(layout, tmp_path / "bundle")
    assert sorted(problem.split()[1] for problem in caught.value.problems) == [
        "foo", "mol_structure_encoder.x_embedding1.weight", "proj_mol.bias",
    ]  # fmt: skip


def test_tensors_that_are_no_real_numbers_are_listed(
    saved: Callable[..., Layout], original: State, tmp_path: Path
) -> None:
    layout = saved({"llm.lm_head.weight": original["llm.lm_head.weight"].to(torch.int8)})
    with pytest.raises(KeyMismatchError, match=r"not floating point: llm\.lm_head\.weight is int8"):
        export(layout, tmp_path / "bundle")


def test_a_tokenizer_of_another_model_is_refused(release: Path, tmp_path: Path) -> None:
    (release / TEXT).with_name("tokenizer.model").write_bytes(train_tokenizer(700))
    with pytest.raises(ModelConfigError, match="has 700 pieces, and the configuration a vocabulary of 1,000"):
        export(Layout.locate(release), tmp_path / "bundle")


def test_folder_names_change_no_byte_of_a_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret project"
    shutil.copytree(tiny_checkpoint, elsewhere)
    weights = elsewhere / "fusion_ckpts" / "biomedgpt_10b.pth"
    moved = weights.rename(elsewhere / "mine.pth")
    export(Layout.locate(tiny_checkpoint), tmp_path / "one")
    export(Layout.locate(elsewhere, fusion=moved), tmp_path / "two")
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


@pytest.mark.parametrize("threads", [0, -3, 5000])
def test_threads_are_checked_before_anything_is_written(tiny_checkpoint: Path, tmp_path: Path, threads: int) -> None:
    with pytest.raises(ExportError, match="threads is"):
        export(Layout.locate(tiny_checkpoint), tmp_path / "bundle", threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "biomedgpt_export.cli", "bundle", "--family", "biomedgpt-10b", "--checkpoint"]
    process = subprocess.Popen([*command, tiny_checkpoint, "--out", tmp_path / "bundle"], stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()
    process.terminate()
    assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []
