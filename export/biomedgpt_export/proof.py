"""What quantization costs: one model against another on questions that neither was calibrated with.

Both read the same texts (teacher forcing): a question's recorded answer, and what the second model continues the
question with, so that it can be told how far the first one would have said the same. Judged on trained models only:
random weights have no opinion that could be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from biomedgpt_edge import Engine, Molecule, Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.kv_cache import KvElement
from biomedgpt_edge.decoder.onnx import OnnxDecoder
from biomedgpt_edge.prompt import Input
from biomedgpt_edge.splice import TokenPart, splice

from .calibration import Example
from .streamed_model import StreamedModel, Text

Array = npt.NDArray[np.float32]

# Tokens of a continuation.
CONTINUED = 32
# Questions of a quick comparison.
QUICK = 8


class Side(Protocol):
    """One of two models."""

    def logits(self, texts: Sequence[Text]) -> Iterator[Array]:
        """Logits of each id that follows a prompt, ``[A, rows]``; where none follows, of the first, ``[1, rows]``."""
        ...

    def soft_tokens(self, examples: Sequence[Example]) -> list[Array]:
        """Soft tokens float32 ``[n, hidden]`` of what is given with each example, as far as something is."""
        ...


class SourceSide:
    """A checkpoint, layer by layer."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model

    def logits(self, texts: Sequence[Text]) -> Iterator[Array]:
        """See :class:`Side`."""
        return self._model.logits(texts)

    def soft_tokens(self, examples: Sequence[Example]) -> list[Array]:
        """See :class:`Side`."""
        proteins = self._model.protein_tokens(examples)
        return [
            np.asarray((proteins[item.sequence] if isinstance(item, Protein) else self._molecule(item)).numpy())
            for item in _given(examples)
        ]

    def _molecule(self, molecule: Molecule) -> torch.Tensor:
        return self._model.molecule_tokens(molecule)


class BundleSide:
    """A bundle, with the arithmetic that runs on a box."""

    def __init__(self, bundle: Bundle, threads: int, kv_cache: KvElement | None = None) -> None:
        self._bundle = bundle
        self.tokenizer = bundle.tokenizer
        self._threads = threads
        self._decoder = OnnxDecoder(bundle, threads=threads, kv_cache=kv_cache)
        self._engine = Engine(bundle, self._decoder, threads=threads)

    @property
    def inputs(self) -> tuple[type[Input], ...]:
        """Kinds of input that it has encoders for."""
        manifest = self._bundle.manifest
        encoders = {Molecule: manifest.molecule_encoder, Protein: manifest.protein_encoder}
        return tuple(kind for kind, encoder in encoders.items() if encoder is not None)

    def logits(self, texts: Sequence[Text]) -> Iterator[Array]:
        """See :class:`Side`."""
        for text in texts:
            prompt = self._engine.prepare(text.example.question, *text.example.inputs).embeddings
            answer = splice([TokenPart(text.ids)], self._bundle.embeddings, threads=self._threads)
            rows = np.concatenate([prompt, answer])
            with self._decoder.open(len(rows)) as state:
                yield state.logits(rows, len(prompt) - 1 + np.arange(max(1, len(text.ids))))

    def soft_tokens(self, examples: Sequence[Example]) -> list[Array]:
        """See :class:`Side`."""
        found = []
        for item in _given(examples):
            prompt = self._engine.prepare("?", item)
            found.append(prompt.embeddings[prompt.token_ids < 0])
        return found

    def continuations(self, examples: Sequence[Example], tokens: int) -> list[npt.NDArray[np.int64]]:
        """What it says to each question, at most ``tokens`` ids each, EOS left out."""
        answers = [self._engine.ask(one.question, *one.inputs, max_new_tokens=tokens) for one in examples]
        return [np.array(answer.token_ids, np.int64) for answer in answers]


