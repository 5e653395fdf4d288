"""Data, tokenizer and training of the demo model, on a handful of synthetic molecules and proteins."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.molecule_graph import featurize
from biomedgpt_edge.tokenizer import Tokenizer
from biomedgpt_export.demo import answers, commands, data, molecules
from biomedgpt_export.demo.__main__ import main
from biomedgpt_export.demo.batches import IGNORE, BatchOrder, Example, assemble, example, molecule_batch
from biomedgpt_export.demo.chemistry import facts
from biomedgpt_export.demo.conversations import (
    Conversation,
    Exchange,
    about_molecule,
    molecule_chat,
    protein_chat,
    reworded,
)
from biomedgpt_export.demo.model import DemoConfig
from biomedgpt_export.demo.molecules import (
    MoleculeTable,
    PreparedMolecules,
    prepared_molecules,
    screen,
    shown_molecules,
)
from biomedgpt_export.demo.protein_teacher import MEMBRANE_LABELS, PLACES
from biomedgpt_export.demo.proteins import ProteinFacts, ProteinRecord, proteins
from biomedgpt_export.demo.questions import WORDINGS
from biomedgpt_export.demo.release import write_release
from biomedgpt_export.demo.scoring import wordings
from biomedgpt_export.demo.similarity import identity
from biomedgpt_export.demo.tokenizer import PromptEncoder, corpus, train_tokenizer
from biomedgpt_export.demo.train import rate_factor, train
from biomedgpt_export.demo.trainer import Deck, TrainOptions
from biomedgpt_export.errors import CheckpointError, TrainingDataError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions, read_about
from biomedgpt_export.quantize.rtn import RoundToNearest

PIECES = 460
TINY = DemoConfig(
    pieces=PIECES, hidden=32, layers=3, heads=2, ffn=48, esm_hidden=32, esm_layers=2, esm_heads=2, esm_ffn=64,
    gin_hidden=20, gin_layers=5,
)  # fmt: skip


# Shown in training here, in place of six hundred: an acid, a salt, a labelled solvent.
SHOWN = {"propionic acid": "CCC(=O)O", "sodium chloride": "[Na+].[Cl-]", "heavy water": "[2H]O[2H]"}


@pytest.fixture(scope="module", autouse=True)
def few_molecules() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(molecules, "EVERYDAY", SHOWN)
        patch.setattr(molecules, "_SPELLINGS", {**molecules._SPELLINGS, "well-known": 3, "everyday": 2})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training files in the published formats: alkyl benzoates and chains, random proteins."""
    path = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    smiles = [f"{'C' * n}OC(=O)c1ccc({x})cc1" for n in range(1, 13) for x in ("F", "Cl", "N", "OC", "C#N")]
    smiles += [f"{'C' * n}[C@H](F){'C' * m}O" for n in range(1, 8) for m in range(n + 1, 8)]
    smiles += [s.replace("@", "@@") for s in smiles if "@" in s]
    smiles += ["not a molecule", "*CC", *("C" * n for n in (120, 121, 122)), "CC#N", "CC#N.Cl"]
    lines = "".join(f"{s}\tmade\n" for s in smiles)
    (path / data.MOLECULES_FILE).write_bytes(gzip.compress(lines.encode()))
    text = "The molecule is an alkene that has a role as a metabolite."
    chebi = [r"F/C=C\\F", *("N" + "C" * n + "(=O)O" for n in range(2, 14))]
    rows = "".join(f"{i}\t{smiles}\t{text}\n" for i, smiles in enumerate(chebi))
    (path / data.CHEBI_FILE).write_text(f"CID\tSMILES\tdescription\n{rows}", encoding="utf-8")
    sequences = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(30, 90))) for _ in range(120)]
    located = "".join(
        f"P{i}\t{s}\t{rng.choice(list(answers.LOCATIONS))}\t{'MSU'[i % 3]}\n" for i, s in enumerate(sequences[:80])
    )
    structured = "".join(
        f"S{i}\t{s}\t{''.join(rng.choices('HEC', k=len(s)))}\t{'test' if i % 7 == 0 else 'train'}\n"
        for i, s in enumerate(sequences[60:])
    )
    (path / data.LOCATION_FILE).write_bytes(gzip.compress(f"id\tsequence\tlocation\tmembrane\n{located}".encode()))
    header = "id\tsequence\tsecondary_structure\tsplit\n"
    (path / data.STRUCTURE_FILE).write_bytes(gzip.compress((header + structured).encode()))
    return path


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedMolecules:
    return prepared_molecules(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def table(prepared: PreparedMolecules) -> MoleculeTable:
    return prepared.table


@pytest.fixture(scope="module")
def tokenizer(folder: Path, table: MoleculeTable, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(table, proteins(folder), 0), path, PIECES)
    return Tokenizer(path)


def options(folder: Path, out: Path, **changes: object) -> TrainOptions:
    base = TrainOptions(
        folder, out, steps=5, bf16=False, molecules_per_batch=4, save_every=3, log_every=5, pieces=PIECES, sizes=TINY
    )
    return replace(base, **changes)


# ------------------------------------------------------------------------------------------------------ data


def test_no_held_out_molecule_is_in_training(prepared: PreparedMolecules) -> None:
    unseen = [one.smiles for one in molecules.well_known() if not one.shown]
    held_out = {mark for s in (*prepared.same_source, *prepared.chebi, *unseen) for mark in screen(s).main}
    assert prepared.same_source
    assert prepared.chebi
    for smiles in prepared.training:
        assert held_out.isdisjoint(screen(smiles).marks), smiles
    assert "CC#N.Cl" not in prepared.training, "acetonitrile is held out, so it is in no salt either"


def test_what_is_made_of_training_molecules_is_held_out_nowhere(prepared: PreparedMolecules) -> None:
    unseen = [one.smiles for one in molecules.well_known() if not one.shown]
    held_out = {mark for s in (*prepared.same_source, *prepared.chebi, *unseen) for mark in screen(s).main}
    for smiles in prepared.training:
        for text in molecules.training_spellings((smiles, "")):
            assert held_out.isdisjoint(screen(text).marks), text


@pytest.mark.parametrize(
    ("one", "other"),
    [("C[C@H](F)O", "C[C@@H](F)O"), ("CC(=O)[O-]", "CC(=O)O"), ("[2H]O[2H]", "O"), ("OCC", "CCO"),
     ("Nc1ncnc2[nH]cnc12", "Nc1ncnc2nc[nH]c12"), ("NCCc1c[nH]cn1", "NCCc1cnc[nH]1")],
)  # fmt: skip
def test_what_looks_the_same_to_the_encoder_has_the_same_key(one: str, other: str) -> None:
    assert screen(one).key == screen(other).key


@pytest.mark.parametrize(
    ("one", "other"), [("O=c1cccc[nH]1", "Oc1ccccn1"), ("CC(=O)CC(C)=O", "CC(=O)CC(C)=O"), ("NC(=O)C", "N=C(O)C")]
)
def test_tautomers_share_a_mark(one: str, other: str) -> None:
    assert not screen(one).main.isdisjoint(screen(other).main)


def test_a_salt_is_on_the_side_of_its_main_part() -> None:
    salt, acid = screen("[Na+].CCCC(=O)[O-]"), screen("CCCC(=O)O")
    assert salt.main == acid.main <= salt.marks
    assert screen("[Na+].[Cl-]").marks.isdisjoint(acid.marks)


def test_what_is_left_out_is_counted(prepared: PreparedMolecules) -> None:
    left_out = dict(prepared.left_out)
    assert left_out.pop("held out, or like something held out") >= len(prepared.same_source) + len(prepared.chebi)
    assert left_out.pop("spellings like another one") > 0
    # One of the three chains that are too long is held out.
    assert left_out == {"unreadable": 1, "without features": 1, "larger than 100 heavy atoms": 2}


def test_the_split_depends_on_the_molecules_only(folder: Path, prepared: PreparedMolecules, tmp_path: Path) -> None:
    for file in data.DATA_FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    lines = gzip.decompress((folder / data.MOLECULES_FILE).read_bytes()).decode().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / data.MOLECULES_FILE).write_bytes(gzip.compress("".join(lines).encode()))
    again = molecules.split(tmp_path)
    keys = [{screen(smiles).key for smiles in one.same_source} for one in (again, prepared)]
    assert keys[0] == keys[1]
    assert again.chebi == prepared.chebi


