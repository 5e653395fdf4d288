"""Engine: a loaded bundle that answers questions."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .decoder.base import Decoder, Logits, Rows
from .decoder.graph import Wanted, choose
from .decoder.kv_cache import KvElement, kv_layout
from .device_cache import PREFIXES, SOFT_TOKENS, ArrayFolder, CacheCounts, Verify, verify_once
from .devices import DeviceName, EncodersWanted, load_cpu, load_gpu, require_options
from .embedding import Embedder, HostEmbedder
from .encoders import Encoders
from .errors import ClosedError, InputError, OptionError, PromptTooLongError
from .generate import AnswerText, Finish, Generation, Opening, Timings, generate, prefill
from .inputs import Molecule, Protein
from .kv_reuse import Conversation, Positions, TemplatePrefixes
from .memory import context_within, parse_size
from .prompt import Input, MoleculeSegment, Prompt, ProteinSegment, Segment, TokenSegment, Turn, build_prompt
from .sampling import GenerationOptions, OptionArguments
from .soft_tokens import CACHE_BYTES, SoftTokenCache
from .speculation import PromptLookup
from .splice import FeaturePart, Projection, TokenPart

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEMO_BUNDLE = Path(__file__).parent / "demo_bundle"
# Of the 7B, the beginning before a molecule takes 25 to 50 MB: enough for several bundles and versions of onnxruntime.
_PREFIX_FOLDER_BYTES = 512 * 2**20
_SOFT_TOKEN_FOLDER_BYTES = 2**30


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt with its embeddings, ready for the decoder.

    Attributes:
        segments: text, molecules and proteins in order.
        token_ids: int64 ``[T]``, -1 at soft tokens.
        embeddings: float32 ``[T, hidden]``; while an answer is made, where the decoder reads them.
        text: the prompt for people, with placeholders.
        notes: what was changed on the way here.
        timings: the stages done so far.
    """

    segments: tuple[Segment, ...]
    token_ids: npt.NDArray[np.int64]
    embeddings: Rows
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

    def __init__(
        self,
        bundle: Bundle,
        decoder: Decoder,
        *,
        threads: int,
        encoders: Encoders | None = None,
        embedder: Embedder | None = None,
        allow_16bit: bool | None = None,
        prefix_folder: ArrayFolder | None = None,
        soft_token_folder: ArrayFolder | None = None,
        low_memory: bool = False,
        context: int | None = None,
        memory_limited: bool = False,
    ) -> None:
        self.bundle = bundle
        rounded = _allowed_16bit(bundle, allow_16bit)
        self._prefixes: TemplatePrefixes | None = TemplatePrefixes(decoder, bundle, prefix_folder)
        self._prefix_folder = prefix_folder
        self._encoders = Encoders(bundle, threads=threads) if encoders is None else encoders
        if embedder is None:
            embedder = HostEmbedder(bundle.embeddings, threads=threads, allow_16bit=rounded)
        self._embedder: Embedder = embedder
        where = "" if isinstance(embedder, HostEmbedder) else f", put together for {decoder.identity}"
        bits = f"{bundle.digest}, {self._encoders.identity}, 16 bits: {rounded}, {threads} threads{where}"
        self._soft_tokens = SoftTokenCache(CACHE_BYTES, embedder, folder=soft_token_folder, identity=bits)
        self._low_memory = low_memory
        self._memory_limited = memory_limited
        self._context = bundle.manifest.decoder.context if context is None else context
        self._conversations: weakref.WeakSet[Conversation] = weakref.WeakSet()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: DeviceName = "cpu",
        encoders: EncodersWanted = "auto",
        threads: int | None = None,
        verify: Verify = "once",
        decoder: Wanted = "auto",
        kv_cache: KvElement | None = None,
        allow_16bit: bool | None = None,
        low_memory: bool = False,
        memory_limit: int | str | None = None,
        keep_soft_tokens: bool = False,
        prefault: bool = False,
    ) -> Engine:
        """Opens a bundle and loads its decoder; encoders open when they are first needed.

        Args:
            path: the bundle's folder; left out, the packaged demo bundle.
            device: "cpu"; or of the first NVIDIA GPU "native", our own kernels; "cuda", ONNX Runtime; or "tensorrt",
                engines that were built for that GPU with 'biomedgpt-edge engines build', or are built now. Nothing
                falls back to another one. On a GPU, activations and KV cache have 16 bits, and ``decoder``,
                ``kv_cache`` and ``memory_limit`` do not apply.
            encoders: what reads molecules and proteins for the device "native": "cuda", ONNX Runtime's CUDA provider,
                which takes the GPU's memory for the encoders' weights; "cpu", this machine's processor; "auto", the
                first where the installed ONNX Runtime has that provider and the bundle graphs for it.
            threads: processor threads to use; left out, as many as this process may run on.
            verify: "once" hashes every file the first time and again when one was replaced, "full" always, "sizes"
                never (manifest, sizes and headers are checked in any case).
            decoder: "auto" is the bundle's own, or, where that lies in records and the operators for these cannot be
                used here, the portable one, which a warning of the logger ``biomedgpt_edge`` says. "portable" asks
                for that one; it is derived in the device cache, once, and takes as much space as the bundle's.
                "records" takes no other than that. A protein encoder in records goes with the decoder; it is derived
                when the first protein is read.
            kv_cache: what the decoder's keys and values are stored as: "fp32", "fp16", or "int8" with a scale per
                position and head. What has fewer bytes takes less memory and, in long texts, less time per token. Left
                out, fp16 in records; a portable decoder has fp32 alone.
            allow_16bit: whether features and weights may be rounded to bfloat16 where they are projected, which is
                faster on processors with instructions for it; left out, in bundles that store 16 or 4 bits, and not in
                fp32 ones.
            low_memory: encoders are closed as soon as they have read an input, and open anew for the next.
            memory_limit: bytes, or a text such as "6GiB", that one answer at a time shall do with. It shortens the
                context (see :func:`memory.context_within`), and a chat's KV cache gives way to another answer.
            keep_soft_tokens: keep what encoders made of molecules and proteins on disk too, in a private folder of the
                device cache of at most 1 GiB. Nothing of a question is written otherwise.
            prefault: run one token before returning, so that the decoder's weights are read and mapped, and the first
                answer does not wait for them.

        Raises:
            BundleError: the bundle cannot be opened; see :meth:`Bundle.open`.
            OptionError: ``threads``, ``verify`` or ``memory_limit`` is out of range, or the bundle has no such
                ``decoder``, or that no such ``kv_cache``, or nothing for this ``device``, or that takes no such option.
            PlatformError: the decoder cannot be used here, or not be derived; or the device misses something: named.
            MemoryLimitError: ``memory_limit`` holds no model and answer.
        """
        count = available_threads() if threads is None else threads
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
            raise OptionError(f"threads is {threads!r}.", limit="1 to 1024", remedy="Give a number of threads.")
        if verify not in ("once", "full", "sizes"):
            raise OptionError(f"verify is {verify!r}.", remedy="Give 'once', 'full' or 'sizes'.")
        limit = None if memory_limit is None else parse_size(memory_limit)
        bundle = Bundle.open(DEMO_BUNDLE if path is None else path)
        require_options(device, encoders, decoder=decoder, kv_cache=kv_cache, memory_limit=memory_limit)
        choice = choose(bundle, decoder) if device == "cpu" else None
        context = None
        if limit is not None and choice is not None:
            kv = kv_layout(bundle.manifest.decoder, choice.layout, kv_cache)
            context = context_within(bundle, limit, kv, low_memory=low_memory)
        if verify == "full":
            bundle.verify()
        elif verify == "once":
            verify_once(bundle)
        if choice is not None:
            used = load_cpu(bundle, threads=count, choice=choice, verify=verify, kv_cache=kv_cache)
        else:
            rounded = _allowed_16bit(bundle, allow_16bit)
            used = load_gpu(bundle, device, threads=count, verify=verify, encoders=encoders, allow_16bit=rounded)
        loaded = used.decoder
        if prefault:
            with loaded.open(1) as state:
                state.step(bundle.tokenizer.bos_id)
        return cls(
            bundle,
            loaded,
            threads=count,
            encoders=used.encoders,
            embedder=used.embedder,
            allow_16bit=allow_16bit,
            prefix_folder=ArrayFolder(PREFIXES, _PREFIX_FOLDER_BYTES),
            soft_token_folder=ArrayFolder(SOFT_TOKENS, _SOFT_TOKEN_FOLDER_BYTES) if keep_soft_tokens else None,
            low_memory=low_memory,
            context=used.context if context is None else context,
            memory_limited=context is not None and context < bundle.manifest.decoder.context,
        )

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
        return self._stream([Turn(question, _checked(inputs))], raw, GenerationOptions(**options), None)

    def chat(self, *, raw: bool = False) -> Chat:
        """A conversation that remembers its inputs, questions and answers."""
        return Chat(self, raw=raw)

    @property
    def prefix_counts(self) -> CacheCounts:
        """How the device cache served the template's keys and values: found, absent (then computed) or damaged."""
        return CacheCounts() if self._prefix_folder is None else self._prefix_folder.counts

    def prepare(self, question: str, *inputs: Input, raw: bool = False) -> PreparedPrompt:
        """The prompt that :meth:`ask` would give to the decoder, for looking at or for :meth:`first_logits`."""
        return self._shown([Turn(question, _checked(inputs))], raw)

    def first_logits(self, prompt: PreparedPrompt) -> Logits:
        """Logits of the first answer token, float32 ``[vocabulary rows]``, the row of ``[PAD]`` included."""
        with self._loaded().decoder.open(len(prompt)) as state:
            *_, logits = prefill(state, prompt.embeddings)
            first: Logits = logits.copy()
            return first

    @property
    def decoder(self) -> Decoder:
        """The loaded decoder that answers run through, for measuring it alone.

        Raises:
            ClosedError: the engine is closed.
        """
        return self._loaded().decoder

    def close(self) -> None:
        """Frees the models once the streams that are still open have ended; those can be finished."""
        if self._prefixes is None:
            return
        self._prefixes = None
        self._encoders.close()
        self._soft_tokens.clear()
        self._embedder.close()
        for conversation in list(self._conversations):
            conversation.release(final=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(
        self, turns: list[Turn], raw: bool, options: GenerationOptions, conversation: Conversation | None
    ) -> AnswerStream:
        # Taken now, so that a stream can be finished after the engine was closed.
        prefixes = self._loaded()
        if self._memory_limited:
            self._release_others(conversation)
        prompt = self._prepare(turns, raw, new_tokens=options.max_new_tokens)
        result = Generation(prompt.timings)
        if conversation is None:
            opening: Opening = partial(prefixes.open, prompt.token_ids)
        else:
            positions = Positions.of(prompt.segments, prompt.token_ids)
            opening = partial(conversation.open, prefixes, positions, result.token_ids)
        # Elsewhere a token may change at a near tie, so it must be asked for.
        speculate = prefixes.decoder.tile == 1 if options.speculate is None else options.speculate
        lookup = PromptLookup(prompt.token_ids.tolist()) if speculate else None
        tokens = generate(opening, prompt.embeddings, options, self.bundle.tokenizer, result, lookup)
        return AnswerStream(self._pieces(tokens, options, result), result, prompt.notes)

    def _release_others(self, conversation: Conversation | None) -> None:
        """Frees the KV cache of every other chat, so that one answer has the memory for itself."""
        for other in list(self._conversations):
            if other is not conversation:
                other.release()

    def _conversation(self) -> Conversation:
        conversation = Conversation(self._context)
        self._conversations.add(conversation)
        return conversation

    def _pieces(
        self, generated: Generator[int, None, None], options: GenerationOptions, result: Generation
    ) -> Generator[Piece, None, None]:
        text = AnswerText(self.bundle.tokenizer, options.stop)
        # Closed here and not when it is collected, so that its state is free, or kept, as soon as this ends.
        with contextlib.closing(generated) as tokens:
            for token in tokens:
                yield Piece(text.push(token), token)
                if text.stopped:
                    result.finish = "stop"
                    return
        rest = text.finish()
        if rest:
            yield Piece(rest, None)

    def _prepare(self, turns: list[Turn], raw: bool, new_tokens: int, *, waiting: bool = False) -> PreparedPrompt:
        started = time.perf_counter()
        self._loaded()
        prompt = build_prompt(self.bundle.manifest.prompt, turns, self.bundle.tokenizer, raw=raw)
        inputs = [item for turn in turns for item in turn.inputs]
        for item in inputs:
            self._encoders.check(item)
        self._check_budget(prompt, new_tokens)
        featurized = sum(item.featurize_seconds for item in turns[-1].inputs)
        timings = Timings(featurize=featurized, prompt_tokens=len(prompt))
        clock = time.perf_counter()
        embeddings = self._embedder.new(len(prompt))
        ends = np.cumsum([len(segment) for segment in prompt.segments])
        for segment, end in zip(prompt.segments, ends.tolist(), strict=True):
            self._write(segment, embeddings[end - len(segment) : end], timings, waiting)
        if waiting:
            self._embedder.wait()
        if self._low_memory:
            self._encoders.release()
        timings.splice = time.perf_counter() - clock - timings.encode
        timings.prepare = time.perf_counter() - started
        return PreparedPrompt(prompt.segments, prompt.token_ids, embeddings, prompt.text, prompt.notes, timings)

    def _write(self, segment: Segment, rows: Rows, timings: Timings, waiting: bool) -> None:
        """Writes a segment's embeddings into ``rows`` [positions, hidden]; ``waiting`` for the encoder's end."""
        if isinstance(segment, TokenSegment):
            self._embedder.write(TokenPart(segment.ids), rows)
            return
        known = self._soft_tokens.get(segment.content, rows.shape)
        if known is not None:
            self._embedder.fill(rows, known)
            return
        item: Input = segment.molecule if isinstance(segment, MoleculeSegment) else segment.protein
        clock = time.perf_counter()
        features = self._encoders.encode(item)
        if waiting:
            self._embedder.wait()
        timings.encode += time.perf_counter() - clock
        self._embedder.write(FeaturePart(features, self._projection(item)), rows)
        self._soft_tokens.put(segment.content, rows)

    def _shown(self, turns: list[Turn], raw: bool) -> PreparedPrompt:
        """With its embeddings in this machine's memory, each stage done when its time ends."""
        prompt = self._prepare(turns, raw, new_tokens=0, waiting=True)
        return replace(prompt, embeddings=self._embedder.to_host(prompt.embeddings))

    def _projection(self, item: Input) -> Projection:
        molecule = isinstance(item, Molecule)
        projection = self.bundle.molecule_projection if molecule else self.bundle.protein_projection
        if projection is None:
            raise TypeError("an input without a projection passed the encoders' check")
        return projection

    def _check_budget(self, prompt: Prompt, new_tokens: int) -> None:
        context = self._context
        if len(prompt) + new_tokens <= context:
            return
        soft = [len(s) for s in prompt.segments if isinstance(s, (MoleculeSegment, ProteinSegment))]
        parts = f"{len(prompt) - sum(soft):,} of text and {sum(soft):,} of molecules and proteins"
        room = context - len(prompt)
        fits = f"Ask for at most {room:,} new tokens (max_new_tokens)."
        remedy = fits if room > 0 else "Shorten the conversation, or give fewer or smaller inputs."
        if self._memory_limited:
            reader = "the memory limit leaves room for"
        elif context < self.bundle.manifest.decoder.context:
            reader = "the engines were built for"
        else:
            reader = "the model reads"
        raise PromptTooLongError(
            f"the prompt has {len(prompt):,} positions ({parts}) and the answer may take {new_tokens:,}; "
            f"{reader} {context:,} together.",
            seen=len(prompt) + new_tokens,
            limit=context,
            remedy=remedy,
        )

    def _loaded(self) -> TemplatePrefixes:
        """What opens states of the decoder."""
        if self._prefixes is None:
            raise ClosedError("the engine is closed.", remedy="Load the bundle again.")
        return self._prefixes


@dataclass
class Chat:
    """A conversation over plain text: each turn's prompt holds all earlier ones, as the weights were demonstrated.

    Only complete answers are remembered; a stream that is closed before its end leaves the conversation as it was.
    What turns have in common is computed once: its KV cache is kept until the chat is dropped, :meth:`release` is
    called or the engine is closed.
    """

    engine: Engine
    raw: bool = False
    turns: list[Turn] = field(default_factory=list)
    _conversation: Conversation | None = field(default=None, init=False, repr=False, compare=False)

    def ask(self, question: str, *inputs: Input, **options: Unpack[OptionArguments]) -> Answer:
        """See :meth:`Engine.ask`; inputs of earlier turns stay in the conversation."""
        return _drain(self.stream(question, *inputs, **options))

    def stream(self, question: str, *inputs: Input, **options: Unpack[OptionArguments]) -> AnswerStream:
        """See :meth:`Engine.stream`."""
        turn = Turn(question, _checked(inputs))
        if self._conversation is None:
            self._conversation = self.engine._conversation()
        turns = [*self.turns, turn]
        stream = self.engine._stream(turns, self.raw, GenerationOptions(**options), self._conversation)
        return AnswerStream(self._remember(turn, stream, len(self.turns)), stream._result, stream.notes)

    def prepare(self, question: str, *inputs: Input) -> PreparedPrompt:
        """See :meth:`Engine.prepare`."""
        return self.engine._shown([*self.turns, Turn(question, _checked(inputs))], self.raw)

    def release(self) -> None:
        """Frees the KV cache; the conversation goes on, and its next turn is read from the beginning."""
        if self._conversation is not None:
            self._conversation.release()

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


def _allowed_16bit(bundle: Bundle, wanted: bool | None) -> bool:
    """Bundles that store 16 or 4 bits have nothing to lose by 16-bit operands; a fp32 one stays what was exported."""
    return bundle.manifest.precision != "fp32" if wanted is None else wanted


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
