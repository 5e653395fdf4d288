"""Conversation -> segments: token ids, molecules and proteins in the order in which the model reads them.

The template is that of OpenBioMed's ``Conversation`` (v1), the one the released weights were demonstrated with. Each
text piece around a molecule or protein is tokenized on its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import InputError, ManifestError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    # Bundles are read with this file, also where nobody reads molecules and there is no RDKit.
    from .inputs import Molecule, Protein

Input: TypeAlias = "Molecule | Protein"

# What ends a message, and what user text is kept free of. Look-alikes such as U+FF03 need no care: the tokenizer is
# known not to fold characters (see Tokenizer).
SEPARATOR = "###"
_SEPARATOR_RUN = re.compile("#{3,}")


@dataclass(frozen=True)
class PromptTemplate:
    """The strings of the chat format, from the bundle's manifest.

    Attributes:
        system: opening text, ending in a space, or empty.
        separator: stands between messages; always ``###``.
        human, assistant: role names.
        molecule, protein: opening and closing mark around the soft tokens.
    """

    system: str
    separator: str
    human: str
    assistant: str
    molecule: tuple[str, str]
    protein: tuple[str, str]

    def __post_init__(self) -> None:
        if self.separator != SEPARATOR:
            raise ManifestError(
                f"the prompt template separates messages by {self.separator[:40]!r}.",
                seen=self.separator[:40],
                limit=SEPARATOR,
                remedy=f"User text can be kept free of {SEPARATOR!r} only; update biomedgpt-edge, or export again.",
            )

    def marks(self, item: Input) -> tuple[str, str]:
        """Opening and closing mark of an input."""
        return self.molecule if item.modality == "molecule" else self.protein


@dataclass(frozen=True)
class Turn:
    """One question with its inputs, and its answer once it has been given."""

    question: str
    inputs: tuple[Input, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, eq=False)
class TokenSegment:
    """Ids of one piece of text, int64 ``[n]``."""

    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class MoleculeSegment:
    """One soft token per atom."""

    molecule: Molecule

    @property
    def content(self) -> str:
        """See :func:`content_of`."""
        return content_of(self.molecule)

    def __len__(self) -> int:
        return self.molecule.n_soft_tokens


@dataclass(frozen=True)
class ProteinSegment:
    """One soft token per residue, and one each for ``<cls>`` and ``<eos>``."""

    protein: Protein

    @property
    def content(self) -> str:
        """See :func:`content_of`."""
        return content_of(self.protein)

    def __len__(self) -> int:
        return self.protein.n_soft_tokens


def content_of(item: Input) -> str:
    """Names what the model reads of an input: equal names give equal soft tokens."""
    return f"{type(item).__name__}:{item.digest}"


Segment: TypeAlias = "TokenSegment | MoleculeSegment | ProteinSegment"


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        segments: in order; their lengths add up to ``len(prompt)`` positions.
        text: the prompt as text, with placeholders where soft tokens stand; for people, never tokenized.
        notes: what was changed or left out on the way here; shown with the answer.
    """

    segments: tuple[Segment, ...]
    text: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """int64 ``[T]``: the id at each text position, -1 at soft tokens."""
        return np.concatenate(
            [s.ids if isinstance(s, TokenSegment) else np.full(len(s), -1, np.int64) for s in self.segments]
        )


def build_prompt(template: PromptTemplate, turns: Sequence[Turn], tokenizer: Tokenizer, *, raw: bool = False) -> Prompt:
    """Wraps ``turns`` in the template and tokenizes them piece by piece; the last turn is the open one.

    User text stays text: placeholders and special-token strings in it are encoded as their characters, and a run of
    ``###`` is broken up so that it cannot open a new message (``raw=True`` leaves it, as the reference does).

    Raises:
        InputError: a question that is empty or is not valid Unicode.
    """
    notes: list[str] = []
    parts: list[str | Input] = [_opening(template)]
    for turn in turns:
        _append(parts, _turn_parts(template, turn, raw, notes))
        notes.extend(note for item in turn.inputs for note in item.notes)
    segments: list[Segment] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            # There is no EOS anywhere, not even after earlier answers.
            ids = _first_piece(part, tokenizer) if index == 0 else tokenizer.encode(part)
            segments.append(TokenSegment(np.array(ids, dtype=np.int64)))
        else:
            segments.append(MoleculeSegment(part) if part.modality == "molecule" else ProteinSegment(part))
    text = "".join(part if isinstance(part, str) else part.placeholder for part in parts)
    return Prompt(tuple(segments), text, tuple(dict.fromkeys(notes)))


def beginnings(template: PromptTemplate, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids with which prompts begin: before a molecule, before a protein, and before a question without either.

    Before an input they are all that comes. Before a question they end with the role's name, without the space: where
    the tokenizer joins that with the question, a prompt begins otherwise.
    """
    opening = _opening(template)
    speaks = f"{template.human}: "
    ends = [speaks + template.molecule[0], speaks + template.protein[0], speaks.rstrip()]
    return [_first_piece(opening + end, tokenizer) for end in ends]


def _opening(template: PromptTemplate) -> str:
    return f"{template.system}{template.separator} "


def _first_piece(text: str, tokenizer: Tokenizer) -> list[int]:
    """Only the very first piece gets BOS."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def _turn_parts(template: PromptTemplate, turn: Turn, raw: bool, notes: list[str]) -> list[str | Input]:
    question = _user_text(turn.question, raw, notes)
    parts: list[str | Input] = [f"{template.human}: "]
    for index, item in enumerate(turn.inputs):
        opening, closing = template.marks(item)
        # Every input but the first opens a message of its own; the question joins the last one.
        _append(parts, [f" {template.separator} {template.human}: "] if index else [])
        _append(parts, [opening, item, closing])
    _append(parts, [f" {question}" if turn.inputs else question])
    _append(parts, [f" {template.separator} {template.assistant}: "])
    if turn.answer is not None:
        answer = turn.answer if raw else _break_separators(turn.answer)
        _append(parts, [f"{answer} {template.separator} "])
    return parts


def _append(parts: list[str | Input], more: Sequence[str | Input]) -> None:
    """Appends, joining neighbouring texts: a piece of text reaches the tokenizer whole."""
    for part in more:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)


def _user_text(text: str, raw: bool, notes: list[str]) -> str:
    if not isinstance(text, str):
        raise InputError(f"the question is a {type(text).__name__}, not text.", remedy="Pass a string.")
    if not text.strip():
        raise InputError("the question is empty.", remedy="Ask something, such as 'Please describe this molecule.'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the question is not valid Unicode at character {error.start + 1}.", remedy="Remove that character."
        ) from error
    broken = text if raw else _break_separators(text)
    if broken != text:
        notes.append("'###' in the question was written '# ##', since the model reads '###' as the end of a message")
    return broken


def _break_separators(text: str) -> str:
    """``###`` -> ``# ##``, so that no three marks stand together."""

    def spaced(match: re.Match[str]) -> str:
        run = match.group()
        return " ".join([run[0], *(run[i : i + 2] for i in range(1, len(run), 2))])

    return _SEPARATOR_RUN.sub(spaced, text)
