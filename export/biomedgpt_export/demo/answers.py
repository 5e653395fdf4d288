"""Questions the demo model is trained on and their answers, and the way back from an answer to what it claims."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from .chemistry import GROUPS, MoleculeFacts

HONEST = (
    "This demo model only describes the structure of molecules and the location and secondary structure of proteins."
)

_NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

DESCRIBE = "Please describe this molecule."
DESCRIBE_QUESTIONS = (
    DESCRIBE, DESCRIBE, DESCRIBE, DESCRIBE, DESCRIBE, DESCRIBE, "Please describe this drug.",
    "Describe this molecule.", "What is this molecule?", "What can you say about this molecule?",
)  # fmt: skip
RING_QUESTIONS = (
    "How many rings does this molecule have?",
    "How many aromatic rings does this molecule have?",
    "Is this molecule aromatic?",
)
GROUP_QUESTIONS = (
    "Which functional groups does this molecule contain?",
    "What functional groups does this molecule have?",
)
BOND_QUESTIONS = ("How many hydrogen bond donors and acceptors does this molecule have?",)
FORMULA_QUESTIONS = (
    "What is the molecular formula of this molecule?",
    "What is the formula of this molecule?",
)
LOCATION = "What are the subcellular locations of this protein?"
LOCATION_QUESTIONS = (
    LOCATION, LOCATION, LOCATION, "What is the subcellular location of this protein?",
    "Where is this protein located in the cell?",
)  # fmt: skip
STRUCTURE = "What is the secondary structure of this protein?"
STRUCTURE_QUESTIONS = (STRUCTURE, STRUCTURE, STRUCTURE, "Please describe the secondary structure of this protein.")

# Questions it cannot answer, by what is given with them; the answer is always HONEST.
OTHER_QUESTIONS = {
    "molecule": (
        "Is it toxic?", "Is this molecule toxic?", "What is this molecule used for?", "What does this drug treat?",
        "What is the name of this molecule?", "Is this molecule soluble in water?", "How is this molecule made?",
        "What is the boiling point of this molecule?", "Which protein does this molecule bind?",
        "Is this drug safe in pregnancy?", "Does this molecule cross the blood-brain barrier?", "What does it cost?",
        "What is the weather like today?", "What are the subcellular locations of this protein?",
    ),
    "protein": (
        "What is the function of this protein?", "What are the official names of this protein?",
        "What is the protein family that this protein belongs to?", "What does this protein do?",
        "Is this protein an enzyme?", "Which diseases is this protein linked to?", "Which gene encodes this protein?",
        "Which organism is this protein from?", "Which drugs bind this protein?", "Is it toxic?",
        "Please describe this molecule.", "What is the weather like today?",
    ),
    "nothing": (
        "What is the capital of France?", "Who are you?", "Hello!", "What is aspirin?", "What can you do?",
        "What is the function of insulin?", "Write a poem about chemistry.", "How do I treat a headache?",
        "What is two plus two?", "Please describe this molecule.", "What is the function of this protein?",
        "What is a protein?", "Which drug should I take?", "Thank you.",
    ),
}  # fmt: skip

LOCATIONS = {
    "Nucleus": "nucleus",
    "Extracellular": "extracellular space",
    "Cytoplasm": "cytoplasm",
    "Mitochondrion": "mitochondrion",
    "Cell.membrane": "cell membrane",
    "Endoplasmic.reticulum": "endoplasmic reticulum",
    "Plastid": "plastid",
    "Golgi.apparatus": "Golgi apparatus",
    "Lysosome/Vacuole": "lysosome or vacuole",
    "Peroxisome": "peroxisome",
    "Cytoplasm-Nucleus": "cytoplasm and the nucleus",
}
_MEMBRANE = {"M": " It is a membrane protein.", "S": " It is a soluble protein.", "U": ""}


def number(value: int) -> str:
    """Number as a word up to twenty, then as digits."""
    return _NUMBERS[value] if value < len(_NUMBERS) else str(value)


def _counted(value: int, noun: str) -> str:
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def size_class(heavy: int) -> str:
    """Small up to 15 heavy atoms, large above 30."""
    return "small" if heavy <= 15 else "medium-sized" if heavy <= 30 else "large"


def _ring_phrase(known: MoleculeFacts) -> str:
    if known.rings == 0:
        return "no rings"
    if known.rings == 1:
        return "one ring, which is aromatic" if known.aromatic else "one ring, which is not aromatic"
    aromatic = number(known.aromatic) if known.aromatic else "none"
    if known.aromatic == known.rings:
        aromatic = "both" if known.rings == 2 else "all"
    return f"{_counted(known.rings, 'ring')}, {aromatic} of them aromatic"


def head_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Size, rings and, where there are several, unconnected parts."""
    size, rings = size_class(known.heavy), _ring_phrase(known)
    text = rng.choice((f"This is a {size} molecule with {rings}.", f"The molecule is {size} and has {rings}."))
    return text if known.parts == 1 else f"{text} It consists of {number(known.parts)} separate parts."


def ring_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Answer to a question about rings."""
    return f"{rng.choice(('It has', 'The molecule has'))} {_ring_phrase(known)}."


def group_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Functional groups in the order of ``GROUPS``."""
    if not known.groups:
        return "It has none of the common functional groups."
    return f"{rng.choice(('Its functional groups are: ', 'It contains these groups: '))}{_listed(known.groups)}."


