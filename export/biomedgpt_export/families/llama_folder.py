"""A language model's folder as transformers writes it: ``config.json``, ``tokenizer.model`` and, mostly, weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from biomedgpt_edge.errors import BundleCorruptError
from biomedgpt_edge.tokenizer import Tokenizer

from ..checkpoint import Checkpoint, GptqCheckpoint, GptqConfig, open_checkpoint, open_gptq
from ..errors import ModelConfigError
from ..graphs.config import LlamaConfig
from .tensors import LLAMA_BUFFERS, key_problems, llama_tensors

# The tokenizer adds [PAD] behind the vocabulary of the configuration; its row was never trained and is never chosen.
ADDED_TOKENS = 1

_TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True)
class LlamaFolder:
    """The folder at ``path``."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def side_files(self) -> dict[str, Path]:
        """Files beside the weights that an export reads, by the part they play."""
        return {"text/config.json": self.path / "config.json", "text/tokenizer.model": self.tokenizer}

    def config(self) -> LlamaConfig:
        """Raises:
        ModelConfigError: see :meth:`LlamaConfig.read`.
        """
        return LlamaConfig.read(self.path / "config.json")

    def quantized(self) -> bool:
        """Whether the folder says that its weights were quantized.

        Raises:
            CheckpointError: they were, in a way that is not read here.
        """
        return GptqConfig.read(self.path) is not None

    def open(self) -> Checkpoint:
        """The weights; those that GPTQ has quantized as a :class:`GptqCheckpoint`.

        Raises:
            CheckpointError: see :func:`open_checkpoint` and :func:`open_gptq`.
        """
        return open_gptq(self.path) if self.quantized() else open_checkpoint(self.path)

    def check_tokenizer(self, config: LlamaConfig, rows: int) -> None:
        """The ids that a tokenizer gives are rows of the vocabulary matrix; another one's would be read without a sign.

        Args:
            rows: of that matrix.

        Raises:
            ModelConfigError: the file is no SentencePiece model, or another model's.
        """
        try:
            pieces = len(Tokenizer(self.tokenizer))
        except BundleCorruptError as error:
            raise ModelConfigError(f"{self.tokenizer} cannot be used: {error.message}", remedy=error.remedy) from error
        # A vocabulary that was widened by [PAD] may stand in the configuration, too.
        if pieces not in (config.vocabulary, rows - ADDED_TOKENS):
            raise ModelConfigError(
                f"{self.tokenizer} has {pieces:,} pieces, and the configuration a vocabulary of {config.vocabulary:,}.",
                seen=pieces,
                limit=config.vocabulary,
                remedy="Use the tokenizer.model that came with the weights.",
            )


def vocabulary_rows(config: LlamaConfig, weights: Checkpoint) -> int:
    """Rows of the vocabulary matrices, with or without an added token: as many as the embedding table has.

    Any other number is left to the comparison of all shapes, which names it beside whatever else is wrong.
    """
    shape = weights.shape(_TABLE) if _TABLE in weights.keys() else ()
    widened = config.vocabulary + ADDED_TOKENS
    return widened if shape[:1] == (widened,) else config.vocabulary


def llama_problems(config: LlamaConfig, rows: int, weights: Checkpoint) -> list[str]:
    """What does not fit, see :func:`key_problems`.

    Biases that AutoGPTQ made up for layers without one add nothing, and are no problem.
    """
    made_up = weights.zero_biases if isinstance(weights, GptqCheckpoint) else frozenset[str]()
    ignored = re.compile("|".join([LLAMA_BUFFERS, *map(re.escape, sorted(made_up))]))
    return key_problems(llama_tensors(config, rows), weights, ignored)


def weight_files(weights: Checkpoint) -> dict[str, Path]:
    """Files of the weights, by the part they play."""
    return {f"text/{path.name}": path for path in weights.files}