def test_a_table_holds_the_facts_of_its_molecules(prepared: PreparedMolecules, table: MoleculeTable) -> None:
    some = [smiles for smiles in prepared.training if len(smiles) < 100][-9:]
    last, _ = molecules.molecule_table([(smiles, "") for smiles in some])
    known = [facts(molecules.Chem.MolFromSmiles(smiles)) for smiles in some]
    assert set(known) <= {last.facts(row) for row in range(len(last))}
    assert table.numbers[:, 0].max() <= molecules.MAX_HEAVY_ATOMS


def test_small_molecules_and_salts_come_in_several_spellings() -> None:
    spelled = {smiles: molecules.training_spellings((smiles, "")) for smiles in ("CCO", "CC(C)Cc1ccc(cc1)CN.Cl")}
    for smiles, texts in spelled.items():
        assert len(texts) >= 4
        assert {screen(text).key for text in texts[:4]} == {screen(smiles).key}
    assert len(molecules.training_spellings(("CCCCCCCCCCCCCCCCCCO", ""))) <= 2


def test_molecules_of_chebi_and_large_ones_come_in_several_spellings() -> None:
    chain, long_chain = f"{'C' * 17}O", f"{'C' * 49}O"
    assert len(molecules.training_spellings((chain, "ChEBI"))) >= 6
    assert len(molecules.training_spellings((long_chain, ""))) >= 8
    assert len(molecules.training_spellings((long_chain, "ChEBI"))) >= 8, "the rarer of role and kind decides"


