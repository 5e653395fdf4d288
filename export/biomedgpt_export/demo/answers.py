"""What the demo model answers, written from facts, and the way back from an answer to what it claims."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from rdkit import Chem

from .chemistry import GROUPS, MoleculeFacts

HONEST = (
    "This demo model only describes the structure of molecules and the location and secondary structure of proteins."
)

_NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

# ChEBI's way of saying it: "The molecule is an ester and a carboxylic acid." Groups without such a noun are listed.
_CLASS_NOUNS = {
    "carboxylic acid": "a carboxylic acid", "ester": "an ester", "amide": "an amide", "carbamate": "a carbamate",
    "ketone": "a ketone", "aldehyde": "an aldehyde", "alcohol": "an alcohol", "phenol": "a phenol",
    "ether": "an ether", "amine": "an amine", "quaternary ammonium": "a quaternary ammonium compound",
    "N-oxide": "an N-oxide", "oxime": "an oxime", "hydrazone": "a hydrazone", "nitrile": "a nitrile",
    "nitro": "a nitro compound", "sulfonamide": "a sulfonamide", "sulfone": "a sulfone",
    "sulfonic acid": "a sulfonic acid", "sulfoxide": "a sulfoxide", "thioether": "an organic sulfide",
    "thioester": "a thioester", "thiol": "a thiol", "disulfide": "an organic disulfide",
    "fluoro": "an organofluorine compound", "chloro": "an organochlorine compound",
    "bromo": "an organobromine compound", "iodo": "an organoiodine compound",
    "aromatic ring nitrogen": "a nitrogen heteroarene", "aromatic ring oxygen": "an oxygen heteroarene",
    "aromatic ring sulfur": "a sulfur heteroarene",
}  # fmt: skip
_GROUP_OF_NOUN = {noun: group for group, noun in _CLASS_NOUNS.items()}

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
MEMBRANE = {"M": "It is a membrane protein.", "S": "It is a soluble protein."}


# ----------------------------------------------------------------------------------------------------- molecules


def number(value: int) -> str:
    """Number as a word up to twelve, then as digits."""
    return _NUMBERS[value] if value < len(_NUMBERS) else str(value)


def _counted(value: int, noun: str) -> str:
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def _listed(names: list[str]) -> str:
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
    return f"{_it_has(rng)} {_ring_phrase(known)}."


def aromatic_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Answer to a question about aromatic rings."""
    return f"{_it_has(rng)} {_counted(known.aromatic, 'aromatic ring')}."


def group_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Functional groups in the order of ``GROUPS``, as a list or in ChEBI's words."""
    if not known.groups:
        return "It has none of the common functional groups."
    if all(group in _CLASS_NOUNS for group in known.groups) and rng.random() < 0.2:
        return f"The molecule is {_listed([_CLASS_NOUNS[group] for group in known.groups])}."
    return f"{rng.choice(('Its functional groups are: ', 'It contains these groups: '))}{_listed([*known.groups])}."


def composition_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """How many heavy atoms, and of which elements."""
    start = f"{_it_has(rng)} {_counted(known.heavy, 'heavy atom')}"
    if not known.composition:
        return f"{start}."
    return f"{start}: {_listed([f'{number(count)} {element(s)}' for s, count in known.composition.items()])}."


def donor_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Hydrogen bond donors."""
    return f"{_neutral_it(rng)} has {_donors(known)}."


def acceptor_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Hydrogen bond acceptors."""
    return f"{_it_has(rng)} {_acceptors(known)}."


def bond_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Hydrogen bond donors and acceptors."""
    return f"{_neutral_it(rng)} has {_donors(known)} and {_acceptors(known)}."


def formula_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Molecular formula, after the elements: a model that writes token by token counts better out loud."""
    start = rng.choice(("In neutral form its molecular formula is", "Its molecular formula, in neutral form, is"))
    return f"{composition_sentence(known, rng)} {start} {known.formula}."


def size_sentence(known: MoleculeFacts, rng: random.Random) -> str:
    """Size class with its reason."""
    size, atoms = size_class(known.heavy), _counted(known.heavy, "heavy atom")
    return rng.choice((f"It is a {size} molecule of {atoms}.", f"This molecule is {size}: it has {atoms}."))


