"""The synthetic checkpoint: release layout, right names and shapes, the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from biomedgpt_export import synthesize as module
from biomedgpt_export.checkpoint import open_checkpoint
from biomedgpt_export.errors import ExportError, OutputExistsError
from biomedgpt_export.synthesize import SCALES, Exact, Noise, Spread, TensorSpec, synthesize
from support import bounded_memory

WEIGHTS = "fusion_ckpts/biomedgpt_10b.pth"
TEXT = "text_ckpts/biomedgpt-lm-7b"
PROTEIN = "protein_ckpts/esm2-3b"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "release"
    synthesize(out, scale="tiny", seed=7, report=lambda line: None)
    return out


@pytest.fixture(scope="module")
def state(release: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(release / WEIGHTS, weights_only=True, mmap=True)
    return loaded


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_layout_is_that_of_the_release(release: Path) -> None:
    tokenizer = ("special_tokens_map.json", "tokenizer_config.json")
    assert sorted(digests(release)) == sorted(
        [
            WEIGHTS,
            *(f"{TEXT}/{name}" for name in ("config.json", "tokenizer.model", *tokenizer)),
            *(f"{PROTEIN}/{name}" for name in ("config.json", "vocab.txt", *tokenizer)),
        ]
    )


def test_same_seed_same_bytes(release: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "again", scale="tiny", seed=7, report=lambda line: None)
    assert digests(tmp_path / "again") == digests(release)


def test_another_seed_changes_the_weights_and_nothing_else(release: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "other", scale="tiny", seed=8, report=lambda line: None)
    before, after = digests(release), digests(tmp_path / "other")
    assert [name for name in before if before[name] != after[name]] == [WEIGHTS]


def test_values_do_not_depend_on_library_versions(state: dict[str, torch.Tensor]) -> None:
    """A frozen checksum: tests elsewhere may freeze answers of the synthetic model."""
    values = state["proj_mol.weight"].numpy().tobytes() + state["llm.lm_head.weight"].numpy().tobytes()
    assert hashlib.sha256(values).hexdigest()[:16] == "1220e8af95e57fe5"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        synthesize(out, scale="tiny", seed=0, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    class FailedReportError(Exception):
        pass

    def report(line: str) -> None:
        raise FailedReportError

    with pytest.raises(FailedReportError):
        synthesize(tmp_path / "out", scale="tiny", seed=0, report=report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scale", "seed"), [("small", 0), ("tiny", -1), ("tiny", 2**64)])
def test_bad_arguments(tmp_path: Path, scale: str, seed: int) -> None:
    with pytest.raises(ExportError):
        synthesize(tmp_path / "out", scale=scale, seed=seed, report=lambda line: None)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ExportError, match="1,000 are free"):
        synthesize(tmp_path / "out", scale="tiny", seed=0, report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    synthesize(tmp_path / "out", scale="tiny", seed=0, report=lines.append)
    assert len(lines) == 9
    assert WEIGHTS in lines[-1]


# --- names, shapes, types ---------------------------------------------------------------------------------------------


def expected_layout() -> dict[str, tuple[tuple[int, ...], str]]:
    """The table of the release's keys, written out for the tiny dimensions."""
    table: dict[str, tuple[tuple[int, ...], str]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: str, *, bias: bool = False) -> None:
        table[name if not bias else f"{name}.weight"] = (shape, dtype)
        if bias:
            table[f"{name}.bias"] = (shape[:1], dtype)

    mol, prot = "mol_structure_encoder", "prot_structure_encoder"
    add(f"{mol}.x_embedding1.weight", (120, 300), "float32")
    add(f"{mol}.x_embedding2.weight", (3, 300), "float32")
    for k in range(5):
        add(f"{mol}.gnns.{k}.mlp.0", (600, 300), "float32", bias=True)
        add(f"{mol}.gnns.{k}.mlp.2", (300, 600), "float32", bias=True)
        add(f"{mol}.gnns.{k}.edge_embedding1.weight", (6, 300), "float32")
        add(f"{mol}.gnns.{k}.edge_embedding2.weight", (3, 300), "float32")
        for part in ("weight", "bias", "running_mean", "running_var"):
            add(f"{mol}.batch_norms.{k}.{part}", (300,), "float32")
        add(f"{mol}.batch_norms.{k}.num_batches_tracked", (), "int64")
    add(f"{prot}.embeddings.word_embeddings.weight", (33, 64), "float16")
    add(f"{prot}.embeddings.position_embeddings.weight", (1026, 64), "float16")
    add(f"{prot}.embeddings.position_ids", (1, 1026), "int64")
    for j in range(2):
        layer = f"{prot}.encoder.layer.{j}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{layer}.attention.{part}", (64, 64), "float16", bias=True)
        add(f"{layer}.attention.self.rotary_embeddings.inv_freq", (8,), "float16")
        add(f"{layer}.attention.LayerNorm", (64,), "float16", bias=True)
        add(f"{layer}.intermediate.dense", (256, 64), "float16", bias=True)
        add(f"{layer}.output.dense", (64, 256), "float16", bias=True)
        add(f"{layer}.LayerNorm", (64,), "float16", bias=True)
    add(f"{prot}.encoder.emb_layer_norm_after", (64,), "float16", bias=True)
    add(f"{prot}.pooler.dense", (64, 64), "float16", bias=True)
    add(f"{prot}.contact_head.regression", (1, 8), "float16", bias=True)
    add("llm.model.embed_tokens.weight", (1001, 128), "float16")
    add("llm.lm_head.weight", (1001, 128), "float16")
    add("llm.model.norm.weight", (128,), "float16")
    for i in range(2):
        layer = f"llm.model.layers.{i}"
        for part in "qkvo":
            add(f"{layer}.self_attn.{part}_proj.weight", (128, 128), "float16")
        add(f"{layer}.self_attn.rotary_emb.inv_freq", (16,), "float16")
        add(f"{layer}.mlp.gate_proj.weight", (344, 128), "float16")
        add(f"{layer}.mlp.up_proj.weight", (344, 128), "float16")
        add(f"{layer}.mlp.down_proj.weight", (128, 344), "float16")
        add(f"{layer}.input_layernorm.weight", (128,), "float16")
        add(f"{layer}.post_attention_layernorm.weight", (128,), "float16")
    add("proj_mol", (128, 300), "float32", bias=True)
    add("proj_prot", (128, 64), "float32", bias=True)
    return table