def test_molecules_of_chebi_are_known_as_such(folder: Path) -> None:
    roles = dict(molecules.split(folder).training)
    assert {roles[smiles] for smiles in roles if smiles.startswith("NCCCCC")} == {"ChEBI"}
    assert {roles[smiles] for smiles in roles if smiles.startswith("CCCCOC")} == {""}
    assert {roles[smiles] for smiles in SHOWN.values()} == {"everyday"}


@pytest.mark.parametrize("smiles", ["CCC(=O)O", "CCCCN", "CCS(=O)(=O)O", "c1ccccc1"])
def test_made_salts_are_salts_of_the_molecule(smiles: str) -> None:
    mol = molecules.Chem.MolFromSmiles(smiles)
    made = molecules._salted(mol, random.Random(1))
    assert len(made) == int(smiles != "c1ccccc1")
    for text in made:
        assert screen(text).problem == ""
        assert len(text.split(".")) == 2
        assert screen(text).main == screen(smiles).main
        assert molecules.Chem.GetFormalCharge(molecules.Chem.MolFromSmiles(text)) == 0


def test_inputs_that_look_alike_come_once_and_are_counted() -> None:
    table, left_out = molecules.molecule_table(
        [("C[N+](C)(C)C", ""), ("CC(C)(C)C", ""), ("c1ccccc1CCCCCCCCCCC", "")] * 2
    )
    assert len(table) == len(
        {(table.formulas[i], table.atoms[table.atom_slice(i)].tobytes()) for i in range(len(table))}
    )
    assert left_out["spellings like another one"] > 3


def test_deuterium_is_seen_as_atoms_and_said_as_hydrogen() -> None:
    mol = molecules.Chem.MolFromSmiles("CCO")
    (text,) = molecules._deuterated(mol, random.Random(1))
    labelled = molecules.Chem.MolFromSmiles(text)
    assert len(featurize(labelled).atoms) > 3
    assert facts(labelled) == facts(mol)


