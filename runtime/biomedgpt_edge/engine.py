"""Engine: a loaded bundle that answers questions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .decoder.base import Decoder, Logits
from .decoder.onnx import OnnxDecoder
from .device_cache import verify_once
from .encoders import Encoders
from .errors import ClosedError, InputError, OptionError, PromptTooLongError
from .generate import AnswerText, Finish, Generation, Timings, generate
from .inputs import Molecule, Protein
from .prompt import Input, MoleculeSegment, Prompt, ProteinSegment, Segment, TokenSegment, Turn, build_prompt
from .sampling import GenerationOptions, OptionArguments
from .splice import FeaturePart, Projection, TokenPart, splice

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEMO_BUNDLE = Path(__file__).parent / "demo_bundle"


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt with its embeddings, ready for the decoder.

    Attributes:
        segments: text, molecules and proteins in order.
        token_ids: int64 ``[T]``, -1 at soft tokens.
        embeddings: float32 ``[T, hidden]``.
        text: the prompt for people, with placeholders.
        notes: what was changed on the way here.
        timings: the stages done so far.
    """

    segments: tuple[Segment, ...]
    token_ids: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float32]
    text: str
    notes: tuple[str, ...]
    timings: Timings

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without white space around it.
        token_ids: every generated token, without EOS.
        finish: "eos", "length" (``max_new_tokens`` reached) or "stop" (a stop text appeared).
        notes: what was changed in the inputs (a protein that was cut, ...); worth showing with the answer.
        timings: seconds by stage, time to first token and per token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    notes: tuple[str, ...]
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer: a token, and the text that could be given out after it (often a word, or none)."""

    text: str
    token_id: int | None


class AnswerStream:
    """An answer as it is generated: iterate over its pieces.

    Closing it (also by leaving a ``with`` block, or dropping it) cancels the rest and frees its KV cache. ``answer``
    is there once the iteration has ended by itself.
    """

    def __init__(self, pieces: Generator[Piece, None, None], result: Generation, notes: tuple[str, ...]) -> None:
        self._pieces = pieces
        self._result = result
        self._text: list[str] = []
        self._state: Literal["open", "complete", "broken"] = "open"
        self.notes = notes

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            piece = next(self._pieces)
        except StopIteration:
            if self._state == "open" and not self._result.cancelled.is_set():
                self._state = "complete"
            raise
        except BaseException:
            self._state = "broken"
            raise
        self._text.append(piece.text)
        return piece

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ClosedError: the stream has not ended, or was closed before it did.
        """
        if self._state != "complete":
            raise ClosedError("the answer is not complete.", remedy="Iterate over the stream to its end first.")
        return Answer(
            "".join(self._text),
            tuple(self._result.token_ids),
            self._result.finish,
            self.notes,
            self._result.timings,
        )

    def close(self) -> None:
        """Cancels what is left; calling it again does nothing.

        Another thread may call it while a piece is being computed; the answer then ends after that piece.
        """
        if self._state == "open":
            self._result.cancelled.set()
            self._state = "broken"
        # Only the thread that iterates can close the generator, and it does so when it sees the event.
        with contextlib.suppress(ValueError):
            self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine:
    """A bundle, loaded: :meth:`ask`, :meth:`stream`, :meth:`chat`. Make one with :meth:`load`; a context manager."""

    def __init__(self, bundle: Bundle, decoder: Decoder, *, threads: int, allow_16bit: bool | None = None) -> None:
        self.bundle = bundle
        # Bundles that store 16 or 4 bits have nothing to lose by 16-bit operands; a fp32 one stays what was exported.
        self._allow_16bit = bundle.manifest.precision != "fp32" if allow_16bit is None else allow_16bit
        self._decoder: Decoder | None = decoder
        self._encoders = Encoders(bundle, threads=threads)
        self._threads = threads

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        threads: int | None = None,
        verify: Literal["once", "full", "sizes"] = "once",
        allow_16bit: bool | None = None,
    ) -> Engine:
        """Opens a bundle and loads its decoder; encoders open when they are first needed.

        Args:
            path: the bundle's folder; left out, the packaged demo bundle.
            threads: processor threads to use; left out, as many as this process may run on.
            verify: "once" hashes every file the first time and again when one was replaced, "full" always, "sizes"
                never (manifest, sizes and headers are checked in any case).
            allow_16bit: whether features and weights may be rounded to bfloat16 where they are projected, which is
                faster on processors with instructions for it; left out, in bundles that store 16 or 4 bits, and not in
                fp32 ones.

        Raises:
            BundleError: the bundle cannot be opened; see :meth:`Bundle.open`.
            OptionError: ``threads`` or ``verify`` is out of range.
        """
        count = available_threads() if threads is None else threads
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
            raise OptionError(f"threads is {threads!r}.", limit="1 to 1024", remedy="Give a number of threads.")
        if verify not in ("once", "full", "sizes"):
            raise OptionError(f"verify is {verify!r}.", remedy="Give 'once', 'full' or 'sizes'.")
        bundle = Bundle.open(DEMO_BUNDLE if path is None else path)
        if verify == "full":
            bundle.verify()
        elif verify == "once":
            verify_once(bundle)
        return cls(bundle, OnnxDecoder(bundle, threads=count), threads=count, allow_16bit=allow_16bit)

    def ask(self, question: str, *inputs: Input, raw: bool = False, **options: Unpack[OptionArguments]) -> Answer:
        """Answers one question about molecules and proteins, or about none.

        Args:
            question: plain text.
            inputs: molecules and proteins, in the order in which the model shall read them.
            raw: leave ``###`` in the question as it is, as the reference implementation does.
            options: see :class:`GenerationOptions`.

        Raises:
            InputError: a question, input or option that cannot be used, before anything has run.
        """
        return _drain(self.stream(question, *inputs, raw=raw, **options))

    def stream(
        self, question: str, *inputs: Input, raw: bool = False, **options: Unpack[OptionArguments]
    ) -> AnswerStream:
        """As :meth:`ask`, piece by piece."""
        return self._stream([Turn(question, _checked(inputs))], raw, GenerationOptions(**options))

    def chat(self, *, raw: bool = False) -> Chat:
        """A conversation that remembers its inputs, questions and answers."""
        return Chat(self, raw=raw)

    def prepare(self, question: str, *inputs: Input, raw: bool = False) -> PreparedPrompt:
        """The prompt that :meth:`ask` would give to the decoder, for looking at or for :meth:`first_logits`."""
        return self._prepare([Turn(question, _checked(inputs))], raw, new_tokens=0)

    def first_logits(self, prompt: PreparedPrompt) -> Logits:
        """Logits of the first answer token, float32 ``[vocabulary rows]``, the row of ``[PAD]`` included."""
        with self._loaded_decoder().open(len(prompt)) as state:
            logits: Logits = state.prefill(prompt.embeddings).copy()
            return logits

    @property
    def decoder(self) -> Decoder:
        """The loaded decoder that answers run through, for measuring it alone.

        Raises:
            ClosedError: the engine is closed.
        """
        return self._loaded_decoder()

    def close(self) -> None:
        """Frees the models once the streams that are still open have ended; those can be finished."""
        self._decoder = None
        self._encoders = Encoders(self.bundle, threads=self._threads)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, turns: list[Turn], raw: bool, options: GenerationOptions) -> AnswerStream:
        # Taken now, so that a stream can be finished after the engine was closed.
        decoder = self._loaded_decoder()
        prompt = self._prepare(turns, raw, new_tokens=options.max_new_tokens)
        result = Generation(prompt.timings)
        return AnswerStream(self._pieces(decoder, prompt, options, result), result, prompt.notes)

    def _pieces(
        self, decoder: Decoder, prompt: PreparedPrompt, options: GenerationOptions, result: Generation
    ) -> Generator[Piece, None, None]:
        tokenizer = self.bundle.tokenizer
        text = AnswerText(tokenizer, options.stop)
        for token in generate(decoder, prompt.embeddings, options, tokenizer, result):
            yield Piece(text.push(token), token)
            if text.stopped:
                result.finish = "stop"
                return
        rest = text.finish()
        if rest:
            yield Piece(rest, None)

    def _prepare(self, turns: list[Turn], raw: bool, new_tokens: int) -> PreparedPrompt:
        started = time.perf_counter()
        self._loaded_decoder()
        prompt = build_prompt(self.bundle.manifest.prompt, turns, self.bundle.tokenizer, raw=raw)
        inputs = [item for turn in turns for item in turn.inputs]
        for item in inputs:
            self._encoders.check(item)
        self._check_budget(prompt, new_tokens)
        featurized = sum(item.featurize_seconds for item in turns[-1].inputs)
        timings = Timings(featurize=featurized, prompt_tokens=len(prompt))
        clock = time.perf_counter()
        parts = [self._part(segment) for segment in prompt.segments]
        timings.encode = time.perf_counter() - clock
        clock = time.perf_counter()
        embeddings = splice(parts, self.bundle.embeddings, threads=self._threads, allow_16bit=self._allow_16bit)
        timings.splice = time.perf_counter() - clock
        timings.prepare = time.perf_counter() - started
        return PreparedPrompt(prompt.segments, prompt.token_ids, embeddings, prompt.text, prompt.notes, timings)

    def _part(self, segment: Segment) -> TokenPart | FeaturePart:
        if isinstance(segment, TokenSegment):
            return TokenPart(segment.ids)
        item: Input = segment.molecule if isinstance(segment, MoleculeSegment) else segment.protein
        return FeaturePart(self._encoders.encode(item), self._projection(item))

    def _projection(self, item: Input) -> Projection:
        molecule = isinstance(item, Molecule)
        projection = self.bundle.molecule_projection if molecule else self.bundle.protein_projection
        if projection is None:
            raise TypeError("an input without a projection passed the encoders' check")
        return projection

    def _check_budget(self, prompt: Prompt, new_tokens: int) -> None:
        context = self.bundle.manifest.decoder.context
        if len(prompt) + new_tokens <= context:
            return
        soft = [len(s) for s in prompt.segments if isinstance(s, (MoleculeSegment, ProteinSegment))]
        parts = f"{len(prompt) - sum(soft):,} of text and {sum(soft):,} of molecules and proteins"
        room = context - len(prompt)
        fits = f"Ask for at most {room:,} new tokens (max_new_tokens)."
        remedy = fits if room > 0 else "Shorten the conversation, or give fewer or smaller inputs."
        raise PromptTooLongError(
            f"the prompt has {len(prompt):,} positions ({parts}) and the answer may take {new_tokens:,}; "
            f"the model reads {context:,} together.",
            seen=len(prompt) + new_tokens,
            limit=context,
            remedy=remedy,
        )

    def _loaded_decoder(self) -> Decoder:
        if self._decoder is None:
            raise ClosedError("the engine is closed.", remedy="Load the bundle again.")
        return self._decoder


