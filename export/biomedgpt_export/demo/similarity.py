"""Similar protein sequences, found without an external program: clusters for the split, and the nearest sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from Bio import Align
from Bio.Align import substitution_matrices

from ..errors import TrainingDataError

# An edit changes at most this many of a sequence's words, since a residue lies in no more.
CLUSTER_WORD = 5
# Of the shorter sequence; at most this share edited means similar.
EDITED_PERCENT = 10
SEARCH_WORD = 3
# BLAST's penalties for BLOSUM62: a gap of n residues costs 11 + n.
_GAP_OPEN, _GAP_EXTEND = -12.0, -1.0
_UNKNOWN = str.maketrans("UOJ", "XXX")

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


class Words:
    """The words of ``length`` residues of each sequence, as numbers.

    A word's n-th occurrence in a sequence has a number of its own. Numbers that two sequences share are then as many as
    the words that they share with repeats counted, and a repeat of one residue does not look like a single word.
    """

    def __init__(self, sequences: Sequence[str], length: int) -> None:
        residues = np.array([len(s) for s in sequences], dtype=np.int64)
        sizes = np.maximum(0, residues - length + 1)
        self._starts = np.append(np.int64(0), np.cumsum(sizes))
        # 5 bits tell the 26 letters apart.
        letters = np.frombuffer("".join(sequences).encode(), dtype=np.uint8).astype(np.int64) & 31
        at = _ranges(np.cumsum(residues) - residues, sizes)
        words = np.zeros(len(at), dtype=np.int64)
        for offset in range(length):
            words = words << 5 | letters[at + offset]
        owners = np.repeat(np.arange(len(sequences)), sizes)
        self.numbers: I64 = words << 32 | _occurrences(owners, words)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def of(self, index: int) -> I64:
        """Numbers of the words of one sequence."""
        return self.numbers[self._starts[index] : self._starts[index + 1]]

    def owners(self) -> I32:
        """Index of the sequence of each of ``numbers``."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self._starts))


def _ranges(starts: I64, sizes: I64) -> I64:
    """``starts[0], starts[0] + 1, ...`` (``sizes[0]`` numbers), then the same of ``starts[1]``, and so on."""
    before = np.cumsum(sizes) - sizes
    ranges: I64 = np.repeat(starts - before, sizes) + np.arange(sizes.sum())
    return ranges


def _occurrences(owners: I64, words: I64) -> I64:
    """How often each word has occurred before in its own sequence."""
    order = np.lexsort((words, owners))
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (np.diff(owners[order]) != 0) | (np.diff(words[order]) != 0)
    place = np.arange(len(order))
    counts = np.empty(len(order), dtype=np.int64)
    counts[order] = place - np.maximum.accumulate(np.where(fresh, place, 0))
    return counts


class WordIndex:
    """Which sequences hold a word: exact, however common the word."""

    def __init__(self, words: Words) -> None:
        order = np.argsort(words.numbers, kind="stable")
        self._count = len(words)
        self._owners = words.owners()[order]
        self._numbers, starts = np.unique(words.numbers[order], return_index=True)
        self._bounds = np.append(starts, len(order))

    def shared(self, numbers: I64) -> I64:
        """``[sequences]``: how many of ``numbers`` each sequence holds."""
        if not len(self._numbers):
            return np.zeros(self._count, dtype=np.int64)
        found = np.searchsorted(self._numbers, numbers)
        found[found == len(self._numbers)] = 0
        found = found[self._numbers[found] == numbers]
        starts = self._bounds[found]
        holders = self._owners[_ranges(starts, self._bounds[found + 1] - starts)]
        return np.bincount(holders, minlength=self._count)


