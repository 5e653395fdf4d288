"""Residues -> ESM-2 ids.

The alphabet is that of ``EsmTokenizer`` (transformers; fair-esm's ``Alphabet`` "ESM-1b"), the same 33 ids for every
ESM-2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLS_ID = 0
EOS_ID = 2
# ESM-2 was trained on windows of 1,024 ids: <cls>, 1,022 residues, <eos>.
MAX_RESIDUES = 1022
SPECIAL_POSITIONS = 2

ALPHABET = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    *"LAGVSERTIDPKQNFYMHWCXBUZO",
    ".", "-", "<null_1>", "<mask>",
)  # fmt: skip

STANDARD_RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWY")
# X unknown, B = D or N, Z = E or Q, U selenocysteine, O pyrrolysine: rows of the table that training has seen.
ALLOWED_RESIDUES = STANDARD_RESIDUES | frozenset("XBUZO")

_RESIDUE_ID = {letter: i for i, letter in enumerate(ALPHABET) if len(letter) == 1}


def residue_ids(sequence: str) -> npt.NDArray[np.int64]:
    """int64 ``[L + 2]``: ``<cls>``, one id per residue, ``<eos>``.

    ``sequence`` holds allowed letters only (see :class:`biomedgpt_edge.inputs.Protein`, which checks them).
    """
    return np.array([CLS_ID, *(_RESIDUE_ID[letter] for letter in sequence), EOS_ID], dtype=np.int64)
