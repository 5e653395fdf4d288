"""The demo's SentencePiece model, and prompts in the shipped template."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import sentencepiece

from biomedgpt_edge.prompt import TokenSegment, build_prompt
from biomedgpt_edge.tokenizer import Tokenizer

from ..errors import TrainingDataError
from ..families.biomedgpt_10b import PROMPT_TEMPLATE
from . import answers
from .conversations import Conversation, about_molecule, about_nothing, about_protein, molecule_chat, protein_chat
from .molecules import MoleculeTable
from .proteins import ProteinFacts, ProteinSplit

PIECES = 1024
_DESCRIPTIONS = 6000
_PROMPTS = 3000


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
    staging = path.with_suffix(".tmp")
    staging.write_bytes(model.getvalue())
    staging.replace(path)


def corpus(table: MoleculeTable, split: ProteinSplit, seed: int) -> Iterator[str]:
    """Text in the proportions in which the model reads and writes it."""
    rng = random.Random(f"{seed}:corpus")
    for _ in range(_DESCRIPTIONS):
        yield answers.description(table.facts(rng.randrange(len(table))), rng)
    for _ in range(_PROMPTS):
        known = table.facts(rng.randrange(len(table)))
        yield from _texts(Conversation((about_molecule(known, 0, rng),)))
    for _ in range(_PROMPTS // 3):
        yield from _texts(molecule_chat([table.facts(rng.randrange(len(table)))], 0, rng))
        yield from _texts(Conversation((about_nothing(rng),)))
    for _ in range(2 * _PROMPTS // 3):
        yield from _texts(Conversation((about_protein(_some_facts(split, rng), 0, rng),)))
        yield from _texts(protein_chat([_some_facts(split, rng)], 0, rng))


def _some_facts(split: ProteinSplit, rng: random.Random) -> ProteinFacts:
    """What an answer might say: the location of one protein, the structure of another."""
    location, shares = rng.choice(split.located).location, rng.choice(split.structured).shares
    return ProteinFacts(location, rng.choice(tuple(answers.MEMBRANE)), *shares)


class _Recorder:
    """Stands for a tokenizer and keeps the texts it is given."""

    bos_id = 1

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return []


def _texts(conversation: Conversation) -> list[str]:
    """The pieces of text that the model reads, as they reach the tokenizer, and the answer."""
    recorder = _Recorder()
    build_prompt(PROMPT_TEMPLATE, conversation.turns, cast(Tokenizer, recorder))
    return [*recorder.texts, conversation.answer]


class PromptEncoder:
    """Conversations as the runtime reads them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._single: dict[tuple[str, str, int], list[list[int]]] = {}

    def texts(self, conversation: Conversation) -> list[list[int]]:
        """Ids of the pieces of text, one more than there are inputs; single questions are remembered."""
        if len(conversation.exchanges) > 1:
            return self._encoded(conversation)
        only = conversation.exchanges[0]
        key = (only.given, only.question, len(only.subjects))
        if key not in self._single:
            self._single[key] = self._encoded(conversation)
        return self._single[key]

    def _encoded(self, conversation: Conversation) -> list[list[int]]:
        prompt = build_prompt(PROMPT_TEMPLATE, conversation.turns, self.tokenizer)
        return [segment.ids.tolist() for segment in prompt.segments if isinstance(segment, TokenSegment)]

    def answer(self, text: str) -> list[int]:
        """Ids the model is to generate: the answer, then EOS."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]
