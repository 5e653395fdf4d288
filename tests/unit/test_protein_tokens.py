"""Residues -> ESM-2 ids: the 33 ids of the published alphabet."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_edge.inputs import Protein
from biomedgpt_edge.protein_tokens import ALLOWED_RESIDUES, ALPHABET, STANDARD_RESIDUES, residue_ids


def test_every_letter_has_its_published_id() -> None:
    published = "L4 A5 G6 V7 S8 E9 R10 T11 I12 D13 P14 K15 Q16 N17 F18 Y19 M20 H21 W22 C23 X24 B25 U26 Z27 O28"
    for pair in published.split():
        assert residue_ids(pair[0]).tolist() == [0, int(pair[1:]), 2]


def test_the_alphabet_has_33_ids_and_25_residues() -> None:
    assert len(ALPHABET) == 33
    assert (ALPHABET[0], ALPHABET[1], ALPHABET[2], ALPHABET[3], ALPHABET[32]) == (
        "<cls>", "<pad>", "<eos>", "<unk>", "<mask>",
    )  # fmt: skip
    assert (len(STANDARD_RESIDUES), len(ALLOWED_RESIDUES)) == (20, 25)


def test_the_alphabet_is_that_of_fair_esm() -> None:
    import esm

    assert esm.data.Alphabet.from_architecture("ESM-1b").all_toks == list(ALPHABET)


@given(st.text(sorted(ALLOWED_RESIDUES), min_size=1, max_size=40))
def test_a_sequence_stands_between_cls_and_eos(sequence: str) -> None:
    ids = residue_ids(sequence)
    assert ids.dtype == np.int64
    assert (ids[0], ids[-1], len(ids)) == (0, 2, Protein.from_sequence(sequence).n_soft_tokens)
    assert "".join(ALPHABET[i] for i in ids[1:-1]) == sequence
