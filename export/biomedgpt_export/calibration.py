"""Questions with answers that a model is run on while it is quantized, or compared with its quantized form.

A file has one JSON object per line: ``question``, and where there are some ``answer`` and ``smiles`` or ``sequence``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from biomedgpt_edge import Molecule, Protein
from biomedgpt_edge.bundle import sha256_of
from biomedgpt_edge.errors import BioMedGPTError
from biomedgpt_edge.prompt import Input, PromptTemplate, Segment, Turn, build_prompt
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_edge.tokenizer import Tokenizer

from .errors import CalibrationError

_FOLDER = Path(__file__).parent / "questions"
CALIBRATION, PROOF = _FOLDER / "calibration.jsonl", _FOLDER / "proof.jsonl"

MAX_BYTES = 64 << 20
_FIELDS = ("question", "answer", "smiles", "sequence")
_LINES_NAMED = 10


@dataclass(frozen=True)
class Example:
    """A question, what is given with it, and its answer, which may be empty."""

    question: str
    inputs: tuple[Input, ...]
    answer: str

    def segments(self, template: PromptTemplate, tokenizer: Tokenizer) -> tuple[Segment, ...]:
        """The prompt, as the runtime reads it."""
        return build_prompt(template, [Turn(self.question, self.inputs)], tokenizer).segments

    def answer_ids(self, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
        """Ids of the answer and EOS, int64 ``[A]``; none where there is no answer."""
        return np.array([*tokenizer.encode(self.answer), tokenizer.eos_id] if self.answer else [], np.int64)


@dataclass(frozen=True)
class Questions:
    """What one model is run on.

    Attributes:
        sha256: of the file they come from.
        lengths: positions that each takes in the decoder, its answer included.
        answers: positions of those that its answer takes.
    """

    sha256: str
    examples: Sequence[Example]
    lengths: Sequence[int]
    answers: Sequence[int]

    @classmethod
    def fitting(
        cls,
        path: Path,
        examples: Sequence[Example],
        template: PromptTemplate,
        tokenizer: Tokenizer,
        context: int,
        *,
        answer: int = 0,
        left_out: Callable[[int], None] | None = None,
    ) -> Questions:
        """All of ``examples``, which were read from ``path``.

        Args:
            context: positions that the decoder has.
            answer: positions to be kept for an answer where that of the example is shorter.
            left_out: where given, those that are too long are no error, and it is told how many they are.

        Raises:
            CalibrationError: one is too long, or all are.
        """
        measured = [_measured(example, template, tokenizer, answer) for example in examples]
        fitting = [one for one in measured if one.length <= context]
        shortest = min(measured, key=lambda one: one.length)
        long = next((one for one in measured if one.length > context), None)
        if long is not None and (left_out is None or not fitting):
            named = long if fitting else shortest
            raise CalibrationError(
                f"the question {named.example.question[:60]!r} of {path} takes {named.length} positions with its "
                "answer.",
                seen=named.length,
                limit=context,
                remedy="Shorten its answer or its protein, or give other questions.",
            )
        if left_out is not None and long is not None:
            left_out(len(measured) - len(fitting))
        return cls(
            sha256_of(path),
            [one.example for one in fitting],
            [one.length for one in fitting],
            [one.answer for one in fitting],
        )

    def first(self, count: int) -> Questions:
        """At most so many of them."""
        return Questions(self.sha256, self.examples[:count], self.lengths[:count], self.answers[:count])

    @property
    def residues(self) -> list[int]:
        """Positions that each protein takes in its encoder, which reads none twice."""
        given = [item for example in self.examples for item in example.inputs if isinstance(item, Protein)]
        return [len(residue_ids(sequence)) for sequence in dict.fromkeys(protein.sequence for protein in given)]


@dataclass(frozen=True)
class _Measured:
    """An example, the positions that its answer takes, and those of all of it."""

    example: Example
    answer: int
    length: int


def _measured(example: Example, template: PromptTemplate, tokenizer: Tokenizer, answer: int) -> _Measured:
    kept = max(answer, len(example.answer_ids(tokenizer)))
    return _Measured(example, kept, sum(map(len, example.segments(template, tokenizer))) + kept)


def read_examples(path: Path) -> list[Example]:
    """Every line of a file.

    Raises:
        CalibrationError: the file cannot be read, is empty or too large, or lines of it cannot be used (they are named
            by number).
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CalibrationError(f"{path} is too large.", seen=path.stat().st_size, limit=MAX_BYTES)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}.", seen=str(path)) from error
    examples, problems = list[Example](), list[str]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(line))
            except (ValueError, RecursionError, BioMedGPTError) as error:
                problems.append(f"line {number}: {error}")
    if problems:
        named = "\n  ".join(problems[:_LINES_NAMED])
        more = f"\n  and {len(problems) - _LINES_NAMED} more" if len(problems) > _LINES_NAMED else ""
        raise CalibrationError(
            f"{len(problems)} of the lines of {path} cannot be used:\n  {named}{more}\n",
            seen=len(problems),
            remedy="Each line is a JSON object with 'question' and, where there are some, 'answer' and 'smiles' or "
            "'sequence'.",
        )
    if not examples:
        raise CalibrationError(f"{path} holds no questions.", seen=str(path), remedy="Give at least one line.")
    return examples


def readable(
    examples: Sequence[Example], inputs: tuple[type[Input], ...], purpose: str, report: Callable[[str], None]
) -> list[Example]:
    """Those of the questions that a model can read which has encoders for ``inputs`` alone.

    Args:
        purpose: what they are for, such as "calibration".
        report: is told how many others there are.

    Raises:
        CalibrationError: none can be read.
    """
    found = [example for example in examples if all(isinstance(item, inputs) for item in example.inputs)]
    if not found:
        raise CalibrationError(
            f"each of the {len(examples)} {purpose} questions has a molecule or protein, for which the model has no "
            "encoder.",
            seen=len(examples),
            remedy="Give questions that it can be asked.",
        )
    if len(found) < len(examples):
        report(
            f"{purpose}: {len(examples) - len(found)} of {len(examples)} questions need an encoder that is not there"
        )
    return found


def require_protein(examples: Sequence[Example]) -> None:
    """Raises:
    CalibrationError: none of the calibration questions has a protein.
    """
    if not any(isinstance(item, Protein) for example in examples for item in example.inputs):
        raise CalibrationError(
            "none of the calibration questions has a protein, and the protein encoder cannot be calibrated without.",
            remedy="Add lines with 'sequence'.",
        )


def _example(line: str) -> Example:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    wrong = [name for name, value in fields.items() if not isinstance(value, str) or not value.strip()]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not text, or empty")
    if "question" not in fields:
        raise ValueError("'question' is missing")
    if "smiles" in fields and "sequence" in fields:
        raise ValueError("both 'smiles' and 'sequence' are given")
    inputs: tuple[Input, ...] = ()
    if "smiles" in fields:
        inputs = (Molecule.from_smiles(fields["smiles"]),)
    elif "sequence" in fields:
        inputs = (Protein.from_sequence(fields["sequence"]),)
    return Example(fields["question"], inputs, fields.get("answer", ""))