def words_left(length: int) -> int:
    """Words of a sequence of ``length`` residues that survive any ``length * EDITED_PERCENT // 100`` edits."""
    return length - CLUSTER_WORD + 1 - CLUSTER_WORD * (length * EDITED_PERCENT // 100)


def clusters(sequences: list[str]) -> list[int]:
    """Cluster number of each sequence; clusters are numbered in the order in which they first appear.

    Two sequences are linked where the longer one holds at least ``words_left`` of the 5-residue words of the shorter
    one, about half of them, repeats counted. Clusters are what links connect. It follows that no two sequences stand in
    two clusters if the shorter one, of n residues, becomes a stretch of the longer one by at most n / 10 edits (90 %
    identity over the shorter one). An edit is a residue of the shorter one that is replaced or left out, or a place
    inside it where any number of residues is put in. For a residue lies in at most five words and a place between two
    residues in at most four, and all other words stand in the longer sequence as they are. The reverse does not hold:
    a cluster has less similar pairs in it too.

    Raises:
        TrainingDataError: a sequence is shorter than a word, or has anything but the letters A to Z.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence) < CLUSTER_WORD or not (sequence.isascii() and sequence.isalpha() and sequence.isupper()):
            raise TrainingDataError(
                f"sequence {index + 1} cannot be compared with others.",
                seen=sequence[:40],
                remedy=f"Give sequences of at least {CLUSTER_WORD} letters, A to Z.",
            )
    words = Words(sequences, CLUSTER_WORD)
    index_of_words = WordIndex(words)
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    parents = list(range(len(sequences)))
    for one, length in enumerate(lengths.tolist()):
        linked = (index_of_words.shared(words.of(one)) >= words_left(length)) & (lengths >= length)
        for other in np.flatnonzero(linked).tolist():
            parents[_root(parents, other)] = _root(parents, one)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(_root(parents, one), len(numbers)) for one in range(len(sequences))]


def _root(parents: list[int], node: int) -> int:
    """Representative of a node's cluster; shortens the way to it."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


def identity_to_nearest(
    queries: Sequence[str], references: Sequence[str], candidates: int = 20
) -> npt.NDArray[np.float64]:
    """``[queries]``: for each query the largest identity (0 to 1) to any of the references that were looked at.

    This is a search by heuristic, not a proof: the ``candidates`` references that share the most 3-residue words with
    the query, beyond what their length lets one expect, are aligned with it (see ``identity``), and the others are not.
    A reference that shares few words can be missed, so a value is a lower bound. Above about 40 % identity shared words
    are plenty. Below 30 % few are left, and unrelated sequences reach 25 % too where one of them is short.

    Raises:
        TrainingDataError: there is no reference.
    """
    if not references:
        raise TrainingDataError("no sequence to compare with.", remedy="Give at least one reference.")
    words = Words(references, SEARCH_WORD)
    index_of_words = WordIndex(words)
    sizes = np.array([max(1, len(reference)) for reference in references], dtype=np.float64)
    query_words = Words(queries, SEARCH_WORD)
    aligner = _aligner()
    nearest = np.zeros(len(queries))
    for row, query in enumerate(queries):
        shared = index_of_words.shared(query_words.of(row))
        # By chance a reference shares words in proportion to its length: how far above that, in the spread of chance.
        excess = (shared - shared.sum() * sizes / sizes.sum()) / np.sqrt(sizes)
        likely = np.argsort(-excess, kind="stable")[:candidates]
        nearest[row] = max(_identity(aligner, query, references[column]) for column in likely.tolist())
    return nearest


def identity(one: str, other: str) -> float:
    """Identical pairs of the best local alignment over the length of the shorter sequence, 0 to 1.

    Scores are BLOSUM62's, gap penalties those of BLAST. Residues outside the alignment count as different: a shared
    domain that is half of the shorter sequence gives half of its own identity.
    """
    return _identity(_aligner(), one, other)


def _aligner() -> Align.PairwiseAligner:
    matrix = substitution_matrices.load("BLOSUM62")
    return Align.PairwiseAligner(
        mode="local", substitution_matrix=matrix, open_gap_score=_GAP_OPEN, extend_gap_score=_GAP_EXTEND
    )


def _identity(aligner: Align.PairwiseAligner, one: str, other: str) -> float:
    if not one or not other:
        return 0.0
    # The matrix knows no U, O or J.
    alignments = aligner.align(one.translate(_UNKNOWN), other.translate(_UNKNOWN))
    if alignments.score <= 0:
        return 0.0
    identical = sum(
        letter == partner
        for (start, end), (low, high) in zip(*alignments[0].aligned, strict=True)
        for letter, partner in zip(one[start:end], other[low:high], strict=True)
    )
    return identical / min(len(one), len(other))
