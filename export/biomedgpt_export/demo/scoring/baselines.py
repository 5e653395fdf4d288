"""What simple methods say about the same molecules and proteins: a score means something beside theirs only.

``commonest_claims`` and ``commonest`` look at no input at all. ``NearestMolecule`` copies from the most similar
training molecule. ``composition_regression`` sees which residues a protein has and nothing of their order. Molecules
have no composition regression, since their composition is one of the things that are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...errors import TrainingDataError
from ..answers import MoleculeClaims, claims_of
from ..chemistry import facts, neutral_form
from ..protein_teacher import AMINO_ACIDS

_RADIUS, _BITS = 2, 2048
# Inverse strengths of regularisation that cross-validation chooses from, and its parts.
_INVERSE_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_FOLDS = 5

_Value = TypeVar("_Value", bound=Hashable)


# -------------------------------------------------------------------------------------------------------- commonest


def commonest(values: Iterable[_Value]) -> _Value:
    """The most frequent value; of several, the one that comes first.

    Raises:
        TrainingDataError: there is no value.
    """
    counted = Counter(values).most_common(1)
    if not counted:
        raise TrainingDataError("no training value for a baseline.", remedy="Check the training files.")
    return counted[0][0]


def commonest_claims(known: Sequence[MoleculeClaims]) -> MoleculeClaims:
    """The commonest training value of each field; ``groups`` are those of more than a third of the molecules.

    A third is about where F1 is largest (it was measured to be flat from .20 to .33); see ``with_commonest_groups`` for
    the exact list.
    """
    compositions = [tuple((one.composition or {}).items()) for one in known]
    counts = Counter(name for one in known for name in one.groups or ())
    return MoleculeClaims(
        size=commonest(one.size for one in known),
        parts=commonest(one.parts for one in known),
        heavy=commonest(one.heavy for one in known),
        composition=dict(commonest(compositions)) or None,
        rings=commonest(one.rings for one in known),
        aromatic=commonest(one.aromatic for one in known),
        groups=frozenset(name for name, count in counts.items() if count > len(known) / 3),
        donors=commonest(one.donors for one in known),
        acceptors=commonest(one.acceptors for one in known),
        formula=commonest(one.formula for one in known),
    )


def with_commonest_groups(said: MoleculeClaims, known: Sequence[MoleculeClaims]) -> MoleculeClaims:
    """``said`` with the commonest whole list of groups, which is right more often than a list of common groups."""
    return replace(said, groups=commonest(one.groups for one in known))


# -------------------------------------------------------------------------------------------------------- molecules


def readable(smiles: str) -> Chem.Mol:
    """The molecule of a SMILES that is known to be good.

    Raises:
        TrainingDataError: it is not.
    """
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise TrainingDataError(
            "a molecule cannot be read.", seen=smiles[:80], remedy="Leave out what RDKit cannot read beforehand."
        )
    return mol


def true_claims(smiles: str) -> MoleculeClaims:
    """What a right answer about a molecule claims.

    Raises:
        TrainingDataError: it cannot be read.
    """
    return claims_of(facts(readable(smiles)))


class NearestMolecule:
    """Says of a molecule what is true of the most similar training molecule.

    Similarity is Tanimoto's of Morgan fingerprints (radius 2, 2,048 bits) of the neutral forms; of equally similar
    ones the first is taken. At 125,000 training molecules: a minute to begin with, then about 50 ms per question.

    Raises:
        TrainingDataError: no training molecule, or one that cannot be read.
    """

    def __init__(self, training: Sequence[str]) -> None:
        if not training:
            raise TrainingDataError("no training molecule for a baseline.", remedy="Check the training files.")
        self._training = training
        self._generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_BITS)
        self._fingerprints = [self._fingerprint(smiles) for smiles in training]

    def claims(self, smiles: str) -> MoleculeClaims:
        """Claims about one molecule."""
        return true_claims(self.nearest(smiles))

    def nearest(self, smiles: str) -> str:
        """The most similar training molecule."""
        similar = DataStructs.BulkTanimotoSimilarity(self._fingerprint(smiles), self._fingerprints)
        return self._training[int(np.argmax(similar))]

    def _fingerprint(self, smiles: str) -> DataStructs.ExplicitBitVect:
        fingerprint: DataStructs.ExplicitBitVect = self._generator.GetFingerprint(neutral_form(readable(smiles)))
        return fingerprint


# --------------------------------------------------------------------------------------------------------- proteins


def amino_acid_fractions(sequences: Sequence[str]) -> npt.NDArray[np.float64]:
    """``[sequences, 20]``: share of each standard amino acid; the rest of a sequence are other letters."""
    return np.array([[s.count(letter) / max(1, len(s)) for letter in AMINO_ACIDS] for s in sequences]).reshape(-1, 20)


def composition_regression(training: Sequence[str], labels: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Labels of the sequences ``asked``, by multinomial logistic regression on amino-acid fractions.

    The 20 fractions are standardised on training; the strength of the L2 regularisation is the one with the best
    accuracy in five-fold cross-validation on training (stratified, fixed seed). Labels of fewer than five training
    sequences are not learnt; where fewer than two are left, the commonest label is always said.

    Raises:
        TrainingDataError: no training sequence.
    """
    enough = {label for label, count in Counter(labels).items() if count >= _FOLDS}
    if len(enough) < 2 or not asked:
        return [commonest(labels)] * len(asked)
    kept = [(sequence, label) for sequence, label in zip(training, labels, strict=True) if label in enough]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": _INVERSE_STRENGTHS},
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0),
    )
    search.fit(amino_acid_fractions([sequence for sequence, _ in kept]), [label for _, label in kept])
    return [str(label) for label in search.predict(amino_acid_fractions(asked))]
