"""From questions with answers to the int4 matrices of a whole BioMedGPT-10B, by GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from .calibration import Example
from .quantize.gptq import GptqOptions
from .quantize.journal import Journal
from .quantize.layerwise import Layerwise
from .streamed_model import DECODER_PART, PROTEIN_PART, StreamedModel, Text

Report = Callable[[str], None]


def quantize_model(
    model: StreamedModel,
    examples: Sequence[Example],
    parts: Collection[str],
    journal: Journal,
    options: GptqOptions,
    report: Report,
    *,
    head: bool = True,
) -> None:
    """Fills the journal with the matrices of the protein encoder and of the decoder.

    Calibration has soft tokens in it: they differ from word embeddings in scale, and text alone would not do for them.

    Args:
        model: computes with the checkpoint's matrices, which are quantized on the way.
        parts: which of the two; the other computes with the checkpoint's matrices.
        head: whether the decoder's head is quantized, too.

    Raises:
        QuantizationError: a matrix cannot be quantized.
    """
    texts = [Text(example, example.answer_ids(model.tokenizer)) for example in examples]
    layerwise = Layerwise(journal, options, report)
    rows = replace(model, walk=layerwise.layers if PROTEIN_PART in parts else model.walk).embedded(texts)
    if DECODER_PART not in parts:
        return
    lengths = [len(one) for one in rows]
    report(f"calibrating the decoder on {len(lengths)} prompts, {sum(lengths)} positions")
    llama, weights = model.decoder()
    # Rows take gigabytes: the parts are let go, and the whole is handed over, so that the first layer can let it go.
    rows[:] = [torch.cat(rows)]
    hidden = layerwise.layers(DECODER_PART, llama, weights, rows.pop(), lengths)
    if head:
        layerwise.head(DECODER_PART, llama, weights, llama.normed(hidden))
