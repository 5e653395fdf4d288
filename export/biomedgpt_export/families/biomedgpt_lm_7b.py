"""BioMedGPT-LM-7B: the language model alone, as its authors and those who quantize it publish it.

There is no official template. The release is a base model, its card feeds it plain text, and others use the roles and
separators of BioMedGPT-10B; so does a bundle, without the system text, which speaks of molecules and proteins.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from biomedgpt_edge.manifest import Policy

from ..checkpoint import GptqCheckpoint, JoinedCheckpoint
from ..errors import CheckpointError
from . import biomedgpt_10b
from .base import LLM, Configs, Family, Modality, Source
from .base import Layout as AnyLayout
from .llama_folder import LlamaFolder, llama_problems, vocabulary_rows, weight_files
from .tensors import require_fit

FAMILY = Family(
    name="biomedgpt-lm-7b",
    title="BioMedGPT-LM-7B",
    template=replace(biomedgpt_10b.PROMPT_TEMPLATE, system=""),
    policy=Policy(
        licence="Apache-2.0 (model card); it derives from Llama 2, whose community licence applies to its weights",
        use_policy=biomedgpt_10b.POLICY.use_policy,
        notice=biomedgpt_10b.POLICY.notice,
    ),
    facts={
        "prompt": "The authors gave no prompt format for this base model; the roles and separators are those of "
        "BioMedGPT-10B, without its system text."
    },
)


@dataclass(frozen=True)
class Layout(AnyLayout):
    """One folder."""

    folder: LlamaFolder
    family: ClassVar[Family] = FAMILY

    @classmethod
    def locate(
        cls,
        checkpoint: Path | None,
        *,
        fusion: Path | None = None,
        text: Path | None = None,
        protein: Path | None = None,
        without: Collection[Modality] = (),
    ) -> Layout:
        """See :meth:`families.base.Layout.locate`; everything lies in ``checkpoint``."""
        given = {"--fusion": fusion, "--text": text, "--protein": protein, "--without": without}
        useless = [name for name, value in given.items() if value]
        if useless:
            raise CheckpointError(
                f"{FAMILY.title} is one folder without encoders, and {', '.join(useless)} was given.",
                seen=useless,
                remedy="Give --checkpoint alone.",
            )
        if checkpoint is None:
            raise CheckpointError("no checkpoint folder was given.", remedy="Give --checkpoint.")
        folder = LlamaFolder(checkpoint)
        missing = [str(path) for path in folder.side_files.values() if not path.exists()]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}.",
                seen=missing,
                remedy="The folder holds config.json, tokenizer.model and the weights side by side.",
            )
        return cls(folder)

    @property
    def tokenizer(self) -> Path:
        return self.folder.tokenizer

    def open(self) -> Source:
        """See :meth:`families.base.Layout.open`."""
        llama = self.folder.config()
        with ExitStack() as opened:
            weights = opened.enter_context(self.folder.open())
            rows = vocabulary_rows(llama, weights)
            self.folder.check_tokenizer(llama, rows)
            require_fit(llama_problems(llama, rows, weights))
            opened.pop_all()
        return Source(
            Configs(llama, rows),
            JoinedCheckpoint({LLM: weights}),
            {**weight_files(weights), **self.folder.side_files},
            weights if isinstance(weights, GptqCheckpoint) else None,
        )