def description(known: MoleculeFacts, rng: random.Random) -> str:
    """Everything: size and rings, groups, elements, hydrogen bonds, formula."""
    last = f"{_neutral_it(rng)} has {_donors(known)} and {_acceptors(known)}, and its formula is {known.formula}."
    parts = (head_sentence, group_sentence, composition_sentence)
    return " ".join([*(part(known, rng) for part in parts), last])


def _it_has(rng: random.Random) -> str:
    return rng.choice(("It has", "The molecule has"))


def _neutral_it(rng: random.Random) -> str:
    return rng.choice(("In neutral form it", "The neutral form"))


def _donors(known: MoleculeFacts) -> str:
    return _counted(known.donors, "hydrogen bond donor")


def _acceptors(known: MoleculeFacts) -> str:
    return _counted(known.acceptors, "hydrogen bond acceptor")


def element(symbol: str) -> str:
    """``Cl`` -> ``chlorine``."""
    table = Chem.GetPeriodicTable()
    return str(table.GetElementName(table.GetAtomicNumber(symbol))).lower()


MOLECULE_ANSWERS: dict[str, Callable[[MoleculeFacts, random.Random], str]] = {
    "describe": description,
    "composition": composition_sentence,
    "formula": formula_sentence,
    "rings": ring_sentence,
    "aromatic": aromatic_sentence,
    "groups": group_sentence,
    "donors": donor_sentence,
    "acceptors": acceptor_sentence,
    "hydrogen_bonds": bond_sentence,
    "size": size_sentence,
}

# ------------------------------------------------------------------------------------------------------ proteins


STRUCTURES = ("mostly helical", "mostly strand", "mixed")


def structure_class(helix: float, strand: float) -> str:
    """Mostly helical or mostly strand where one is at least a quarter of the chain and twice the other; else mixed."""
    if helix >= 0.25 and helix >= 2 * strand:
        return STRUCTURES[0]
    if strand >= 0.25 and strand >= 2 * helix:
        return STRUCTURES[1]
    return STRUCTURES[2]


def tenths(share: float) -> int:
    """A share in tenths, halves rounded up."""
    return int(share * 10 + 0.5)


def location_answer(location: str, membrane: str, rng: random.Random) -> str:
    """Where a protein is; ``location`` and ``membrane`` as DeepLoc writes them."""
    start = rng.choice(("This protein is located in the", "The protein is found in the"))
    return f"{start} {LOCATIONS[location]}. {MEMBRANE[membrane]}"


def structure_answer(helix: float, strand: float, rng: random.Random) -> str:
    """Secondary structure from the shares of helix and strand, from 0 to 1."""
    start = rng.choice(("The structure of this protein is", "This protein is"))
    shares = f"with about {10 * tenths(helix)} percent helix and {10 * tenths(strand)} percent strand"
    return f"{start} {structure_class(helix, strand)}, {shares}."


# ---------------------------------------------------------------------------------------------------- reading back


@dataclass(frozen=True)
class MoleculeClaims:
    """What an answer says, ``None`` where it says nothing; ``parts`` counts those that no bond connects."""

    size: str | None = None
    parts: int | None = None
    heavy: int | None = None
    composition: dict[str, int] | None = None
    rings: int | None = None
    aromatic: int | None = None
    groups: frozenset[str] | None = None
    donors: int | None = None
    acceptors: int | None = None
    formula: str | None = None


def claims_of(known: MoleculeFacts) -> MoleculeClaims:
    """What a full and correct description claims."""
    return MoleculeClaims(
        size=size_class(known.heavy),
        parts=known.parts,
        heavy=known.heavy,
        composition=known.composition,
        rings=known.rings,
        aromatic=known.aromatic,
        groups=frozenset(known.groups),
        donors=known.donors,
        acceptors=known.acceptors,
        formula=known.formula,
    )


def claims(text: str) -> MoleculeClaims:
    """Reads an answer about a molecule back.

    Nothing is claimed where a sentence is none that the functions above write, or speaks of what another one spoke of:
    a false addition must not go unnoticed. Numbers need not fit each other, for each is a claim of its own.
    """
    stated: dict[str, Any] = {}
    try:
        # The sentence about parts is the end of the one about size and rings.
        for sentence in re.split(r"(?<=\.) (?!It consists)", text):
            found = _stated(sentence)
            _require(stated.keys().isdisjoint(found))
            stated |= found
    except ValueError:
        return MoleculeClaims()
    return MoleculeClaims(**stated)