def test_doubled_backslashes_are_read_as_one(folder: Path) -> None:
    assert data.chebi_lines(folder)[0] == "F/C=C\\F"


def test_a_saved_table_is_used_only_for_the_same_files(
    folder: Path, prepared: PreparedMolecules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    prepared_molecules(folder, tmp_path, report=said.append)
    assert said == [f"preparing molecules; this takes minutes, once: they are kept in {tmp_path / 'molecules.npz'}"]
    with monkeypatch.context() as patch:
        patch.setattr(molecules, "split", None)  # would fail if it were called
        again = prepared_molecules(folder, tmp_path, report=pytest.fail)
    np.testing.assert_array_equal(again.table.atoms, prepared.table.atoms)
    assert (again.training, again.left_out) == (prepared.training, prepared.left_out)
    monkeypatch.setattr(molecules, "EVERYDAY", {})
    assert len(prepared_molecules(folder, tmp_path).training) == len(prepared.training) - len(SHOWN)


def test_no_held_out_protein_is_in_training_nor_one_like_it(folder: Path) -> None:
    split = proteins(folder)
    held_out = {r.sequence for r in (*split.held_out_located, *split.held_out_structured)}
    trained = {r.sequence for r in (*split.located, *split.structured)}
    assert split.held_out_located
    assert split.held_out_structured
    assert not held_out & trained


def test_relatives_of_a_held_out_protein_are_held_out(folder: Path, tmp_path: Path) -> None:
    for file in data.DATA_FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    rows = gzip.decompress((folder / data.LOCATION_FILE).read_bytes()).decode()
    mutated = [f"X{i}\t{r.sequence[:20]}W{r.sequence[21:]}\tNucleus\tU\n" for i, r in enumerate(located(folder))]
    (tmp_path / data.LOCATION_FILE).write_bytes(gzip.compress((rows + "".join(mutated)).encode()))
    split = proteins(tmp_path)
    assert len(split.held_out_located) >= 2
    for one in split.held_out_located:
        assert all(identity(one.sequence, other.sequence) < 0.9 for other in split.located)


def located(folder: Path) -> list[ProteinRecord]:
    split = proteins(folder)
    return [*split.located, *split.held_out_located]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=data.STRUCTURE_FILE):
        data.file_hashes(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (data.LOCATION_FILE, "id\tsequence\tlocation\tmembrane\nP\tMKV\n", "line 2: 2 columns"),
        (data.LOCATION_FILE, f"id\ts\tl\tm\nP\t{'M' * 40}\tMoon\tU\n", "unknown location 'Moon'"),
        (data.LOCATION_FILE, f"id\ts\tl\tm\nP\t{'M' * 40}\tNucleus\tX\n", "membrane is 'X'"),
        (data.LOCATION_FILE, f"id\ts\tl\tm\n\t{'M' * 40}\tNucleus\tM\n", "line 2: the first column is empty"),
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
        proteins(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:60], lambda raw: raw[:40] + b"damaged!" + raw[48:], lambda raw: b""]
)
def test_a_damaged_gzip_is_refused(folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for file in data.DATA_FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / data.LOCATION_FILE).write_bytes(damage((folder / data.LOCATION_FILE).read_bytes()))
    with pytest.raises(TrainingDataError, match=r"cannot be read|is empty"):
        proteins(tmp_path)


# ------------------------------------------------------------------------------------------------- tokenizer


def test_answers_survive_the_tokenizer(table: MoleculeTable, tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer)
    texts = [answers.description(table.facts(row), random.Random(row)) for row in range(0, len(table), 11)]
    for text in [*texts, answers.HONEST, "Any other text: µ, 30 %, C12H22O11."]:
        ids = encoder.answer(text)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[:-1]) == text


