"""Data, tokenizer and training of the demo model, on a handful of synthetic molecules and proteins."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.demo import __main__ as command
from biomedgpt_export.demo import answers, data, evaluate
from biomedgpt_export.demo.batches import IGNORE, BatchOrder, Example, assemble, molecule_batch, protein_batch
from biomedgpt_export.demo.model import DemoConfig
from biomedgpt_export.demo.release import write_release
from biomedgpt_export.demo.tokenizer import PromptEncoder, corpus, train_tokenizer
from biomedgpt_export.demo.train import rate_factor, train
from biomedgpt_export.demo.trainer import TrainOptions
from biomedgpt_export.errors import TrainingDataError
from biomedgpt_export.exporter import ExportOptions, export_bundle, read_about
from biomedgpt_export.families.biomedgpt_10b import Layout

PIECES = 460
TINY = DemoConfig(
    pieces=PIECES, hidden=32, layers=3, heads=2, ffn=48, esm_hidden=32, esm_layers=2, esm_heads=2, esm_ffn=64,
    gin_hidden=20, gin_layers=5,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fewer_spellings() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "EVERYDAY_SPELLINGS", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training files in the published formats: alkyl benzoates and chains, random proteins."""
    path = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    smiles = [f"{'C' * n}OC(=O)c1ccc({x})cc1" for n in range(1, 13) for x in ("F", "Cl", "N", "OC", "C#N")]
    smiles += [f"{'C' * n}[C@H](F){'C' * m}O" for n in range(1, 8) for m in range(n + 1, 8)]
    smiles += [s.replace("@", "@@") for s in smiles if "@" in s]
    smiles += ["not a molecule", "[NH3]->[Cu]", "C" * 80]
    lines = "".join(f"{s}\tmade\n" for s in smiles)
    (path / data.MOLECULES_FILE).write_bytes(gzip.compress(lines.encode()))
    text = "The molecule is an alkene that has a role as a metabolite."
    (path / data.CHEBI_FILE).write_text(f"CID\tSMILES\tdescription\n1\tF/C=C\\\\F\t{text}\n", encoding="utf-8")
    sequences = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(30, 90))) for _ in range(120)]
    located = "".join(f"P{i}\t{s}\t{rng.choice(list(answers.LOCATIONS))}\tU\n" for i, s in enumerate(sequences[:80]))
    structured = "".join(
        f"S{i}\t{s}\t{''.join(rng.choices('HEC', k=len(s)))}\t{'test' if i % 7 == 0 else 'train'}\n"
        for i, s in enumerate(sequences[60:])
    )
    (path / data.LOCATION_FILE).write_bytes(gzip.compress(f"id\tsequence\tlocation\tmembrane\n{located}".encode()))
    header = "id\tsequence\tsecondary_structure\tsplit\n"
    (path / data.STRUCTURE_FILE).write_bytes(gzip.compress((header + structured).encode()))
    return path


@pytest.fixture(scope="module")
def table(folder: Path) -> data.MoleculeTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "HELD_OUT_PERCENT", 20)
        return data.molecule_table(data.molecule_sources(folder))


@pytest.fixture(scope="module")
def tokenizer(folder: Path, table: data.MoleculeTable, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(table, data.proteins(folder), folder, 0), path, PIECES)
    return Tokenizer(path)


def options(folder: Path, out: Path, **changes: object) -> TrainOptions:
    base = TrainOptions(
        folder, out, steps=5, bf16=False, molecules_per_batch=4, save_every=3, log_every=5, pieces=PIECES, sizes=TINY
    )
    return replace(base, **changes)


# ------------------------------------------------------------------------------------------------------ data


def test_no_held_out_molecule_is_in_training(table: data.MoleculeTable) -> None:
    keys = [data.split_key(data.Chem.MolFromSmiles(s.decode())) for s in table.smiles]
    held_out = {key for key, out in zip(keys, table.held_out, strict=True) if out}
    trained = {key for key, out in zip(keys, table.held_out, strict=True) if not out}
    assert held_out
    assert not held_out & trained


