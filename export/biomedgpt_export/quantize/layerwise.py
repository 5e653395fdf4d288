"""GPTQ through a whole model, layer by layer: each one sees the activations that the quantized layers before it give.

Inside a layer, too, matrices are quantized in the order in which they compute, for what the quantized ones before them
put out (GPTQ's "true sequential"); those that read the same activations share one record of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..graphs.matrices import HEAD, Matrix, Weights
from ..streamed import LinearStep, Product, StreamedEsm, StreamedLlama, product
from .gptq import GptqOptions, Hessian, gptq
from .int4 import Int4Weight
from .journal import Journal, Unit

Report = Callable[[str], None]

# Rows that are looked at for values beyond float32 at once.
HESSIAN_ROWS = 4096


class _GptqStep:
    """Quantizes matrices for the activations that enter them, and computes with the result.

    Attributes:
        chosen: every matrix so far, by its name in the graph.
        notes: relative squared error of the outputs, damping where it was raised, silent channels.
    """

    def __init__(self, weights: Weights, options: GptqOptions, device: torch.device) -> None:
        self._weights = weights
        self._options = options
        self._device = device
        self.chosen: dict[str, Int4Weight] = {}
        self.notes: dict[str, Any] = {}

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        parts = [matrix.weight(self._weights) for matrix in matrices]
        names = ", ".join(module for matrix in matrices for module in matrix.modules)
        hessian = Hessian(names, rows.shape[1], self._device)
        for some in rows.split(HESSIAN_ROWS):
            hessian.add(some)
        result = gptq(torch.cat(parts), hessian, self._options)
        # Two digits: what is recorded should not hang on the last bits of a sum.
        note: dict[str, Any] = {"loss": float(f"{result.loss:.1e}")}
        if result.damping != self._options.damping:
            note["damping"] = result.damping
        if result.dead:
            note["silent_channels"] = len(result.dead)
        found, first = result.weight, 0
        products = []
        for matrix, part in zip(matrices, parts, strict=True):
            mine = slice(first, first + len(part))
            first = mine.stop
            # Copies, for views would keep, and store, all of what they are cut from.
            chosen = Int4Weight(found.packed[mine].clone(), found.scales[mine].clone(), found.columns, found.group_size)
            self.chosen[matrix.name], self.notes[matrix.name] = chosen, note
            products.append(product(chosen.dequantize(), matrix.bias_vector(self._weights), self._device))
        return products


class _StoredStep:
    """Computes with matrices that were quantized before."""

    def __init__(self, unit: Unit, weights: Weights, device: torch.device) -> None:
        self._unit = unit
        self._weights = weights
        self._device = device

    def __call__(self, matrices: Sequence[Matrix], rows: torch.Tensor) -> list[Product]:
        return [
            product(self._unit.matrices[matrix.name].dequantize(), matrix.bias_vector(self._weights), self._device)
            for matrix in matrices
        ]


class Layerwise:
    """Quantizes the parts of one model into a journal.

    Args:
        journal: what is in it already is computed with, not done again.
        report: is told of every layer.
    """

    def __init__(self, journal: Journal, options: GptqOptions, report: Report) -> None:
        self._journal = journal
        self._options = options
        self._report = report

    def layers(
        self,
        part: str,
        model: StreamedLlama | StreamedEsm,
        weights: Weights,
        hidden: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Quantizes all layers for sequences ``hidden`` float32 ``[N, hidden]``; returns the last one's output.

        Args:
            part: prefix of the units' names.
            weights: tensors by their names in the model.
        """
        began, done = time.monotonic(), 0
        for index in range(model.layers):
            unit = self._journal.read(unit_name(part, f"layers.{index}"))
            step: LinearStep
            if unit is not None:
                step = _StoredStep(unit, weights, model.device)
                hidden = model.layer(index, hidden, lengths, step)
                self._report(f"{part} layer {index + 1} of {model.layers}: done before")
                continue
            step = _GptqStep(weights, self._options, model.device)
            hidden = model.layer(index, hidden, lengths, step)
            self._journal.write(unit_name(part, f"layers.{index}"), Unit(step.chosen, step.notes))
            done += 1
            left = (time.monotonic() - began) / done * (model.layers - index - 1)
            worst = max(step.notes.values(), key=lambda note: note["loss"])["loss"]
            self._report(
                f"{part} layer {index + 1} of {model.layers}: error at most {worst:.1e} of the output"
                + (f", about {_duration(left)} left" if index + 1 < model.layers else "")
            )
        return hidden

    def head(self, part: str, model: StreamedLlama, weights: Weights, normed: torch.Tensor) -> None:
        """Quantizes the head for what it reads, float32 ``[N, hidden]``."""
        if self._journal.read(unit_name(part, HEAD)) is None:
            step = _GptqStep(weights, self._options, model.device)
            with torch.inference_mode():
                step([model.head()], normed)
            self._journal.write(unit_name(part, HEAD), Unit(step.chosen, step.notes))
        self._report(f"{part} head")


class JournalQuantizer:
    """Gives a graph the matrices of a journal (a :class:`WeightQuantizer`)."""

    name = "gptq"

    def __init__(self, journal: Journal, part: str) -> None:
        self._journal = journal
        self._part = part
        self._last: tuple[str, Unit | None] = ("", None)

    def quantize(self, key: str, weight: torch.Tensor) -> Int4Weight:
        """The matrix called ``key`` in the graph, whatever its ``weight`` was."""
        return self.matrix(key)

    def matrix(self, key: str) -> Int4Weight:
        """The matrix called ``key`` in the graph."""
        name = unit_name(self._part, HEAD if key == HEAD else ".".join(key.split(".")[:2]))
        if self._last[0] != name:
            self._last = (name, self._journal.read(name))
        unit = self._last[1]
        if unit is None:
            raise OSError(None, "was removed or changed while it was in use", str(self._journal.folder / name))
        return unit.matrices[key]


def unit_name(part: str, name: str) -> str:
    """What the journal calls a layer or head of a part of the model."""
    return f"{part}.{name}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