def test_prompts_are_those_of_the_template(tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer)
    asked = Exchange("Please describe this molecule.", "An answer.", "molecule", (0,))
    before, after = encoder.texts(Conversation((asked,)))
    assert before[0] == tokenizer.bos_id
    assert tokenizer.decode(before[1:]).endswith("Answer questions about it. ### Human: <molecule>")
    assert tokenizer.decode(after) == "</molecule> Please describe this molecule. ### Assistant: "
    (everything,) = encoder.texts(Conversation((Exchange("Hello!", "Hi."),)))
    assert tokenizer.decode(everything[1:]).endswith("### Human: Hello! ### Assistant: ")
    _, chat = encoder.texts(Conversation((asked, Exchange("And its rings?", "None."))))
    ending = "### Assistant: An answer. ### Human: And its rings? ### Assistant: "
    assert tokenizer.decode(chat).endswith(ending)


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


def test_a_molecule_batch_keeps_molecules_apart(table: MoleculeTable) -> None:
    rows = np.array([3, 0, 9])
    batch = molecule_batch(table, rows)
    assert np.diff(batch.starts).tolist() == table.sizes[rows].tolist()
    owner = np.repeat(np.arange(3), np.diff(batch.starts))
    np.testing.assert_array_equal(owner[batch.graph.source], owner[batch.graph.target])
    np.testing.assert_array_equal(batch.groups[1].numpy(), table.group_flags(0))


def test_soft_tokens_stand_where_the_inputs_are() -> None:
    made = example([[1, 5], [6], [7]], [range(3), range(8, 10)], [2])
    assert made == Example([1, 5, -1, -2, -3, 6, -9, -10, 7], [2])
    with pytest.raises(ValueError, match="zip"):
        example([[1, 5], [6]], [range(3), range(8, 10)], [2])


def test_labels_are_the_answer_and_nothing_else() -> None:
    examples = [Example([1, 5, -1, -2, -3, 6], [7, 8, 2]), Example([1, 5, 5], [9, 2])]
    index, labels, last = assemble(examples, 100)
    assert index.tolist() == [[1, 5, 100, 101, 102, 6, 7, 8], [1, 5, 5, 9, 0, 0, 0, 0]]
    assert labels[0].tolist() == [IGNORE] * 5 + [7, 8, 2]
    assert labels[1].tolist() == [IGNORE] * 2 + [9, 2] + [IGNORE] * 4
    assert last.tolist() == [5, 2]


# --------------------------------------------------------------------------------------------- conversations


def test_the_answer_belongs_to_the_last_molecule_given() -> None:
    known = [facts(molecules.Chem.MolFromSmiles(smiles)) for smiles in ("CCO", "c1ccccc1", "CC(=O)O")]
    kinds = set()
    for seed in range(400):
        chat = molecule_chat(known, 1, random.Random(seed))
        assert [turn.answer is None for turn in chat.turns] == [False] * (len(chat.turns) - 1) + [True]
        kinds.add(kind := answers.kind_of(chat.answer))
        several = any(len(exchange.subjects) > 1 for exchange in chat.exchanges)
        if kind == "other":
            continue
        assert not several, "two molecules in one question are refused"
        assert chat.subjects[-1] == 1
        stated = {name: value for name, value in vars(answers.claims(chat.answer)).items() if value is not None}
        full = vars(answers.claims_of(known[1]))
        assert stated == {name: full[name] for name in stated}
    assert kinds == {*answers.MOLECULE_ANSWERS, "other"}


def test_the_answer_belongs_to_the_last_protein_given() -> None:
    known = [ProteinFacts("Nucleus", "S", 0.7, 0.1), ProteinFacts("Plastid", "M", 0.1, 0.7)]
    right = {"Nucleus", "S", "mostly helical", None}
    contexts, kinds = set(), set()
    for seed in range(300):
        chat = protein_chat(known, 0, random.Random(seed))
        reads = (answers.claimed_location, answers.claimed_membrane, answers.claimed_structure)
        assert {read(chat.answer) for read in reads} <= right
        kinds.add(answers.kind_of(chat.answer))
        contexts.update(answers.kind_of(exchange.answer) for exchange in chat.exchanges[:-1])
    assert contexts == kinds == {"location", "structure", "other"}