@dataclass
class _Sums:
    """Figures of all positions so far."""

    kl: list[Array]
    agreed: int = 0
    positions: int = 0
    nll: tuple[float, float] = (0.0, 0.0)
    answered: int = 0

    def add(self, text: Text, first: Array, second: Array, *, recorded: bool) -> None:
        """``recorded``: the ids are an answer that somebody wrote, so that how likely it is says something."""
        p, q = (torch.from_numpy(logits).double().log_softmax(1) for logits in (first, second))
        self.kl.append((p.exp() * (p - q)).sum(1).clamp(min=0).numpy())
        self.agreed += int((p.argmax(1) == q.argmax(1)).sum())
        self.positions += len(p)
        if recorded and len(text.ids):
            ids = torch.from_numpy(text.ids)[:, None]
            mine, other = (-float(one.gather(1, ids).sum()) for one in (p, q))
            self.nll = (self.nll[0] + mine, self.nll[1] + other)
            self.answered += len(text.ids)


def compared(first: Side, second: BundleSide, examples: Sequence[Example]) -> dict[str, Any]:
    """Figures for people and for the manifest.

    Returns:
        ``questions`` and ``positions`` that were looked at; ``perplexity`` of the recorded answers, of both models;
        ``kl``, nats per position, from the first to the second: ``mean`` and ``p99``; ``top1_agreement``; the number
        of tokens ``same_tokens`` (``mean``, of at most ``limit``) for which the first model would have continued as
        the second one did; and ``cosine`` between the soft tokens of both: ``mean`` and ``least``.
    """
    recorded = [Text(example, example.answer_ids(second.tokenizer)) for example in examples]
    continued = [
        Text(example, ids) for example, ids in zip(examples, second.continuations(examples, CONTINUED), strict=True)
    ]
    texts = [*recorded, *continued]
    sums = _Sums([])
    same = []
    for index, (text, mine, other) in enumerate(zip(texts, first.logits(texts), second.logits(texts), strict=True)):
        sums.add(text, mine, other, recorded=index < len(recorded))
        if index >= len(recorded) and len(text.ids):
            differing = np.flatnonzero(mine.argmax(1) != text.ids)
            same.append(int(differing[0]) if len(differing) else len(text.ids))
    kl = np.concatenate(sums.kl)
    return {
        "questions": len(examples),
        "positions": sums.positions,
        "perplexity": [_rounded(float(np.exp(nll / max(1, sums.answered)))) for nll in sums.nll],
        "kl": {"mean": _rounded(float(kl.mean())), "p99": _rounded(float(np.quantile(kl, 0.99)))},
        "top1_agreement": _rounded(sums.agreed / sums.positions),
        "same_tokens": {"mean": _rounded(float(np.mean(same or [0]))), "limit": CONTINUED},
        "cosine": _cosine(first.soft_tokens(examples), second.soft_tokens(examples)),
    }


def table(figures: dict[str, Any]) -> list[str]:
    """The figures of :func:`compared` for a terminal."""
    first, second = figures["perplexity"]
    kl, cosine = figures["kl"], figures["cosine"]
    lines = [
        f"{figures['questions']} questions, {figures['positions']} tokens:",
        f"  perplexity of the recorded answers  {first} -> {second}",
        f"  KL divergence, nats per token       mean {kl['mean']}, 99th percentile {kl['p99']}",
        f"  same most likely token              {100 * figures['top1_agreement']:.1f} %",
        f"  continues alike for                 {figures['same_tokens']['mean']} tokens of at most {CONTINUED}",
    ]
    if cosine:
        lines.append(f"  cosine of soft tokens               mean {cosine['mean']}, least {cosine['least']}")
    return lines


def _cosine(first: list[Array], second: list[Array]) -> dict[str, float]:
    if not first:
        return {}
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(first, second, strict=True)]
    cosines = np.concatenate(
        [(a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)) for a, b in pairs]
    )
    return {"mean": _rounded(float(cosines.mean())), "least": _rounded(float(cosines.min()))}


def _given(examples: Sequence[Example]) -> list[Input]:
    return [item for example in examples for item in example.inputs]


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
