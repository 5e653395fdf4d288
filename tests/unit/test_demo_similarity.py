"""Similar proteins land in one cluster, whatever was edited; the nearest one is found and its identity is right."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_export.demo.similarity import clusters, identity, identity_to_nearest, words_left
from biomedgpt_export.errors import TrainingDataError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def protein(rng: random.Random, length: int, letters: str = RESIDUES) -> str:
    return "".join(rng.choices(letters, k=length))


def edited(sequence: str, edits: int, rng: random.Random, *, kinds: str = "replace leave_out put_in") -> str:
    """``sequence`` with ``edits`` of its residues replaced or left out, or followed by some that were not there."""
    parts = list(sequence)
    for place in rng.sample(range(len(parts)), edits):
        kind = rng.choice(kinds.split())
        if kind == "replace":
            parts[place] = rng.choice(RESIDUES.replace(parts[place], ""))
        elif kind == "leave_out":
            parts[place] = ""
        else:
            parts[place] += protein(rng, rng.randint(1, 40))
    return "".join(parts)


# Two letters make repeats, where counting a word once would not do.
@given(st.integers(0, 2**32), st.integers(5, 400), st.sampled_from((RESIDUES, "AG", "A")), st.integers(0, 60))
def test_up_to_one_edit_in_ten_residues_stays_in_the_cluster(seed: int, length: int, letters: str, around: int) -> None:
    rng = random.Random(seed)
    short = protein(rng, length, letters)
    # The longer one is made from the shorter one, so its residues are the ones that may be replaced.
    long = edited(short, length // 10, rng, kinds="replace put_in")
    others = [protein(rng, 50) for _ in range(3)]
    found = clusters([*others, protein(rng, around) + long + protein(rng, around), short])
    assert found[-1] == found[-2]


@given(st.integers(0, 2**32), st.integers(20, 400))
def test_sequences_that_lack_residues_stay_in_the_cluster(seed: int, length: int) -> None:
    rng = random.Random(seed)
    long = protein(rng, length)
    # n / 10 edits of the shorter one, which is what is left over.
    short = edited(long, length // 11, rng, kinds="leave_out")
    assert len(set(clusters([long, short]))) == 1
    start = rng.randint(0, length - 10)
    assert len(set(clusters([long, long[start : start + rng.randint(10, length)]]))) == 1


@given(st.integers(0, 2**32))
def test_clusters_do_not_depend_on_the_order(seed: int) -> None:
    rng = random.Random(seed)
    families = [protein(rng, rng.randint(30, 120)) for _ in range(6)]
    sequences = [edited(family, len(family) // 8, rng) for family in families for _ in range(4)]
    shuffled = rng.sample(sequences, len(sequences))

    def parts(order: list[str]) -> set[frozenset[str]]:
        numbers = clusters(order)
        return {frozenset(s for s, n in zip(order, numbers, strict=True) if n == number) for number in numbers}

    assert parts(sequences) == parts(shuffled)


def test_unrelated_sequences_stand_apart() -> None:
    rng = random.Random(0)
    sequences = [protein(rng, rng.randint(30, 800)) for _ in range(300)]
    assert clusters(sequences) == list(range(300))


def test_half_of_the_words_is_the_limit() -> None:
    rng = random.Random(1)
    one = protein(rng, 100)
    assert words_left(100) == 46
    held = one[: 46 + 4]
    assert len(set(clusters([one, held + protein(rng, 60)]))) == 1
    assert len(set(clusters([one, held[:-1] + protein(rng, 60)]))) == 2


def test_a_repeated_word_counts_as_often_as_both_have_it() -> None:
    rng = random.Random(4)
    repeat = "A" * 40
    assert len(set(clusters([repeat, protein(rng, 50, "CDEF") + "AAAAA" + protein(rng, 50, "CDEF")]))) == 2
    assert len(set(clusters([repeat, protein(rng, 50, "CDEF") + "A" * 36]))) == 1


def test_links_connect_through_a_third_sequence() -> None:
    rng = random.Random(2)
    first, second = protein(rng, 60), protein(rng, 60)
    assert clusters([first, second]) == [0, 1]
    assert clusters([first, second, first + second]) == [0, 0, 0]


def test_no_sequences_are_no_clusters() -> None:
    assert clusters([]) == []


@pytest.mark.parametrize("sequence", ["MKTA", "", "mktaa", "MKT-AA", "MKTAÄA"])
def test_what_cannot_be_compared_is_refused(sequence: str) -> None:
    with pytest.raises(TrainingDataError, match="sequence 2 cannot be compared"):
        clusters([UBIQUITIN, sequence])


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (UBIQUITIN, UBIQUITIN, 1.0),
        (UBIQUITIN, UBIQUITIN[:38], 1.0),
        # A change at the end falls out of the alignment and counts as different all the same.
        (UBIQUITIN, UBIQUITIN[:75] + "W", 75 / 76),
        (UBIQUITIN, UBIQUITIN.replace("L", "V"), 1 - 9 / 76),
        (UBIQUITIN, UBIQUITIN[:30] + "GGS" + UBIQUITIN[30:], 1.0),
        # Half of the shorter one is shared.
        (UBIQUITIN[:38] + "P" * 38, UBIQUITIN[:38] + "W" * 60, 0.5),
        ("PPPPPPPP", "WWWWWWWW", 0.0),
        ("MKUOWWHC", "MKUOWWHC", 1.0),
        ("", "MKT", 0.0),
    ],
)
def test_identity_of_known_pairs(one: str, other: str, wanted: float) -> None:
    assert identity(one, other) == pytest.approx(wanted)
    assert identity(other, one) == pytest.approx(wanted)


def test_the_nearest_of_many_is_found() -> None:
    rng = random.Random(3)
    references = [protein(rng, rng.randint(40, 600)) for _ in range(200)]
    queries = [edited(references[i], len(references[i]) * i // 400, rng, kinds="replace") for i in range(0, 200, 20)]
    found = identity_to_nearest(queries, references)
    assert found[0] == 1.0
    np.testing.assert_array_less([1 - i / 400 - 0.1 for i in range(0, 200, 20)], found)
    unrelated = identity_to_nearest([protein(rng, 300)], [reference for reference in references if len(reference) > 99])
    assert unrelated.shape == (1,)
    assert unrelated[0] < 0.3


def test_a_query_without_words_and_no_query_are_answered() -> None:
    assert identity_to_nearest(["MK"], [UBIQUITIN])[0] <= 1
    assert identity_to_nearest([], [UBIQUITIN]).shape == (0,)


def test_no_reference_is_refused() -> None:
    with pytest.raises(TrainingDataError, match="no sequence to compare with"):
        identity_to_nearest([UBIQUITIN], [])