def test_most_questions_are_asked_in_their_canonical_words() -> None:
    known = facts(molecules.Chem.MolFromSmiles("CCO"))
    asked = [about_molecule(known, 0, random.Random(seed)).question for seed in range(500)]
    assert asked.count(WORDINGS["describe"][0]) > 100
    assert len(set(asked)) > 60


def test_rewording_changes_no_word() -> None:
    for seed in range(50):
        assert reworded("What is it?", random.Random(seed)).lower().rstrip("?") == "what is it"


# -------------------------------------------------------------------------------------------------- training


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    factors = [rate_factor(step, 100) for step in range(101)]
    assert 0 < factors[0] < 0.5
    assert max(factors) <= 1
    assert factors[100] == 0
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole = train(options(folder, tmp_path / "whole"), lambda line: None)
    began, spent = time.process_time(), [0.0]
    for pause in (1, 5, None):
        parts = train(options(folder, tmp_path / "parts"), lambda line: None, stop_after=pause)
        spent.append(parts.progress.processor_seconds)
    assert spent == sorted(set(spent))
    assert spent[-1] <= time.process_time() - began
    assert parts.progress.plan == whole.progress.plan == {"gin": 2, "esm": 6, "joint": 5, "everyday": 1}
    for (name, one), other in zip(
        whole.trainer.model.state_dict().items(), parts.trainer.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", atol=1e-6, rtol=1e-5)


def test_the_end_of_training_computes_with_the_weights_of_a_bundle(folder: Path, tmp_path: Path) -> None:
    trainer = train(options(folder, tmp_path, steps=2), lambda line: None).trainer
    layer = trainer.model.llm.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    trainer.set_mode("joint", 0, 100)
    stored = RoundToNearest().quantize("", layer.weight.detach()).dequantize()

    def is_rounded(stage: str, step: int) -> bool:
        trainer.set_mode(stage, step, 100)
        wanted = [x @ weight.T for weight in (layer.weight, stored)]
        matches = [torch.allclose(layer(x), one, atol=1e-6) for one in wanted]
        assert matches.count(True) == 1
        return matches[1]

    assert [is_rounded("joint", step) for step in (0, 69, 70, 99)] == [False, False, True, True]
    assert not any(is_rounded(stage, 99) for stage in ("gin", "esm"))
    everyday = [is_rounded("everyday", step) for step in range(100)]
    assert 35 <= sum(everyday) <= 65
    assert everyday == [is_rounded("everyday", step) for step in range(100)]
    trainer.set_mode("joint", 99, 100)
    layer.weight.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight))


def test_the_decoder_is_taught_what_the_encoder_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(options(folder, tmp_path, steps=1), lambda line: None).trainer
    with torch.no_grad():
        trainer.heads.location.bias[PLACES.index("Golgi.apparatus")] += 1e3
        trainer.heads.membrane.bias[MEMBRANE_LABELS.index("M")] += 1e3
        trainer.heads.shares.weight.zero_()
        trainer.heads.shares.bias.copy_(torch.tensor([0.62, 1.4]))
    taught: list[Conversation] = []
    answer_loss = trainer._answer_loss

    def watched(conversations: list[Conversation], *others: object) -> object:
        taught.extend(conversations)
        return answer_loss(conversations, *others)

    monkeypatch.setattr(trainer, "_answer_loss", watched)
    for k in range(12):
        trainer._protein_answers("joint", k, random.Random(k))
    said = [
        {read(one.answer) for one in taught} - {None}
        for read in (answers.claimed_location, answers.claimed_membrane, answers.claimed_shares)
    ]
    assert said == [{"Golgi.apparatus"}, {"M"}, {(60, 100)}]


