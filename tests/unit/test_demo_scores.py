"""Scores and simple baselines, with answerers that are right, wrong or silent in place of a model."""

from __future__ import annotations

import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from rdkit import Chem

from biomedgpt_edge.errors import InputError, OptionError
from biomedgpt_export.demo import answers, questions
from biomedgpt_export.demo.answers import MoleculeClaims
from biomedgpt_export.demo.chemistry import facts
from biomedgpt_export.demo.proteins import ProteinRecord
from biomedgpt_export.demo.scoring import baselines, molecules, panel, scores, sections, statistics, table, wordings
from biomedgpt_export.demo.scoring import proteins as of_proteins
from biomedgpt_export.errors import TrainingDataError

TRAINED = ["CCO", "CCCO", "CCCCO", "CC(=O)O", "c1ccccc1", "Cc1ccccc1", "Cc1ccncc1", "CCN", "CCCN", "CC(=O)NC"] * 2
ASKED = ["CCCCCO", "CCc1ccccc1", "CCCCN", "OC(=O)CC", "ClCCl"]
UNUSABLE = ["not a molecule", "[NH3]->[Cu]"]


def proteins(seed: int, count: int) -> list[ProteinRecord]:
    """Half of them helical and nuclear, half strands and in the cytoplasm, of different residues."""
    rng = random.Random(seed)
    kinds = [("AELKQ", "Nucleus", "S", "H"), ("VTIYF", "Cytoplasm", "M", "E")]
    found = []
    for i in range(count):
        letters, location, membrane, structure = kinds[i % 2]
        length = rng.randint(40, 80)
        text = "".join(rng.choices(letters + "GS", k=length))
        found.append(ProteinRecord(text, location=location, membrane=membrane, structure=structure * length))
    return found


HELD_OUT = panel.HeldOut(
    same_source=ASKED + UNUSABLE,
    chebi=ASKED[:2],
    well_known_shown={"ethanol": "CCO"},
    well_known_held_out={"benzyl alcohol": "OCc1ccccc1", "acetamide": "CC(N)=O"},
    located=proteins(1, 9),
    structured=proteins(2, 12),
)
TRAINING = panel.Training(smiles=TRAINED, located=proteins(3, 40), structured=proteins(4, 40))
BY_SEQUENCE = {r.sequence: r for r in (*HELD_OUT.located, *HELD_OUT.structured)}
KIND_OF_QUESTION = {
    text: kind
    for every in (questions.WORDINGS, questions.HELD_OUT_WORDINGS, questions.HELD_OUT_FOLLOW_UPS)
    for kind, texts in every.items()
    for text in texts
}


class Right:
    """Knows everything, and counts what it is asked."""

    source = "weights"

    def __init__(self, precision: str = "int4") -> None:
        self.precision = precision
        self.asked: list[tuple[str, ...]] = []

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
        self.asked.append(questions)
        kind = KIND_OF_QUESTION.get(questions[-1], "other")
        rng = random.Random(len(smiles))
        if kind in answers.MOLECULE_ANSWERS and smiles:
            return answers.MOLECULE_ANSWERS[kind](facts(Chem.MolFromSmiles(smiles)), rng)
        if kind == "location" and sequence:
            record = BY_SEQUENCE[sequence]
            return answers.location_answer(record.location, record.membrane, rng)
        if kind == "structure" and sequence:
            return answers.structure_answer(*BY_SEQUENCE[sequence].shares, rng)
        return answers.HONEST


