"""The demo's SentencePiece model, and prompts in the shipped template."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sentencepiece

from biomedgpt_edge.inputs import Molecule, Protein
from biomedgpt_edge.prompt import Input, TokenSegment, Turn, build_prompt
from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from ..families.biomedgpt_10b import PROMPT_TEMPLATE
from . import answers
from .data import CHEBI_FILE, MoleculeTable, ProteinRecord, ProteinSplit

PIECES = 1024
_DESCRIPTIONS = 6000
_PROMPTS = 3000
_HONEST_REPEATS = 20


def train_tokenizer(corpus: Iterator[str], path: Path, pieces: int = PIECES) -> None:
    """Writes a BPE model with byte fallback whose pieces may span words, so that constant texts take few tokens.

    Numbers are never joined with letters, so that a formula splits into elements and counts. There are no user-defined
    symbols: no text of a user can become a control token.

    Raises:
        TrainingDataError: too little text for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus, model_writer=model, model_type="bpe", vocab_size=pieces, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            split_by_whitespace=False, max_sentencepiece_length=32, character_coverage=1.0, num_threads=1,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, max_sentence_length=100_000,
        )  # fmt: skip
    except RuntimeError as error:
        raise TrainingDataError(f"the tokenizer cannot be trained: {error}.", remedy="Give it more text.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def corpus(table: MoleculeTable, split: ProteinSplit, data: Path, seed: int) -> Iterator[str]:
    """Text in the proportions in which the model reads and writes it: prompts, answers, a little chemistry English."""
    rng = random.Random(f"{seed}:corpus")
    trained = [i for i in range(len(table)) if not table.held_out[i]]
    for _ in range(_DESCRIPTIONS):
        yield answers.description(table.facts(rng.choice(trained)), rng)
    for _ in range(_PROMPTS):
        question, answer = answers.molecule_exchange(table.facts(rng.choice(trained)), rng, single_share=0.5)
        yield from _prompt_texts("molecule", question)
        yield answer
    for records in (split.located, split.structured):
        for _ in range(_PROMPTS // 2 if records else 0):
            question, answer = protein_exchange(rng.choice(records), rng)
            yield from _prompt_texts("protein", question)
            yield answer
    for given, questions in answers.OTHER_QUESTIONS.items():
        for question in questions:
            yield from _prompt_texts(given, question)
            yield from [answers.HONEST] * _HONEST_REPEATS
    yield from _english(data)


def _english(data: Path) -> Iterator[str]:
    lines = (data / CHEBI_FILE).read_text(encoding="utf-8").splitlines()[1:400]
    for line in lines:
        yield line.rpartition("\t")[2]


def protein_exchange(record: ProteinRecord, rng: random.Random) -> tuple[str, str]:
    """A question about a protein that its record has the answer to, and the answer."""
    if record.location:
        return answers.location_exchange(record.location, record.membrane, rng)
    return answers.structure_exchange(record.structure, rng)


@cache
def _example(given: str) -> tuple[Input, ...]:
    """Something of the right kind; only its kind matters to the texts around it."""
    if given == "molecule":
        return (Molecule.from_smiles("C"),)
    return (Protein.from_sequence("M"),) if given == "protein" else ()


def _prompt_texts(given: str, question: str) -> list[str]:
    """The pieces of a prompt as text, split where the soft tokens stand."""
    template = PROMPT_TEMPLATE
    opening, closing = {"molecule": template.molecule, "protein": template.protein}.get(given, ("", ""))
    head = f"{template.system}{template.separator} {template.human}: "
    tail = f"{question} {template.separator} {template.assistant}: "
    return [head + opening, f"{closing} {tail}"] if opening else [head + tail]


class PromptEncoder:
    """Prompts as the runtime builds them, remembered per question."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._prompts: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def prompt(self, given: str, question: str) -> tuple[list[int], list[int]]:
        """Ids before and after the soft tokens of a ``molecule`` or ``protein``; for ``nothing``, all ids and none."""
        key = (given, question)
        if key not in self._prompts:
            prompt = build_prompt(PROMPT_TEMPLATE, [Turn(question, _example(given))], self.tokenizer)
            texts = [segment.ids.tolist() for segment in prompt.segments if isinstance(segment, TokenSegment)]
            self._prompts[key] = (texts[0], texts[1] if len(texts) > 1 else [])
        return self._prompts[key]

    def answer(self, text: str) -> list[int]:
        """Ids the model is to generate: the answer, then EOS."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]