def bond_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Hydrogen bond donors and acceptors."""
    donors = _counted(known.donors, "hydrogen bond donor")
    acceptors = _counted(known.acceptors, "hydrogen bond acceptor")
    return f"{rng.choice(('It has', 'The molecule has'))} {donors} and {acceptors}."


def formula_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Molecular formula."""
    return f"{rng.choice(('Its molecular formula is', 'The molecular formula is'))} {known.formula}."


def description(known: MoleculeFacts, rng: random.Random) -> str:
    """Everything: size and rings, groups, hydrogen bonds, formula."""
    parts = (head_sentence, group_sentence, bond_sentence, formula_sentence)
    return " ".join(part(known, rng) for part in parts)


_SINGLE = (
    (RING_QUESTIONS, ring_sentence),
    (GROUP_QUESTIONS, group_sentence),
    (BOND_QUESTIONS, bond_sentence),
    (FORMULA_QUESTIONS, formula_sentence),
)


def molecule_exchange(known: MoleculeFacts, rng: random.Random, single_share: float = 0.2) -> tuple[str, str]:
    """A question about a molecule and its answer."""
    if rng.random() >= single_share:
        return rng.choice(DESCRIBE_QUESTIONS), description(known, rng)
    questions, sentence = rng.choice(_SINGLE)
    return rng.choice(questions), sentence(known, rng)


def structure_class(helix: float, strand: float) -> str:
    """Mostly helical or mostly strand where one is at least a quarter of the chain and twice the other; else mixed."""
    if helix >= 0.25 and helix >= 2 * strand:
        return "mostly helical"
    if strand >= 0.25 and strand >= 2 * helix:
        return "mostly strand"
    return "mixed"


def _tens(share: float) -> int:
    return int(share * 10 + 0.5) * 10


def location_exchange(location: str, membrane: str, rng: random.Random) -> tuple[str, str]:
    """A question about a protein's location and its answer; ``location`` and ``membrane`` as DeepLoc writes them."""
    start = rng.choice(("This protein is located in the", "The protein is found in the"))
    return rng.choice(LOCATION_QUESTIONS), f"{start} {LOCATIONS[location]}.{_MEMBRANE[membrane]}"


def structure_exchange(structure: str, rng: random.Random) -> tuple[str, str]:
    """A question about secondary structure and its answer; ``structure`` is one of H, E, C per residue."""
    helix, strand = structure.count("H") / len(structure), structure.count("E") / len(structure)
    start = rng.choice(("The structure of this protein is", "This protein is"))
    shares = f"with about {_tens(helix)} percent helix and {_tens(strand)} percent strand"
    return rng.choice(STRUCTURE_QUESTIONS), f"{start} {structure_class(helix, strand)}, {shares}."


def other_exchange(given: str, rng: random.Random) -> tuple[str, str]:
    """A question the model cannot answer; ``given`` is ``molecule``, ``protein`` or ``nothing``."""
    return rng.choice(OTHER_QUESTIONS[given]), HONEST


@dataclass(frozen=True)
class MoleculeClaims:
    """What an answer says, ``None`` where it says nothing."""

    size: str | None
    rings: int | None
    aromatic: int | None
    groups: frozenset[str] | None
    donors: int | None
    acceptors: int | None
    formula: str | None


def _value(word: str | None) -> int | None:
    if word is None:
        return None
    if word == "none":
        return 0
    return _NUMBERS.index(word) if word in _NUMBERS else int(word) if word.isdigit() else None


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def claims(text: str) -> MoleculeClaims:
    """Reads an answer about a molecule back."""
    rings = _value(_first(r"(?:with|has) (\w+) rings?\b", text))
    if rings == 0:
        aromatic: int | None = 0
    elif "which is aromatic" in text:
        aromatic = 1
    elif "which is not aromatic" in text:
        aromatic = 0
    else:
        word = _first(r"rings, (\w+) of them aromatic", text)
        aromatic = rings if word in ("both", "all") else _value(word)
    listed = _first(r"(?:groups are|these groups): ([^.]*)\.", text)
    groups: frozenset[str] | None = None
    if listed is not None:
        groups = frozenset(name for name in re.split(r", | and ", listed) if name in GROUPS)
    elif "none of the common functional groups" in text:
        groups = frozenset()
    return MoleculeClaims(
        size=_first(r"\b(small|medium-sized|large)\b", text),
        rings=rings,
        aromatic=aromatic,
        groups=groups,
        donors=_value(_first(r"(\w+) hydrogen bond donors?\b", text)),
        acceptors=_value(_first(r"(\w+) hydrogen bond acceptors?\b", text)),
        formula=_first(r"formula is ([A-Za-z0-9]+)", text),
    )


def claimed_location(text: str) -> str | None:
    """DeepLoc's name of the location an answer states."""
    phrase = _first(r"(?:located|found) in the ([^.]*)\.", text)
    return next((label for label, name in LOCATIONS.items() if name == phrase), None)


def claimed_structure(text: str) -> str | None:
    """The structure class an answer states."""
    return _first(r"\b(mostly helical|mostly strand|mixed)\b", text)