class Saying(Right):
    """Says the same of everything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
        return self._text


def scored(bundle: panel.Answerer, reference: panel.Answerer | None = None) -> scores.Scores:
    return scores.score(bundle, reference, HELD_OUT, TRAINING, lambda line: None)


@pytest.fixture(scope="module")
def all_right() -> scores.Scores:
    return scored(Right(), Right("fp32"))


def every_row(found: scores.Scores) -> list[statistics.Row]:
    return [row for section in found.sections.values() for row in section.rows.values()]


# ----------------------------------------------------------------------------------------------------------- scores


def test_right_answers_score_one_everywhere(all_right: scores.Scores) -> None:
    assert set(all_right.sections) == {
        "same_source", "chebi", "well_known_shown", "well_known_held_out", "location", "location_low_identity",
        "structure", "wordings", "refusals", "together",
    }  # fmt: skip
    assert {row.bundle.value for row in every_row(all_right)} == {1.0}
    assert {row.fp32.value for row in every_row(all_right) if row.fp32} == {1.0}
    assert all(not section.misses for section in all_right.sections.values())


def test_every_field_of_a_molecule_is_scored(all_right: scores.Scores) -> None:
    claimed = {one.name for one in dataclasses.fields(MoleculeClaims)}
    assert set(molecules.EXACT_FIELDS.values()) == claimed
    assert set(all_right.sections["chebi"].rows) == {*molecules.EXACT_FIELDS, molecules.GROUP_F1}


@pytest.mark.parametrize("text", ["", "Nothing to say.", "It is an animal."])
def test_answers_without_a_field_are_wrong_there(text: str) -> None:
    found = scored(Saying(text))
    assert {row.bundle.value for row in every_row(found)} == {0.0}
    assert found.sections["well_known_held_out"].misses == [
        f"{name}: {', '.join(molecules.EXACT_FIELDS)}" for name in HELD_OUT.well_known_held_out
    ]


def test_a_refusal_of_everything_is_right_for_refusals_only() -> None:
    found = scored(Saying(answers.HONEST))
    assert {row.bundle.value for row in found.sections["refusals"].rows.values()} == {1.0}
    assert {row.bundle.value for row in found.sections["wordings"].rows.values()} == {0.0}
    assert found.sections["location"].rows["accuracy"].bundle.value == 0.0


class Changing(Right):
    """Says ``other`` in place of ``one``."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__()
        self._change = (one, other)

    def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
        return super().ask(*questions, smiles=smiles, sequence=sequence).replace(*self._change)


@pytest.mark.parametrize(
    ("one", "other", "section", "wrong"),
    [
        ("no hydrogen bond donors", "two hydrogen bond donors", "chebi", {"donors"}),
        ("aromatic. I", "aromatic. It consists of two separate parts. I", "chebi", {"parts"}),
        ("a membrane protein", "a soluble protein", "location", {"membrane"}),
        (" 0 percent strand", " 20 percent strand", "structure", {"strand_within_ten"}),
    ],
)
def test_one_field_wrong_is_one_row_wrong(one: str, other: str, section: str, wrong: set[str]) -> None:
    rows = scored(Changing(one, other)).sections[section].rows
    assert {name for name, row in rows.items() if row.bundle.value < 1} == wrong


def test_a_sentence_too_many_makes_every_field_wrong() -> None:
    rows = scored(Changing(".", ". It is charged.")).sections["chebi"].rows
    assert {row.bundle.value for row in rows.values()} == {0.0}


def test_shares_are_those_of_the_residues_that_are_read() -> None:
    long = ProteinRecord("A" * 2000, structure="H" * 511 + "C" * 511 + "E" * 978)
    assert long.shares == (0.5, 0.0)
    asked = panel.Panel(
        Saying("This protein is mixed, with about 60 percent helix and 20 percent strand."),
        None,
        panel.Progress(9, lambda line: None),
    )
    rows = of_proteins.structure_section(asked, [long], TRAINING.structured).section.rows
    assert [rows[f"{name}_within_ten"].bundle.value for name in ("helix", "strand")] == [1.0, 0.0]
    # Half of the training proteins are all helix, half all strand.
    assert [rows[f"{name}_within_ten"].commonest for name in ("helix", "strand")] == [1.0, 0.0]


def test_membrane_is_scored_where_it_is_known() -> None:
    some = [dataclasses.replace(one, membrane="U") if i else one for i, one in enumerate(HELD_OUT.located)]
    asked = panel.Panel(Right(), None, panel.Progress(9, lambda line: None))
    row = of_proteins.location_sections(asked, dataclasses.replace(HELD_OUT, located=some), TRAINING)[
        "location"
    ].section.rows
    assert row["membrane"].bundle == statistics.wilson(1.0, 1)
    assert (row["membrane"].commonest, row["membrane"].baseline) == (1.0, 1.0)
    none = dataclasses.replace(HELD_OUT, located=some[1:])
    assert set(of_proteins.location_sections(asked, none, TRAINING)["location"].section.rows) == {"accuracy"}


