"""What an export needs to know about a family of models, and about one checkpoint of it."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal

from biomedgpt_edge import Molecule, Protein
from biomedgpt_edge.manifest import Policy
from biomedgpt_edge.prompt import PromptTemplate

from ..checkpoint import Checkpoint, GptqCheckpoint
from ..graphs.config import EsmConfig, GinConfig, LlamaConfig

if TYPE_CHECKING:
    from typing_extensions import Self

# By which prefixes every checkpoint shows the tensors of its parts: those of BioMedGPT-10B's own file.
LLM, PROTEIN, MOLECULE = "llm.", "prot_structure_encoder.", "mol_structure_encoder."

# Kinds of input that a model may have an encoder for.
Modality = Literal["molecule", "protein"]
MODALITIES: tuple[Modality, ...] = ("molecule", "protein")


@dataclass(frozen=True)
class Family:
    """What all checkpoints of a family have in common.

    Attributes:
        name: in commands and manifests.
        title: what a bundle calls itself unless it is told otherwise.
        template: the chat format.
        policy: the terms of use, unless the checkpoint is somebody's own.
        facts: what the manifest of every bundle says about the model.
    """

    name: str
    title: str
    template: PromptTemplate
    policy: Policy
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Configs:
    """The configurations of a model's parts.

    Attributes:
        rows: of the vocabulary matrices, added tokens included.
        esm, gin: None without a protein encoder, or a molecule encoder.
    """

    llama: LlamaConfig
    rows: int
    esm: EsmConfig | None = None
    gin: GinConfig | None = None

    @property
    def inputs(self) -> tuple[type[Molecule] | type[Protein], ...]:
        """Kinds of input that there is an encoder for."""
        molecule: tuple[type[Molecule], ...] = () if self.gin is None else (Molecule,)
        protein: tuple[type[Protein], ...] = () if self.esm is None else (Protein,)
        return molecule + protein


@dataclass(frozen=True)
class Source:
    """An opened checkpoint that fits its configurations; a context manager.

    Attributes:
        checkpoint: all tensors, under the prefixes above and ``proj_mol.``, ``proj_prot.``.
        files: everything that is read, by the part it plays.
        quantized: the language model without its prefix, where GPTQ has quantized it before.
    """

    configs: Configs
    checkpoint: Checkpoint
    files: Mapping[str, Path]
    quantized: GptqCheckpoint | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()


class Layout(abc.ABC):
    """Where the files of one checkpoint lie."""

    family: ClassVar[Family]

    @classmethod
    @abc.abstractmethod
    def locate(
        cls,
        checkpoint: Path | None,
        *,
        fusion: Path | None = None,
        text: Path | None = None,
        protein: Path | None = None,
        without: Collection[Modality] = (),
    ) -> Layout:
        """Finds the files by what a command was given.

        Args:
            checkpoint: the folder of all of them.
            fusion, text, protein: paths of parts that lie elsewhere.
            without: encoders that are not wanted.

        Raises:
            CheckpointError: lists every file that is missing, or names what the family has no use for.
        """

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Path:
        """The SentencePiece model."""

    @abc.abstractmethod
    def open(self) -> Source:
        """Opens the checkpoint and compares it with its configurations.

        Raises:
            CheckpointError: a file cannot be read.
            KeyMismatchError: lists every tensor that is missing, unexpected or misshapen.
            ModelConfigError: a configuration asks for something that the graphs cannot express.
        """