def test_stereoisomers_lie_on_one_side(table: data.MoleculeTable) -> None:
    sides: dict[str, set[bool]] = {}
    for smiles, out in zip(table.smiles, table.held_out, strict=True):
        flat = smiles.decode().replace("@@", "@")
        sides.setdefault(flat, set()).add(bool(out))
    assert all(len(found) == 1 for found in sides.values())


def test_a_table_holds_the_facts_of_its_molecules(table: data.MoleculeTable) -> None:
    for row in range(0, len(table), 7):
        mol = data.Chem.MolFromSmiles(table.smiles[row].decode())
        assert table.facts(row) == data.facts_of(mol, data.group_atoms(mol))
    assert 1 <= table.sizes.min() <= table.sizes.max() <= data.MAX_HEAVY_ATOMS


def test_doubled_backslashes_are_read_as_one(table: data.MoleculeTable) -> None:
    assert b"F/C=C\\F" in set(table.smiles)


def test_a_saved_table_is_used_only_for_the_same_files(table: data.MoleculeTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.npz", "one")
    again = data.MoleculeTable.load(tmp_path / "t.npz", "one")
    assert again is not None
    np.testing.assert_array_equal(again.atoms, table.atoms)
    assert data.MoleculeTable.load(tmp_path / "t.npz", "two") is None


def test_no_held_out_protein_is_in_training(folder: Path) -> None:
    split = data.proteins(folder)
    held_out = {r.sequence for r in (*split.held_out_located, *split.held_out_structured)}
    trained = {r.sequence for r in (*split.located, *split.structured)}
    assert split.held_out_located
    assert split.held_out_structured
    assert not held_out & trained


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=data.STRUCTURE_FILE):
        data.file_hashes(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (data.LOCATION_FILE, "id\tsequence\tlocation\tmembrane\nP\tMKV\n", "line 2: 2 columns"),
        (data.LOCATION_FILE, f"id\ts\tl\tm\nP\t{'M' * 40}\tMoon\tU\n", "unknown location 'Moon'"),
        (data.STRUCTURE_FILE, f"id\ts\tt\tp\nP\t{'M' * 40}\tHHH\ttrain\n", "does not match"),
    ],
)
def test_malformed_protein_files_are_refused(
    folder: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    for file in data.DATA_FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    with pytest.raises(TrainingDataError, match=message):
        data.proteins(tmp_path)


def test_a_truncated_gzip_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in data.DATA_FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes()[: 60 if file == data.LOCATION_FILE else None])
    with pytest.raises(TrainingDataError, match="cannot be read"):
        data.proteins(tmp_path)


# ------------------------------------------------------------------------------------------------- tokenizer


def test_answers_survive_the_tokenizer(table: data.MoleculeTable, tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer)
    texts = [answers.description(table.facts(row), random.Random(row)) for row in range(0, len(table), 11)]
    for text in [*texts, answers.HONEST, "Any other text: µ, 30 %, C12H22O11."]:
        ids = encoder.answer(text)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[:-1]) == text


def test_prompts_are_those_of_the_template(tokenizer: Tokenizer) -> None:
    before, after = PromptEncoder(tokenizer).prompt("molecule", answers.DESCRIBE)
    assert before[0] == tokenizer.bos_id
    assert tokenizer.decode(before[1:]).endswith("Answer questions about it. ### Human: <molecule>")
    assert tokenizer.decode(after) == "</molecule> Please describe this molecule. ### Assistant: "
    everything, nothing = PromptEncoder(tokenizer).prompt("nothing", "Hello!")
    assert tokenizer.decode(everything[1:]).endswith("### Human: Hello! ### Assistant: ")
    assert nothing == []


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    assert not {0, 1, 2} & set(tokenizer.encode("<s> </s> <unk> [PAD] <moleculeHere>"))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="tokenizer"):
        train_tokenizer(iter(["one line"]), tmp_path / "t.model", 5000)


# --------------------------------------------------------------------------------------------------- batches