def test_what_cannot_be_read_is_counted_and_said(all_right: scores.Scores) -> None:
    lines: list[str] = []
    section = scores.score(Right(), None, HELD_OUT, TRAINING, lines.append).sections["same_source"]
    assert section.count == len(ASKED)
    assert sum(section.left_out.values()) == len(UNUSABLE)
    assert section.left_out["unreadable"] == 1
    assert "same_source: 1 left out: unreadable" in lines
    assert "Left out of 6 held-out molecules of the training sources: 1 (unreadable)." in table.table(all_right)


def test_what_the_runtime_refuses_is_wrong() -> None:
    class Strict(Right):
        def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
            if smiles == "ClCCl":
                raise InputError("no chlorine.")
            return super().ask(*questions, smiles=smiles, sequence=sequence)

    held_out = dataclasses.replace(HELD_OUT, chebi=["ClCCl", "CCO"])
    asked = panel.Panel(Strict(), None, panel.Progress(9, lambda line: None))
    section = molecules.MoleculeScorer(asked, TRAINED).section(held_out.chebi).section
    assert (section.count, section.left_out) == (2, {})
    assert {row.bundle.value for name, row in section.rows.items() if name != "group_f1"} == {0.5}


def test_a_set_of_nothing_usable_has_no_rows() -> None:
    asked = panel.Panel(Right(), None, panel.Progress(9, lambda line: None))
    section = molecules.MoleculeScorer(asked, TRAINED).section(UNUSABLE).section
    assert (section.count, section.rows) == (0, {})


def test_both_bundles_are_asked_the_same() -> None:
    bundle, reference = Right(), Right("fp32")
    scored(bundle, reference)
    assert bundle.asked == reference.asked


def test_follow_ups_come_second_and_ask_for_something_else() -> None:
    follow_ups = wordings.wordings()["follow_up"]
    assert {one.kind for one in follow_ups} == set(questions.HELD_OUT_FOLLOW_UPS)
    assert all(len(one.before) == 1 and KIND_OF_QUESTION[one.before[0]] != one.kind for one in follow_ups)


def test_wrong_kinds_are_listed() -> None:
    class Describing(Right):
        def ask(self, *questions: str, smiles: str = "", sequence: str = "") -> str:
            return super().ask(questions[0] if len(questions) > 1 else questions[-1], smiles=smiles, sequence=sequence)

    section = scored(Describing()).sections["wordings"]
    assert section.rows["molecule"].bundle.value == 1.0
    assert section.rows["follow_up"].bundle.value == 0.0
    text = questions.HELD_OUT_FOLLOW_UPS["formula"][0]
    assert f"{text} (formula): describe ×{wordings.WORDING_INPUTS}" in section.misses


def test_everything_held_out_is_counted_once_together(all_right: scores.Scores) -> None:
    parts = ("same_source", "chebi", "well_known_held_out", "location", "structure")
    found = all_right.sections["together"]
    assert found.count == sum(all_right.sections[name].count for name in parts)
    assert [all_right.sections[name].count for name in parts] == [5, 2, 2, 9, 12]
    # Donors wrong in some of nine answers with ten fields, beside nine with one field and twelve with three.
    partly = scored(Changing("no hydrogen bond donors", "two hydrogen bond donors"), Right("fp32")).sections
    missed = sum(partly[name].count * (1 - partly[name].rows["donors"].bundle.value) for name in parts[:3])
    wrong = partly["together"].rows["fields"]
    assert 0 < missed < 9
    assert wrong.bundle.value == pytest.approx(1 - missed / (9 * 10 + 9 + 12 * 3), abs=1e-4)
    assert wrong.over_fp32 is not None
    assert wrong.over_fp32.value == pytest.approx(wrong.bundle.value - 1)
    assert wrong.over_fp32.low < wrong.over_fp32.value < wrong.over_fp32.high


@pytest.mark.parametrize("changes", [{"same_source": UNUSABLE}, {"located": [], "structured": []}])
def test_nothing_to_ask_about_is_refused(changes: dict[str, list[str]]) -> None:
    with pytest.raises(TrainingDataError, match="nothing is held out"):
        wordings.wording_subjects(dataclasses.replace(HELD_OUT, **changes))