@dataclass
class Chat:
    """A conversation over plain text: each turn reads all earlier ones again, as the weights were demonstrated.

    Only complete answers are remembered; a stream that is closed before its end leaves the conversation as it was.
    """

    engine: Engine
    raw: bool = False
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str, *inputs: Input, **options: Unpack[OptionArguments]) -> Answer:
        """See :meth:`Engine.ask`; inputs of earlier turns stay in the conversation."""
        return _drain(self.stream(question, *inputs, **options))

    def stream(self, question: str, *inputs: Input, **options: Unpack[OptionArguments]) -> AnswerStream:
        """See :meth:`Engine.stream`."""
        turn = Turn(question, _checked(inputs))
        stream = self.engine._stream([*self.turns, turn], self.raw, GenerationOptions(**options))
        return AnswerStream(self._remember(turn, stream, len(self.turns)), stream._result, stream.notes)

    def prepare(self, question: str, *inputs: Input) -> PreparedPrompt:
        """See :meth:`Engine.prepare`."""
        return self.engine._prepare([*self.turns, Turn(question, _checked(inputs))], self.raw, new_tokens=0)

    def _remember(self, turn: Turn, stream: AnswerStream, known: int) -> Generator[Piece, None, None]:
        with stream:
            yield from stream
        if stream._result.cancelled.is_set():
            return
        if len(self.turns) != known:
            raise ClosedError(
                "the conversation went on while this answer was streaming, so it cannot be remembered.",
                remedy="Finish or close one answer before asking for the next.",
            )
        self.turns.append(Turn(turn.question, turn.inputs, stream.answer.text))


def _drain(stream: AnswerStream) -> Answer:
    with stream:
        for _ in stream:
            pass
    return stream.answer


def _checked(inputs: tuple[object, ...]) -> tuple[Input, ...]:
    for item in inputs:
        if not isinstance(item, (Molecule, Protein)):
            raise InputError(
                f"an input is a {type(item).__name__}, not a molecule or protein.",
                remedy="Wrap it: Molecule.from_smiles('CCO'), Protein.from_sequence('MKT...').",
            )
    return inputs  # type: ignore[return-value]


def available_threads() -> int:
    """Processor threads this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
