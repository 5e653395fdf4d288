"""What the demo's protein encoder learns from: the teacher, and altered proteins with their labels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.protein_tokens import MAX_RESIDUES
from biomedgpt_export.demo import protein_pool, protein_teacher
from biomedgpt_export.demo.batches import IGNORE, protein_batch
from biomedgpt_export.demo.protein_pool import ProteinPool, mutated
from biomedgpt_export.demo.protein_teacher import (
    AMINO_ACIDS,
    LEARNT_FEATURES,
    MEMBRANE_LABELS,
    PLACES,
    ProteinTeacher,
    Ridge,
    features,
)
from biomedgpt_export.demo.proteins import GROUPS, ProteinRecord, ProteinSplit

PLACE_OF = {"K": "Nucleus", "L": "Cell.membrane", "S": "Extracellular"}
MEMBRANE_OF = {"K": "S", "L": "M", "S": "U"}


def made(rng: random.Random, rich_in: str, length: int) -> str:
    return "".join(rng.choice(AMINO_ACIDS + 20 * rich_in) for _ in range(length))


@pytest.fixture(scope="module")
def split() -> ProteinSplit:
    """Proteins whose place is what they are rich in, and structures of what the residues' letters say."""
    rng = random.Random(0)
    located = [
        ProteinRecord(made(rng, rich, rng.randint(40, 400)), place, MEMBRANE_OF[rich], group=rng.randrange(GROUPS))
        for rich, place in PLACE_OF.items()
        for _ in range(25)
    ]
    sequences = [made(rng, rng.choice("EF"), rng.randint(40, 500)) for _ in range(30)]
    structured = [
        ProteinRecord(s, structure="".join("HEC"[ord(c) % 3] for c in s), group=i % GROUPS)
        for i, s in enumerate(sequences)
    ]
    return ProteinSplit(located, structured, [], [], {})


@pytest.fixture(scope="module")
def teacher(split: ProteinSplit) -> ProteinTeacher:
    return ProteinTeacher(split.located, split.structured)


@pytest.fixture
def pool(split: ProteinSplit, teacher: ProteinTeacher) -> ProteinPool:
    return ProteinPool(split, teacher, "seed", tokens=2048, chimeras=20, structured=15)


# ------------------------------------------------------------------------------------------------- teacher


@given(st.text(alphabet="ACDEFGHIKLMNPQRSTVWYXBZUO", min_size=1, max_size=120))
def test_every_sequence_has_finite_features(sequence: str) -> None:
    found = features([sequence, "M" * 100])
    assert np.isfinite(found).all()