def test_structured_proteins_are_sampled_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_proteins, "STRUCTURED_PROTEINS", 5)
    one, other = (scored(Right()).sections["structure"] for _ in range(2))
    assert one.count == 5
    assert one == other


def test_proteins_like_training_ones_are_not_of_low_identity() -> None:
    like = dataclasses.replace(HELD_OUT, located=[*HELD_OUT.located[:2], TRAINING.located[0]])
    asked = panel.Panel(Saying("?"), None, panel.Progress(9, lambda line: None))
    found = of_proteins.location_sections(asked, like, TRAINING)
    assert found["location"].section.count == 3
    assert found["location_low_identity"].section.count < 3


def test_low_identity_is_to_structured_training_proteins_too() -> None:
    like = dataclasses.replace(HELD_OUT, located=[TRAINING.structured[0]])
    asked = panel.Panel(Saying("?"), None, panel.Progress(9, lambda line: None))
    section = of_proteins.location_sections(asked, like, TRAINING)["location_low_identity"].section
    assert (section.count, section.rows) == (0, {})


def test_a_reference_of_another_precision_is_refused() -> None:
    with pytest.raises(OptionError, match="in int4"):
        scored(Right(), Right())


def test_a_reference_of_another_checkpoint_is_refused() -> None:
    other = Right("fp32")
    other.source = "other weights"
    with pytest.raises(OptionError, match="another checkpoint"):
        scored(Right(), other)


def test_the_source_of_a_bundle_is_its_fusion_file() -> None:
    files = [SimpleNamespace(path=path, sha256=path[::-1]) for path in ("fusion", "tokenizer.model")]
    engine = SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(sources=files)))
    assert panel.EngineAnswerer(engine).source == "noisuf"  # type: ignore[arg-type]


def test_progress_is_said_every_ten_seconds_and_at_the_end() -> None:
    times = iter([0.0, 4.0, 11.0, 12.0, 13.0])
    lines: list[str] = []
    progress = panel.Progress(4, lines.append, lambda: next(times))
    for _ in range(4):
        progress.step()
    assert lines == [
        "2 of 4 questions, about 0.2 min left",
        "4 of 4 questions, about 0.0 min left",
    ]


def test_the_questions_announced_are_those_asked() -> None:
    usable = dataclasses.replace(HELD_OUT, same_source=ASKED)
    lines: list[str] = []
    scores.score(Right(), None, usable, TRAINING, lines.append)
    total = lines[-1].split(" questions")[0]
    assert total.split(" of ")[0] == total.split(" of ")[1]


# -------------------------------------------------------------------------------------------------------- intervals


def group_f1(truth: list[MoleculeClaims], said: list[MoleculeClaims]) -> statistics.Score:
    return statistics.ratio_score(molecules.group_counts(truth, said))


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, table I (method 3): r and n, and Wilson's limits.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_numbers(hits: int, count: int, low: float, high: float) -> None:
    found = statistics.wilson(hits / count, count)
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)
    mirrored = statistics.wilson(1 - hits / count, count)
    assert (mirrored.low, mirrored.high) == (pytest.approx(1 - high, abs=2e-4), pytest.approx(1 - low, abs=2e-4))


def test_no_trials_say_nothing() -> None:
    assert statistics.wilson(0.0, 0) == group_f1([], []) == statistics.Score(0.0, 0.0, 1.0)


def test_intervals_hold_their_value_and_shrink_with_more_items() -> None:
    rng = np.random.default_rng(5)
    names = ["amide", "ether", "amine", "ester"]

    def draw(count: int) -> list[MoleculeClaims]:
        return [MoleculeClaims(groups=frozenset(np.array(names)[rng.random(4) < 0.5].tolist())) for _ in range(count)]

    widths = []
    for count in (20, 200, 2000):
        for found in (group_f1(draw(count), draw(count)), statistics.wilson(0.7, count)):
            assert found.low < found.value < found.high
            widths.append(found.high - found.low)
    assert widths[0] > widths[2] > widths[4]
    assert widths[1] > widths[3] > widths[5]