def test_an_epoch_holds_every_item_once_in_an_order_of_the_seed() -> None:
    lengths = np.arange(100)
    for jitter in (None, 4.0):
        orders = [BatchOrder(lengths, 8, seed, jitter) for seed in (1, 1, 2)]
        epochs = [np.concatenate([o.batch(k) for k in range(o.per_epoch)]) for o in orders]
        assert len(set(epochs[0].tolist())) == len(epochs[0]) == 96
        np.testing.assert_array_equal(epochs[0], epochs[1])
        assert epochs[0].tolist() != epochs[2].tolist()
    assert np.ptp(orders[0].batch(0)) < 20


def test_a_molecule_batch_keeps_molecules_apart(table: data.MoleculeTable) -> None:
    rows = np.array([3, 0, 9])
    batch = molecule_batch(table, rows)
    assert np.diff(batch.starts).tolist() == table.sizes[rows].tolist()
    owner = np.repeat(np.arange(3), np.diff(batch.starts))
    np.testing.assert_array_equal(owner[batch.graph.source], owner[batch.graph.target])
    np.testing.assert_array_equal(batch.groups[1].numpy(), table.group_flags(0))


def test_a_protein_is_cut_with_its_labels() -> None:
    record = data.ProteinRecord("ACDEFGHIKL" * 9, structure="HHHHHEEEEE" * 9)
    batch = protein_batch([record], 25, random.Random(0))
    assert batch.ids.shape == (1, 27)
    for residue, label in zip(batch.records[0].sequence, batch.residues[0, 1:-1].tolist(), strict=True):
        assert label == int(residue in "GHIKL")
    assert batch.residues[0, 0] == batch.residues[0, -1] == IGNORE


def test_labels_are_the_answer_and_nothing_else() -> None:
    examples = [Example([1, 5], 0, 3, [6], [7, 8, 2]), Example([1, 5, 5], 3, 0, [], [9, 2])]
    index, labels, last = assemble(examples, 100)
    assert index.tolist() == [[1, 5, 100, 101, 102, 6, 7, 8], [1, 5, 5, 9, 0, 0, 0, 0]]
    assert labels[0].tolist() == [IGNORE] * 5 + [7, 8, 2]
    assert labels[1].tolist() == [IGNORE] * 2 + [9, 2] + [IGNORE] * 4
    assert last.tolist() == [5, 2]


