"""The stages: what a request goes through, through the same interfaces, one at a time and end to end."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from ..bundle import Bundle
from ..decoder.base import Embeddings
from ..decoder.graph import Wanted, choose
from ..decoder.kv_cache import KvElement
from ..devices import DeviceName, EncodersWanted
from ..engine import DEMO_BUNDLE, Engine
from ..inputs import Molecule, Protein
from ..portable import derived_files, of_decoder, of_protein_encoder
from ..prompt import Input
from ..sampling import GenerationOptions, Sampler
from ..splice import TokenPart, splice
from .counters import bytes_read_from_storage
from .work import Work, decode_work, molecule_work, prefill_work, protein_work, splice_work

GROUPS = ("load", "encode", "splice", "prefill", "decode", "request")
PROMPTS = (128, 512)
DEPTHS = (0, 512, 1024)
DECODED_TOKENS = 128
PROTEIN_LENGTHS = (400, 1000)
# Enough for an answer of ordinary length; what an answer really took stands beside it.
ANSWER_TOKENS = 128
MOLECULE_QUESTION = "Please describe this molecule."
PROTEIN_QUESTION = "What are the subcellular locations of this protein?"

# metric -> unit of its samples
UNITS = {
    **dict.fromkeys(("ready", "first step", "encode", "encode again", "splice", "prefill", "tpot", "itl"), "s"),
    **dict.fromkeys(("ttft", "end to end", "featurize", "decode", "other"), "s"),
    "read from storage": "B",
    "answer": "tokens",
}
# What a request's time is made of, in this order.
REQUEST_PARTS = ("featurize", "encode", "splice", "prefill", "decode", "other")

Samples = dict[str, list[float]]
Look = Callable[[], None]


class NotMeasured(Exception):
    """A stage cannot be measured here; the text says why, for the result."""


class Stage(Protocol):
    """Something to time."""

    @property
    def group(self) -> str:
        """One of ``GROUPS``."""
        ...

    @property
    def name(self) -> str:
        """Unique among all stages."""
        ...

    @property
    def bounded(self) -> str:
        """The metric that ``work`` is the least of; "" for none."""
        ...

    @property
    def positions(self) -> int:
        """Positions or tokens behind one sample of ``bounded``, for rates; 0 where there is no rate."""
        ...

    def works(self) -> tuple[Work, ...]:
        """The least that one sample of ``bounded`` takes, one after the other; asked for after the runs."""
        ...

    def run(self, turn: int, look: Look) -> Samples:
        """One run; ``look`` is called where it holds the most memory. Turns differ in their inputs, not in size.

        Raises:
            NotMeasured: it cannot be measured here.
        """
        ...


class LoadOptions(TypedDict):
    """As for :meth:`Engine.load`."""

    decoder: Wanted
    kv_cache: KvElement | None
    device: DeviceName
    encoders: EncodersWanted


@dataclass
class LoadStage:
    """From a folder to a decoder that is ready, and to the end of its first step."""

    path: Path | None
    threads: int
    cold: bool
    options: LoadOptions
    group: str = "load"
    bounded: str = ""
    positions: int = 0

    @property
    def name(self) -> str:
        return f"load, {'cold' if self.cold else 'warm'}"

    def works(self) -> tuple[Work, ...]:
        return ()

    def run(self, turn: int, look: Look) -> Samples:
        if self.cold:
            drop_from_page_cache(self.path, self.options)
        read_before = bytes_read_from_storage()
        started = time.perf_counter()
        with Engine.load(self.path, threads=self.threads, **self.options) as engine:
            ready = time.perf_counter() - started
            _step_once(engine)
            first_step = time.perf_counter() - started
            look()
        del engine
        gc.collect()  # a session in a cycle would keep its file mapped, and the next load warm
        read = _difference(bytes_read_from_storage(), read_before)
        if self.cold and not read:
            raise NotMeasured("nothing was read from storage after the files were dropped from the page cache")
        samples = {"ready": [ready], "first step": [first_step]}
        return samples if read is None else {**samples, "read from storage": [float(read)]}


@dataclass
class PrepareStage:
    """Encoder and splice of one input, without the decoder."""

    engine: Engine
    group: str
    what: str
    make: Callable[[int], Input]
    question: str
    residues: int = 0

    @property
    def name(self) -> str:
        return f"{self.group} {self.what}"

    @property
    def bounded(self) -> str:
        return self.group

    @property
    def positions(self) -> int:
        return self.residues + 2 if self.residues else 0  # <cls> and <eos>

    def works(self) -> tuple[Work, ...]:
        bundle, item = self.engine.bundle, self.make(0)
        if self.group == "encode":
            return encoder_works(bundle, item)
        projection = bundle.molecule_projection if isinstance(item, Molecule) else bundle.protein_projection
        return () if projection is None else (splice_work(projection, item.n_soft_tokens),)

    def run(self, turn: int, look: Look) -> Samples:
        item = self.make(turn)
        first = self.engine.prepare(self.question, item).timings
        look()
        again = self.engine.prepare(self.question, item).timings
        if self.group == "splice":
            return {"splice": [again.splice]}
        return {"encode": [first.encode], "encode again": [again.encode]}


@dataclass
class PrefillStage:
    """A prompt of ``positions`` through the decoder, to the logits of its last position."""

    engine: Engine
    positions: int
    group: str = "prefill"
    bounded: str = "prefill"

    @property
    def name(self) -> str:
        return f"prefill pp{self.positions}"

    def works(self) -> tuple[Work, ...]:
        return (prefill_work(self.engine.bundle, self.positions),)

    def run(self, turn: int, look: Look) -> Samples:
        _check_context(self.engine, self.positions, 0)
        embeddings = text_embeddings(self.engine.bundle, self.group, self.positions, turn)
        with self.engine.decoder.open(self.positions) as state:
            started = time.perf_counter()
            state.prefill(embeddings)
            seconds = time.perf_counter() - started
            look()
        return {"prefill": [seconds]}


@dataclass
class DecodeStage:
    """Greedy tokens after ``depth`` positions (after BOS alone at depth 0): choosing each one, and its step."""

    engine: Engine
    depth: int
    positions: int = 1
    tokens: int = DECODED_TOKENS
    group: str = "decode"
    bounded: str = "tpot"

    def __post_init__(self) -> None:
        self._kv = self.engine.decoder.kv  # asked for when the engine is closed

    @property
    def name(self) -> str:
        return f"decode tg{self.tokens} @ depth {self.depth}"

    def works(self) -> tuple[Work, ...]:
        return (decode_work(self.engine.bundle, self._kv, self.depth, self.tokens),)

    def run(self, turn: int, look: Look) -> Samples:
        prompt = max(1, self.depth)
        _check_context(self.engine, prompt, self.tokens)
        sampler = Sampler(GenerationOptions(), len(self.engine.bundle.tokenizer))
        times = []
        with self.engine.decoder.open(prompt + self.tokens) as state:
            logits = state.prefill(text_embeddings(self.engine.bundle, self.group, prompt, turn))
            for _ in range(self.tokens):
                started = time.perf_counter()
                # EOS is a token like any other here: every run is to have the same length.
                logits = state.step(sampler.choose(logits))
                times.append(time.perf_counter() - started)
            look()
        return {"tpot": [sum(times) / len(times)], "itl": times}


@dataclass
class RequestStage:
    """A question from the call to the end of its answer, as :meth:`Engine.stream` gives it."""

    engine: Engine
    what: str
    make: Callable[[int], Input]
    question: str
    group: str = "request"
    bounded: str = "ttft"
    positions: int = 0
    computed: int = 0  # positions of the prompt that no cache held

    @property
    def name(self) -> str:
        return f"request {self.what}"

    def works(self) -> tuple[Work, ...]:
        bundle = self.engine.bundle
        return (*encoder_works(bundle, self.make(0)), prefill_work(bundle, self.computed))

    def run(self, turn: int, look: Look) -> Samples:
        item = self.make(turn)
        arrivals = []
        started = time.perf_counter()
        with self.engine.stream(self.question, item, max_new_tokens=ANSWER_TOKENS) as stream:
            for piece in stream:
                if piece.token_id is not None:
                    arrivals.append(time.perf_counter())
        end = time.perf_counter()
        look()
        timings = stream.answer.timings
        self.computed = timings.prompt_tokens - timings.cached_tokens
        parts = {part: getattr(timings, part) for part in REQUEST_PARTS[:-1]}
        # Tokenizing, choosing tokens and making text of them. Inputs were featurized before the call.
        parts["other"] = end - started - sum(parts.values()) + parts["featurize"]
        samples = {"end to end": [end - started], "answer": [float(timings.new_tokens)]}
        samples |= {part: [seconds] for part, seconds in parts.items()}
        if arrivals:
            samples["ttft"] = [arrivals[0] - started]
        if len(arrivals) > 1:
            samples["itl"] = [later - earlier for earlier, later in pairwise(arrivals)]
            samples["tpot"] = [(arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)]
        return samples


def encoder_works(bundle: Bundle, item: Input) -> tuple[Work, ...]:
    """What reading an input takes."""
    manifest = bundle.manifest
    if isinstance(item, Molecule):
        spec = manifest.molecule_encoder
        return () if spec is None else (molecule_work(bundle, spec, item.n_soft_tokens),)
    encoder = manifest.protein_encoder
    return () if encoder is None else (protein_work(bundle, encoder, item.n_soft_tokens),)


def load_stages(path: Path | None, threads: int, options: LoadOptions) -> list[Stage]:
    """Cold first: it leaves the files in the page cache for the warm one."""
    return [LoadStage(path, threads, cold, options) for cold in (True, False)]


def serve_stages(engine: Engine, groups: tuple[str, ...]) -> list[Stage]:
    """All stages of ``groups`` on an open engine, in the order in which a request meets them."""
    stages: list[Stage] = []
    for group in ("encode", "splice"):
        stages.append(PrepareStage(engine, group, "molecule", molecule_maker(group), MOLECULE_QUESTION))
        for length in PROTEIN_LENGTHS:
            make = protein_maker(group, length)
            stages.append(PrepareStage(engine, group, f"protein {length}", make, PROTEIN_QUESTION, length))
    stages += [PrefillStage(engine, count) for count in PROMPTS]
    stages += [DecodeStage(engine, depth) for depth in DEPTHS]
    stages.append(RequestStage(engine, "molecule", molecule_maker("request"), MOLECULE_QUESTION))
    for length in PROTEIN_LENGTHS:
        stages.append(RequestStage(engine, f"protein {length}", protein_maker("request", length), PROTEIN_QUESTION))
    return [stage for stage in stages if stage.group in groups]


def molecule_maker(group: str) -> Callable[[int], Molecule]:
    """Molecules of 13 heavy atoms, as aspirin has.

    Each group and turn has inputs of its own, here and below: what an engine keeps of one must help no other.
    """
    chains = ["".join(chain) for chain in product("CNOS", repeat=7)]

    def make(turn: int) -> Molecule:
        return Molecule.from_smiles(chains[turn * len(GROUPS) + GROUPS.index(group)] + "c1ccccc1")

    return make


def protein_maker(group: str, length: int) -> Callable[[int], Protein]:
    """Random proteins of ``length`` residues."""

    def make(turn: int) -> Protein:
        random = np.random.default_rng((GROUPS.index(group), length, turn))
        return Protein.from_sequence("".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)))

    return make


def text_embeddings(bundle: Bundle, group: str, positions: int, turn: int) -> Embeddings:
    """BOS and random tokens, float32 ``[positions, hidden]``."""
    random = np.random.default_rng((GROUPS.index(group), positions, turn))
    ids = random.integers(0, len(bundle.tokenizer), positions)
    ids[0] = bundle.tokenizer.bos_id
    embeddings: Embeddings = splice([TokenPart(ids)], bundle.embeddings, threads=1)
    return embeddings


def drop_from_page_cache(path: Path | None, options: LoadOptions) -> None:
    """Asks the system to forget the pages of a bundle's files and of what is derived from them with these options.

    That needs no privilege but that nobody maps them.

    Raises:
        NotMeasured: this system has no such call, or what is derived for the device is not known here.
    """
    if options["device"] != "cpu":
        raise NotMeasured("what a GPU loads is not dropped from the page cache")
    if not hasattr(os, "posix_fadvise"):
        raise NotMeasured("this system has no posix_fadvise to drop files from the page cache with")
    bundle = Bundle.open(DEMO_BUNDLE if path is None else path)
    files = [bundle.path / entry.path for entry in bundle.manifest.files]
    if choose(bundle, options["decoder"]).derived:
        derivations = filter(None, (of_decoder(bundle), of_protein_encoder(bundle)))
        # The encoder's are there once a protein was read.
        files += [path for one in derivations for path in derived_files(one) if path.exists()]
    del bundle
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that are not written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _step_once(engine: Engine) -> None:
    """The smallest prompt there is, BOS alone; its token's step."""
    with engine.decoder.open(2) as state:
        logits = state.prefill(text_embeddings(engine.bundle, "load", 1, 0))
        state.step(int(logits[: len(engine.bundle.tokenizer)].argmax()))


def _check_context(engine: Engine, prompt: int, tokens: int) -> None:
    context = engine.bundle.manifest.decoder.context
    if prompt + tokens > context:
        raise NotMeasured(f"{prompt} + {tokens} positions do not fit the model's context of {context}")


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