def test_group_f1_by_hand() -> None:
    truth = [MoleculeClaims(groups=frozenset({"amide", "ether"})), MoleculeClaims(groups=frozenset({"amine"}))]
    said = [MoleculeClaims(groups=frozenset({"amide", "ester"})), MoleculeClaims()]
    assert group_f1(truth, said).value == pytest.approx(2 * 1 / (3 + 2))
    none = [MoleculeClaims(groups=frozenset())]
    assert group_f1(none, none).value == 1.0
    # Nothing wrong in 20 molecules does not mean that nothing ever is.
    assert group_f1(truth * 10, truth * 10) == statistics.wilson(1.0, 20)


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    one = rng.random(500) < 0.8
    other = one & (rng.random(500) < 0.9)
    found = statistics.difference(statistics.shares(one.tolist()), statistics.shares(other.tolist()))
    assert found.value == pytest.approx(one.mean() - other.mean(), abs=1e-4)
    assert 0 < found.low < found.value < found.high
    # The spread of a mean of paired differences, not that of two independent shares.
    half = 1.96 * (one.astype(float) - other).std() / 500**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert statistics.difference(statistics.shares([1, 0]), statistics.shares([1, 0])) == statistics.Score(
        0.0, 0.0, 0.0
    )


def test_every_compared_row_has_its_differences(all_right: scores.Scores) -> None:
    for section in all_right.sections.values():
        for row in section.rows.values():
            assert row.over_fp32 == statistics.Score(0.0, 0.0, 0.0)
            assert (row.over_baseline is None) == (row.baseline is None)
            if row.over_baseline is not None and row.baseline is not None:
                assert row.over_baseline.value == pytest.approx(row.bundle.value - row.baseline, abs=2e-4)


# -------------------------------------------------------------------------------------------------- record and table


def test_the_same_answers_give_the_same_record(all_right: scores.Scores) -> None:
    again = scored(Right(), Right("fp32"))
    assert json.dumps(again.to_json()) == json.dumps(all_right.to_json())


def test_a_recorded_fp32_column_is_used_for_the_same_items_only(all_right: scores.Scores) -> None:
    about = json.loads(json.dumps({"scores": all_right.to_json()}))
    alone = scored(Right())
    assert alone.fp32_from == ""
    assert "No fp32 bundle was given" in table.table(alone)
    restored = scores.with_recorded_fp32(alone, about)
    assert restored.sections == all_right.sections
    assert restored.fp32_from == "manifest"
    assert "recorded when the bundle was made" in table.table(restored)
    about["scores"]["sections"]["chebi"]["items"] = "others"
    partly = scores.with_recorded_fp32(alone, about)
    assert partly.sections["chebi"].rows["rings"].fp32 is None
    assert partly.sections["structure"].rows["accuracy"].fp32 is not None
    about["scores"]["precision"] = "fp16"
    row = scores.with_recorded_fp32(alone, about).sections["structure"].rows["accuracy"]
    assert row.fp32 is not None
    assert row.over_fp32 is None
    about["scores"]["source"] = "other weights"
    assert scores.with_recorded_fp32(alone, about) == alone


@pytest.mark.parametrize(
    "about", [{}, {"scores": []}, {"scores": {"int4": {}}}, {"scores": {"sections": {"chebi": 3}}}]
)
def test_a_manifest_without_such_scores_leaves_the_column_empty(about: dict[str, object]) -> None:
    alone = scored(Right())
    assert scores.with_recorded_fp32(alone, about) == alone


def test_the_table_in_markdown() -> None:
    row = statistics.Row(statistics.Score(0.9876, 0.97, 1.0), statistics.Score(1.0, 0.99, 1.0), 0.0, None)
    section = sections.Section(1234, "", {"rings": row, "group_f1": row})
    found = scores.Scores("int4", "weights", "bundle", {"chebi": section})
    lines = table.table(found).splitlines()
    assert lines[:5] == [
        "| | int4 (95 % interval) | fp32 | commonest | simple baseline |",
        "|---|---|---|---|---|",
        "| **1,234 held-out molecules of ChEBI-20** | | | | |",
        "| rings | .988 (.970–1.000) | 1.000 | .000 |  |",
        "| functional groups, F1 | .988 (.970–1.000) | 1.000 | .000 |  |",
    ]
    assert lines[5] == ""
    assert "5,000 drawn training molecules" in lines[6]


