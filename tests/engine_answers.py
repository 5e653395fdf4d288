"""Questions to the packaged demo that engines for other devices have to answer as the one for the processor does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.decoder.base import Decoder
from biomedgpt_edge.engine import Answer, AnswerStream
from biomedgpt_edge.splice import EmbeddingTable, TokenPart, splice

# Answers about these are certain: with another rounding, no other token is the likeliest.
IBUPROFEN = Molecule.from_smiles("CC(C)Cc1ccc(cc1)C(C)C(=O)O")
BENZENE = Molecule.from_smiles("c1ccccc1")
PROTEIN = Protein.from_sequence("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV")
# Its prompt has two chunks, and its answer goes on beyond a multiple of 256 positions.
LARGE_PROTEIN = Protein.from_sequence((PROTEIN.sequence * 8)[:479])
SIZE = "How large is this molecule?"
GROUPS = "Which functional groups does this molecule contain?"
LOCATION = "What are the subcellular locations of this protein?"
STRUCTURE = "What is the secondary structure of this protein?"
TOKENS = 40

Tokens = tuple[int, ...]
Asked = Callable[[Engine], object]


def a_molecule(engine: Engine) -> Tokens:
    return engine.ask(SIZE, IBUPROFEN, max_new_tokens=TOKENS).token_ids


def a_protein(engine: Engine) -> Tokens:
    return engine.ask(LOCATION, PROTEIN, max_new_tokens=TOKENS).token_ids


def a_large_protein(engine: Engine) -> Tokens:
    return engine.ask(STRUCTURE, LARGE_PROTEIN, max_new_tokens=TOKENS).token_ids


def both(engine: Engine) -> Tokens:
    return engine.ask(LOCATION, IBUPROFEN, PROTEIN, max_new_tokens=TOKENS).token_ids


def a_chat(engine: Engine) -> list[Tokens]:
    chat = engine.chat()
    first = chat.ask(SIZE, IBUPROFEN, max_new_tokens=TOKENS)
    return [first.token_ids, *(chat.ask(question, max_new_tokens=TOKENS).token_ids for question in ("Why?", SIZE))]


def a_chat_with_drafts(engine: Engine) -> list[Tokens]:
    """What is asked again is drafted from the answer before."""
    chat, answers = engine.chat(), list[Answer]()
    for inputs in ((BENZENE,), (), ()):
        answers.append(chat.ask(GROUPS, *inputs, max_new_tokens=TOKENS, speculate=True))
    assert sum(answer.timings.drafted for answer in answers) > 0
    return [answer.token_ids for answer in answers]


def streams_in_turns(engine: Engine) -> list[Tokens]:
    """Three answers, a token of each in turns."""
    questions = ((SIZE, IBUPROFEN), (STRUCTURE, LARGE_PROTEIN), (GROUPS, BENZENE))
    return in_turns(engine.stream(text, item, max_new_tokens=TOKENS) for text, item in questions)


def streams_with_drafts_in_turns(engine: Engine) -> list[Tokens]:
    """Two chats, a token of each in turns: what was computed ahead for one outlasts what the other computes."""
    chats = {SIZE: engine.chat(), GROUPS: engine.chat()}
    for (question, chat), molecule in zip(chats.items(), (IBUPROFEN, BENZENE), strict=True):
        chat.ask(question, molecule, max_new_tokens=TOKENS)
    streams = [chat.stream(text, max_new_tokens=TOKENS, speculate=True) for text, chat in chats.items()]
    return in_turns(streams)


def threads_at_once(engine: Engine) -> list[Tokens]:
    """Three answers, each asked for by a thread of its own."""
    questions = ((SIZE, IBUPROFEN), (LOCATION, PROTEIN), (GROUPS, BENZENE))
    found = dict[int, Tokens]()

    def ask(index: int) -> None:
        text, item = questions[index]
        found[index] = engine.ask(text, item, max_new_tokens=TOKENS).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(questions))]


def random_rows(table: EmbeddingTable, count: int) -> np.ndarray:
    """Embeddings of random tokens."""
    ids = np.random.default_rng(0).integers(3, len(table.rows) - 1, count)
    return splice([TokenPart(ids)], table, threads=1)


def random_logits(engine: Engine) -> np.ndarray:
    """Behind random text: after each chunk of it, and of tokens that follow, singly and several in a call."""
    decoder: Decoder = engine.decoder
    rows = random_rows(engine.bundle.embeddings, 500)
    with decoder.open(600) as state:
        found = [state.prefill(rows[start:end]).copy() for start, end in ((0, 16), (16, 250), (250, 500))]
        # Beyond 512 positions, more of the cache is attended to.
        found += [state.step(token).copy() for token in range(3, 23)]
        for tokens in ((3, 4), (5, 6, 7, 8, 9, 10, 11, 12)):
            found += [*state.steps(tokens).copy()]
            state.truncate(state.length - len(tokens) + 1)
    return np.stack(found)


def in_turns(streams: Iterable[AnswerStream]) -> list[Tokens]:
    going = list(streams)
    left = list(going)
    while left:
        left = [stream for stream in left if next(stream, None) is not None]
    return [stream.answer.token_ids for stream in going]


ANSWERS: dict[str, Asked] = {
    one.__name__: one
    for one in (
        a_molecule,
        a_protein,
        a_large_protein,
        both,
        a_chat,
        a_chat_with_drafts,
        streams_in_turns,
        streams_with_drafts_in_turns,
        threads_at_once,
    )
}