# -------------------------------------------------------------------------------------------------- training


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    factors = [rate_factor(step, 100) for step in range(101)]
    assert 0 < factors[0] < 0.5
    assert max(factors) <= 1
    assert factors[100] == 0
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole = train(options(folder, tmp_path / "whole"), lambda line: None)
    for pause in (1, 5, None):
        parts = train(options(folder, tmp_path / "parts"), lambda line: None, stop_after=pause)
    assert parts.progress.plan == whole.progress.plan == {"gin": 2, "esm": 4, "joint": 5}
    for (name, one), other in zip(
        whole.trainer.model.state_dict().items(), parts.trainer.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", atol=1e-6, rtol=1e-5)


def test_a_state_of_other_options_is_refused(folder: Path, tmp_path: Path) -> None:
    train(options(folder, tmp_path, steps=1), lambda line: None)
    with pytest.raises(TrainingDataError, match="'seed': 0"):
        train(options(folder, tmp_path, steps=1, seed=1), lambda line: None)
    (tmp_path / "state" / "last.pt").write_bytes(b"half a file")
    with pytest.raises(TrainingDataError, match="cannot be read"):
        train(options(folder, tmp_path, steps=1), lambda line: None)


def release_shapes(c: DemoConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the 10B release at the sizes of ``c``."""
    d, e, g, rows = c.hidden, c.esm_hidden, c.gin_hidden, c.pieces + 1
    shapes: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (rows, d), "llm.lm_head.weight": (rows, d)}
    shapes |= {"llm.model.norm.weight": (d,), "proj_mol.weight": (d, g), "proj_mol.bias": (d,)}
    shapes |= {"proj_prot.weight": (d, e), "proj_prot.bias": (d,)}
    for i in range(c.layers):
        layer = f"llm.model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (c.ffn, d) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (d, c.ffn)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    esm = "prot_structure_encoder"
    shapes |= {f"{esm}.embeddings.word_embeddings.weight": (33, e)}
    shapes |= {f"{esm}.encoder.emb_layer_norm_after.{part}": (e,) for part in ("weight", "bias")}
    for j in range(c.esm_layers):
        linear = {f"attention.self.{name}": (e, e) for name in ("query", "key", "value")}
        linear |= {
            "attention.output.dense": (e, e),
            "intermediate.dense": (c.esm_ffn, e),
            "output.dense": (e, c.esm_ffn),
        }
        for name, shape in linear.items():
            shapes[f"{esm}.encoder.layer.{j}.{name}.weight"] = shape
            shapes[f"{esm}.encoder.layer.{j}.{name}.bias"] = shape[:1]
        for name in ("attention.LayerNorm", "LayerNorm"):
            shapes |= {f"{esm}.encoder.layer.{j}.{name}.{part}": (e,) for part in ("weight", "bias")}
    gin = "mol_structure_encoder"
    shapes |= {f"{gin}.x_embedding1.weight": (120, g), f"{gin}.x_embedding2.weight": (3, g)}
    for k in range(c.gin_layers):
        shapes |= {f"{gin}.gnns.{k}.mlp.0.weight": (2 * g, g), f"{gin}.gnns.{k}.mlp.0.bias": (2 * g,)}
        shapes |= {f"{gin}.gnns.{k}.mlp.2.weight": (g, 2 * g), f"{gin}.gnns.{k}.mlp.2.bias": (g,)}
        shapes |= {f"{gin}.gnns.{k}.edge_embedding1.weight": (6, g), f"{gin}.gnns.{k}.edge_embedding2.weight": (3, g)}
        names = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{gin}.batch_norms.{k}.{name}": (g,) for name in names}
        shapes |= {f"{gin}.batch_norms.{k}.num_batches_tracked": ()}
    return shapes


def test_a_trained_model_is_exported_and_scored_as_it_ships(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "EVERYDAY", {name: evaluate.EVERYDAY[name] for name in evaluate.SHOWN})
    checkpoint = tmp_path / "checkpoint"
    setup = options(folder, checkpoint, steps=2)
    run = train(setup, lambda line: None)
    tokenizer = checkpoint / "state" / "tokenizer.model"
    write_release(run.trainer.model, tokenizer, checkpoint, command.training_record(run, setup))
    tensors = torch.load(checkpoint / "fusion_ckpts/biomedgpt_10b.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == release_shapes(TINY)
    half = {key for key, value in tensors.items() if value.dtype == torch.float16}
    assert half == {key for key in tensors if key.startswith(("llm.", "prot_structure_encoder."))}
    record = checkpoint / "demo.json"
    about, policy = read_about(record)
    assert about["data"][data.CHEBI_FILE]["sha256"] == data.file_hashes(folder)[data.CHEBI_FILE]
    bundle = tmp_path / "bundle"
    export_bundle(ExportOptions(Layout.locate(checkpoint), bundle, "int4", about=about, policy=policy), lambda _: None)
    assert Bundle.open(bundle).manifest.policy.notice.startswith(answers.HONEST)
    arguments = ["--data", folder, "--bundle", bundle, "--cache", checkpoint / "state", "--record", record]
    assert command.main(["evaluate", *map(str, arguments), "--held-out", "2"]) == 0
    scores = json.loads(record.read_text())["scores"]["int4"]
    assert scores == json.loads(capsys.readouterr().out)
    assert set(scores["molecules"]["scores"]) == set(scores["molecules"]["commonest"])
    assert set(scores["answers"]) >= {"aspirin", "benzene"}


def test_errors_of_the_command_are_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command.main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"])
    assert code == TrainingDataError.exit_code
    assert capsys.readouterr().err.startswith("error: ")