def test_names_shapes_and_types_are_those_of_the_release(state: dict[str, torch.Tensor]) -> None:
    found = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()}
    assert found == expected_layout()


def test_our_reader_and_torch_read_the_same(release: Path, state: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(release / WEIGHTS) as checkpoint:
        assert checkpoint.keys() == list(state)
        for key, tensor in state.items():
            read = checkpoint.tensor(key)
            assert torch.equal(read, tensor)
            assert read.stride() == tensor.stride()
            assert read.data_ptr() % 64 == 0


def test_the_full_dimensions_of_the_table_of_the_10b() -> None:
    """The same code at the real sizes names the real parameters: 9.591 G of them, and 19.2 GB."""
    full = replace(
        SCALES["tiny"],
        **{"hidden": 4096, "layers": 32, "heads": 32, "ffn": 11008, "positions": 4096, "pieces": 32000},
        **{"esm_hidden": 2560, "esm_layers": 36, "esm_heads": 40, "esm_ffn": 10240},
    )
    specs = {spec.name: spec for spec in module.tensor_specs(full)}
    assert specs["prot_structure_encoder.contact_head.regression.weight"].shape == (1, 1440)
    assert specs["llm.model.embed_tokens.weight"].shape == (32001, 4096)
    assert sum(spec.elements for spec in specs.values()) == pytest.approx(9.591e9, rel=2e-3)
    assert sum(spec.nbytes for spec in specs.values()) == pytest.approx(19.2e9, rel=2e-3)


def test_memory_does_not_grow_with_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Discard(io.RawIOBase):
        """A file of any size: it counts and forgets."""

        position = 0

        def writable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def tell(self) -> int:
            return self.position

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset
            return offset

        def write(self, data: object) -> int:
            self.position += len(memoryview(data))  # type: ignore[arg-type]
            return len(memoryview(data))  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_BLOCK_VALUES", 1 << 16)
    with bounded_memory(4 << 20):
        module.write_torch_archive(Discard(), [TensorSpec("w", (1 << 11, 1 << 11), "float16", Noise(1.0))], 0)  # type: ignore[arg-type]


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_are_finite_and_their_sizes_sane(state: dict[str, torch.Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.dtype == torch.int64:
            continue
        values = tensor.float()
        assert values.isfinite().all(), key
        assert values.abs().max() < 10, key
        assert values.numel() < 4 or key.endswith("inv_freq") or values.std() > 0.005, key


def test_batch_norm_statistics_are_not_trivial(state: dict[str, torch.Tensor]) -> None:
    for k in range(5):
        norm = f"mol_structure_encoder.batch_norms.{k}"
        assert state[f"{norm}.running_mean"].std() > 0.3
        assert 0.4 < state[f"{norm}.running_var"].min() < 1 < 2 < state[f"{norm}.running_var"].max() < 3.1


@pytest.mark.parametrize(("key", "head_dim"), [("llm.model.layers.0.self_attn.rotary_emb.inv_freq", 32)])
def test_buffers_have_the_values_the_architecture_gives_them(
    state: dict[str, torch.Tensor], key: str, head_dim: int
) -> None:
    expected = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).double() / head_dim)
    assert torch.equal(state[key], expected.half())
    assert state["prot_structure_encoder.embeddings.position_ids"].tolist() == [list(range(1026))]


def test_noise_has_the_declared_moments_and_tensors_are_independent() -> None:
    def values(spec: TensorSpec, seed: int) -> np.ndarray:
        return np.concatenate(list(module.value_blocks(spec, seed)))

    first = values(TensorSpec("a", (300, 301), "float32", Noise(0.5, mean=2.0)), 3)
    second = values(TensorSpec("b", (300, 301), "float32", Noise(0.5, mean=2.0)), 3)
    assert first.shape == (300 * 301,)
    assert first.mean() == pytest.approx(2.0, abs=0.01)
    assert first.std() == pytest.approx(0.5, rel=0.01)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    spread = values(TensorSpec("c", (9999,), "float32", Spread(0.5, 3.0)), 3)
    assert spread.min() >= 0.5
    assert spread.max() < 3.0
    assert values(TensorSpec("d", (), "int64", Exact((5,))), 3).tolist() == [5]


# --- configurations and tokenizer -------------------------------------------------------------------------------------


def test_configurations_agree_with_the_weights(release: Path, state: dict[str, torch.Tensor]) -> None:
    text = json.loads((release / TEXT / "config.json").read_text())
    rows, width = state["llm.model.embed_tokens.weight"].shape
    assert (text["vocab_size"] + 1, text["hidden_size"]) == (rows, width)
    assert state["llm.model.layers.1.mlp.up_proj.weight"].shape[0] == text["intermediate_size"]
    protein = json.loads((release / PROTEIN / "config.json").read_text())
    vocabulary = (release / PROTEIN / "vocab.txt").read_text().split("\n")
    assert protein["vocab_size"] == len(vocabulary) == 33
    assert [vocabulary.index(token) for token in ("<cls>", "<pad>", "<eos>", "L", "X", "<mask>")] == [
        0,
        1,
        2,
        4,
        24,
        32,
    ]


def test_the_tokenizer_is_of_the_kind_of_llamas(release: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(release / TEXT / "tokenizer.model"))
    assert processor.get_piece_size() == json.loads((release / TEXT / "config.json").read_text())["vocab_size"]
    assert [processor.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert processor.pad_id() == -1
    assert processor.encode("</molecule>", out_type=str)[0].startswith("▁<")
    assert processor.encode("Assistant: ", out_type=str)[-1] == "▁"
    assert processor.encode("é", out_type=str) == ["▁", "<0xC3>", "<0xA9>"]
    for sample in ("two  spaces", " leading", "ﬁ ½ 苯 🧪", "C1=CC=CC=C1"):
        assert processor.decode(processor.encode(sample)) == sample


def test_transformers_loads_configurations_and_tokenizer(release: Path) -> None:
    import sentencepiece
    import transformers

    prompt = "What is the function of this protein? ### Assistant: "
    tokenizer = transformers.LlamaTokenizer.from_pretrained(release / TEXT)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(release / TEXT / "tokenizer.model"))
    assert tokenizer(prompt, add_special_tokens=False).input_ids == processor.encode(prompt)
    protein = transformers.EsmTokenizer.from_pretrained(release / PROTEIN)
    assert protein("MKT").input_ids == [0, 20, 15, 11, 2]
    assert transformers.LlamaConfig.from_pretrained(release / TEXT).rms_norm_eps == 1e-6
    assert transformers.EsmConfig.from_pretrained(release / PROTEIN).token_dropout


def test_activations_stay_sane(release: Path, state: dict[str, torch.Tensor]) -> None:
    import transformers

    config = transformers.EsmConfig.from_pretrained(release / PROTEIN)
    encoder = transformers.EsmModel(config, add_pooling_layer=False).eval()
    prefix = "prot_structure_encoder."
    weights = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    assert encoder.load_state_dict(weights, strict=False).missing_keys == []
    with torch.no_grad():
        features = encoder(torch.tensor([[0, *range(4, 24), 2]])).last_hidden_state[0]
    soft_tokens = features @ state["proj_prot.weight"].T + state["proj_prot.bias"]
    assert 0.5 < features.std() < 2
    embedded = state["llm.model.embed_tokens.weight"].float().std()
    assert math.isclose(soft_tokens.std(), embedded, rel_tol=0.5)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_full_scale_is_that_of_the_release() -> None:
    specs = module.tensor_specs(SCALES["full"])
    buffers = ("position_ids", "num_batches_tracked", "inv_freq", "running_mean", "running_var")
    assert sum(spec.elements for spec in specs if not spec.name.endswith(buffers)) == 9_593_631_501
    assert 19.1e9 < sum(spec.nbytes for spec in specs) < 19.3e9


def test_layers_can_be_left_out_or_added(tmp_path: Path) -> None:
    synthesize(tmp_path / "few", scale="tiny", seed=0, report=lambda line: None, layers=1, protein_layers=3)
    with open_checkpoint(tmp_path / "few" / WEIGHTS) as checkpoint:
        keys = checkpoint.keys()
    assert {key.split(".")[3] for key in keys if key.startswith("llm.model.layers.")} == {"0"}
    assert {key.split(".")[3] for key in keys if key.startswith("prot_structure_encoder.encoder.layer.")} == set("012")
    assert json.loads((tmp_path / "few" / TEXT / "config.json").read_text())["num_hidden_layers"] == 1
    for layers in (-1, 1001):
        with pytest.raises(ExportError, match="layers"):
            synthesize(tmp_path / "none", scale="tiny", seed=0, report=lambda line: None, layers=layers)


def test_a_tokenizer_of_llamas_size_reads_as_the_small_one_does() -> None:
    small, large = (module.train_tokenizer(pieces) for pieces in (1000, 32000))
    processors = [sentencepiece.SentencePieceProcessor(model_proto=model) for model in (small, large)]
    assert [one.vocab_size() for one in processors] == [1000, 32000]
    for text in (
        "The molecule is aspirin.",
        "\N{LEFT WHITE SQUARE BRACKET}1000 \N{LEFT WHITE SQUARE BRACKET}7",
        "  a",
        "é",
    ):
        assert processors[0].encode(text) == processors[1].encode(text)