def _stated(sentence: str) -> dict[str, Any]:
    """Fields and values of one sentence; this and all that it calls raise ``ValueError`` where it is not as written."""
    match = next(filter(None, (pattern.fullmatch(sentence) for pattern in _SENTENCES)), None)
    stated: dict[str, Any] = {}
    _require(match is not None)
    for name, phrase in match.groupdict().items() if match else ():
        stated |= _READERS[name](phrase)
    return stated


def _require(as_written: bool) -> None:
    if not as_written:
        raise ValueError("no answer is written like this")


def _value(word: str) -> int:
    value = _NUMBERS.index(word) if word in _NUMBERS else int(word)
    _require(number(value) == word)
    return value


def _names(listed: str) -> list[str]:
    names = re.split(", | and ", listed)
    _require(_listed(names) == listed)
    return names


def _counted_field(name: str) -> Callable[[str], dict[str, Any]]:
    def read(phrase: str) -> dict[str, Any]:
        value = _value(phrase.split(" ")[0])
        _require(_counted(value, _COUNTED[name]) == phrase)
        return {name: value}

    return read


def _rings_fields(phrase: str) -> dict[str, Any]:
    rings = _value(phrase.split(" ")[0])
    some = re.search(r", (\w+) of them", phrase)
    if some:
        aromatic = {"none": 0, "both": rings, "all": rings}.get(some[1])
        aromatic = _value(some[1]) if aromatic is None else aromatic
    else:
        aromatic = int(phrase.endswith("which is aromatic"))
    known = MoleculeFacts(
        heavy=0, rings=rings, aromatic=aromatic, donors=0, acceptors=0, parts=1, formula="", groups=()
    )
    _require(aromatic <= rings and _ring_phrase(known) == phrase)
    return {"rings": rings, "aromatic": aromatic}


def _parts_field(word: str | None) -> dict[str, Any]:
    """Of one part nothing is said."""
    parts = 1 if word is None else _value(word)
    _require(parts > 1 or word is None)
    return {"parts": parts}


def _groups_field(names: list[str]) -> dict[str, Any]:
    _require(names == [group for group in GROUPS if group in names])
    return {"groups": frozenset(names)}


def _composition_field(listed: str) -> dict[str, Any]:
    found: dict[str, int] = {}
    pairs = [name.split(" ") for name in _names(listed)]
    for count, name in pairs:
        found[_SYMBOLS.get(name, "")] = _value(count)
    # Each once and in the order of a formula: carbon first, the others by the alphabet.
    _require(len(found) == len(pairs) and "" not in found and 0 not in found.values())
    _require(list(found) == sorted(found, key=lambda symbol: (symbol != "C", symbol)))
    return {"composition": found}