def test_training_ends_with_the_molecules_that_people_type_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(options(folder, tmp_path, steps=1), lambda line: None).trainer
    assert len(trainer.everyday) >= len(shown_molecules())
    drawn: list[Deck] = []
    molecules = trainer.molecules

    def watched(deck: Deck, *others: int) -> object:
        drawn.append(deck)
        return molecules(deck, *others)

    monkeypatch.setattr(trainer, "_molecule_answers", lambda deck, k, rng: watched(deck, k))
    monkeypatch.setattr(trainer, "_protein_answers", lambda *arguments: None)
    for step in range(8):
        trainer.everyday_loss(step)
    tables = [deck.table for deck in drawn]
    assert [table is trainer.everyday for table in tables] == [True, False] * 3


def test_a_state_of_other_options_is_refused(folder: Path, tmp_path: Path) -> None:
    train(options(folder, tmp_path, steps=1), lambda line: None)
    with pytest.raises(TrainingDataError, match="another seed") as caught:
        train(options(folder, tmp_path, steps=1, seed=1), lambda line: None)
    assert caught.value.seen["seed"] == 0
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
    some = [one for one in molecules.well_known() if one.name in ("aspirin", "ethanol", "glycine")]
    monkeypatch.setattr(commands, "well_known", lambda: some)
    for name in ("HELD_OUT_WORDINGS", "HELD_OUT_FOLLOW_UPS", "HELD_OUT_OTHER"):
        monkeypatch.setattr(wordings, name, {kind: texts[:1] for kind, texts in getattr(wordings, name).items()})
    monkeypatch.setattr(wordings, "WORDING_INPUTS", 1)
    checkpoint = tmp_path / "checkpoint"
    setup = options(folder, checkpoint, steps=2)
    run = train(setup, lambda line: None)
    tokenizer = checkpoint / "state" / "tokenizer.model"
    write_release(run.trainer.model, tokenizer, checkpoint, commands.training_record(run, setup))
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
    assert main(["scores", *map(str, arguments)]) == 0
    recorded = json.loads(record.read_text())["scores"]
    assert recorded["precision"] == "int4"
    assert recorded["sections"]["well_known_shown"]["count"] == 2
    assert "| functional groups, F1 |" in capsys.readouterr().out
    about, policy = read_about(record)
    assert about["scores"] == recorded


def test_errors_of_the_command_are_one_line_and_an_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == TrainingDataError.exit_code
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} lacks {data.MOLECULES_FILE}")
    taken = tmp_path / "a file"
    taken.write_text("")
    assert main(["train", "--data", str(folder), "--out", str(taken)]) == TrainingDataError.exit_code
    assert "cannot be made" in capsys.readouterr().err
    record = tmp_path / "record.json"
    arguments = ["scores", "--data", str(folder), "--cache", str(tmp_path), "--record", str(record)]
    assert main(arguments) == CheckpointError.exit_code
    assert "record.json cannot be read" in capsys.readouterr().err
    record.write_text("[]")
    assert main(arguments) == CheckpointError.exit_code
    assert "holds a list" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "train", lambda given, log: train(options(given.data, given.out, steps=1), log))
    arguments = ["train", "--data", str(folder), "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "demo.json").read_text()) | {"scores": "kept"}
    (tmp_path / "demo.json").write_text(json.dumps(record))
    assert main(arguments) == 0
    assert json.loads((tmp_path / "demo.json").read_text()) == record
    (tmp_path / "fusion_ckpts/biomedgpt_10b.pth").unlink()
    assert main(arguments) == 0
    assert (tmp_path / "fusion_ckpts/biomedgpt_10b.pth").exists(), "a run that was cut off before it wrote is completed"


@pytest.mark.parametrize("wrong", [("--steps", "0"), ("--threads", "0"), ("--seed", "-1"), ("--device", "tpu")])
def test_numbers_out_of_range_are_wrong_usage(wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--data", ".", *wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "nowhere", "--device", "cuda"]) == 5
    assert "no CUDA device" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 5
    assert "biopython" in capsys.readouterr().err
