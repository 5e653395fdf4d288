"""A whole model over many texts at once, layer by layer, from a checkpoint of any size.

Prompts reach the decoder as on a box: molecules and proteins go through their encoders and projections, and stand as
soft tokens among the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from biomedgpt_edge import Molecule, Protein
from biomedgpt_edge.prompt import MoleculeSegment, PromptTemplate, ProteinSegment
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_edge.tokenizer import Tokenizer

from .calibration import Example
from .device import CPU
from .families.base import LLM, MOLECULE, PROTEIN, Configs
from .graphs.matrices import Weights
from .source_modules import SourceGin
from .streamed import ExactStep, StreamedEsm, StreamedLlama, rowwise

# Parts of the model that are walked through layer by layer.
DECODER_PART, PROTEIN_PART = "decoder", "protein_encoder"


@dataclass(frozen=True)
class Text:
    """A question's prompt and what follows it: ids int64 ``[A]``, which may be none."""

    example: Example
    ids: npt.NDArray[np.int64]


class Walk(Protocol):
    """Goes through all layers of a part; see ``Layerwise.layers``."""

    def __call__(
        self,
        part: str,
        model: StreamedLlama | StreamedEsm,
        weights: Weights,
        hidden: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor: ...


def walk_exactly(
    part: str, model: StreamedLlama | StreamedEsm, weights: Weights, hidden: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Computes every layer with the checkpoint's own matrices."""
    step = ExactStep(weights, model.device)
    for index in range(model.layers):
        hidden = model.layer(index, hidden, lengths, step)
    return hidden


@dataclass(frozen=True)
class StreamedModel:
    """The model.

    Attributes:
        weights: tensors by their names in the checkpoint.
        template, tokenizer: those of the bundle.
        walk: what its layers compute.
        device: where they are computed. All else, the molecule encoder too, is computed on the host.
    """

    configs: Configs
    weights: Weights
    template: PromptTemplate
    tokenizer: Tokenizer
    walk: Walk = walk_exactly
    device: torch.device = CPU

    def protein_tokens(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Soft tokens float32 ``[L + 2, hidden]`` of every protein that is given, by its sequence.

        Raises:
            TypeError: there is one, and no encoder for it.
        """
        given = [item for example in examples for item in example.inputs if isinstance(item, Protein)]
        sequences = list(dict.fromkeys(protein.sequence for protein in given))
        if not sequences:
            return {}
        if self.configs.esm is None:
            raise TypeError("a model without a protein encoder was given a protein")
        weights = _under(self.weights, PROTEIN)
        esm = StreamedEsm(self.configs.esm, weights, self.device)
        ids = [torch.from_numpy(residue_ids(sequence)) for sequence in sequences]
        lengths = [len(one) for one in ids]
        hidden = self.walk(PROTEIN_PART, esm, weights, esm.embedded(torch.cat(ids)), lengths)
        return dict(zip(sequences, self._projected("proj_prot", esm.normed(hidden)).split(lengths), strict=True))

    def molecule_tokens(self, molecule: Molecule) -> torch.Tensor:
        """Soft tokens float32 ``[atoms, hidden]``.

        Raises:
            TypeError: there is no encoder for molecules.
        """
        if self.configs.gin is None:
            raise TypeError("a model without a molecule encoder was given a molecule")
        gin = SourceGin(self.configs.gin, _under(self.weights, MOLECULE))
        return self._projected("proj_mol", gin.features(molecule.graph))

    def embedded(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """Embeddings float32 ``[T, hidden]`` of each prompt and what follows it."""
        proteins = self.protein_tokens([text.example for text in texts])
        table = self.weights(f"{LLM}model.embed_tokens.weight")
        return [torch.cat(list(self._parts(text, proteins, table))) for text in texts]

    def _parts(self, text: Text, proteins: dict[str, torch.Tensor], table: torch.Tensor) -> Iterator[torch.Tensor]:
        for segment in text.example.segments(self.template, self.tokenizer):
            if isinstance(segment, MoleculeSegment):
                yield self.molecule_tokens(segment.molecule)
            elif isinstance(segment, ProteinSegment):
                yield proteins[segment.protein.sequence]
            else:
                yield table[torch.from_numpy(segment.ids)].float()
        yield table[torch.from_numpy(text.ids)].float()

    def decoder(self) -> tuple[StreamedLlama, Weights]:
        """The language model, and its tensors by their names in transformers."""
        weights = _under(self.weights, LLM)
        return StreamedLlama(self.configs.llama, weights, self.device), weights

    def logits(self, texts: Sequence[Text]) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of each id that follows a prompt, ``[A, rows]``; where none follows, of the first, ``[1, rows]``."""
        llama, weights = self.decoder()
        embedded = self.embedded(texts)
        lengths = [len(rows) for rows in embedded]
        hidden = llama.normed(self.walk(DECODER_PART, llama, weights, torch.cat(embedded), lengths))
        (head,) = ExactStep(weights, llama.device)([llama.head()], hidden)
        for text, rows in zip(texts, hidden.split(lengths), strict=True):
            last = len(rows) - len(text.ids) - 1
            wanted = rowwise(head, rows[last : last + max(1, len(text.ids))], llama.device)
            logits: npt.NDArray[np.float32] = wanted.numpy()
            yield logits

    def _projected(self, name: str, features: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights(f"{name}.weight").float(), self.weights(f"{name}.bias").float()
        return torch.nn.functional.linear(features, weight, bias)


def _under(weights: Weights, prefix: str) -> Weights:
    return lambda name: weights(prefix + name)