def test_features_end_where_the_encoder_stops_reading() -> None:
    whole = "MK" * (MAX_RESIDUES // 2)
    one, other = features([whole, whole + "W" * 50])
    np.testing.assert_array_equal(one, other)


def test_the_teacher_learns_places_and_its_probabilities_add_up(teacher: ProteinTeacher) -> None:
    rng = random.Random(1)
    fresh = [(made(rng, rich, 200), rich) for rich in PLACE_OF for _ in range(10)]
    taught = teacher.teach([sequence for sequence, _ in fresh], [GROUPS] * len(fresh))
    for probabilities in (taught.places, taught.membrane):
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert [PLACES[i] for i in taught.places.argmax(1)] == [PLACE_OF[rich] for _, rich in fresh]
    # Nothing is known of the membranes of those that are rich in serine.
    assert [MEMBRANE_LABELS[i] for i in taught.membrane.argmax(1)[:20]] == ["S"] * 10 + ["M"] * 10
    assert taught.learnt.shape == (30, LEARNT_FEATURES)


def test_the_teacher_learns_shares(teacher: ProteinTeacher) -> None:
    rng = random.Random(2)
    # In the structures of this file, glutamates are helix and phenylalanines strand.
    shares = teacher.teach([made(rng, rich, 300) for rich in "EF" for _ in range(5)], [GROUPS] * 10).shares
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares[:5, 0].min() > shares[5:, 0].max()
    assert shares[:5, 1].max() < shares[5:, 1].min()


def test_the_closed_form_is_the_regression_without_the_group() -> None:
    rng = random.Random(2)
    sequences = [made(rng, rng.choice("KLS"), 60) for _ in range(40)]
    values = torch.tensor([[rng.random(), rng.random()] for _ in sequences], dtype=torch.float64)
    groups = [rng.randrange(GROUPS) for _ in sequences]
    found = features(sequences)
    regression = Ridge(found, values, groups)
    kernel = regression._kernel(regression._known).double()
    wanted = values - values.mean(0)
    for group in range(GROUPS):
        kept = torch.tensor([i for i, g in enumerate(groups) if g != group])
        ridge = protein_teacher._RIDGE * torch.eye(len(kept)).double()
        alone = torch.linalg.solve(kernel[kept][:, kept] + ridge, wanted[kept])
        # The kernel is fp32: its two triangles differ in their last bits, and each side reads another one.
        torch.testing.assert_close(regression._coefficients[group][kept], alone, atol=1e-6, rtol=1e-5)
        left_out = [i for i, g in enumerate(groups) if g == group]
        assert not regression._coefficients[group][left_out].any(), "a group's own proteins have no say"
    torch.testing.assert_close(regression.predict(found, groups), regression.unseen, atol=1e-6, rtol=1e-5)


def test_the_teacher_is_the_same_every_time(split: ProteinSplit, teacher: ProteinTeacher) -> None:
    again = ProteinTeacher(split.located, split.structured)
    sequences = [record.sequence for record in split.structured]
    one, other = (vars(each.teach(sequences, [GROUPS] * 30)) for each in (teacher, again))
    for name, said in one.items():
        np.testing.assert_array_equal(said, other[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------- pool


def test_a_batch_has_one_length_and_fits(pool: ProteinPool) -> None:
    for step in range(30):
        batch = pool.batch(step)
        assert len({len(record.sequence) for record in batch.records}) == 1
        width = len(batch.records[0].sequence) + 2
        assert width * len(batch.records) <= 2048 or len(batch.records) == 1
        assert batch.taught.places.shape == (len(batch.records), len(PLACES))
        np.testing.assert_allclose(batch.taught.places.sum(1), 1, atol=1e-5)


def test_an_epoch_holds_everything_once(pool: ProteinPool, split: ProteinSplit) -> None:
    epoch = pool._epoch(0)
    assert sorted(row for batch in epoch.batches for row in batch) == list(range(len(epoch.records)))
    assert len(epoch.records) == len(split.located) + 20 + 15
    shares = [len(batch) for batch in epoch.batches]
    assert np.mean([pool.batch(i).share for i in range(len(shares))]) == pytest.approx(1)


def test_a_step_sees_the_same_whatever_came_before(split: ProteinSplit, teacher: ProteinTeacher) -> None:
    def fresh(seed: str) -> ProteinPool:
        return ProteinPool(split, teacher, seed, tokens=1024, chimeras=5, structured=5)

    walked = fresh("a")
    for step in (0, 3, 501):
        walked.batch(step)
    assert walked.batch(7).records == fresh("a").batch(7).records
    assert walked.batch(507).records == fresh("a").batch(507).records
    assert walked.batch(7).records != walked.batch(507).records
    assert fresh("a").batch(7).records != fresh("b").batch(7).records


def test_a_label_weighs_half_beside_the_teacher(
    pool: ProteinPool, teacher: ProteinTeacher, split: ProteinSplit
) -> None:
    epoch = pool._epoch(0)
    groups = [record.group for record in epoch.records]
    alone = teacher.teach([record.sequence for record in epoch.records], groups)
    seen = set()
    for row, record in enumerate(epoch.records):
        if record.location:
            assert epoch.taught.places[row, PLACES.index(record.location)] >= protein_pool._LABEL_WEIGHT
            column = MEMBRANE_LABELS.find(record.membrane)
            assert column < 0 or epoch.taught.membrane[row, column] >= protein_pool._LABEL_WEIGHT
            seen.add(record.membrane)
        if record.structure:
            half = (alone.shares[row] + np.array(record.shares)) / 2
            np.testing.assert_allclose(epoch.taught.shares[row], half, atol=1e-6)
            seen.add("shares")
    assert seen == {*"MSU", "shares"}


def test_structures_are_cut_with_their_sequences(pool: ProteinPool) -> None:
    seen = 0
    for step in range(40):
        for record in pool.batch(step).records:
            if record.structure:
                assert record.structure == "".join("HEC"[ord(c) % 3] for c in record.sequence)
                seen += 1
    assert seen > 10


@given(st.text(alphabet=AMINO_ACIDS, min_size=1, max_size=300), st.integers(1, 300), st.integers(0, 99))
def test_shortening_keeps_both_ends(sequence: str, length: int, seed: int) -> None:
    short = protein_pool._shortened(sequence, length, random.Random(seed))
    assert len(short) == min(len(sequence), length)
    if length >= 4:
        assert short[0] == sequence[0]
        assert short[-1] == sequence[-1]


def test_mutation_keeps_the_length_and_does_nothing_at_rate_zero() -> None:
    sequence = made(random.Random(3), "K", 500)
    assert mutated(sequence, 0.0, random.Random(0)) == sequence
    changed = mutated(sequence, 0.15, random.Random(0))
    differing = sum(a != b for a, b in zip(sequence, changed, strict=True))
    assert 0.05 * 500 < differing < 0.2 * 500
    assert mutated("XXBZ", 1.0, random.Random(0)) != "XXBZ"


def test_a_batch_as_tensors_labels_residues_and_nothing_else(pool: ProteinPool) -> None:
    for step in range(20):
        drawn = pool.batch(step)
        batch = protein_batch(drawn)
        assert batch.ids.shape == (len(drawn.records), len(drawn.records[0].sequence) + 2)
        assert (batch.residues[:, 0] == IGNORE).all()
        assert (batch.residues[:, -1] == IGNORE).all()
        for row, record in enumerate(drawn.records):
            labels = batch.residues[row, 1:-1].tolist()
            assert labels == (["HEC".index(c) for c in record.structure] or [IGNORE] * len(record.sequence))
        assert batch.structured == np.mean([bool(record.structure) for record in drawn.records])