def test_differences_stand_under_the_table() -> None:
    def section(over_baseline: float, over_fp32: float, field: str = "accuracy") -> sections.Section:
        over = [statistics.Score(one, one - 0.032, one + 0.031) for one in (over_baseline, over_fp32)]
        return sections.Section(
            9, "", {field: statistics.Row(statistics.Score(0.5, 0.4, 0.6), None, None, None, *over)}
        )

    def under(fp32: float) -> list[str]:
        sections = {
            "location": section(0.123, 0.0),
            "location_low_identity": section(-0.02, fp32),
            "together": section(0.0, 0.002, "fields"),
        }
        text = table.table(scores.Scores("int4", "weights", "bundle", sections))
        return text.split("\n\n")[1].splitlines()

    assert under(-0.004)[:4] == [
        "held-out proteins with a location: int4 over the composition regression: +12.3 points (9.1 to 15.4).",
        "of these, below 30% identity to any training protein found: int4 over the composition regression: "
        "-2.0 points (-5.2 to 1.1).",
        "held-out questions about molecules and proteins together: int4 against fp32: +0.2 points (-3.0 to 3.3).",
        "Largest loss of int4 against fp32: right, of these, below 30% identity to any training protein found: "
        "-0.4 points (-3.6 to 2.7).",
    ]
    assert under(0.01)[3] == "Largest loss of int4 against fp32: none."


def test_every_row_of_the_table_has_a_name(all_right: scores.Scores) -> None:
    rows = [line for line in table.table(all_right).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(all_right.sections) + len(every_row(all_right))
    assert {line.count("|") for line in rows} == {6}


# -------------------------------------------------------------------------------------------------------- baselines


def test_the_commonest_value_of_each_field() -> None:
    known = [baselines.true_claims(smiles) for smiles in ("CCO", "CCO", "CC(=O)O", "c1ccccc1", "CCO", "CC(=O)NC")]
    found = baselines.commonest_claims(known)
    assert found == baselines.true_claims("CCO")
    scattered = [MoleculeClaims(groups=frozenset(g)) for g in ({"amide", "ether"}, {"amide"}, {"ether"}, set(), set())]
    said = baselines.commonest_claims(scattered)
    assert said.groups == {"amide", "ether"}
    assert baselines.with_commonest_groups(said, scattered).groups == set()


def test_nothing_has_no_commonest_value() -> None:
    with pytest.raises(TrainingDataError, match="no training value"):
        baselines.commonest([])


def test_the_nearest_molecule_by_fingerprint() -> None:
    nearest = baselines.NearestMolecule(TRAINED)
    assert nearest.nearest("Cc1ccncc1") == "Cc1ccncc1"
    assert nearest.nearest("CCc1ccccc1") == "Cc1ccccc1"
    # Acetate is acetic acid to the demo, so it is to the baseline.
    assert nearest.nearest("CC(=O)[O-]") == "CC(=O)O"
    assert nearest.claims("CCCCCO") == baselines.true_claims("CCCCO")


@pytest.mark.parametrize(("training", "message"), [([], "no training molecule"), (["?"], "cannot be read")])
def test_molecules_that_nothing_can_be_learnt_from(training: list[str], message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        baselines.NearestMolecule(training)


def test_composition_regression_learns_residues_but_not_their_order() -> None:
    train, asked = proteins(7, 60), proteins(8, 20)
    labels = [record.location for record in train]
    found = baselines.composition_regression([r.sequence for r in train], labels, [r.sequence for r in asked])
    assert found == [record.location for record in asked]
    backwards = baselines.composition_regression([r.sequence[::-1] for r in train], labels, [r.sequence for r in asked])
    assert backwards == found


def test_rare_labels_are_not_learnt() -> None:
    train = [record.sequence for record in proteins(9, 10)]
    assert baselines.composition_regression(train, ["one"] * 8 + ["two"] * 2, train[:3]) == ["one"] * 3
    assert baselines.composition_regression(train, ["one"] * 10, []) == []


def test_amino_acid_fractions() -> None:
    found = baselines.amino_acid_fractions(["AAC", "XX"])
    assert found.shape == (2, 20)
    np.testing.assert_allclose(found[0, :3], [2 / 3, 1 / 3, 0])
    assert not found[1].any()