# How the functions above word their sentences. What a name stands for is read by the reader of that name, which makes
# sure that what it reads would be written in these words.
_COUNTED = {
    "heavy": "heavy atom",
    "aromatic": "aromatic ring",
    "donors": "hydrogen bond donor",
    "acceptors": "hydrogen bond acceptor",
}
_PHRASES = {
    **{name: rf"(?P<{name}>\w+ {noun}s?)" for name, noun in _COUNTED.items()},
    "size": f"(?P<size>{'|'.join(dict.fromkeys(map(size_class, range(100))))})",
    "rings": r"(?P<rings>\w+ rings?(?:, [\w ]+)?)",
    "parts": r"(?: It consists of (?P<parts>\w+) separate parts\.)?",
    "formula": "(?P<formula>[A-Z][A-Za-z0-9]*)",
    "it_has": "(?:It|The molecule) has",
    "neutral_it_has": "(?:In neutral form it|The neutral form) has",
}
_SENTENCES = tuple(
    re.compile(sentence.format_map(_PHRASES))
    for sentence in (
        r"This is a {size} molecule with {rings}\.{parts}",
        r"The molecule is {size} and has {rings}\.{parts}",
        r"{it_has} {rings}\.",
        r"{it_has} {aromatic}\.",
        r"It has none of the common functional groups(?P<no_groups>\.)",
        r"The molecule is (?P<nouns>an? [^.]+)\.",
        r"(?:Its functional groups are|It contains these groups): (?P<groups>[^.]+)\.",
        r"{it_has} no heavy atoms(?P<no_atoms>\.)",
        r"{it_has} (?!no ){heavy}: (?P<composition>[^.]+)\.",
        r"{neutral_it_has} {donors}\.",
        r"{it_has} {acceptors}\.",
        r"{neutral_it_has} {donors} and {acceptors}\.",
        r"{neutral_it_has} {donors} and {acceptors}, and its formula is {formula}\.",
        r"(?:In neutral form its molecular formula|Its molecular formula, in neutral form,) is {formula}\.",
        r"It is a {size} molecule of {heavy}\.",
        r"This molecule is {size}: it has {heavy}\.",
    )
)
_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{name: _counted_field(name) for name in _COUNTED},
    "size": lambda size: {"size": size},
    "rings": _rings_fields,
    "parts": _parts_field,
    "no_groups": lambda _: {"groups": frozenset()},
    "nouns": lambda listed: _groups_field([_GROUP_OF_NOUN.get(noun, "") for noun in _names(listed)]),
    "groups": lambda listed: _groups_field(_names(listed)),
    "no_atoms": lambda _: {"heavy": 0, "composition": {}},
    "composition": _composition_field,
    "formula": lambda formula: {"formula": formula},
}
# Elements other than hydrogen by their names.
_SYMBOLS = {element(symbol): symbol for symbol in map(Chem.GetPeriodicTable().GetElementSymbol, range(2, 119))}


def _location_claims(text: str) -> tuple[str, str] | None:
    """DeepLoc's names of what an answer states: the location, and M or S."""
    match = _LOCATION.fullmatch(text)
    return (_LABELS[match["location"]], _LABELS[match["membrane"]]) if match else None


def _one_of(name: str, texts: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(map(re.escape, texts))})"


_LABELS = {text: label for label, text in (*LOCATIONS.items(), *MEMBRANE.items())}
_LOCATION = re.compile(
    r"(?:This protein is located|The protein is found) in the "
    rf"{_one_of('location', LOCATIONS.values())}\. {_one_of('membrane', MEMBRANE.values())}"
)
_STRUCTURE = re.compile(
    r"(?:The structure of this protein is|This protein is) "
    rf"{_one_of('structure', STRUCTURES)}, "
    r"with about (?P<helix>0|[1-9]0|100) percent helix and (?P<strand>0|[1-9]0|100) percent strand\."
)


def claimed_location(text: str) -> str | None:
    """DeepLoc's name of the location an answer states."""
    stated = _location_claims(text)
    return stated[0] if stated else None


def claimed_membrane(text: str) -> str | None:
    """M where an answer says that it is a membrane protein, S for a soluble one."""
    stated = _location_claims(text)
    return stated[1] if stated else None


def claimed_structure(text: str) -> str | None:
    """The structure class an answer states."""
    match = _STRUCTURE.fullmatch(text)
    return match["structure"] if match else None


def claimed_shares(text: str) -> tuple[int, int] | None:
    """Percent helix and strand that an answer about structure states."""
    match = _STRUCTURE.fullmatch(text)
    return (int(match["helix"]), int(match["strand"])) if match else None


# The fields that an answer of each kind states, and no others.
_FIELDS = {
    "describe": {field.name for field in fields(MoleculeClaims)},
    "composition": {"heavy", "composition"},
    "formula": {"heavy", "composition", "formula"},
    "rings": {"rings", "aromatic"},
    "aromatic": {"aromatic"},
    "groups": {"groups"},
    "donors": {"donors"},
    "acceptors": {"acceptors"},
    "hydrogen_bonds": {"donors", "acceptors"},
    "size": {"size", "heavy"},
}


def kind_of(text: str) -> str | None:
    """The kind of question that ``text`` answers, right or wrong; ``other`` for the refusal, None for no kind."""
    if text == HONEST:
        return "other"
    if claimed_location(text) is not None:
        return "location"
    if claimed_structure(text) is not None:
        return "structure"
    stated = {name for name, value in vars(claims(text)).items() if value is not None}
    return next((kind for kind, names in _FIELDS.items() if names == stated), None)
